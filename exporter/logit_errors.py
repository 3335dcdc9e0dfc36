"""How far logits are from a reference's: errors, divergence, agreement of the best tokens, perplexity."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export_vq.ranking import top_ids
from export_vq.records import ErrorStats

Floats = NDArray[np.floating[Any]]
EDGES = np.arange(-12.0, 3.01, 0.5)
"""Of the histogram, in log10 of the absolute error."""
_SAMPLE = 13  # every 13th token enters the histogram: prime, so no structure of the vocabulary is favoured


def largest(values: Floats) -> float:
    """The maximum, NaN if any is NaN."""
    return float(values.max(initial=0.0))


@dataclass
class ErrorAccumulator:
    """Streaming statistics of candidate logits against reference logits, row by row."""

    positions: int = 0
    elements: int = 0
    max_abs: float = 0.0
    sum_abs: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    cosine: float = 1.0
    kl: list[Floats] = field(default_factory=list)
    nll: list[Floats] = field(default_factory=list)
    top1: int = 0
    top5: float = 0.0
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(EDGES) - 1, np.int64))

    def add(self, reference: Floats, candidate: Floats, targets: NDArray[np.int64]) -> None:
        """Take in rows: both [rows, V]; `targets` [rows] the next token, -1 where unknown."""
        for start in range(0, len(reference), 64):  # bounded scratch: 64 x V in float64
            part = slice(start, start + 64)
            self._add(reference[part].astype(np.float64), candidate[part].astype(np.float64), targets[part])

    def _add(self, a: Floats, b: Floats, targets: NDArray[np.int64]) -> None:
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            self.max_abs, a, b = (
                math.nan,
                np.nan_to_num(a),
                np.nan_to_num(b),
            )  # NaN stays NaN below, and fails every limit
        error = np.abs(a - b)
        self.positions += len(a)
        self.elements += a.size
        self.max_abs = float(np.maximum(self.max_abs, largest(error)))
        self.sum_abs += float(error.sum())
        self.low, self.high = min(self.low, float(a.min())), max(self.high, float(a.max()))
        self.cosine = float(np.minimum(self.cosine, lowest_cosine(a, b)))
        log_a, log_b = log_softmax(a), log_softmax(b)
        self.kl.append((np.exp(log_a) * (log_a - log_b)).sum(1))
        known = np.flatnonzero(targets >= 0)
        self.nll.append(np.stack([-log_a[known, targets[known]], -log_b[known, targets[known]]]))
        for row_a, row_b in zip(a, b, strict=True):
            best_a, best_b = top_ids(row_a, 5), top_ids(row_b, 5)
            self.top1 += int(best_a[0] == best_b[0])
            self.top5 += len(np.intersect1d(best_a, best_b)) / len(best_a)
        sample = np.log10(np.maximum(error[:, ::_SAMPLE], 10.0 ** EDGES[0]))
        self.histogram += np.histogram(np.minimum(sample, EDGES[-1]), EDGES)[0]

    def stats(self) -> ErrorStats:
        """The numbers so far."""
        return ErrorStats(
            positions=self.positions,
            max_abs=self.max_abs,
            mean_abs=self.sum_abs / max(self.elements, 1),
            logit_range=self.high - self.low,
            cosine_min=self.cosine,
            top1_agreement=self.top1 / max(self.positions, 1),
            top5_agreement=self.top5 / max(self.positions, 1),
            **divergence(self.kl, self.nll),
            error_histogram=tuple((float(edge), int(n)) for edge, n in zip(EDGES[1:], self.histogram, strict=True)),
        )


def divergence(kl: list[Floats], nll: list[Floats]) -> dict[str, float]:
    """The fields of ErrorStats on KL [rows] and on the negative log-likelihoods [2, rows] of reference and candidate."""
    each = np.concatenate(kl) if kl else np.zeros(1)
    both = np.concatenate(nll, axis=1) if nll else np.zeros((2, 0))
    perplexity = np.exp(both.mean(axis=1)) if both.size else np.full(2, np.nan)
    return {
        "kl_mean": float(each.mean()),
        "kl_p99": float(np.quantile(each, 0.99)),
        "perplexity_reference": float(perplexity[0]),
        "perplexity_candidate": float(perplexity[1]),
    }


def lowest_cosine(a: Floats, b: Floats) -> float:
    """Of the rows of two arrays [rows, n]; 1 of no rows."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(1) / np.maximum(norms, 1e-300)).min(initial=1.0))


def log_softmax(logits: Floats) -> Floats:
    """Over the last dimension of [rows, V]."""
    shifted: Floats = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted
