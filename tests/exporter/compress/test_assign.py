"""Coordinates, clustering and bias on small random matrices, against definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from export_vq.compress.assign import RIDGE, Metric, product_head, single_head, token_weights
from export_vq.compress.bias import matched_bias, mean_error_bias
from export_vq.compress.cluster import weighted_kmeans
from export_vq.compress.statistics import OutputLayer, Statistics, mean_probability
from export_vq.head import VQHead


def problem(v: int = 300, d: int = 16, n: int = 600, seed: int = 0) -> tuple[OutputLayer, Statistics]:
    """A random layer, and hidden states with a mean and very unequal directions."""
    random = torch.Generator().manual_seed(seed)
    weight = 0.5 * torch.randn(v, d, generator=random)
    mixing = torch.randn(d, d, generator=random) * torch.logspace(0, -1, d)
    hidden = torch.randn(n, d, generator=random) @ mixing.T + torch.randn(d, generator=random)
    layer = OutputLayer(weight)
    exact = hidden.double()
    centred = exact - exact.mean(0)
    return layer, Statistics(exact.mean(0), centred.T @ centred / n, mean_probability(layer, hidden), hidden)


def logit_errors(layer: OutputLayer, head: VQHead, hidden: Tensor) -> Tensor:
    """float64 [n, V], the bias left out."""
    return hidden.double() @ (head.token_vectors() - layer.weight.double()).T


def mean_kl(layer: OutputLayer, head: VQHead, hidden: Tensor) -> float:
    with torch.no_grad():
        p, q = layer.probabilities(hidden).double(), head(hidden).softmax(-1).double()
    return float((p * (p / q).log()).sum(-1).mean())


def test_metric_makes_squared_distance_the_squared_logit_error_about_the_mean() -> None:
    _, stats = problem()
    metric = Metric.of(stats.covariance)
    change = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    centred = stats.sample.double() - stats.mean
    ridge = RIDGE * stats.covariance.trace() / 16 * change.square().sum()
    expected = (centred @ change).square().mean() + ridge
    torch.testing.assert_close((change @ metric.to).square().sum(), expected)
    torch.testing.assert_close(metric.to @ metric.back, torch.eye(16, dtype=torch.float64), atol=1e-9, rtol=0)


def test_rotation_whitens_the_hidden_states_and_keeps_the_logits() -> None:
    layer, stats = problem()
    head = product_head(layer, stats, 4, 300, bias=False)
    assert head.rotation is not None
    torch.testing.assert_close(head(stats.sample), stats.sample @ layer.weight.T, atol=2e-4, rtol=0)
    with_bias = product_head(layer, stats, 4, 8)
    assert with_bias.rotation is not None
    rotation, identity = with_bias.rotation.detach().double(), torch.eye(16, dtype=torch.float64)
    raised = stats.covariance + RIDGE * stats.covariance.trace() / 16 * identity
    torch.testing.assert_close(rotation.T @ raised @ rotation, identity, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bias", [False, True])
def test_single_with_a_code_for_every_token_is_the_dense_layer(bias: bool) -> None:
    layer, stats = problem()
    head = single_head(layer, stats, 300, bias=bias)
    torch.testing.assert_close(head.token_vectors(dtype=torch.float32), layer.weight, atol=1e-6, rtol=0)
    assert mean_kl(layer, head, stats.sample) < 1e-6


def test_product_with_a_code_for_every_different_slice_is_the_dense_layer() -> None:
    layer, stats = problem()
    few = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    choice = torch.randint(0, 7, (300, 4), generator=torch.Generator().manual_seed(2))
    layer.weight = few[choice].reshape(300, 16)
    head = product_head(layer, stats, 4, 9, rotate=False)  # two codes to spare
    assert head.rotation is None
    torch.testing.assert_close(head.token_vectors(dtype=torch.float32), layer.weight, atol=1e-6, rtol=0)


def test_a_token_counts_by_its_weight() -> None:
    random = np.random.default_rng(0)
    points = random.standard_normal((500, 3)).astype(np.float32)
    weights = random.pareto(1.0, 500) + 0.01

    def error(used: np.ndarray) -> float:
        centroids, index = weighted_kmeans(points, used, 16, 20, seed=0)
        return float((weights * np.square(points - centroids[index]).sum(1)).sum())

    assert error(weights) < 0.8 * error(np.ones(500))


def test_kmeans_assigns_the_nearest_centroid_and_centroids_are_weighted_means() -> None:
    random = np.random.default_rng(1)
    points = random.standard_normal((400, 2)).astype(np.float32)
    weights = random.random(400) + 0.1
    centroids, index = weighted_kmeans(points, weights, 8, 200, seed=0)
    distance = np.square(points[:, None] - centroids).sum(-1)
    np.testing.assert_array_equal(index, distance.argmin(1))
    for code in range(8):
        members = index == code
        np.testing.assert_allclose(
            np.average(points[members], axis=0, weights=weights[members]), centroids[code], atol=1e-3
        )


def test_activation_weighting_lowers_the_logit_error() -> None:
    layer, stats = problem()
    weights = token_weights(stats)
    plain = product_head(layer, stats, 4, 16, rotate=False)
    rotated = product_head(layer, stats, 4, 16)

    def error(head: VQHead) -> float:
        errors = logit_errors(layer, head, stats.sample)
        return float(((errors - errors.mean(0)).square().mean(0) * weights).mean())

    assert error(rotated) < 0.5 * error(plain)


def test_bias_removes_the_mean_error() -> None:
    layer, stats = problem()
    layer.bias = torch.randn(300, generator=torch.Generator().manual_seed(5))
    head = single_head(layer, stats, 12, bias=False)
    bias = mean_error_bias(layer, head.token_vectors(dtype=torch.float32), stats.mean)
    errors = logit_errors(layer, head, stats.sample) + (bias - layer.bias).double()
    torch.testing.assert_close(errors.mean(0), torch.zeros(300, dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["single", "product"])
def test_matched_bias_equals_mean_probabilities_and_lowers_kl(kind: str) -> None:
    layer, stats = problem()
    make = {
        "single": lambda b: single_head(layer, stats, 12, bias=b),
        "product": lambda b: product_head(layer, stats, 4, 4, bias=b),
    }
    head = make[kind](True)
    twin = head.token_vectors(dtype=torch.float32)
    first = VQHead.from_tensors(
        kind, head.codebook, head.codes, mean_error_bias(layer, twin, stats.mean), head.rotation
    )
    assert mean_kl(layer, head, stats.sample) < mean_kl(layer, first, stats.sample)
    assert mean_kl(layer, head, stats.sample) < mean_kl(layer, make[kind](False), stats.sample)
    bias = head.bias.detach() if head.bias is not None else torch.zeros(300)
    for _ in range(30):
        bias = matched_bias(layer, twin, bias, stats.sample)
    reached = mean_probability(OutputLayer(twin, bias), stats.sample)
    torch.testing.assert_close(reached, stats.probability, atol=1e-4, rtol=0.02)


def test_tokens_of_one_code_share_its_probability_as_in_the_dense_model() -> None:
    layer, stats = problem()
    head = single_head(layer, stats, 12)
    assert head.bias is not None
    for code in range(12):
        members = (head.codes[:, 0] == code).nonzero().flatten()
        wanted = stats.probability[members] / stats.probability[members].sum()
        torch.testing.assert_close(head.bias.detach()[members].double().softmax(0), wanted, atol=5e-3, rtol=0)


@pytest.mark.parametrize("kind", ["single", "product"])
def test_same_seed_same_head(kind: str) -> None:
    layer, stats = problem()

    def make(seed: int) -> VQHead:
        return (
            single_head(layer, stats, 12, seed=seed)
            if kind == "single"
            else product_head(layer, stats, 4, 8, seed=seed)
        )

    first, again, other = make(0), make(0), make(1)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(first.codes, other.codes)


@pytest.mark.parametrize("bias", [False, True])
def test_a_dense_bias_is_kept(bias: bool) -> None:
    layer, stats = problem()
    layer.bias = torch.randn(300, generator=torch.Generator().manual_seed(5))
    head = single_head(layer, stats, 300, bias=bias)
    assert head.bias is not None
    assert mean_kl(layer, head, stats.sample) < 1e-6


def test_odd_sizes_are_refused() -> None:
    layer, stats = problem()
    with pytest.raises(ValueError, match="num_codebooks is 5; expected a divisor of hidden_size"):
        product_head(layer, stats, 5, 8)
    for wrong in (0, 301):
        with pytest.raises(ValueError, match=f"num_codes is {wrong}; expected 1 to vocab_size"):
            single_head(layer, stats, wrong)
        with pytest.raises(ValueError, match=f"num_codes is {wrong}; expected 1 to vocab_size"):
            product_head(layer, stats, 4, wrong)


@pytest.mark.parametrize(("v", "d", "m", "k"), [(37, 7, 7, 37), (50, 6, 1, 3), (20, 1, 1, 1)])
def test_any_sizes_work(v: int, d: int, m: int, k: int) -> None:
    layer, stats = problem(v, d)
    head = product_head(layer, stats, m, k)
    assert head.codes.shape == (v, m)
    assert int(head.codes.max()) < k
    assert bool(head(stats.sample).isfinite().all())
