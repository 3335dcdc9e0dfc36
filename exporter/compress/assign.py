"""Which token gets which code of a single codebook: maps by name, and the head that a map makes.

| method | map | source |
|---|---|---|
| random | every code equally often, drawn by seed | VQ-Logits (arXiv:2505.10202), pre-assigned |
| contiguous | runs of neighbouring token ids | the same |
| frequency | runs of equally frequent tokens: similar frequency, same code | the same, frequency buckets |
| kmeans | k-means of the rows of the output layer | the same, and the usual way |
| weighted | k-means, tokens weighted by their probability | metric.py |
| activation | weighted k-means in coordinates where distance is logit error | metric.py; E[h h^T] as in GPTQ (arXiv:2210.17323) |
| private | the most probable tokens get a code each, `activation` for the rest | class-based models (Brown et al. 1992) keep frequent words apart |

`balanced` limits every code of a k-means method to ceil(V / K) tokens, as codes of equal size need.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export_vq.compress.bias import with_bias
from export_vq.compress.cluster import weighted_kmeans
from export_vq.compress.metric import Metric, token_weights
from export_vq.compress.statistics import OutputLayer, Statistics
from export_vq.head import VQHead

ITERATIONS = 15
PRIVATE = 0.75
"""Share of the codes that `private` gives to one token each: at K = 512 the floor of real text is lowest around there."""


def single_head(
    layer: OutputLayer,
    stats: Statistics,
    num_codes: int,
    *,
    method: str = "activation",
    balanced: bool = False,
    bias: bool = True,
    seed: int = 0,
) -> VQHead:
    """One codebook of K whole vectors [1, K, D]: each the mean of its tokens' rows, weighted by probability.

    Args:
        layer: the dense output layer, weight [V, D].
        stats: of the hidden states that enter it.
        num_codes: K, at most V.
        method: one of METHODS.
        balanced: no code has more than ceil(V / K) tokens; for methods that cluster.
        bias: without, only a dense layer's own bias is kept.
        seed: of the clustering or the draw.

    Raises:
        ValueError: K is out of range, or there is no such method.
    """
    weight = layer.weight
    if not 1 <= num_codes <= len(weight):
        raise ValueError(f"num_codes is {num_codes}; expected 1 to vocab_size ({len(weight)})")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(METHODS)}")
    codes = METHODS[method](layer, stats, num_codes, bias, balanced, seed)
    head = VQHead.from_tensors("single", code_means(weight, codes, num_codes, stats)[None], codes[:, None], layer.bias)
    return with_bias(head, layer, stats) if bias else head


def code_means(weight: Tensor, codes: Tensor, num_codes: int, stats: Statistics) -> Tensor:
    """Rows of the output layer [V, D] averaged over each code's tokens by weight: float32 [K, D]; 0 for a code without tokens."""
    weights = token_weights(stats)
    share = torch.zeros(num_codes, dtype=torch.float64).index_add(0, codes, weights)
    book = torch.zeros(num_codes, weight.shape[1], dtype=torch.float64)
    book = book.index_add(0, codes, weight.double() * weights[:, None])
    return (book / share.clamp(min=1e-300)[:, None]).float()


# ------------------------------------------------------------------------------------------------------------ methods


def _random(layer: OutputLayer, stats: Statistics, k: int, bias: bool, balanced: bool, seed: int) -> Tensor:
    del stats, bias, balanced
    v = len(layer.weight)
    return torch.randperm(v, generator=torch.Generator().manual_seed(seed)) * k // v


def _contiguous(layer: OutputLayer, stats: Statistics, k: int, bias: bool, balanced: bool, seed: int) -> Tensor:
    del stats, bias, balanced, seed
    v = len(layer.weight)
    return torch.arange(v) * k // v


def _frequency(layer: OutputLayer, stats: Statistics, k: int, bias: bool, balanced: bool, seed: int) -> Tensor:
    del bias, balanced, seed
    v = len(layer.weight)
    codes = torch.empty(v, dtype=torch.int64)
    codes[stats.probability.argsort(descending=True, stable=True)] = torch.arange(v) * k // v
    return codes


def _kmeans(layer: OutputLayer, stats: Statistics, k: int, bias: bool, balanced: bool, seed: int) -> Tensor:
    del stats, bias
    return _clusters(layer.weight, np.ones(len(layer.weight)), k, balanced, seed)


def _weighted(layer: OutputLayer, stats: Statistics, k: int, bias: bool, balanced: bool, seed: int) -> Tensor:
    del bias
    return _clusters(layer.weight, token_weights(stats).numpy(), k, balanced, seed)


def _activation(layer: OutputLayer, stats: Statistics, k: int, bias: bool, balanced: bool, seed: int) -> Tensor:
    return _clusters(_points(layer, stats, bias), token_weights(stats).numpy(), k, balanced, seed)


def _private(layer: OutputLayer, stats: Statistics, k: int, bias: bool, balanced: bool, seed: int) -> Tensor:
    alone = min(int(PRIVATE * k), k - 1)  # one code at least for all others
    order = stats.probability.argsort(descending=True, stable=True)
    first, rest = order[:alone], order[alone:]
    codes = torch.empty(len(order), dtype=torch.int64)
    codes[first] = torch.arange(alone)
    weights = token_weights(stats).numpy()
    codes[rest] = alone + _clusters(_points(layer, stats, bias)[rest], weights[rest], k - alone, balanced, seed)
    return codes


METHODS: dict[str, Callable[[OutputLayer, Statistics, int, bool, bool, int], Tensor]] = {
    "random": _random,
    "contiguous": _contiguous,
    "frequency": _frequency,
    "kmeans": _kmeans,
    "weighted": _weighted,
    "activation": _activation,
    "private": _private,
}


def _points(layer: OutputLayer, stats: Statistics, bias: bool) -> Tensor:
    """Rows of the output layer in the metric's coordinates, float32 [V, D]."""
    return (layer.weight.double() @ Metric.of_text(stats, bias=bias).to).float()


def _clusters(points: Tensor, weights: NDArray[np.float64], k: int, balanced: bool, seed: int) -> Tensor:
    """k-means: the code of every point, int64 [n]."""
    centroids, index = weighted_kmeans(points.numpy(), weights, k, ITERATIONS, seed)
    if balanced:
        index = _balanced(points, weights, torch.from_numpy(centroids))
    return torch.from_numpy(index)


def _balanced(points: Tensor, weights: NDArray[np.float64], centroids: Tensor) -> NDArray[np.int64]:
    """Nearest centroids with at most ceil(n / K) points each; heavy points choose first."""
    room = np.full(len(centroids), -(-len(points) // len(centroids)))
    codes = np.empty(len(points), np.int64)
    waiting = np.argsort(-weights, kind="stable")
    while len(waiting):
        open_codes = np.flatnonzero(room)
        nearest = open_codes[torch.cdist(points[waiting], centroids[open_codes]).argmin(1).numpy()]
        # Of those that want the same code, as many as it has room for, in their order.
        order = np.argsort(nearest, kind="stable")
        rank = np.empty(len(nearest), np.int64)
        rank[order] = np.arange(len(nearest)) - np.searchsorted(nearest[order], nearest[order])
        taken = rank < room[nearest]
        codes[waiting[taken]] = nearest[taken]
        room -= np.bincount(nearest[taken], minlength=len(room))
        waiting = waiting[~taken]
    return codes
