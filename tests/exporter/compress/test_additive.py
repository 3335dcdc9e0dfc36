"""Additive heads: residual start, exact codebooks, beam search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from head_problem import mean_kl, problem

from export_vq.compress.additive import _beam_search, _best_codebooks, additive_head
from export_vq.compress.assign import single_head
from export_vq.compress.statistics import Statistics


def test_a_layer_that_is_a_sum_of_codebooks_comes_back() -> None:
    layer, stats = problem()
    random = torch.Generator().manual_seed(4)
    coarse, fine = 3 * torch.randn(5, 16, generator=random), 0.2 * torch.randn(6, 16, generator=random)
    layer.weight = coarse[torch.randint(5, (300,), generator=random)] + fine[torch.randint(6, (300,), generator=random)]
    stats = Statistics.of(layer, stats.hidden)
    head = additive_head(layer, stats, 2, 8)
    # The ridge of the least-squares problem pulls codebooks, whose numbers are up to 10 here, by about a thousandth.
    torch.testing.assert_close(head.token_vectors(dtype=torch.float32), layer.weight, atol=0.02, rtol=1e-3)


def test_more_codebooks_come_nearer() -> None:
    layer, stats = problem()
    gaps = [mean_kl(layer, additive_head(layer, stats, m, 16), stats.hidden) for m in (1, 2, 4)]
    assert gaps[0] > gaps[1] > gaps[2]


def test_one_codebook_is_about_a_single_head() -> None:
    layer, stats = problem()
    one = mean_kl(layer, additive_head(layer, stats, 1, 16), stats.hidden)
    assert one < 1.2 * mean_kl(layer, single_head(layer, stats, 16, method="activation"), stats.hidden)


def test_codebooks_solve_the_weighted_least_squares_problem() -> None:
    random = np.random.default_rng(0)
    points = random.standard_normal((80, 3)).astype(np.float32)
    weights = random.random(80) + 0.1
    codes = random.integers(0, 4, (80, 2))
    books = _best_codebooks(points, weights, codes, 4)
    residual = points - books[0][codes[:, 0]] - books[1][codes[:, 1]]
    # At the optimum the weighted residual of every code's tokens is 0, but for the ridge.
    for m in range(2):
        for code in range(4):
            mine = codes[:, m] == code
            assert (
                np.abs((weights[mine, None] * residual[mine]).sum(0)).max()
                < 2e-3 * weights.sum() / 4 * np.abs(books).max()
            )


@pytest.mark.parametrize("k", [1, 3, 4, 7])
def test_beam_search_finds_codes_that_are_there(k: int) -> None:
    random = np.random.default_rng(1)
    books = (random.standard_normal((3, k, 5)) * np.array([9.0, 1.0, 0.1])[:, None, None]).astype(np.float32)
    codes = random.integers(0, k, (40, 3))
    points = sum(book[codes[:, m]] for m, book in enumerate(books))
    found = _beam_search(points, books)
    np.testing.assert_allclose(sum(book[found[:, m]] for m, book in enumerate(books)), points, atol=1e-4)


def test_same_seed_same_head() -> None:
    layer, stats = problem()
    first, again = (additive_head(layer, stats, 3, 8, seed=5) for _ in range(2))
    assert torch.equal(first.codebook, again.codebook)
    assert torch.equal(first.codes, again.codes)


@pytest.mark.parametrize(("m", "k"), [(0, 8), (2, 0), (2, 301)])
def test_impossible_sizes_are_refused(m: int, k: int) -> None:
    layer, stats = problem()
    with pytest.raises(ValueError, match="expected"):
        additive_head(layer, stats, m, k)
