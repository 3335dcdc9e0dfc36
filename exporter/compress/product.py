"""Product heads: slices of the rotated output layer, each with a codebook of its own.

The rotation is R = U L^(-1/2) Q (metric.py), Q orthogonal and optimised as in optimised product quantisation (Ge et al.
2013, arXiv:1311.4055, the non-parametric form): start from the principal axes of the weighted X, dealt so that every slice
gets large and small ones, then alternate k-means per slice and the orthogonal Procrustes turn that brings X closest to its
quantised form.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import faiss
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
TURNS = 8
TURN_ITERATIONS = 2

Tell = Callable[[float], None]


def product_head(
    layer: OutputLayer,
    stats: Statistics,
    num_codebooks: int,
    num_codes: int,
    *,
    rotate: bool = True,
    bias: bool = True,
    seed: int = 0,
    tell: Tell = lambda _: None,
) -> VQHead:
    """M codebooks over slices of the rotated weight.

    Args:
        layer: the dense output layer, weight [V, D].
        stats: of the hidden states that enter it.
        num_codebooks: M, a divisor of D.
        num_codes: K, at most V.
        rotate: without, slices are taken as they come, in plain coordinates.
        bias: without, only a dense layer's own bias is kept.
        seed: of the clustering.
        tell: called with the fraction done.

    Raises:
        ValueError: M does not divide D, or K is out of range.
    """
    weight = layer.weight.double()
    v, d = weight.shape
    if not 1 <= num_codes <= v:
        raise ValueError(f"num_codes is {num_codes}; expected 1 to vocab_size ({v})")
    if num_codebooks < 1 or d % num_codebooks:
        raise ValueError(f"num_codebooks is {num_codebooks}; expected a divisor of hidden_size ({d})")
    weights = token_weights(stats)
    metric = Metric.plain(d)
    slices = _Slices(num_codebooks, num_codes, weights.numpy(), seed)
    if rotate:
        metric = Metric.of_text(stats, bias=bias)
        metric = metric.turned(_dealt_axes(weight @ metric.to, weights, num_codebooks))
        metric = _optimise_turn(weight, metric, slices, lambda part: tell(0.5 * part))
    slices.fit((weight @ metric.to).float().numpy(), ITERATIONS, lambda part: tell(0.5 + 0.5 * part))
    rotation = metric.back.T.float() if rotate else None
    head = VQHead.from_tensors(
        "product", torch.from_numpy(slices.codebook), torch.from_numpy(slices.codes), layer.bias, rotation
    )
    return with_bias(head, layer, stats) if bias else head


def _dealt_axes(points: Tensor, weights: Tensor, num_codebooks: int) -> Tensor:
    """Principal axes of weighted points as columns, dealt to the slices back and forth by variance: [D, D]."""
    share = (weights / weights.sum())[:, None]
    centred = points - (share * points).sum(0)
    axes: Tensor = torch.linalg.eigh(centred.T @ (share * centred)).eigenvectors.flip(1)  # largest first
    order = torch.arange(axes.shape[1]).reshape(-1, num_codebooks)
    order[1::2] = order[1::2].flip(1)
    return axes.index_select(1, order.T.reshape(-1))


def _optimise_turn(weight: Tensor, metric: Metric, slices: _Slices, tell: Tell) -> Metric:
    """Alternate quantisation and the turn that brings the points closest to it."""
    share = torch.from_numpy(slices.weights)[:, None].float()
    for step in range(TURNS):
        points = (weight @ metric.to).float()
        slices.fit(points.numpy(), TURN_ITERATIONS)
        tell((step + 1) / TURNS)
        # argmin over orthogonal Q of sum_v w[v] |x[v] Q - q[v]|^2 (Schoenemann 1966)
        left, _, right = torch.linalg.svd(((share * points).T @ torch.from_numpy(slices.quantised())).double())
        metric = metric.turned(left @ right)
    return metric


class _Slices:
    """Codebooks and codes of all slices; every `fit` goes on from the last."""

    def __init__(self, num_codebooks: int, num_codes: int, weights: NDArray[np.float64], seed: int) -> None:
        self.weights, self.seed = weights, seed
        self.codes = np.zeros((len(weights), num_codebooks), np.int64)  # [V, M]
        self.books: list[NDArray[np.float32] | None] = [None] * num_codebooks
        self.num_codes = num_codes

    @property
    def codebook(self) -> NDArray[np.float32]:
        """float32 [M, K, D/M]."""
        return np.stack([book for book in self.books if book is not None])

    def fit(self, points: NDArray[np.float32], iterations: int, tell: Tell = lambda _: None) -> None:
        """k-means in every slice of points float32 [V, D], a slice to a thread: the same answer on any number of cores."""
        parts = np.split(points, len(self.books), axis=1)

        def cluster(i: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
            faiss.omp_set_num_threads(1)  # of this thread only
            return weighted_kmeans(parts[i], self.weights, self.num_codes, iterations, self.seed + i, self.books[i])

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for i, (book, codes) in enumerate(pool.map(cluster, range(len(parts)))):
                self.books[i], self.codes[:, i] = book, codes
                tell((i + 1) / len(parts))

    def quantised(self) -> NDArray[np.float32]:
        """What the codes stand for: float32 [V, D]."""
        return np.concatenate([book[ids] for book, ids in zip(self.codebook, self.codes.T, strict=True)], axis=1)
