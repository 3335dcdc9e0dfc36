"""Additive heads: every token's row as a sum of M full-width vectors, one of each codebook.

Residual quantisation gives the start: codebook m clusters what the first m - 1 left over. Then, as additive quantisation
does it (Babenko and Lempitsky 2014; AQLM, arXiv:2401.06118), alternate between the best codebooks for given codes, a
weighted least-squares problem that is solved exactly, and better codes for given codebooks by beam search. Distances are
logit errors (metric.py).
"""

from __future__ import annotations

from collections.abc import Callable

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from export_vq.compress.bias import with_bias
from export_vq.compress.cluster import weighted_kmeans
from export_vq.compress.metric import Metric, token_weights
from export_vq.compress.statistics import OutputLayer, Statistics
from export_vq.head import VQHead

ITERATIONS = 10
ROUNDS = 4
BEAM = 8
RIDGE = 1e-3
"""Added to a code's share of all weight, in codes of equal share: a code without tokens keeps a defined vector."""

Floats = NDArray[np.float32]


def additive_head(
    layer: OutputLayer,
    stats: Statistics,
    num_codebooks: int,
    num_codes: int,
    *,
    bias: bool = True,
    seed: int = 0,
    tell: Callable[[float], None] = lambda _: None,
) -> VQHead:
    """M codebooks [M, K, D] whose picked rows add up; arguments and errors as `product_head`, M free.

    Raises:
        ValueError: M is below 1, or K is out of range.
    """
    weight = layer.weight.double()
    v, d = weight.shape
    if not 1 <= num_codes <= v:
        raise ValueError(f"num_codes is {num_codes}; expected 1 to vocab_size ({v})")
    if num_codebooks < 1:
        raise ValueError(f"num_codebooks is {num_codebooks}; expected 1 or more")
    metric = Metric.of_text(stats, bias=bias)
    points = np.ascontiguousarray((weight @ metric.to).float().numpy())
    weights = token_weights(stats).numpy()
    steps = num_codebooks + ROUNDS
    left = points.copy()
    codes = np.empty((v, num_codebooks), np.int64)
    for m in range(num_codebooks):
        book, codes[:, m] = weighted_kmeans(left, weights, num_codes, ITERATIONS, seed + m)
        left -= book[codes[:, m]]
        tell((m + 1) / steps)
    books = _best_codebooks(points, weights, codes, num_codes)
    error = _error(points, weights, books, codes)
    for step in range(ROUNDS):
        found = _beam_search(points, books)
        candidate = _best_codebooks(points, weights, found, num_codes)
        lower = _error(points, weights, candidate, found)
        if lower < error:  # beam search is greedy: it may miss what the last round had
            books, codes, error = candidate, found, lower
        tell((num_codebooks + step + 1) / steps)
    codebook = torch.from_numpy(books).double().reshape(-1, d) @ metric.back
    head = VQHead.from_tensors(
        "additive",
        codebook.reshape(num_codebooks, num_codes, d).float(),
        torch.from_numpy(codes),
        layer.bias,
    )
    return with_bias(head, layer, stats) if bias else head


def _best_codebooks(points: Floats, weights: NDArray[np.float64], codes: NDArray[np.int64], num_codes: int) -> Floats:
    """argmin over codebooks of sum_v weights[v] |points[v] - sum_m book[m, codes[v, m]]|^2: float32 [M, K, D]."""
    m, k = codes.shape[1], num_codes
    blocks = np.empty((m, k, m, k))
    for i in range(m):
        for j in range(m):
            pairs = np.bincount(codes[:, i] * k + codes[:, j], weights, minlength=k * k)
            blocks[i, :, j] = pairs.reshape(k, k)
    gram = blocks.reshape(m * k, m * k)
    # Sums of codebooks are free up to a constant each; the ridge picks one solution.
    gram[np.diag_indices_from(gram)] += RIDGE * weights.sum() / k
    weighted = torch.from_numpy(points * weights[:, None])
    right = [
        torch.zeros(k, points.shape[1], dtype=torch.float64).index_add(0, ids, weighted)
        for ids in torch.from_numpy(codes).T
    ]
    return np.linalg.solve(gram, torch.cat(right).numpy()).astype(np.float32).reshape(m, k, -1)


def _beam_search(points: Floats, books: Floats) -> NDArray[np.int64]:
    """Codes [V, M] of sums near the points: faiss's residual encoder, which keeps BEAM candidates a step."""
    m, k, d = books.shape
    bits = max(1, (k - 1).bit_length())
    encoder = faiss.ResidualQuantizer(d, m, bits)
    padded = np.zeros((m, 1 << bits, d), np.float32)
    padded[:, :k] = books
    padded[:, k:] = books[:, :1]  # never better than the first code, which wins ties by its number
    faiss.copy_array_to_vector(padded.reshape(-1), encoder.codebooks)
    encoder.is_trained = True
    encoder.max_beam_size = BEAM
    packed = encoder.compute_codes(points)
    codes = np.empty((len(points), m), np.int64)
    unpacked = np.unpackbits(packed, axis=1, bitorder="little")
    for i in range(m):
        codes[:, i] = unpacked[:, i * bits : (i + 1) * bits].astype(np.int64) @ (1 << np.arange(bits))
    codes[codes >= k] = 0
    return codes


def _error(points: Floats, weights: NDArray[np.float64], books: Floats, codes: NDArray[np.int64]) -> float:
    """sum_v weights[v] |points[v] - its sum|^2."""
    total = sum(book[codes[:, m]] for m, book in enumerate(books))
    return float(weights @ np.square(points - total).sum(1))
