"""The learned mapping of single heads."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from head_problem import mean_kl, problem

from export_vq.compress.assign import single_head
from export_vq.compress.mapping import LearnOptions, _Learner, learn_single
from export_vq.compress.product import product_head
from export_vq.resume import RunFolder


@pytest.mark.parametrize("method", ["random", "kmeans", "private"])
def test_learning_lowers_the_divergence_whatever_the_start(method: str) -> None:
    layer, stats = problem(n=3000)
    start = single_head(layer, stats, 24, method=method)
    tuned = learn_single(start, layer, stats, LearnOptions(rounds=1))
    learned = learn_single(start, layer, stats, LearnOptions(rounds=4))
    gaps = [mean_kl(layer, head, stats.hidden) for head in (start, tuned, learned)]
    assert gaps[1] < gaps[0]
    assert torch.equal(tuned.codes, start.codes)
    assert gaps[2] < gaps[1]
    assert not torch.equal(learned.codes, start.codes)


def test_the_loss_is_the_cross_entropy_of_the_head() -> None:
    layer, stats = problem()
    head = single_head(layer, stats, 24)
    learner = _Learner(head, layer, stats, seed=0)
    p = layer.probabilities(stats.hidden)
    expected = -(p * head(stats.hidden).log_softmax(-1)).sum(-1).mean()
    found = learner._loss(head, learner._targets(lambda _: None))
    # float32 sums over 300 tokens
    assert math.isclose(found, float(expected.detach()), rel_tol=1e-4)


def test_a_head_that_is_right_already_is_kept() -> None:
    layer, stats = problem(v=40)
    exact = single_head(layer, stats, 40, method="kmeans")
    assert mean_kl(layer, learn_single(exact, layer, stats, LearnOptions()), stats.hidden) < 1e-5


def test_tokens_of_one_code_share_it_by_their_probability() -> None:
    layer, stats = problem(n=3000)
    head = learn_single(single_head(layer, stats, 8), layer, stats, LearnOptions(rounds=2))
    assert head.bias is not None
    for code in range(8):
        mine = head.codes[:, 0] == code
        share = head.bias.detach()[mine].double().softmax(0)
        torch.testing.assert_close(share, stats.probability[mine] / stats.probability[mine].sum(), atol=1e-5, rtol=1e-4)


def test_same_seed_same_map() -> None:
    layer, stats = problem()
    start = single_head(layer, stats, 12)
    first, again = (learn_single(start, layer, stats, LearnOptions(rounds=3, seed=2)) for _ in range(2))
    assert torch.equal(first.codes, again.codes)
    assert torch.equal(first.codebook, again.codebook)


def test_only_single_heads_without_a_softcap() -> None:
    layer, stats = problem()
    with pytest.raises(ValueError, match="kind single"):
        learn_single(product_head(layer, stats, 4, 8), layer, stats, LearnOptions())
    capped, its = problem(softcap=5.0)
    with pytest.raises(ValueError, match="softcap"):
        learn_single(single_head(capped, its, 8), capped, its, LearnOptions())


class Stopped(Exception):
    """The run was interrupted."""


def test_a_stopped_run_goes_on_to_the_same_head(tmp_path: Path) -> None:
    layer, stats = problem()
    start = single_head(layer, stats, 12)
    whole = learn_single(start, layer, stats, LearnOptions(rounds=4))

    def stop(_: str, part: float) -> None:
        if part > 0.6:
            raise Stopped

    keep = RunFolder(tmp_path, {})
    with pytest.raises(Stopped):
        learn_single(start, layer, stats, LearnOptions(rounds=4), stop, keep)
    told: list[float] = []
    again = learn_single(start, layer, stats, LearnOptions(rounds=4), lambda _, part: told.append(part), keep)
    assert told[0] > 0.4  # it did not start anew
    assert torch.equal(again.codes, whole.codes)
    assert torch.equal(again.codebook, whole.codebook)
