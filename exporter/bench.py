"""How fast, against what: timings of several ways to do the same, in one run.

They take turns round by round, and every round begins with another, so that drift of a shared machine meets all alike.
Cold means that the device's caches were evicted before every single run, as the backbone of a decode step does to the
head; warm is a short loop of nothing else.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export_vq.records import BenchReport, Timing

WARM_LOOP_SECONDS = 0.02
"""How long one warm loop lasts; its first run is not counted."""


@dataclass(frozen=True)
class Workload:
    """One thing to time: `runs` does it once in each of several ways, by the names that the timings will carry."""

    subject: str
    batch: int
    runs: dict[str, Callable[[], None]]


def run_benchmark(
    workloads: Sequence[Workload],
    *,
    threads: int,
    dtype: str,
    backend: str,
    device: str | None = None,
    evict: Callable[[], None] | None = None,
    seconds: float = 2.0,
    min_rounds: int = 15,
    max_rounds: int = 300,
    progress: Callable[[float], None] = lambda _: None,
) -> BenchReport:
    """Time every workload, warm and cold.

    Args:
        workloads: what to run.
        threads: the runtime's intra-op threads, for the record.
        dtype: of the graphs, for the record.
        backend: what ran them, for the record.
        device: where, for the record; None: this machine's processor.
        evict: empties the caches of that device; None: the processor's.
        seconds: time to spend on each way, workload and cache state, within the bounds on rounds.
        min_rounds, max_rounds: bounds on the rounds.
        progress: called with the fraction done.
    """
    evict = evict or Evictor().evict
    timings: list[Timing] = []
    for i, workload in enumerate(workloads):
        for j, cache in enumerate(("warm", "cold")):
            samples = _measure(workload, evict if cache == "cold" else None, seconds, min_rounds, max_rounds)
            timings += [_timing(workload, name, cache, values) for name, values in samples.items()]
            progress((2 * i + j + 1) / (2 * len(workloads)))
    return BenchReport(
        device=device or device_name(), threads=threads, dtype=dtype, backend=backend, timings=tuple(timings)
    )


def _measure(
    workload: Workload, evict: Callable[[], None] | None, seconds: float, min_rounds: int, max_rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of each run."""
    names = list(workload.runs)
    samples: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds * len(names)
    for turn in range(max_rounds):
        if turn >= min_rounds and time.perf_counter() > end:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            run = workload.runs[name]
            run()  # the others just had the caches; the very first run allocates
            if evict is not None:
                evict()
                samples[name].append(_timed(run))
                continue
            loop_end = time.perf_counter() + WARM_LOOP_SECONDS
            samples[name].append(_timed(run))
            while time.perf_counter() < loop_end:
                samples[name].append(_timed(run))
    return samples


def _timed(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _timing(workload: Workload, runner: str, cache: str, samples: list[float]) -> Timing:
    q1, median, q3, p90, p99 = np.quantile(samples, [0.25, 0.5, 0.75, 0.9, 0.99])
    return Timing(
        subject=workload.subject,
        runner=runner,
        batch=workload.batch,
        cache=cache,
        samples=len(samples),
        median_ms=float(median),
        p90_ms=float(p90),
        p99_ms=float(p99),
        min_ms=min(samples),
        q1_ms=float(q1),
        q3_ms=float(q3),
    )


class Evictor:
    """Pushes everything else out of the CPU's caches by writing to more memory than they hold, every time it is called."""

    def __init__(self) -> None:
        self._buffer = np.zeros(2 * _last_level_cache_bytes() // 8, np.int64)

    def evict(self) -> None:
        self._buffer += 1


def _last_level_cache_bytes() -> int:
    """The largest cache that the kernel reports, within 32 MiB and 512 MiB; 64 MiB where it reports none."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}.get(text[-1], 0) if text[-1].isalpha() else int(text))
    return min(max(max(sizes, default=64 << 20), 32 << 20), 512 << 20)


def device_name() -> str:
    """The processor's model name and how many cores this process may use."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model or platform.machine()}, {cores} cores"
