"""What runs an output folder: TensorRT on its GPU, ONNX Runtime on CUDA, ONNX Runtime on the CPU, in this order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from export_vq.errors import UserError
from export_vq.forms import read_graph
from export_vq.records import EngineArtifact, OnnxArtifact
from export_vq.require import require
from export_vq.runners import CPU, CUDA, OrtRunner, read_head, signature_of
from export_vq.top_k_graph import end_in_top_k
from export_vq.trt_runner import TrtRunner

AUTO = "auto"
BACKENDS = (AUTO, "tensorrt", "cuda", "cpu")
_KINDS = ("vq-plugin", "vq-plain")
"""Engines of the VQ model, the faster one first."""


def open_runner(folder: Path, artifact: OnnxArtifact, backend: str = AUTO, threads: int = 0) -> OrtRunner | TrtRunner:
    """Open the model of an output folder for writing text.

    Args:
        folder: holds model.onnx; engines/*/ where engines were built.
        artifact: the record of model.onnx.
        backend: one of BACKENDS; 'auto' takes the first that works here.
        threads: ONNX Runtime's intra-op threads (0: its own choice).

    Raises:
        UserError: this machine, or this folder, cannot do it that way.
    """
    ways: dict[str, Callable[[], OrtRunner | TrtRunner]] = {
        "tensorrt": partial(_engine, folder, artifact),
        "cuda": partial(_on_cuda, folder, artifact, threads),
        "cpu": partial(_session, folder, artifact, threads, CPU),
    }
    if backend not in BACKENDS:
        raise UserError(f"--backend is {backend!r}, expected one of {', '.join(BACKENDS)}; correct it")
    if backend != AUTO:
        return ways[backend]()
    for way in ("tensorrt", "cuda"):
        try:
            return ways[way]()
        except UserError:
            continue  # most machines have neither
    return ways["cpu"]()


def longest_sequence(runner: OrtRunner | TrtRunner) -> int | None:
    """Prompt and new tokens together, as far as the runner sets a limit: an engine's profiles do, a session does not."""
    if isinstance(runner, OrtRunner):
        return None
    masks = [
        given for profile in runner.artifact.profiles for given in profile.inputs if given.name == "attention_mask"
    ]
    return max((given.max[1] for given in masks), default=None)


def _engine(folder: Path, artifact: OnnxArtifact) -> TrtRunner:
    """The engine of this graph that this machine can load."""
    sidecars = [path for kind in _KINDS for path in sorted(folder.glob(f"engines/*/{kind}.json"))]
    if not sidecars:
        raise UserError(f"{folder}: holds no TensorRT engine of the VQ model; build one with: export-vq build {folder}")
    reason = None
    for sidecar in sidecars:
        try:
            told = EngineArtifact.load(sidecar).source_sha256
            if any(artifact.file_sha256.get(name) != digest for name, digest in told.items()):
                raise UserError(
                    f"{sidecar}: built from another {artifact.path}; build it again with: export-vq build {folder}"
                )
            return TrtRunner(sidecar, head=read_head(folder / artifact.path))
        except UserError as error:
            reason = reason or error
    assert reason is not None
    raise reason


def _on_cuda(folder: Path, artifact: OnnxArtifact, threads: int) -> OrtRunner:
    offered = require("onnxruntime", extra="gpu").get_available_providers()
    if CUDA not in offered:
        raise UserError(
            f"--backend is 'cuda', but the ONNX Runtime here offers {', '.join(offered)} only; install onnxruntime-gpu in the "
            "place of onnxruntime"
        )
    if not torch.cuda.is_available():
        raise UserError(
            f"PyTorch {torch.__version__} sees no CUDA device, and the KV cache lies in its tensors; install PyTorch for CUDA"
        )
    if artifact.dtype == "bf16":
        raise UserError(
            f"{folder / artifact.path}: is in bf16, of which ONNX Runtime gives Python no arrays; export with --dtype fp16, or "
            "use --backend tensorrt"
        )
    return _session(folder, artifact, threads, CUDA)


def _session(folder: Path, artifact: OnnxArtifact, threads: int, provider: str) -> OrtRunner:
    """The graph in ONNX Runtime; one with V logits ends in the best tokens of the last position instead."""
    file, signature, graph = folder / artifact.path, signature_of(artifact), read_graph(folder / artifact.path)
    output = end_in_top_k(graph, artifact)
    if output is not None:
        signature = dataclasses.replace(signature, output=output.word, top_k=output.top_k, last_token=output.last_token)
    return OrtRunner(
        file,
        signature,
        threads=threads,
        provider=provider,
        bundle=folder,
        edited=None if output is None else graph,
        fuse_quantised=artifact.fusible,
    )
