"""From what was seen of a tensor to the magnitude that the largest quantised number stands for."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from export_vq.calibration.histogram import EDGES, Histogram
from export_vq.require import require

PERCENTILE = 0.9999
"""Share of the numbers that method 'percentile' does not clip."""
TOP = {"int8": 127.0, "fp8": 448.0}
"""The largest number of int8, symmetric as TensorRT wants it, and of FP8 E4M3."""
_LINEAR = 1024
"""Bins of each sign that the entropy search works on."""
_OCTAVES = 7
"""How far below the largest magnitude the search for the least squared error goes: int8 has no more."""


def magnitude(seen: Histogram, method: str, precision: str) -> float:
    """The range [-m, m] of a tensor.

    Args:
        seen: at least one number.
        method: 'max' clips nothing; 'percentile' the largest 0.01 %; 'entropy' what keeps the distribution most alike, by
            ONNX Runtime's search; 'mse' what makes the expected squared error least.
        precision: 'int8' or 'fp8'.

    Returns:
        m, above 0 and at most the largest magnitude seen, or 1 where that is 0.
    """
    largest = seen.largest
    if largest == 0:
        return 1.0
    found = {"max": lambda _seen, _: largest, "percentile": _percentile, "entropy": _entropy, "mse": _least_squares}
    return min(largest, found[method](seen, precision))


def _percentile(seen: Histogram, _: str) -> float:
    share = np.cumsum(seen.counts) / seen.counts.sum()
    return float(EDGES[1 + np.searchsorted(share, PERCENTILE)])


def _entropy(seen: Histogram, _: str) -> float:
    calibrate = require("onnxruntime.quantization.calibrate", extra="calibration")
    steps = np.linspace(0, seen.largest, _LINEAR + 1)
    below = np.interp(steps, EDGES[:-1].astype(np.float64), np.concatenate([[0], np.cumsum(seen.counts)[:-1]]))
    below[-1] = seen.counts.sum()
    half = np.diff(below).round().astype(np.int64)
    edges = np.concatenate([-steps[:0:-1], steps])
    collector = calibrate.HistogramCollector("entropy", True, 2 * _LINEAR, 255, 99.99, "same")
    both = (np.concatenate([half[::-1], half]), edges, edges[0], edges[-1])
    return float(collector.get_entropy_threshold(both, 255)[1])


def _least_squares(seen: Histogram, precision: str) -> float:
    filled = np.flatnonzero(seen.counts)
    counts, sizes = seen.counts[filled], ((EDGES[:-1] + np.diff(EDGES) / 2).astype(np.float64))[filled]
    last = int(filled[-1]) + 1
    tried = EDGES[max(1, last - 64 * _OCTAVES) : last + 1].astype(np.float64)
    return float(tried[np.argmin([_squared_error(counts, sizes, m, precision) for m in tried])])


def _squared_error(counts: NDArray[np.int64], sizes: NDArray[np.float64], limit: float, precision: str) -> float:
    """Of numbers known to a bin, whose width is a small part of FP8's steps, so they are rounded as they are. Those of int8
    may be smaller than a bin: what is rounded has an even error inside its step."""
    scale = limit / TOP[precision]
    inside = np.minimum(sizes, limit)
    if precision == "fp8":
        off = (inside / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale - inside
        rounded = off**2
    else:
        rounded = np.where(sizes < scale / 2, sizes**2, scale**2 / 12)
    return float(counts @ np.where(sizes > limit, (sizes - limit) ** 2, rounded))
