"""Reading a plan back: refused with the reason where this machine is not the one that it was built for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export_vq.errors import UserError
from export_vq.files import is_inside, sha256
from export_vq.manifest import bundled_library
from export_vq.plugins.library import find, require_library
from export_vq.records import EngineArtifact
from export_vq.trt import TensorRT, find_tensorrt, last_errors, load_plugin, log


@dataclass(frozen=True)
class LoadedEngine:
    """A deserialised engine, what its sidecar says, and the TensorRT that holds it."""

    artifact: EngineArtifact
    here: TensorRT
    runtime: Any
    engine: Any


def load_engine(sidecar: Path, *, plugin: Path | None = None) -> LoadedEngine:
    """Deserialise the plan that a sidecar describes.

    Args:
        sidecar: <kind>.json beside the plan.
        plugin: the libvq_trt.so that the plan needs; None for the one of the output folder around it when that is the
            one, else the one that was built here.

    Raises:
        UserError: the plan is damaged, was built for another TensorRT or GPU, or needs another plugin library.
    """
    artifact = EngineArtifact.load(sidecar)
    outside = [name for name in (artifact.path, artifact.onnx) if not is_inside(name)]
    if outside:
        raise UserError(f"{sidecar}: it names {outside[0]!r}, expected a file of the same folder; build it again")
    plan = sidecar.with_name(artifact.path)
    if not plan.is_file() or sha256(plan) != artifact.sha256:
        raise UserError(f"{plan}: missing, or not the file that {sidecar.name} describes; build it again")
    here = find_tensorrt(artifact.flavour)
    check_fit(plan, artifact, here)
    embedded = bool(artifact.options["embed_plugin"])
    if artifact.plugin_sha256 is not None and not embedded:
        library = plugin or _plugin_library(sidecar, artifact.plugin_sha256)
        if load_plugin(here, library) != artifact.plugin_sha256:
            raise UserError(
                f"{plan}: built with another plugin library than {library}; build it again with: export-vq build, or give the "
                "library that it was built with"
            )
    log(here).clear()
    runtime = here.module.Runtime(log(here))
    # Such plans carry code of their own, a plugin library or a lean runtime; TensorRT wants to be asked for it.
    runtime.engine_host_code_allowed = embedded or bool(artifact.options["version_compatible"])
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise UserError(f"{plan}: {here} cannot load it: {last_errors(here)}")
    if artifact.options["strip"]:
        _refit(here, engine, sidecar.with_name(artifact.onnx))
    return LoadedEngine(artifact, here, runtime, engine)


def check_fit(plan: Path, artifact: EngineArtifact, here: TensorRT) -> None:
    """Whether this TensorRT and GPU may load the plan.

    A plan is for the exact version and GPU that built it; one that was built version-compatible also for later versions;
    one of TensorRT for RTX for every GPU.

    Raises:
        UserError: they may not; the sentence says what the plan is for, and what is here.
    """
    mend = "build it again here with: export-vq build"
    if here.flavour != artifact.flavour:
        raise UserError(f"{plan}: built by {artifact.flavour}, here is {here.flavour}; {mend}")
    ours, theirs = _numbers(here.version), _numbers(artifact.tensorrt_version)
    compatible = bool(artifact.options["version_compatible"])
    if ours != theirs and not (compatible and ours > theirs):
        kind = "version-compatible with later versions" if compatible else "for that version only"
        raise UserError(
            f"{plan}: built by {artifact.flavour} {artifact.tensorrt_version} and {kind}, here is {here.version}; {mend}"
        )
    if here.gpu is None:
        raise UserError(f"{plan}: needs an NVIDIA GPU to run, and there is none here; run it on the machine it is for")
    if artifact.gpu is not None and (artifact.gpu, artifact.compute_capability) != (
        here.gpu.name,
        here.gpu.compute_capability,
    ):
        raise UserError(
            f"{plan}: built for {artifact.gpu} (compute capability {artifact.compute_capability}), here is {here.gpu.name} "
            f"({here.gpu.compute_capability}); {mend}"
        )


def _plugin_library(sidecar: Path, needed: str) -> Path:
    """The library with this hash, if it was built here or came along in the output folder: out/engines/<machine>/<kind>.json."""
    own = find("vq_trt")
    if own is None or own.sha256 != needed:
        parents = sidecar.resolve().parents
        bundled = bundled_library(parents[min(2, len(parents) - 1)], "vq_trt")
        if bundled is not None and bundled.sha256 == needed:
            return bundled.path
    return require_library("vq_trt").path


def _refit(here: TensorRT, engine: Any, onnx: Path) -> None:
    """Put the weights back into an engine whose plan was stripped of them."""
    trt = here.module
    refitter = trt.Refitter(engine, log(here))
    parser = trt.OnnxParserRefitter(refitter, log(here))
    if not onnx.is_file() or not parser.refit_from_file(str(onnx)) or not refitter.refit_cuda_engine():
        raise UserError(
            f"{onnx}: the stripped plan takes its weights from here, and cannot ({last_errors(here)}); build it again"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())
