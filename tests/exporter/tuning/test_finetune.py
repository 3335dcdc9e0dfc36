"""End-to-end tuning on tiny models: what moves, what stays, and that a run goes on where it stopped."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import save_dense, tiny_model
from torch import Tensor

from export_vq.errors import UserError
from export_vq.load import TESTED_MODEL_TYPES, LoadedModel, load_dense, load_model, save_model
from export_vq.resume import FILE
from export_vq.tuning import FinetuneOptions, FinetuneReport, FinetuneResult, finetune
from export_vq.tuning import run as finetune_run
from export_vq.tuning.loss import last_hidden
from export_vq.tuning.parts import TrainedParts, decoder_layers, working_copy
from export_vq.tuning.run import batch_rows, rate
from export_vq.tuning.teacher import Teacher

QUICK = FinetuneOptions(
    last_layers=1,
    lora_rank=3,
    steps=12,
    batch_size=4,
    micro_batch_size=2,
    eval_every=4,
    learning_rate=1e-3,
    head_learning_rate=1e-2,
)
EVERYTHING = ("last-layers", "lora", "all")


def some_text(rows: int, seed: int) -> Tensor:
    """Blocks in which each token makes the next one likely, so that there is something to learn: int64 [rows, 15]."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 97, (rows, 1), generator=random)
    for _ in range(14):
        following = (ids[:, -1:] * 3 + torch.randint(0, 4, (rows, 1), generator=random)) % 95 + 2
        ids = torch.cat([ids, following], dim=1)
    return ids


BLOCKS, HELD_OUT = some_text(22, 0), some_text(5, 1)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The original: tied, and with the same backbone as `tiny_model()`."""
    folder = tmp_path_factory.mktemp("dense") / "model"
    save_dense(folder)
    return load_dense(folder)


@pytest.fixture(scope="module")
def vq(dense: LoadedModel) -> LoadedModel:
    made = tiny_model(rotation=True)
    made.model.base_model.load_state_dict(dense.model.base_model.state_dict())  # type: ignore[union-attr,operator]
    return made


def tune(model: LoadedModel, folder: Path, options: FinetuneOptions = QUICK, **more: object) -> FinetuneResult:
    return finetune(model, BLOCKS, HELD_OUT, options, folder, **more)  # type: ignore[arg-type]


def weights(loaded: LoadedModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in loaded.model.state_dict().items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def held_out_loss(loaded: LoadedModel) -> float:
    """By transformers' own loss."""
    with torch.no_grad():
        return float(loaded.model(input_ids=HELD_OUT, labels=HELD_OUT).loss)


# ---------------------------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize("parts", EVERYTHING)
@pytest.mark.parametrize("which", ["vq", "control"])
def test_the_held_out_loss_falls(parts: str, which: str, dense: LoadedModel, vq: LoadedModel, tmp_path: Path) -> None:
    """The VQ model and the dense control, by one function; the given models stay as they are."""
    model = vq if which == "vq" else dense
    before, teacher_before = weights(model), weights(dense)
    result = tune(model, tmp_path, dataclasses.replace(QUICK, parts=parts), teacher=dense)
    report = result.report
    assert held_out_loss(result.model) == pytest.approx(math.log(report.perplexity_after), rel=1e-5)
    assert held_out_loss(model) == pytest.approx(math.log(report.perplexity_before), rel=1e-5)
    assert report.perplexity_after < report.perplexity_before
    assert [point.step for point in report.curve] == [0, 4, 8, 12]
    assert report.curve[0].training_loss is None
    assert report.tokens == 12 * 4 * 15
    assert FinetuneReport.from_json(report.to_json()) == report
    assert not moved(before, weights(model))
    assert not moved(teacher_before, weights(dense))
    assert not any(m._forward_hooks for m in result.model.model.modules())  # nothing of the run stays on the model


def test_last_layers_move_those_and_nothing_else(vq: LoadedModel, tmp_path: Path) -> None:
    result = tune(vq, tmp_path)
    found = moved(weights(vq), weights(result.model))
    above = {name for name in weights(vq) if name.startswith("model.layers.1.")}
    assert found == above | {"model.norm.weight", "lm_head.codebook", "lm_head.bias"}


def test_no_last_layer_is_the_head_alone(vq: LoadedModel, tmp_path: Path) -> None:
    result = tune(vq, tmp_path, dataclasses.replace(QUICK, last_layers=0))
    assert moved(weights(vq), weights(result.model)) == {"lm_head.codebook", "lm_head.bias"}


def test_everything_moves_but_codes_and_rotation(vq: LoadedModel, tmp_path: Path) -> None:
    result = tune(vq, tmp_path, dataclasses.replace(QUICK, parts="all"))
    assert moved(weights(vq), weights(result.model)) == weights(vq).keys() - {"lm_head.codes", "lm_head.rotation"}


def test_lora_ends_as_an_ordinary_checkpoint(vq: LoadedModel, tmp_path: Path) -> None:
    """Merged into the matrices of the layers: the same tensor names, and `load_model` reads what `save_model` wrote."""
    result = tune(vq, tmp_path / "run", dataclasses.replace(QUICK, parts="lora"))
    matrices = {name for name in weights(vq) if name.endswith("_proj.weight")}
    assert moved(weights(vq), weights(result.model)) == matrices | {"lm_head.codebook", "lm_head.bias"}
    save_model(result.model, tmp_path / "model.pt")
    again = load_model(tmp_path / "model.pt")
    assert not moved(weights(result.model), weights(again))


def test_merged_additions_compute_what_they_computed_apart(vq: LoadedModel) -> None:
    work = working_copy(vq)
    parts = TrainedParts(work.model, "lora", 0, 3, seed=0)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in parts.named().items():
            if "lora" in name:
                value.copy_(0.3 * torch.randn(value.shape, generator=random))
        work.model.double()
        apart = last_hidden(work.model, BLOCKS)
        parts.merge()
        merged = last_hidden(work.model, BLOCKS)
    plain = last_hidden(working_copy(vq).model.double(), BLOCKS)
    torch.testing.assert_close(merged, apart)  # float64
    assert not torch.allclose(merged, plain, rtol=1e-2)
    assert work.model.state_dict().keys() == vq.model.state_dict().keys()


def test_a_tied_control_gets_an_output_layer_of_its_own(tmp_path: Path) -> None:
    """As the VQ head is one: training it leaves the input embedding where it was."""
    save_dense(tmp_path / "tied", tied=True)
    tied = load_dense(tmp_path / "tied")
    result = tune(tied, tmp_path / "run")
    found = moved(weights(tied), weights(result.model))
    assert "lm_head.weight" in found
    assert "model.embed_tokens.weight" not in found
    assert not result.model.tied_embedding


@pytest.mark.parametrize("model_type", TESTED_MODEL_TYPES)
@pytest.mark.parametrize("last_layers", [0, 1])
def test_shared_lower_layers_change_nothing(model_type: str, last_layers: int, tmp_path: Path) -> None:
    """Every architecture: the teacher that takes over the student's lower layers is the teacher that runs in full."""
    save_dense(tmp_path, model_type)
    dense = load_dense(tmp_path)
    work = working_copy(dense)
    parts = TrainedParts(work.model, "last-layers", last_layers, 1, seed=0)
    teacher = Teacher(dense, parts, torch.device("cpu"))
    assert teacher.shared_layers == 2 - last_layers
    with torch.no_grad():
        for parameter in parts.backbone:
            parameter.add_(0.1)  # the student has learnt
        for ids in torch.randint(2, 90, (2, 3, 9), generator=torch.Generator().manual_seed(0)):
            student = last_hidden(work.model, ids)
            wanted = last_hidden(dense.model, ids)
            assert torch.equal(teacher.hidden(ids), wanted)
            assert bool(parts.backbone) != torch.equal(student, wanted)


def test_other_lower_layers_are_not_shared(vq: LoadedModel, tmp_path: Path) -> None:
    save_dense(tmp_path, seed=5)
    other = load_dense(tmp_path)
    parts = TrainedParts(working_copy(vq).model, "last-layers", 1, 1, seed=0)
    teacher = Teacher(other, parts, torch.device("cpu"))
    assert teacher.shared_layers == 0
    assert torch.equal(teacher.hidden(BLOCKS), last_hidden(other.model, BLOCKS))


@pytest.mark.parametrize("model_type", TESTED_MODEL_TYPES)
def test_the_layers_are_found_in_every_architecture(model_type: str) -> None:
    layers = decoder_layers(tiny_model(model_type).model)
    assert [type(layer).__name__.lower().rstrip("layer") for layer in layers]
    assert all(any("attention" in type(m).__name__.lower() for m in layer.modules()) for layer in layers)


def test_bfloat16_products_train_float32_weights(vq: LoadedModel, dense: LoadedModel, tmp_path: Path) -> None:
    result = tune(vq, tmp_path, dataclasses.replace(QUICK, dtype="bf16"), teacher=dense)
    assert result.report.perplexity_after < result.report.perplexity_before
    assert {p.dtype for p in result.model.model.parameters()} == {torch.float32}


# ------------------------------------------------------------------------------------------------------ early and late


def test_the_best_parameters_are_returned_and_patience_ends_the_run(vq: LoadedModel, tmp_path: Path) -> None:
    """A step size far too large: what is returned is the model before it went wrong."""
    options = dataclasses.replace(
        QUICK, learning_rate=3.0, head_learning_rate=3.0, steps=40, eval_every=1, patience=3, parts="all"
    )
    result = tune(vq, tmp_path, options)
    assert (result.report.best_step, len(result.report.curve)) == (0, 4)
    assert not moved(weights(vq), weights(result.model))


def test_the_text_is_read_evenly() -> None:
    """Seven rows, batches of three: in seven steps each row comes three times, and in another order each time."""
    taken = torch.cat([batch_rows(step, 3, 7, seed=1) for step in range(7)])
    rounds = taken.split(7)
    assert all(part.sort().values.tolist() == list(range(7)) for part in rounds)
    assert len({tuple(part.tolist()) for part in rounds}) == 3
    assert batch_rows(0, 20, 7, seed=1)[:7].tolist() == rounds[0].tolist()


def test_the_rate_rises_and_falls() -> None:
    rates = [rate(step, 100) for step in range(101)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[100] == pytest.approx(0.1)
    assert rate(0, 1) == 1


def test_progress_tells_the_loss(vq: LoadedModel, tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    tune(vq, tmp_path, progress=lambda name, part: told.append((name, part)))
    fractions = [part for _, part in told]
    assert fractions == sorted(fractions)
    assert told[-1] == ("tune", 1.0)
    losses = [float(name.removeprefix("tune, loss ")) for name, _ in told if name.startswith("tune, loss ")]
    assert len(losses) == 12
    assert losses[-1] < losses[0]


# -------------------------------------------------------------------------------------------------------------- resume


class Interrupt(Exception):
    pass


def interrupt_at(step: int) -> Callable[[str, float], None]:
    def progress(name: str, part: float) -> None:
        if name.startswith("tune, loss") and round(part * QUICK.steps) == step:
            raise Interrupt

    return progress


@pytest.mark.parametrize("parts", EVERYTHING)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    parts: str, vq: LoadedModel, dense: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, also when it stops between two judgements, and when it loses steps since the last saved state."""
    options = dataclasses.replace(QUICK, parts=parts)
    whole = tune(vq, tmp_path / "whole", options, teacher=dense)
    for step, seconds in ((3, 0.0), (6, 0.0), (10, math.inf)):
        monkeypatch.setattr(finetune_run, "SAVE_SECONDS", seconds)
        with pytest.raises(Interrupt):
            tune(vq, tmp_path / "parts", options, teacher=dense, progress=interrupt_at(step))
    pieced = tune(vq, tmp_path / "parts", options, teacher=dense)
    assert pieced.report == whole.report
    assert not moved(weights(whole.model), weights(pieced.model))


def test_a_finished_run_is_not_run_again(vq: LoadedModel, tmp_path: Path) -> None:
    first = tune(vq, tmp_path)
    told: list[str] = []
    second = tune(vq, tmp_path, progress=lambda name, _: told.append(name))
    assert told == ["tune"]
    assert second.report == first.report
    assert not moved(weights(first.model), weights(second.model))


def test_the_folder_of_another_run_is_refused(vq: LoadedModel, dense: LoadedModel, tmp_path: Path) -> None:
    tune(vq, tmp_path)
    with pytest.raises(UserError, match=r"learning_rate is 0\.001, expected 0\.5; choose another folder"):
        tune(vq, tmp_path, dataclasses.replace(QUICK, learning_rate=0.5))
    with pytest.raises(UserError, match="its text is"):
        finetune(vq, BLOCKS.flip(0), HELD_OUT, QUICK, tmp_path)
    with pytest.raises(UserError, match="its held-out text is"):
        finetune(vq, BLOCKS, HELD_OUT.flip(0), QUICK, tmp_path)
    with pytest.raises(UserError, match="its teacher is None"):
        tune(vq, tmp_path, teacher=dense)
    with pytest.raises(UserError, match=r"its model is .* teacher differ"):
        tune(dense, tmp_path, teacher=dense)
    (tmp_path / FILE).write_bytes(b"no state")
    with pytest.raises(UserError, match="not readable as the state of a run"):
        tune(vq, tmp_path)


KILLED = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import transformers.models.llama.modeling_llama
import accelerate, torch._dynamo
from test_finetune import QUICK, tune
from checkpoints import tiny_model
from pathlib import Path
from export_vq.tuning import run as finetune_run
finetune_run.SAVE_SECONDS = 0.0  # a state after every step: most kills meet one being written
folder, model = Path(sys.argv[1]), tiny_model()
died = 0
for _ in range(12):
    start, end = os.pipe()
    child = os.fork()
    if child == 0:
        tune(model, folder, progress=lambda name, _: os.write(end, b"x") if name.startswith("tune, loss") else None)
        os._exit(0)
    os.read(start, 1)
    time.sleep(random.uniform(0.0, 0.02))
    os.kill(child, signal.SIGKILL)
    died += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    state = torch.load(folder / "training.pt", weights_only=True)  # whole, whenever it is there
    print("killed at", state["step"], flush=True)
    if state["step"] == QUICK.steps:
        break
assert died
"""


def test_kill_minus_nine_at_any_moment_leaves_a_state_to_go_on_from(tmp_path: Path) -> None:
    """The process is killed again and again, a few milliseconds into its work, and the run still ends as if it never was."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    result = run_python([str(script), str(tmp_path / "run")])
    assert "killed at" in result.stdout
    model = tiny_model()
    pieced, whole = tune(model, tmp_path / "run"), tune(model, tmp_path / "whole")
    assert pieced.report == whole.report
    assert not moved(weights(whole.model), weights(pieced.model))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [FILE]  # nothing half-written stays


def run_python(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    here = Path(__file__).parent
    paths = [str(here), str(here.parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "1",
    }
    result = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def test_two_processes_share_a_batch(tmp_path: Path) -> None:
    """Started as `accelerate launch` starts them: the result is that of one process, up to the order of its sums."""
    script = tmp_path / "two.py"
    script.write_text(
        textwrap.dedent("""
            import sys
            import torch
            from accelerate import PartialState
            from pathlib import Path
            from test_finetune import tune
            from checkpoints import tiny_model
            folder = Path(sys.argv[1])
            result = tune(tiny_model(), folder / "run")
            assert PartialState().num_processes == 2
            torch.save(result.model.model.state_dict(), folder / f"{PartialState().process_index}.pt")
        """)
    )
    run_python(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), str(tmp_path)])
    first, second = (torch.load(tmp_path / f"{i}.pt", weights_only=True) for i in range(2))
    assert not moved(first, second)
    alone = weights(tune(tiny_model(), tmp_path / "alone").model)
    # Adam divides by the gradient's size, so rounding may move a parameter by part of a step where its gradient is near 0.
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"parts": "half"}, "parts is 'half', expected one of last-layers, lora, all"),
        ({"dtype": "fp16"}, "dtype is 'fp16', expected fp32 or bf16"),
        ({"steps": 0}, "steps is 0, expected 1 or more"),
        ({"last_layers": -1}, "last_layers is -1, expected 0 or more"),
        ({"last_layers": 3}, "last_layers is 3, expected 0 to 2"),
        ({"alpha": 1.5}, r"alpha is 1\.5, expected 0 to 1"),
        ({"batch_size": 3}, "batch_size is 3, expected a multiple of 2"),
    ],
)
def test_options_that_do_not_fit(changes: dict[str, object], says: str, vq: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        tune(vq, tmp_path, dataclasses.replace(QUICK, **changes))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_texts_and_teachers_that_do_not_fit(vq: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="held-out text holds the token id 97, expected ids from 0 to 96"):
        finetune(vq, BLOCKS, torch.full((2, 3), 97), QUICK, tmp_path)
    with pytest.raises(UserError, match=r"training text has the shape \[0, 15\]"):
        finetune(vq, BLOCKS[:0], HELD_OUT, QUICK, tmp_path)
    save_dense(tmp_path / "gpt2", "gpt2")
    for teacher in (vq, load_dense(tmp_path / "gpt2")):
        with pytest.raises(UserError, match="expected an ordinary model with vocab_size 97"):
            tune(vq, tmp_path / "run", teacher=teacher)
