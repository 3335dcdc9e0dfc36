"""The floor, against brute force and as a bound on what is measured."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from checkpoints import tiny_model

from export_vq.compress.statistics import replace_output
from export_vq.head import VQHead
from export_vq.quality import quality_report
from export_vq.quality.floor import mapping_floor


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
    vq, dense = tiny_model("llama", "single"), tiny_model("llama", "single")
    assert dense.head is not None
    twin = dataclasses.replace(
        dense, model=replace_output(dense.model, dense.head.dense_twin(), share=False), head=None
    )
    blocks = torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(0))
    found = quality_report(twin, {"vq": vq}, {"random": blocks}).heads[-1]
    assert 1.0 < found.total.floor <= found.total.perplexity
