"""The command line as a user meets it: exit codes, one-line errors, skipped steps, nothing left behind."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from checkpoints import DAMAGES, save_dense, save_tiny, tiny_model
from commands import run

from export_vq import cli
from export_vq.compress import KINDS, CompressOptions
from export_vq.compress.assign import METHODS
from export_vq.load import load_model, save_model
from export_vq.records import OnnxArtifact, RunReport
from export_vq.runners import native_library
from export_vq.tuning.options import FinetuneOptions
from export_vq.tuning.parts import PARTS
from export_vq.workloads import STOCK

TEXT = "the cat and the hat sat on the mat, and that is all there is to it. " * 200


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name.replace(" ", "-"))
def test_damaged_input_is_exit_code_2_one_sentence_and_no_output(damage, tmp_path):
    (tmp_path / "in").mkdir()
    path = damage.make(tmp_path / "in")
    out = tmp_path / "out"
    code, stdout, stderr = run(path, "-o", out)
    assert code == 2
    assert stdout == ""
    message = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert len(message) == 1
    assert path.name in message[0]
    assert "Traceback" not in stderr
    assert not out.exists()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A dense model, the VQ model made of it, and text."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "text.txt").write_text(TEXT)
    save_dense(folder / "dense", "llama", tied=True)
    save_tiny(folder / "model.pt", "llama", "product", rotation=True)
    return folder


def test_main_job_then_again_with_everything_skipped(world):
    out = world / "out"
    args = (
        world / "model.pt",
        "-o",
        out,
        "--text",
        world / "text.txt",
        "--positions",
        "512",
        "--baseline",
        world / "dense",
    )
    code, stdout, stderr = run(*args)
    assert code == 0, stderr
    assert "PASS" in stdout
    report = RunReport.load(out / "report.json")
    assert report
    # Where the native kernels are built the same file is checked on them and on stock ops.
    ways = ["with native kernels", "dense.onnx", "model.onnx"] if native_library() else ["model.onnx", "dense.onnx"]
    assert [check.total.top1_agreement for check in report.parity] == [1.0] * len(ways)
    assert all(way in check.candidate for way, check in zip(ways, report.parity, strict=True))
    runners = {timing.runner for timing in report.bench.timings}
    assert runners == {"vq", "dense"} | ({STOCK} if native_library() else set())
    assert report.gap.perplexity_dense > 1
    assert {t.subject for t in report.bench.timings} == {"head", "decode step"}
    assert report.continuation
    # What this machine has, TensorRT or native kernels, is its own affair.
    assert not [line for line in report.not_done if not line.startswith(("TensorRT", "vq-plugin", "native kernels"))]
    assert {p.name for p in out.iterdir()} >= {
        "model.onnx",
        "dense.onnx",
        "config.json",
        "tokenizer.json",
        "report.html",
    }
    assert not list(out.rglob(".*"))
    page = (out / "report.html").read_text()

    code, _, stderr = run(*args)
    assert code == 0
    steps = [line for line in stderr.splitlines() if "✓" in line]
    assert steps
    assert all("unchanged, skipped" in step for step in steps)
    assert (out / "report.html").read_text() == page


@pytest.mark.parametrize(("output", "rest"), [("topk", ("--top-k", "5", "--last-token")), ("sample", ())])
def test_main_job_and_check_of_a_graph_that_chooses(output, rest, world, tmp_path):
    out = tmp_path / "out"
    few = ("--positions", "256")
    code, stdout, stderr = run(world / "model.pt", "-o", out, "--output", output, *rest, *few)
    assert code == 0, stderr
    report = RunReport.load(out / "report.json")
    assert {artifact.output for artifact in report.artifacts} == {output}
    assert {artifact.top_k for artifact in report.artifacts} == {5 if output == "topk" else 0}
    assert {check.output for check in report.parity} == {output}
    assert {t.subject for t in report.bench.timings} == {"head", "decode step"}
    draws_left_out = any(line.startswith("continuation: this graph draws") for line in report.not_done)
    assert (bool(report.continuation), draws_left_out) == ((True, False) if output == "topk" else (False, True))
    assert f"largest {'value' if output == 'topk' else 'log-probability'} error" in stdout
    assert "draws" in (out / "report.html").read_text() or output == "topk"

    code, stdout, stderr = run("check", world / "model.pt", out, *few)
    assert code == 0, stderr
    said = "32/32 greedy tokens" if output == "topk" else "draws decided by rounding"
    assert [said in line and line.startswith("PASS") for line in stdout.splitlines()] == [True, True]


def test_build_keeps_what_the_graphs_of_the_folder_give(world, monkeypatch, tmp_path):
    """Also where they are exported anew, in another type. The engines themselves are tests/exporter/test_engine.py's."""
    monkeypatch.setattr("export_vq.engines.build_engines", lambda *_: ({}, []))
    given = ("--output", "topk", "--top-k", "7", "--last-token")
    assert run("export", world / "model.pt", "-o", tmp_path, "--dtype", "fp16", *given)[0] == 0
    for dtype, again in (("fp16", False), ("fp32", True)):
        build = ("build", world / "model.pt", "-o", tmp_path, "--dtype", dtype)
        code, _, stderr = run(*build)
        assert code == 0
        assert ("unchanged, skipped" in stderr) != again
        for name in ("model.onnx.json", "dense.onnx.json"):
            found = OnnxArtifact.load(tmp_path / name)
            assert (found.output, found.top_k, found.last_token, found.dtype) == ("topk", 7, True, dtype)


def test_changed_input_is_not_skipped(tmp_path):
    out = tmp_path / "out"
    for bias, expected in ((True, False), (True, True), (False, False)):
        save_tiny(tmp_path / "model.pt", "llama", "product", bias=bias)
        code, _, stderr = run("export", tmp_path / "model.pt", "-o", out)
        assert code == 0
        assert ("unchanged, skipped" in stderr) == expected
    _, _, stderr = run("export", tmp_path / "model.pt", "-o", out, "--external-data-mb", "0")
    assert "unchanged, skipped" not in stderr
    (out / "model.onnx").write_bytes(b"damaged")
    _, _, stderr = run("export", tmp_path / "model.pt", "-o", out)
    assert "unchanged, skipped" not in stderr


def test_without_text_and_baseline_what_was_not_done_is_named(world, tmp_path):
    code, stdout, _ = run(world / "model.pt", "-o", tmp_path / "out", "--positions", "256", "--json")
    assert code == 0
    report = RunReport.from_json(json.loads(stdout))
    assert any("give a text with --text FILE" in line for line in report.not_done)
    assert any("--baseline" in line for line in report.not_done)


def test_a_model_with_few_positions_is_not_driven_past_them(world, tmp_path):
    save_dense(tmp_path / "dense", "gpt2", tied=True)
    save_tiny(tmp_path / "model.pt", "gpt2", "single")  # 64 learned positions
    args = (
        tmp_path / "model.pt",
        "-o",
        tmp_path / "out",
        "--text",
        world / "text.txt",
        "--baseline",
        tmp_path / "dense",
    )
    code, stdout, stderr = run(*args, "--positions", "256", "--prompt", "the cat")
    assert code == 0, stderr
    assert "PASS" in stdout


def test_check_fails_with_exit_code_1_when_the_graph_is_of_another_model(world, tmp_path):
    out = tmp_path / "out"
    assert run("export", world / "model.pt", "-o", out)[0] == 0
    code, stdout, _ = run("check", world / "model.pt", out, "--positions", "256")
    assert code == 0
    assert stdout.count("PASS") == 2
    loaded = load_model(world / "model.pt")
    loaded.head.codes[11, 0] = (loaded.head.codes[11, 0] + 1) % loaded.spec.num_codes
    save_model(loaded, tmp_path / "other.pt")
    code, stdout, stderr = run("check", tmp_path / "other.pt", out, "--positions", "256")
    assert code == 1
    assert "FAIL" in stdout
    assert "largest logit error" in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize("model", ["dense", "dense.gguf"])
def test_compress_refuses_what_is_no_model(world, tmp_path, model):
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense.gguf").write_bytes(b"GGUF but no more")
    output = tmp_path / "model.pt"
    code, _, stderr = run("compress", tmp_path / model, "--text", world / "text.txt", "-o", output)
    assert code == 2
    assert f"error: {tmp_path / model}" in stderr
    assert not output.exists()


def test_compress_makes_a_checkpoint_the_main_job_takes(world, tmp_path):
    output = tmp_path / "model.pt"
    args = ("compress", world / "dense", "--text", world / "text.txt", "-o", output, "--num-codes", "16")
    code, stdout, stderr = run(*args)
    assert code == 0, stderr
    assert "product head, M=8, K=16" in stdout
    assert load_model(output).tied_embedding
    _, stdout, _ = run("inspect", output)
    assert "nothing is saved on disk" in stdout
    code, stdout, stderr = run(*args)
    assert code == 0
    assert "unchanged, skipped" in stderr
    code, _, _ = run(output, "-o", tmp_path / "out", "--positions", "256")
    assert code == 0


def test_inspect_says_what_a_checkpoint_and_a_graph_are(world, tmp_path):
    code, stdout, _ = run("inspect", world / "model.pt", "--text", world / "text.txt")
    assert code == 0
    assert "product: V=97 D=32 M=4 K=16, bias: yes, rotation: yes" in stdout
    assert "perplexity floor" in stdout
    assert "nothing is saved on disk" not in stdout  # this one is not tied
    run("export", world / "model.pt", "-o", tmp_path / "out", "--external-data-mb", "0")
    code, stdout, _ = run("inspect", tmp_path / "out" / "model.onnx", "--json")
    assert code == 0
    found = json.loads(stdout)
    spec = load_model(world / "model.pt").spec
    assert found["spec"] == spec.to_json()
    # what the graph holds, less its cosine table (4 numbers), is what the checkpoint holds
    model = load_model(world / "model.pt").model
    assert abs(found["numbers"] - sum(p.numel() for p in model.parameters())) < 100
    next((tmp_path / "out").glob("model.*.data")).unlink()
    code, _, stderr = run("inspect", tmp_path / "out" / "model.onnx")
    assert code == 2
    assert "its weights file" in stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--dtype", "fp64", "model.pt"], "No such option"),
        (["run"], "Missing argument 'MODEL'"),
        (["compress", "x"], "Missing option '--text'"),
        (["inspect", "nowhere.onnx"], "nowhere.onnx"),
        (["nowhere.pt"], "nowhere.pt: no such file or folder"),
    ],
)
def test_usage_errors_are_exit_code_2(monkeypatch, args, words, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, stderr = run(*args)
    assert code == 2
    assert words in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize("option", ["--text", "--baseline"])
def test_a_missing_file_is_named_before_any_work_is_done(world, tmp_path, option):
    code, _, stderr = run(world / "model.pt", "-o", tmp_path / "out", option, tmp_path / "nowhere.txt")
    assert code == 2
    assert "nowhere.txt" in stderr
    assert not (tmp_path / "out").exists()


def test_debug_prints_the_traceback():
    code, _, stderr = run("nowhere.pt", "--debug")
    assert code == 2
    assert "Traceback" in stderr


def test_a_folder_that_cannot_be_made_is_named(world, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, _, stderr = run("export", world / "model.pt", "-o", tmp_path / "file" / "out")
    assert code == 2
    assert "file/out" in stderr.replace("\n", "")


def _bare(tmp_path, *args):
    """Run the tool where only click and rich (and what rich needs) can be imported besides the standard library."""
    bare = tmp_path / "bare"
    bare.mkdir()
    import click
    import rich

    libraries = {Path(module.__file__).parent for module in (click, rich)}
    libraries |= {Path(click.__file__).parent.parent / name for name in ("pygments", "markdown_it", "mdurl")}
    metadata = next(Path(click.__file__).parent.parent.glob("export_vq-*.dist-info"))
    for source in (*libraries, Path(cli.__file__).parent, metadata):
        (bare / source.name).symlink_to(source)
    code = f"import sys; sys.path.insert(0, {str(bare)!r}); sys.argv[0] = 'export-vq'; from export_vq.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, *args],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "COLUMNS": "200"},
    )


def test_help_and_doctor_work_with_nothing_installed(tmp_path):
    done = _bare(tmp_path, "--help")
    assert done.returncode == 0, done.stderr
    assert "checkpoint to checked, timed ONNX graphs" in done.stdout
    (tmp_path / "bare").rename(tmp_path / "used")
    done = _bare(tmp_path, "doctor")
    assert done.returncode == 0, done.stderr
    for package, extra in (
        ("torch", "export-vq"),
        ("onnxruntime", "export-vq[cpu]"),
        ("tensorrt", "export-vq[tensorrt]"),
    ):
        (line,) = [line for line in done.stdout.splitlines() if line.split()[:2] == ["missing", package]]
        assert "pip install -c constraints.txt" in line
        assert extra in line


def test_a_command_that_needs_more_says_what_to_install(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"x")
    done = _bare(tmp_path, "model.pt")
    assert done.returncode == 2, done.stderr
    assert "cannot be imported" in done.stderr
    assert "pip install -c constraints.txt" in done.stderr


def test_onnxruntime_alone_runs_the_file_as_hugging_face_users_would(world, tmp_path):
    """Names and shapes are the convention's; nothing of this project is imported."""
    run("export", world / "model.pt", "-o", tmp_path / "out")
    program = textwrap.dedent("""
        import sys, numpy as np, onnxruntime as ort
        session = ort.InferenceSession(sys.argv[1])
        feeds = {}
        for i in session.get_inputs():
            if i.name.startswith("past_key_values."):
                feeds[i.name] = np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
        ids = np.array([[5, 9, 40, 17]])
        feeds |= {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(4)[None]}
        logits, *presents = session.run(None, feeds)
        assert not [m for m in sys.modules if m.startswith("export_vq")]
        print(logits.shape, presents[0].shape, int(logits[0, -1].argmax()))
    """)
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "out" / "model.onnx"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    import torch

    expected = int(
        tiny_model("llama", "product", rotation=True).model(torch.tensor([[5, 9, 40, 17]])).logits[0, -1].argmax()
    )
    assert done.stdout.split("\n")[0] == f"(1, 4, 97) (1, 2, 4, 8) {expected}"


def test_tune_goes_from_a_checkpoint_to_a_better_one(world, tmp_path):
    save_dense(tmp_path / "dense", "llama", tied=True)
    small = ("--num-codes", "8", "--tune-tokens", "0", "--calibration-tokens", "512")
    text = world / "text.txt"
    code, _, stderr = run("compress", tmp_path / "dense", "--text", text, "-o", tmp_path / "model.pt", *small)
    assert code == 0, stderr
    args = ("tune", tmp_path / "model.pt", "--teacher", tmp_path / "dense", "--text", text, "-o", tmp_path / "tuned.pt")
    code, stdout, stderr = run(
        *args,
        "--steps",
        "6",
        "--batch-size",
        "2",
        "--last-layers",
        "1",
        "--learning-rate",
        "0.001",
    )
    assert code == 0, stderr
    before, after = (float(number) for number in re.findall(r"perplexity (\S+) -> (\S+) on", stdout)[0])
    assert after <= before
    assert load_model(tmp_path / "tuned.pt").spec == load_model(tmp_path / "model.pt").spec
    record = json.loads((tmp_path / "tuned.pt.json").read_text())
    assert record["options"]["steps"] == 6
    assert not list(tmp_path.glob(".tuned*"))  # the state of the run is gone


def test_tune_on_a_short_text_is_refused(world, tmp_path):
    (tmp_path / "short.txt").write_text("the cat and the hat. " * 9)
    args = ("tune", world / "model.pt", "--teacher", world / "dense", "--text", tmp_path / "short.txt")
    code, _, stderr = run(*args, "-o", tmp_path / "tuned.pt")
    assert code == 2
    assert "give a longer text" in stderr
    assert not list(tmp_path.glob("*tuned*"))


def test_compress_options_reach_the_checkpoint(world, tmp_path):
    output = tmp_path / "model.pt"
    args = (
        "compress",
        world / "dense",
        "--text",
        world / "text.txt",
        "-o",
        output,
        "--kind",
        "single",
        "--num-codes",
        "16",
    )
    more = ("--assign", "frequency", "--tune-tokens", "0", "--tie-embedding", "--keep-tokens", "script:latin")
    code, _, stderr = run(*args, *more)
    assert code == 0, stderr
    spec = load_model(output).spec
    assert (spec.kind, spec.num_codes, spec.tie_embedding) == ("single", 16, True)
    code, stdout, _ = run("inspect", output)
    assert code == 0
    assert "0 of 16" in stdout
    assert "read from the head's own codes" in stdout


def test_compress_again_when_the_list_of_tokens_changed(world, tmp_path):
    """The file's name is the same, so only its content can tell."""
    output, kept = tmp_path / "model.pt", tmp_path / "keep.txt"
    sizes = (("--num-codes", "8"), ("--num-codebooks", "2"), ("--tune-tokens", "0"))
    args = ("compress", world / "dense", "--text", world / "text.txt", "-o", output, "--keep-tokens", kept)
    skipped = []
    for tokens in (range(40), range(50), range(50)):
        kept.write_text("\n".join(map(str, tokens)))
        code, _, stderr = run(*args, *(word for pair in sizes for word in pair))
        assert code == 0, stderr
        skipped.append("unchanged" in stderr)
    assert skipped == [False, False, True]


@pytest.mark.parametrize(
    ("line", "options", "not_offered"),
    [
        ("compress model --text t", CompressOptions, set()),
        ("tune model --text t --teacher d", FinetuneOptions, {"micro_batch_size", "alpha", "eval_every", "patience"}),
    ],
)
def test_the_command_line_offers_what_there_is_with_the_same_defaults(line, options, not_offered):
    command, *args = line.split()
    offered = cli.cli.commands[command].make_context(command, args).params
    fields = {f.name: f.default for f in dataclasses.fields(options)}
    assert not_offered == set(fields) - set(offered)
    assert {name: offered[name] for name in fields if name in offered} == {
        name: default for name, default in fields.items() if name in offered
    }


def test_the_command_line_offers_the_choices_that_there_are():
    def choices(command, option):
        (found,) = (p.type.choices for p in cli.cli.commands[command].params if p.name == option)
        return tuple(found)

    assert choices("compress", "kind") == KINDS
    assert choices("compress", "assign") == tuple(METHODS)
    assert choices("tune", "parts") == PARTS


def test_a_compress_run_that_was_killed_goes_on(world, tmp_path):
    """kill -9 in the middle of tuning: the same command ends the work, and no state stays behind."""
    output = tmp_path / "model.pt"
    args = ["compress", world / "dense", "--text", world / "text.txt", "-o", output, "--num-codes", "16"]
    command = [sys.executable, "-m", "export_vq.cli", *map(str, args), "--tune-tokens", str(2048 * 4000)]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".model.pt.*.unfinished/cluster/training.pt")) and time.monotonic() < deadline:
        time.sleep(0.1)
    first.kill()
    first.wait()
    assert not output.exists()
    (state,) = tmp_path.glob(".model.pt.*.unfinished")
    # Another set of options is another run: it starts anew and clears away what the first one left.
    other = [sys.executable, "-m", "export_vq.cli", *map(str, args), "--tune-tokens", "2048"]
    subprocess.run(other, check=True, capture_output=True, timeout=200)
    assert load_model(output).spec.num_codes == 16
    assert not state.exists()
    assert not list(tmp_path.glob(".model.pt.*"))
