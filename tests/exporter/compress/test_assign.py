"""Coordinates, clustering and bias on small random matrices, against definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from head_problem import mean_kl, problem
from torch import Tensor

from export_vq.compress.assign import METHODS, code_means, single_head
from export_vq.compress.bias import matched_bias, mean_error_bias
from export_vq.compress.cluster import weighted_kmeans
from export_vq.compress.metric import RIDGE, Metric, token_weights
from export_vq.compress.product import product_head
from export_vq.compress.statistics import OutputLayer
from export_vq.head import VQHead


def logit_errors(layer: OutputLayer, head: VQHead, hidden: Tensor) -> Tensor:
    """float64 [n, V], the bias left out."""
    return hidden.double() @ (head.token_vectors() - layer.weight.double()).T


def test_metric_makes_squared_distance_the_squared_logit_error_about_the_mean() -> None:
    _, stats = problem()
    metric = Metric.of(stats.covariance)
    change = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    centred = stats.hidden.double() - stats.mean
    ridge = RIDGE * stats.covariance.trace() / 16 * change.square().sum()
    expected = (centred @ change).square().mean() + ridge
    torch.testing.assert_close((change @ metric.to).square().sum(), expected)
    torch.testing.assert_close(metric.to @ metric.back, torch.eye(16, dtype=torch.float64), atol=1e-9, rtol=0)


def test_rotation_whitens_the_hidden_states_and_keeps_the_logits() -> None:
    layer, stats = problem()
    head = product_head(layer, stats, 4, 300, bias=False)
    assert head.rotation is not None
    torch.testing.assert_close(head(stats.hidden), stats.hidden @ layer.weight.T, atol=2e-4, rtol=0)
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
    assert mean_kl(layer, head, stats.hidden) < 1e-6


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
        errors = logit_errors(layer, head, stats.hidden)
        return float(((errors - errors.mean(0)).square().mean(0) * weights).mean())

    assert error(rotated) < 0.5 * error(plain)


def test_bias_removes_the_mean_error() -> None:
    layer, stats = problem()
    layer.bias = torch.randn(300, generator=torch.Generator().manual_seed(5))
    head = single_head(layer, stats, 12, bias=False)
    bias = mean_error_bias(layer, head.token_vectors(dtype=torch.float32), stats.mean)
    errors = logit_errors(layer, head, stats.hidden) + (bias - layer.bias).double()
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
    assert mean_kl(layer, head, stats.hidden) < mean_kl(layer, first, stats.hidden)
    assert mean_kl(layer, head, stats.hidden) < mean_kl(layer, make[kind](False), stats.hidden)
    bias = head.bias.detach() if head.bias is not None else torch.zeros(300)
    for _ in range(30):
        bias = matched_bias(layer, twin, bias, stats.hidden)
    reached = OutputLayer(twin, bias).probabilities(stats.hidden).double().mean(0)
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
    assert mean_kl(layer, head, stats.hidden) < 1e-6


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
    assert bool(head(stats.hidden).isfinite().all())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_maps_every_token_and_repeats_itself(method: str) -> None:
    layer, stats = problem()
    first, again = (single_head(layer, stats, 12, method=method, seed=3) for _ in range(2))
    assert torch.equal(first.codes, again.codes)
    assert torch.equal(first.codebook, again.codebook)
    assert int(first.codes.min()) >= 0
    assert int(first.codes.max()) < 12
    assert first.dead_codes == 0


def test_maps_that_need_no_weights_are_what_their_names_say() -> None:
    layer, stats = problem(v=10)
    contiguous = single_head(layer, stats, 3, method="contiguous").codes[:, 0].tolist()
    assert contiguous == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    frequency = single_head(layer, stats, 5, method="frequency").codes[:, 0]
    by_rank = frequency[stats.probability.argsort(descending=True)].tolist()
    assert by_rank == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    drawn = single_head(layer, stats, 5, method="random").codes[:, 0]
    assert torch.bincount(drawn).tolist() == [2] * 5


def test_private_gives_the_most_probable_tokens_a_code_each() -> None:
    layer, stats = problem()
    codes = single_head(layer, stats, 12, method="private").codes[:, 0]
    alone = stats.probability.argsort(descending=True)[:9]
    assert torch.equal(torch.bincount(codes)[codes[alone]], torch.ones(9, dtype=torch.int64))


@pytest.mark.parametrize(("v", "k"), [(300, 12), (301, 12), (50, 50), (7, 3)])
def test_balanced_codes_have_no_more_than_their_share(v: int, k: int) -> None:
    layer, stats = problem(v=v)
    free = torch.bincount(single_head(layer, stats, k, method="activation").codes[:, 0])
    even = torch.bincount(single_head(layer, stats, k, method="activation", balanced=True).codes[:, 0])
    assert int(even.max()) <= -(-v // k)
    assert v < 300 or int(free.max()) > -(-v // k)  # few points may be balanced by themselves


def test_code_vectors_are_weighted_means_of_their_tokens_rows() -> None:
    layer, stats = problem()
    codes = torch.arange(300) % 7
    means = code_means(layer.weight, codes, 8, stats)
    weights = token_weights(stats)
    expected = (layer.weight[codes == 2].double() * weights[codes == 2, None]).sum(0) / weights[codes == 2].sum()
    torch.testing.assert_close(means[2], expected.float())
    assert torch.equal(means[7], torch.zeros(16))  # no token has it


def test_dead_codes_are_counted_over_all_codebooks() -> None:
    codes = torch.tensor([[0, 1], [0, 2], [3, 2]])
    assert VQHead.from_tensors("additive", torch.zeros(2, 4, 5), codes).dead_codes == 4


@pytest.mark.parametrize("asked", [{"num_codes": 0}, {"num_codes": 301}, {"num_codes": 4, "method": "best"}])
def test_impossible_single_heads_are_refused(asked: dict[str, object]) -> None:
    layer, stats = problem()
    with pytest.raises(ValueError, match="expected"):
        single_head(layer, stats, **asked)  # type: ignore[arg-type]
