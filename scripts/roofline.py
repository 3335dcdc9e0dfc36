"""What this machine can do at best: how long reading some bytes takes, and how many multiplications or look-ups a second."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from export_vq.bench import Evictor

LARGEST = 1 << 28
"""Bytes beyond which reading takes proportionally longer: no cache holds more."""
RUNS = 9


@dataclass(frozen=True)
class Work:
    """`num_bytes` to read or write, floating-point `operations`, table `lookups`."""

    num_bytes: int
    operations: int
    lookups: int


class Machine:
    """Measured rates of this processor on so many threads."""

    def __init__(self, threads: int, lookups_per_ms: Callable[[], float]) -> None:
        """Args: of all measurements; measures the rate of table look-ups, asked once."""
        torch.set_num_threads(max(1, threads))
        self._evictor = Evictor()
        self._lookups_per_ms = functools.cache(lookups_per_ms)

    def floor_ms(self, work: Work, *, cold: bool) -> float:
        """The longer of reading and computing, in milliseconds."""
        look_ups = work.lookups / self._lookups_per_ms() if work.lookups else 0.0
        return max(self._read_ms(work.num_bytes, cold), work.operations / self._operations_per_ms(), look_ups)

    def _read_ms(self, num_bytes: int, cold: bool) -> float:
        """Interpolated in steps of a quarter octave, so that equal sizes are measured once."""
        step = 1 << max(12, num_bytes.bit_length() - 3)
        rounded = -(-num_bytes // step) * step
        return self._measured_read_ms(min(rounded, LARGEST), cold) * num_bytes / min(rounded, LARGEST)

    @functools.cache  # noqa: B019  one machine a process
    def _measured_read_ms(self, num_bytes: int, cold: bool) -> float:
        numbers = torch.ones(num_bytes // 4)
        return _median_ms(numbers.sum, self._evictor.evict if cold else None)

    @functools.cache  # noqa: B019
    def _operations_per_ms(self) -> float:
        a, b = torch.ones(512, 1024), torch.ones(1024, 512)
        return 2 * 512 * 1024 * 512 / _median_ms(lambda: a @ b)


def _median_ms(run: Callable[[], object], before: Callable[[], None] | None = None) -> float:
    samples = []
    for _ in range(RUNS + 1):
        if before is not None:
            before()
        start = time.perf_counter()
        run()
        samples.append((time.perf_counter() - start) * 1e3)
    return statistics.median(samples[1:])
