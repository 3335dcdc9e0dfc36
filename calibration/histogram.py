"""How large a tensor's numbers get, counted over many runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SHIFT = 17
"""The lower bits of a float32 that are dropped: 6 bits of mantissa stay, 64 bins an octave."""
BINS = 255 << (23 - _SHIFT)
"""Every finite float32 has one."""
EDGES = (np.arange(BINS + 1, dtype=np.int32) << _SHIFT).view(np.float32)
"""Lower edges of the bins, and the upper one of the last. Zeros are in the first."""


@dataclass
class Histogram:
    """Magnitudes of a tensor [.., D].

    The bins are the same for every tensor and exact, so counts add up in any order, and an outlier of a thousand times
    the usual size costs no resolution; `channels` are the largest magnitudes [D].
    """

    counts: NDArray[np.int64]
    channels: NDArray[np.float32]

    @classmethod
    def of(cls, array: NDArray[Any]) -> Histogram:
        """Of one array [.., D] of any floating type, not empty. NaN and infinity show in `largest` only."""
        sizes = np.abs(array.astype(np.float32)).reshape(-1, array.shape[-1] if array.ndim else 1)
        bins = sizes.ravel().view(np.int32) >> _SHIFT
        return cls(np.bincount(bins[bins < BINS], minlength=BINS).astype(np.int64), sizes.max(axis=0))

    def __add__(self, other: Histogram) -> Histogram:
        return Histogram(self.counts + other.counts, np.maximum(self.channels, other.channels))

    @property
    def largest(self) -> float:
        return float(self.channels.max())

    def to_json(self) -> dict[str, Any]:
        filled = np.flatnonzero(self.counts)
        first, last = (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (0, 0)
        return {"first": first, "counts": self.counts[first:last].tolist(), "channels": self.channels.tolist()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Histogram:
        counts = np.zeros(BINS, np.int64)
        counts[data["first"] :][: len(data["counts"])] = data["counts"]
        return cls(counts, np.array(data["channels"], np.float32))


@dataclass
class Largest:
    """The largest magnitude of a tensor alone."""

    largest: float

    @classmethod
    def of(cls, array: NDArray[Any]) -> Largest:
        return cls(float(np.abs(array).max()))

    def __add__(self, other: Largest) -> Largest:
        return Largest(max(self.largest, other.largest))

    def to_json(self) -> float:
        return self.largest

    @classmethod
    def from_json(cls, data: float) -> Largest:
        return cls(float(data))
