"""How fast an exported folder is on the machine that it lies on, without the checkpoint that it was made from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export_vq.bench import run_benchmark
from export_vq.checkpoint import positions_of, read_json
from export_vq.engine_steps import RUNNERS, bench_engines, sidecar
from export_vq.errors import UserError
from export_vq.progress import Progress
from export_vq.records import BenchReport, EngineArtifact, OnnxArtifact
from export_vq.runners import native_library
from export_vq.trt import find_tensorrt
from export_vq.workloads import CONTEXT, runners, step_workload


def bench_folder(
    folder: Path, progress: Progress, *, context: int | None = None, threads: int = 0, seconds: float = 2.0
) -> tuple[BenchReport, ...]:
    """Time a decode step of everything in an output folder that this machine runs, with the VQ head and with the full
    softmax head where that was exported too: its graphs in ONNX Runtime on the CPU, its engines in TensorRT.

    Args:
        folder: as `export-vq MODEL -o FOLDER` or `export-vq calibrate` writes it.
        progress: told of every step.
        context: tokens in the KV cache, random ones, which take the same time as any; None: 128, or as many as the model
            has positions for.
        threads: ONNX Runtime's intra-op threads (0: its own choice).
        seconds: time for each way and cache state.

    Returns:
        a report of the graphs, and one of the engines where there are some for this GPU.

    Raises:
        UserError: there is nothing that this machine can run, or the model has fewer positions.
    """
    artifact = _record(folder, "model.onnx")
    positions = positions_of(read_json(folder / "config.json"))
    if context is None:
        context = min(CONTEXT, positions - 1) if positions else CONTEXT
    elif positions and context >= positions:
        raise UserError(
            f"{folder}: --context is {context}, expected less than the model's {positions} positions; give a smaller one"
        )
    ids = np.random.default_rng(0).integers(0, artifact.spec.vocab_size, (1, context))
    engines = _bench_engines(folder, ids, progress)
    if artifact.form == "plugin":
        if engines is None:
            raise UserError(
                f"{folder / artifact.path}: is in the plugin form, which TensorRT alone runs, and there is no engine of it "
                f"for this machine; build one with: export-vq build {folder}"
            )
        return (engines,)
    graphs = _bench_graphs(folder, artifact, ids, progress, threads=threads, seconds=seconds)
    return (graphs,) if engines is None else (graphs, engines)


def _bench_graphs(
    folder: Path,
    artifact: OnnxArtifact,
    ids: NDArray[np.int64],
    progress: Progress,
    *,
    threads: int,
    seconds: float,
) -> BenchReport:
    artifacts = {"vq": artifact}
    if (folder / "dense.onnx").is_file():
        artifacts["dense"] = _record(folder, "dense.onnx")
    native = artifact.form == "portable" and native_library(folder) is not None
    with progress.step("bench") as tell, runners(folder, artifacts, threads, native=native) as named:
        return run_benchmark(
            [step_workload(named, ids)],
            threads=threads,
            dtype=artifact.precision or artifact.dtype,
            backend=named["vq"].name,
            seconds=seconds,
            progress=lambda part: tell("bench", part),
        )


def _bench_engines(folder: Path, ids: NDArray[np.int64], progress: Progress) -> BenchReport | None:
    try:
        here = find_tensorrt()
    except UserError:
        return None
    sidecars = {kind: sidecar(folder, here, kind) for kind in RUNNERS}
    engines = {kind: EngineArtifact.load(path) for kind, path in sidecars.items() if path.is_file()}
    if here.gpu is None or not engines:
        return None
    with progress.step("bench engines") as tell:
        return bench_engines(folder, here, engines, ids, lambda part: tell("bench engines", part))


def _record(folder: Path, name: str) -> OnnxArtifact:
    if not (folder / name).is_file():
        raise UserError(f"{folder}: holds no {name}; write the folder with: export-vq MODEL -o {folder}")
    return OnnxArtifact.load(folder / f"{name}.json")
