"""The model gap and the floor, against direct formulas."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from checkpoints import tiny_model
from torch import Tensor

from export_vq.compress.statistics import replace_output
from export_vq.errors import UserError
from export_vq.head import VQHead
from export_vq.load import LoadedModel
from export_vq.quality.gap import mapping_floor, measure_gap
from export_vq.records import ModelGap


def twin_of(vq: LoadedModel) -> LoadedModel:
    """The same model with the dense twin of its head."""
    assert vq.head is not None
    return dataclasses.replace(vq, model=replace_output(vq.model, vq.head.dense_twin(), share=False), head=None)


def some_blocks(vocab_size: int, rows: int = 3, width: int = 20) -> Tensor:
    return torch.randint(0, vocab_size, (rows, width), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["single", "product", "additive"])
def test_no_gap_against_the_dense_twin(kind: str) -> None:
    vq = tiny_model("llama", kind)
    told: list[float] = []
    gap = measure_gap(twin_of(vq), vq, some_blocks(97), baseline="twin", text="random", progress=told.append)
    stats = gap.stats
    assert (gap.baseline, gap.text, stats.positions) == ("twin", "random", 60)
    assert stats.relative_max < 1e-5
    assert abs(stats.kl_mean) < 1e-6
    assert abs(gap.perplexity_increase) < 1e-5
    assert stats.top1_agreement > 0.98  # tokens that share all codes tie, and rounding decides
    assert stats.cosine_min > 0.99999
    assert told[-1] == 1.0
    assert ModelGap.from_json(gap.to_json()) == gap


def test_numbers_against_direct_formulas() -> None:
    """Also with another backbone: only the vocabulary has to agree."""
    dense, vq = twin_of(tiny_model("llama", seed=5)), tiny_model("llama")
    blocks = some_blocks(97, rows=40)  # more than one batch
    gap = measure_gap(dense, vq, blocks, baseline="other", text="random")
    with torch.no_grad():
        a, b = (m.model(input_ids=blocks).logits.double() for m in (dense, vq))
    log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)

    def perplexity(logs: Tensor) -> float:
        return math.exp(-logs[:, :-1].gather(-1, blocks[:, 1:, None]).mean())

    kl = (log_a.exp() * (log_a - log_b)).sum(-1)
    stats = gap.stats
    assert stats.positions == 800
    assert stats.perplexity_reference == pytest.approx(perplexity(log_a), rel=1e-5)
    assert stats.perplexity_candidate == pytest.approx(perplexity(log_b), rel=1e-5)
    assert stats.kl_mean == pytest.approx(float(kl.mean()), rel=1e-5)
    assert stats.kl_p99 == pytest.approx(float(kl.flatten().quantile(0.99)), rel=1e-5)
    assert stats.max_abs == pytest.approx(float((a - b).abs().max()), rel=1e-5)
    assert stats.mean_abs == pytest.approx(float((a - b).abs().mean()), rel=1e-5)
    assert stats.logit_range == pytest.approx(float(a.max() - a.min()), rel=1e-5)
    assert stats.top1_agreement == pytest.approx(float((a.argmax(-1) == b.argmax(-1)).double().mean()))


def test_other_vocabularies_are_refused() -> None:
    vq = tiny_model("llama")
    with pytest.raises(UserError, match="vocab_size is 101, expected 97"):
        measure_gap(twin_of(tiny_model("gpt2")), vq, some_blocks(97), baseline="b", text="t")
    with pytest.raises(UserError, match="expected ids from 0 to 96"):
        measure_gap(twin_of(vq), vq, torch.full((1, 4), 97), baseline="b", text="t")


@pytest.mark.parametrize("kind", ["single", "product"])
@pytest.mark.parametrize("bias", [False, True])
def test_floor_against_brute_force(kind: str, bias: bool) -> None:
    random = torch.Generator().manual_seed(7)
    m = 1 if kind == "single" else 2
    codes = torch.randint(0, 4, (60, m), generator=random)
    values = torch.randn(60, generator=random) if bias else None
    head = VQHead.from_tensors(kind, torch.randn(m, 4, 8 // m, generator=random), codes, values)
    ids = torch.randint(0, 60, (500,), generator=random)
    total = 0.0
    for y in ids.tolist():
        group = [v for v in range(60) if codes[v].tolist() == codes[y].tolist()]
        weights = [1.0 if values is None else math.exp(values[v]) for v in group]
        own = 1.0 if values is None else math.exp(values[y])
        total += math.log(sum(weights) / own)
    assert mapping_floor(head, ids) == pytest.approx(math.exp(total / 500), rel=1e-6)


def test_floor_is_one_where_no_tokens_share_all_codes_and_bounds_perplexity() -> None:
    book = torch.randn(1, 6, 4)
    assert mapping_floor(VQHead.from_tensors("single", book, torch.arange(6)[:, None]), torch.arange(6)) == 1.0
    vq = tiny_model("llama", "single")
    gap = measure_gap(twin_of(vq), vq, some_blocks(97), baseline="twin", text="random")
    assert 1.0 < gap.floor <= gap.stats.perplexity_candidate
