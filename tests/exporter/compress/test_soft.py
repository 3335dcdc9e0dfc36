"""Mappings and codebooks that move in training."""

from __future__ import annotations

import pytest
import torch
from head_problem import mean_kl, problem
from torch import Tensor

from export_vq.compress.assign import single_head
from export_vq.compress.product import product_head
from export_vq.compress.soft import SoftMapping, reparametrise, settle
from export_vq.compress.statistics import OutputLayer
from export_vq.head import VQHead
from export_vq.tuning.loss import cross_entropy


def train(head: torch.nn.Module, layer: OutputLayer, hidden: Tensor, steps: int) -> None:
    """Towards the dense layer's distribution."""
    wanted = layer.probabilities(hidden)
    optimizer = torch.optim.Adam([p for p in head.parameters() if p.requires_grad], lr=0.02)
    for step in range(steps):
        if isinstance(head, SoftMapping):
            head.temperature = 1.0 - 0.9 * step / steps
        loss = -(wanted * head(hidden).log_softmax(-1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_a_soft_mapping_computes_what_its_hard_head_computes() -> None:
    layer, stats = problem()
    head = single_head(layer, stats, 12)
    soft = SoftMapping.of(head)
    torch.testing.assert_close(soft(stats.hidden), head(stats.hidden), atol=1e-4, rtol=1e-5)
    again = soft.harden()
    assert torch.equal(again.codes, head.codes)
    torch.testing.assert_close(again(stats.hidden), head(stats.hidden))


def test_scores_get_the_gradient_of_their_softmax() -> None:
    random = torch.Generator().manual_seed(0)
    codebook, scores = torch.randn(4, 6, generator=random), torch.randn(9, 4, generator=random)
    hidden, slope = torch.randn(5, 6, generator=random), torch.randn(5, 9, generator=random)
    soft = SoftMapping(codebook, scores, torch.zeros(9), temperature=0.7)
    soft(hidden).backward(slope)
    free = scores.clone().requires_grad_()
    (hidden @ ((free / 0.7).softmax(-1) @ codebook).T).backward(slope)
    torch.testing.assert_close(soft.code_scores.grad, free.grad)


def test_training_finds_a_better_mapping_than_training_codes_alone() -> None:
    layer, stats = problem(v=120, n=800)
    start = single_head(layer, stats, 10, method="random")
    fixed, soft = VQHead.from_tensors("single", start.codebook, start.codes, start.bias), SoftMapping.of(start)
    train(fixed, layer, stats.hidden, 200)
    train(soft, layer, stats.hidden, 200)
    learned = soft.harden()
    assert not torch.equal(learned.codes, start.codes)
    assert mean_kl(layer, learned, stats.hidden) < mean_kl(layer, fixed, stats.hidden)


def test_the_training_losses_take_a_soft_mapping() -> None:
    layer, stats = problem(v=50, n=40)
    soft = SoftMapping.of(single_head(layer, stats, 8))
    labels = torch.randint(50, (40,), generator=torch.Generator().manual_seed(1))
    loss = cross_entropy(soft, stats.hidden, labels)
    expected = torch.nn.functional.cross_entropy(soft(stats.hidden), labels)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert soft.code_scores.grad is not None
    assert bool(soft.code_scores.grad.abs().sum() > 0)


@pytest.mark.parametrize("kind", ["single", "product"])
def test_reparametrised_codes_move_together_and_settle_where_they_are(kind: str) -> None:
    layer, stats = problem()
    head = single_head(layer, stats, 12) if kind == "single" else product_head(layer, stats, 4, 12)
    before = mean_kl(layer, head, stats.hidden)
    codebook = head.codebook.detach().clone()
    reparametrise(head)
    torch.testing.assert_close(head.codebook, codebook)
    train(head, layer, stats.hidden, 40)
    moved = head.codebook.detach().clone()
    # Every slice of codes is its old self times one matrix.
    for old, new in zip(codebook, moved, strict=True):
        matrix = torch.linalg.lstsq(old.double(), new.double()).solution
        torch.testing.assert_close(old.double() @ matrix, new.double(), atol=1e-4, rtol=1e-4)
    settle(head)
    assert torch.equal(head.codebook, moved)
    assert isinstance(head.codebook, torch.nn.Parameter)
    assert set(head.state_dict()) >= {"codebook", "codes"}
    assert mean_kl(layer, head, stats.hidden) < before


def test_a_code_that_no_token_uses_goes_along() -> None:
    layer, stats = problem()
    start = single_head(layer, stats, 12)
    codes = start.codes.long().clone()
    codes[codes == 5] = 4
    head = VQHead.from_tensors("single", start.codebook, codes, start.bias)
    assert head.dead_codes == 1
    own = head.codebook.detach()[0, 5].clone()
    reparametrise(head)
    train(head, layer, stats.hidden, 5)
    assert not torch.equal(head.codebook[0, 5], own)


def test_only_single_heads_with_a_bias_become_soft() -> None:
    layer, stats = problem()
    with pytest.raises(ValueError, match="kind single"):
        SoftMapping.of(product_head(layer, stats, 4, 8))
    with pytest.raises(ValueError, match="bias"):
        SoftMapping.of(single_head(layer, stats, 8, bias=False))
