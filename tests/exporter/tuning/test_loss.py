"""The losses against float64 autograd of their definition: VQHead.forward, then torch's own cross-entropy and KL."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checkpoints import tiny_head, tiny_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from export_vq.compress.statistics import OutputLayer
from export_vq.head import VQHead
from export_vq.load import TESTED_MODEL_TYPES, load_model
from export_vq.text import token_blocks
from export_vq.tuning import chunked
from export_vq.tuning.loss import VQCausalLMLoss, cross_entropy, distillation_loss, last_hidden, mixed_loss

ROOT = Path(__file__).parents[3]
D, V = 12, 37
KINDS = (("single", False), ("product", False), ("product", True), ("additive", False))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head_of(kind: str, rotation: bool = False, bias: bool = True) -> VQHead:
    return tiny_head(kind, D, V, seed=3, bias=bias, rotation=rotation).double()


def some_labels(*shape: int) -> Tensor:
    """Token ids, some of them ignored."""
    labels = torch.randint(0, V, shape, generator=torch.Generator().manual_seed(1))
    labels.view(-1)[::4] = -100
    return labels


def teacher_layer(softcap: float | None = None) -> OutputLayer:
    return OutputLayer(random(V, D + 3, seed=7), random(V, seed=8), softcap)


def slopes(loss: Tensor, head: nn.Module, hidden: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [hidden, *head.parameters()]))


def assert_same(found: Tensor, wanted: Tensor, head: nn.Module, hidden: Tensor) -> None:
    torch.testing.assert_close(found, wanted)  # float64: 1e-7 relative
    for a, b in zip(slopes(found, head, hidden), slopes(wanted, head, hidden), strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture(params=[1 << 24, 5 * V, 1], ids=["all rows at once", "five rows", "one row"])
def _chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "LOGITS", request.param)


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize(("kind", "rotation"), KINDS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_cross_entropy_is_that_of_the_logits(kind: str, rotation: bool, bias: bool, softcap: float | None) -> None:
    head, hidden, labels = head_of(kind, rotation, bias), random(3, 7, D).requires_grad_(), some_labels(3, 7)
    logits = head(hidden)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    wanted = F.cross_entropy(logits.flatten(0, -2), labels.flatten())
    assert_same(cross_entropy(head, hidden, labels, softcap=softcap), wanted, head, hidden)


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize(("kind", "rotation"), KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_distillation_is_the_divergence_of_the_logits(
    kind: str, rotation: bool, temperature: float, softcap: float | None
) -> None:
    head, hidden, teacher_hidden = (
        head_of(kind, rotation),
        random(2, 9, D).requires_grad_(),
        random(2, 9, D + 3, seed=5),
    )
    teacher = teacher_layer(2.0)
    raw = F.linear(teacher_hidden, teacher.weight, teacher.bias)
    wanted_q = (2 * torch.tanh(raw / 2) / temperature).softmax(-1)
    logits = head(hidden)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    divergence = (wanted_q * (wanted_q.log() - (logits / temperature).log_softmax(-1))).sum(-1)
    found = distillation_loss(head, hidden, teacher, teacher_hidden, temperature=temperature, softcap=softcap)
    assert_same(found, temperature**2 * divergence.mean(), head, hidden)


@pytest.mark.parametrize(("kind", "rotation"), KINDS)
def test_the_mixed_loss_is_the_mixture_over_counted_positions(kind: str, rotation: bool) -> None:
    head, hidden, teacher_hidden = (
        head_of(kind, rotation),
        random(2, 9, D).requires_grad_(),
        random(2, 9, D + 3, seed=5),
    )
    labels = some_labels(2, 9)
    counted = labels != -100
    wanted = 0.3 * distillation_loss(head, hidden[counted], teacher_layer(), teacher_hidden[counted], temperature=2)
    wanted = wanted + 0.7 * cross_entropy(head, hidden, labels)
    found = mixed_loss(head, hidden, labels, teacher_layer(), teacher_hidden, alpha=0.3, temperature=2)
    assert_same(found, wanted, head, hidden)


def test_a_dense_layer_has_the_same_losses_as_its_vq_form() -> None:
    """The control of a tuning run goes through the same code."""
    head, hidden, labels = head_of("product", rotation=True), random(21, D), some_labels(21)
    twin = head.dense_twin()
    torch.testing.assert_close(cross_entropy(twin, hidden, labels), cross_entropy(head, hidden, labels))
    layer = nn.Linear(D, V, dtype=torch.float64)
    rows = hidden.requires_grad_()
    assert_same(cross_entropy(layer, rows, labels), F.cross_entropy(layer(rows), labels), layer, rows)


@pytest.mark.parametrize("kind", ["single", "product"])
def test_gradcheck(kind: str) -> None:
    head, labels, hidden = head_of(kind), some_labels(5), random(5, D).requires_grad_()
    teacher_hidden = random(5, D + 3, seed=5)

    def loss(rows: Tensor, codebook: Tensor, bias: Tensor) -> Tensor:
        moved = {"codebook": codebook, "bias": bias, "codes": head.codes}
        return torch.func.functional_call(_Mixed(head), {f"head.{n}": t for n, t in moved.items()}, (rows,))

    class _Mixed(nn.Module):
        def __init__(self, head: VQHead) -> None:
            super().__init__()
            self.head = head

        def forward(self, rows: Tensor) -> Tensor:
            return mixed_loss(self.head, rows, labels, teacher_layer(), teacher_hidden, alpha=0.4)

    book, bias = head.codebook.detach().requires_grad_(), head.bias.detach().requires_grad_()  # type: ignore[union-attr]
    assert torch.autograd.gradcheck(loss, (hidden, book, bias))


class _Largest(TorchDispatchMode):
    """The most numbers that any tensor made under it holds."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_a_single_head_never_builds_v_logits() -> None:
    """O(K) a position and O(V) a call, in the forward and in the backward pass."""
    n, v = 200, 900
    head = tiny_head("single", D, v)  # K = 24
    hidden, labels = torch.randn(n, D, requires_grad=True), torch.randint(0, v, (n,))
    with _Largest() as seen:
        cross_entropy(head, hidden, labels).backward()
    assert seen.numel == n * head.spec.num_codes
    assert hidden.grad is not None


@pytest.mark.parametrize("kind", ["product", "additive"])
def test_the_logits_held_at_once_are_bounded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    n, v = 200, 901
    monkeypatch.setattr(chunked, "LOGITS", 32 * v)
    head, layer = tiny_head(kind, D, v), OutputLayer(torch.randn(v, D))
    hidden, labels = torch.randn(n, D, requires_grad=True), torch.randint(0, v, (n,))
    with _Largest() as seen:
        mixed_loss(head, hidden, labels, layer, hidden.detach(), alpha=0.5).backward()
    assert seen.numel == 32 * v  # the dense twin's rows, 12 v or 2 * 12 v numbers, are fewer


def test_codes_that_no_token_has_get_no_gradient_and_no_nan() -> None:
    head = head_of("single")
    head.codes[head.codes == 5] = 6
    hidden = random(6, D).requires_grad_()
    cross_entropy(head, hidden, torch.arange(6)).backward()  # type: ignore[no-untyped-call]
    assert head.codebook.grad is not None
    assert head.bias is not None
    assert head.bias.grad is not None
    assert torch.equal(head.codebook.grad[0, 5], torch.zeros(D, dtype=torch.float64))
    assert all(t.isfinite().all() for t in (head.codebook.grad, head.bias.grad, hidden.grad))


@pytest.mark.parametrize("kind", ["single", "product"])
def test_positions_that_do_not_count_cost_nothing(kind: str) -> None:
    """A batch without any label trains nothing, and is no NaN."""
    head, hidden = head_of(kind), random(4, D).requires_grad_()
    loss = cross_entropy(head, hidden, torch.full((4,), -100))
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


@pytest.mark.parametrize(("kind", "rotation"), KINDS)
def test_bfloat16_autocast_rounds_the_products_only(kind: str, rotation: bool) -> None:
    head = tiny_head(kind, D, V, rotation=rotation)
    hidden, labels = random(40, D).float(), some_labels(40)
    with torch.autocast("cpu", torch.bfloat16):
        low = cross_entropy(head, hidden, labels)
    assert low.dtype == torch.float32
    # Both factors and the result are rounded to 8 bits: |error| <= 3 * 2^-8 * sum |h c| a projection (rotated first: two).
    # The loss moves by at most twice the largest error of a logit.
    turned = hidden if head.rotation is None else hidden.abs() @ head.rotation.abs()
    exact = cross_entropy(head, hidden, labels)
    assert low != exact
    bound = 2 * (1 + rotation) * 3 * 2**-8 * (turned.abs() @ _magnitudes(head).T).max()
    assert abs(low - exact) <= bound


def _magnitudes(head: VQHead) -> Tensor:
    """|codebook| rows by token [V, D], not turned back."""
    plain = VQHead.from_tensors(head.spec.kind, head.codebook.detach().abs(), head.codes)
    return plain.token_vectors(dtype=torch.float32)


@pytest.mark.parametrize("model_type", TESTED_MODEL_TYPES)
@pytest.mark.parametrize("kind", ["single", "product"])
def test_the_module_has_the_loss_of_transformers(model_type: str, kind: str) -> None:
    """Every architecture: the hidden states are those that enter the head, and labels are shifted once."""
    vq = tiny_model(model_type, kind)
    vq.model.double()
    ids = torch.randint(2, 90, (2, 11), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :4] = -100
    torch.testing.assert_close(vq.head(last_hidden(vq.model, ids)), vq.model(input_ids=ids).logits)  # type: ignore[misc]
    wanted = vq.model(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(
        VQCausalLMLoss(vq.model)(ids, labels)["loss"], wanted, rtol=1e-6, atol=0, check_dtype=False
    )  # transformers computes its loss in float32


def test_the_module_divides_by_the_items_of_the_whole_batch() -> None:
    vq = tiny_model()
    ids = torch.randint(2, 90, (4, 11), generator=torch.Generator().manual_seed(0))
    module = VQCausalLMLoss(vq.model)
    parts = [module(rows, rows, num_items_in_batch=40)["loss"] for rows in ids.split(2)]
    torch.testing.assert_close(sum(parts), module(ids, ids)["loss"])


@pytest.mark.parametrize("how", ["product", "single", "single --learn-mapping", "product --reparametrise"])
def test_the_example_trains_a_checkpoint_from_scratch(how: str, tmp_path: Path) -> None:
    """scripts/train_example.py, tiny: what it saves is what load_model takes, with its own tokenizer."""
    text = "the cat sat on the mat and the dog sat on the log\n" * 120
    (tmp_path / "text.txt").write_text(text)
    sizes = "--vocab-size 280 --hidden-size 16 --layers 1 --heads 2 --num-codes 20 --num-codebooks 4"
    work = "--block 20 --batch-size 4 --steps 12 --learning-rate 0.02"
    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / "train_example.py", "text.txt", *f"--kind {how} {sizes} {work}".split()],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    vq = load_model(tmp_path / "model.pt")
    assert (vq.spec.kind, vq.spec.num_codes, vq.spec.hidden_size) == (how.split()[0], 20, 16)
    ids = token_blocks(vq.tokenizer(), text, 20, vocab_size=vq.spec.vocab_size)
    assert vq.tokenizer().decode(ids[0]) == text[: len(vq.tokenizer().decode(ids[0]))]
    with torch.no_grad():
        loss = vq.model(input_ids=ids, labels=ids).loss
    # Better than the frequencies of tokens alone: it has learnt which token follows which.
    _, counts = ids.unique(return_counts=True)
    share = counts.double() / counts.sum()
    assert loss < -(share * share.log()).sum()
