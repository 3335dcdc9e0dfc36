"""How fast, against what: paired timings of VQ and dense in one run.

Both runners take turns inside every round and swap who goes first, so that drift of a shared machine meets both alike.
Cold means that the CPU's caches were evicted before every single run, as the backbone of a decode step does to the
head; warm is a loop of nothing else.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export_vq import feeds as fd
from export_vq.records import BenchReport, Timing


@dataclass(frozen=True)
class Workload:
    """One thing to time on each of two runners: `runners` and `feeds` share the keys 'vq' and 'dense'."""

    subject: str
    batch: int
    runners: dict[str, fd.Runner]
    feeds: dict[str, fd.Feeds]


def run_benchmark(
    workloads: Sequence[Workload],
    *,
    threads: int,
    dtype: str,
    backend: str,
    seconds: float = 2.0,
    min_rounds: int = 15,
    max_rounds: int = 300,
    progress: Callable[[float], None] = lambda _: None,
) -> BenchReport:
    """Time every workload, warm and cold.

    Args:
        workloads: what to run.
        threads: the runners' intra-op threads, for the record.
        dtype: of the graphs, for the record.
        backend: what ran them, for the record.
        seconds: time to spend on each workload and cache state, within the bounds on rounds.
        min_rounds, max_rounds: bounds on the samples of each timing.
        progress: called with the fraction done.
    """
    evictor = _Evictor()
    timings: list[Timing] = []
    for i, workload in enumerate(workloads):
        for j, cache in enumerate(("warm", "cold")):
            samples = _measure(workload, evictor if cache == "cold" else None, seconds, min_rounds, max_rounds)
            timings += [_timing(workload, name, cache, values) for name, values in samples.items()]
            progress((2 * i + j + 1) / (2 * len(workloads)))
    return BenchReport(device=device_name(), threads=threads, dtype=dtype, backend=backend, timings=tuple(timings))


def _measure(
    workload: Workload, evictor: _Evictor | None, seconds: float, min_rounds: int, max_rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of each runner, one sample a round."""
    names = list(workload.runners)
    samples: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for turn in range(max_rounds):
        if turn >= min_rounds and time.perf_counter() > end:
            break
        for name in names if turn % 2 else reversed(names):
            runner, feeds = workload.runners[name], workload.feeds[name]
            runner.infer(feeds)  # the other runner just had the caches; the very first run allocates
            if evictor is not None:
                evictor.evict()
            start = time.perf_counter()
            runner.infer(feeds)
            samples[name].append((time.perf_counter() - start) * 1e3)
    return samples


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


class _Evictor:
    """Pushes everything else out of the CPU's caches by writing to more memory than they hold."""

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
