"""From a dense output layer to a VQ head: which coordinates, which codes, which bias.

The coordinates. Replacing W[v] by W_hat[v] changes the logit of v by e(h) = h . (W_hat[v] - W[v]) + b[v]. Its mean over
the text is made zero by b[v] = mu . (W[v] - W_hat[v]), mu = E[h]; what remains is the variance

    E[((h - mu) . (W_hat[v] - W[v]))^2] = |(W_hat[v] - W[v]) U L^(1/2)|^2,    U L U^T = E[(h - mu)(h - mu)^T]

so squared distance between rows of X = W U L^(1/2) is the squared logit error that the bias cannot remove. The head sees
h U L^(-1/2) instead of h, which leaves the logits as they are. Any orthogonal turn Q of both keeps this; the rotation of a
product head is R = U L^(-1/2) Q. Small eigenvalues are raised by `RIDGE` of their mean, so that directions the text
hardly used keep some weight on another text.

The slices. For a product head Q is optimised as in optimised product quantisation (Ge et al. 2013, arXiv:1311.4055, the
non-parametric form): start from the principal axes of the weighted X, dealt so that every slice gets large and small
ones, then alternate k-means per slice and the orthogonal Procrustes turn that brings X closest to its quantised form.

The weights. KL(p || p_hat) is to second order half the variance of e under p(. | h), so a token counts by its
probability. Above that order an error on an improbable token costs more than its probability says (its exponential
enters the normaliser): tokens count by probability ** `POWER`.

Errors that all tokens have in common cost nothing in a softmax; here they vanish by themselves, as centroids are means.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export_vq.compress.bias import matched_bias, mean_error_bias
from export_vq.compress.cluster import weighted_kmeans
from export_vq.compress.statistics import OutputLayer, Statistics
from export_vq.head import VQHead

RIDGE = 0.03
POWER = 0.5
"""A larger power favours the text at hand, a smaller one texts unlike it: SmolLM2 calibrated on Shakespeare, M = 144, loses
2.0 % perplexity on other plays and 36 % on software documentation with 0.75, 2.4 % and 27 % with 0.5."""
ITERATIONS = 15
TURNS = 8
TURN_ITERATIONS = 2

Tell = Callable[[float], None]


@dataclass(frozen=True)
class Metric:
    """`to` and `back` float64 [D, D], inverse to each other: X = W `to`; rows come back as X `back`; the head sees h `back`^T."""

    to: Tensor
    back: Tensor

    @classmethod
    def of(cls, covariance: Tensor) -> Metric:
        """to = U L^(1/2), back = L^(-1/2) U^T, of a covariance float64 [D, D]."""
        values, vectors = torch.linalg.eigh(covariance)
        values = values.clamp(min=0)
        values = values + RIDGE * values.mean().clamp(min=1e-30)
        return cls(vectors * values.sqrt(), (vectors / values.sqrt()).T)

    def turned(self, turn: Tensor) -> Metric:
        """The same metric after an orthogonal turn [D, D] of the coordinates."""
        return Metric(self.to @ turn, turn.T @ self.back)


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
    _check_codes(num_codes, v)
    if num_codebooks < 1 or d % num_codebooks:
        raise ValueError(f"num_codebooks is {num_codebooks}; expected a divisor of hidden_size ({d})")
    weights = token_weights(stats)
    metric = Metric(torch.eye(d, dtype=torch.float64), torch.eye(d, dtype=torch.float64))
    slices = _Slices(num_codebooks, num_codes, weights.numpy(), seed)
    if rotate:
        metric = Metric.of(_moments(stats, bias))
        metric = metric.turned(_dealt_axes(weight @ metric.to, weights, num_codebooks))
        metric = _optimise_turn(weight, metric, slices, lambda part: tell(0.5 * part))
    slices.fit((weight @ metric.to).float().numpy(), ITERATIONS, lambda part: tell(0.5 + 0.5 * part))
    return _finish(
        "product",
        torch.from_numpy(slices.codebook),
        torch.from_numpy(slices.codes),
        metric.back.T.float() if rotate else None,
        layer,
        stats,
        bias,
    )


def single_head(
    layer: OutputLayer,
    stats: Statistics,
    num_codes: int,
    *,
    bias: bool = True,
    seed: int = 0,
    tell: Tell = lambda _: None,
) -> VQHead:
    """One codebook of K whole vectors; arguments and errors as in `product_head`.

    Codes are found in the metric's coordinates; the codebook is the weighted mean of each code's rows in the original
    ones, which is the same point, since the coordinates are linear.
    """
    weight = layer.weight.double()
    v, d = weight.shape
    _check_codes(num_codes, v)
    weights = token_weights(stats)
    points = (weight @ Metric.of(_moments(stats, bias)).to).float().numpy()
    _, index = weighted_kmeans(points, weights.numpy(), num_codes, ITERATIONS, seed)
    codes = torch.from_numpy(index)
    share = torch.zeros(num_codes, dtype=torch.float64).index_add(0, codes, weights)
    book = torch.zeros(num_codes, d, dtype=torch.float64).index_add(0, codes, weight * weights[:, None])
    book = book / share.clamp(min=1e-300)[:, None]
    tell(1.0)
    return _finish("single", book[None].float(), codes[:, None], None, layer, stats, bias)


def token_weights(stats: Statistics) -> Tensor:
    """How much each token counts in the clustering: float64 [V], mean 1, above 0."""
    weights = stats.probability.clamp(min=1e-12) ** POWER
    scaled: Tensor = weights / weights.mean()
    return scaled


def _moments(stats: Statistics, with_bias: bool) -> Tensor:
    """The matrix behind the metric [D, D]: without a bias nothing removes the mean error, so it counts too."""
    moments = stats.covariance
    if not with_bias:
        moments = moments + torch.outer(stats.mean, stats.mean)
    return moments


def _check_codes(num_codes: int, vocab_size: int) -> None:
    if not 1 <= num_codes <= vocab_size:
        raise ValueError(f"num_codes is {num_codes}; expected 1 to vocab_size ({vocab_size})")


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


def _finish(
    kind: str,
    codebook: Tensor,
    codes: Tensor,
    rotation: Tensor | None,
    layer: OutputLayer,
    stats: Statistics,
    with_bias: bool,
) -> VQHead:
    """The head, with its bias."""
    head = VQHead.from_tensors(kind, codebook, codes, layer.bias, rotation)
    if not with_bias:
        return head
    twin = head.token_vectors(dtype=torch.float32)
    start = mean_error_bias(layer, twin, stats.mean)
    bias = matched_bias(layer, twin, start, stats.sample)
    return VQHead.from_tensors(kind, codebook, codes, bias, rotation)
