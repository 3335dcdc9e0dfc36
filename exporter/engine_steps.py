"""The engines' part of the walk: built where a TensorRT is, checked and timed where its GPU is too."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export_vq import feeds
from export_vq.bench import Workload, run_benchmark
from export_vq.engine import EngineOptions, engine_folder
from export_vq.engines import FOLDER, build_engines, options_for
from export_vq.errors import UserError
from export_vq.progress import Progress
from export_vq.records import BenchReport, EngineArtifact
from export_vq.trt import TensorRT, find_tensorrt
from export_vq.trt_runner import TrtRunner
from export_vq.workloads import STOCK

RUNNERS = {"vq-plugin": "vq", "vq-plain": STOCK, "dense": "dense"}
"""Engine kind -> what its timings are called, as those of ONNX Runtime are."""


def make_engines(folder: Path, progress: Progress) -> tuple[dict[str, EngineArtifact], TensorRT | None, list[str]]:
    """The engines of an output folder that this machine can build.

    Returns:
        {kind: artifact}; the TensorRT that made them, None without; and what was not done, each with the mend.
    """
    try:
        here = find_tensorrt()
        built, not_done = build_engines(folder, folder, (), options_for(folder, EngineOptions()), progress)
    except UserError as error:
        return {}, None, [f"TensorRT engines: {error}"]
    if here.gpu is None:
        not_done.append(
            "TensorRT engines: built, not run, as there is no NVIDIA GPU here; copy the folder to a machine that has one and "
            "run the same command there"
        )
    return built, here, not_done


def sidecar(folder: Path, here: TensorRT, kind: str) -> Path:
    """Where an engine of an output folder is described."""
    return engine_folder(folder / FOLDER, here) / f"{kind}.json"


def bench_engines(
    folder: Path,
    here: TensorRT,
    engines: dict[str, EngineArtifact],
    ids: np.ndarray[Any, np.dtype[np.int64]],
    tell: Callable[[float], None],
) -> BenchReport:
    """Time a decode step of every engine after a prompt `ids` int64 [1, S], captured as a CUDA graph.

    What is timed ends when the GPU is done; tensors stay on the GPU.
    """
    with ExitStack() as stack:
        runs = {}
        for kind in engines:
            runner = stack.enter_context(TrtRunner(sidecar(folder, here, kind), cuda_graph=True))
            runs[RUNNERS[kind]] = _step(runner, feeds.first_step(runner, ids))
        assert here.gpu is not None
        return run_benchmark(
            [Workload("decode step", 1, runs)],
            threads=0,
            dtype=next(iter(engines.values())).dtype,
            backend=str(here),
            device=here.gpu.name,
            evict=_gpu_evictor(),
            progress=tell,
        )


def _step(runner: TrtRunner, given: feeds.Feeds) -> Callable[[], None]:
    tensors = runner.to_device(given)

    def run() -> None:
        runner.run(tensors)
        runner.synchronize()

    return run


def _gpu_evictor() -> Callable[[], None]:
    """Pushes everything else out of the GPU's second cache by writing twice its size."""
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    buffer = torch.empty(2 * size, dtype=torch.uint8, device="cuda")

    def evict() -> None:
        buffer.zero_()
        torch.cuda.synchronize()

    return evict
