"""An ONNX graph becomes a TensorRT plan: the only user of the TensorRT builder.

Three kinds, built with the same settings so that they can be compared: 'vq-plugin' (the head in libvq_trt), 'vq-plain'
(the head in TensorRT's own operators) and 'dense' (the full softmax head). Networks are strongly typed: an engine
computes in the types of its graph, and what TensorRT made of it is read back and held to that before anything is kept.

    <folder>/<gpu>-<tensorrt>/<kind>.plan + .json + .onnx, timing.cache

The .onnx beside the plan is what the parser read, so that trtexec can build the plan again. Large weights are not copied
there: their .data file is a relative link to the source's, which TensorRT follows (ONNX Runtime and `onnx.load` refuse
links, and hard links even in the source folder). Copy such a folder with `cp -L`.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from export_vq import proof
from export_vq.build_progress import Tell, make_monitor
from export_vq.engine_source import EngineSource
from export_vq.errors import CheckFailed, UserError
from export_vq.files import sha256, whole
from export_vq.plugins.library import require_library
from export_vq.profiles import CONTEXT, make_profiles
from export_vq.records import EngineArtifact, EngineProfile
from export_vq.require import require
from export_vq.trt import DTYPES, TensorRT, find_tensorrt, last_errors, load_plugin, log, polygraphy


@dataclass(frozen=True)
class EngineOptions:
    """How to build. Shapes are in trtexec's words (see profiles.py); `workspace_bytes` None leaves it to TensorRT.

    `timing_cache` is a file that is read if there and written whole (None: timing.cache beside the plans);
    `version_compatible` lets later TensorRT versions load the plan, `strip` leaves the weights out, to be filled in from
    the .onnx when the plan is loaded, `embed_plugin` puts the plugin library into the plan. `flavour` is one of
    trt.FLAVOURS, None for what is there; `plugin` a libvq_trt.so, None for the one that was built here.
    """

    min_shapes: str = ""
    opt_shapes: str = ""
    max_shapes: str = ""
    context: int = CONTEXT
    timing_cache: Path | None = None
    version_compatible: bool = False
    strip: bool = False
    embed_plugin: bool = False
    workspace_bytes: int | None = None
    flavour: str | None = None
    plugin: Path | None = None

    def to_record(self) -> dict[str, Any]:
        """What shapes a plan, without the paths that do not."""
        paths = ("timing_cache", "plugin")
        return {name: value for name, value in asdict(self).items() if name not in paths}


def build_engine(
    source: Path,
    kind: str,
    folder: Path,
    options: EngineOptions | None = None,
    tell: Tell | None = None,
) -> EngineArtifact:
    """Build one engine.

    Args:
        source: model.onnx (portable or plugin form), dense.onnx, or a head alone.
        kind: one of KINDS.
        folder: where the folder of this GPU and TensorRT goes.
        options: see EngineOptions.
        tell: told what the builder does and the fraction done, now and then.

    Returns:
        the artifact; its sidecar is `<kind>.json`.

    Raises:
        UserError: an input or option cannot be used, or TensorRT refuses; the sentence has TensorRT's own reason.
        CheckFailed: TensorRT made something else of the graph than was meant.
    """
    options = options or EngineOptions()
    here = find_tensorrt(options.flavour)
    if here.flavour == "tensorrt" and here.gpu is None:
        raise UserError(
            f"{here} builds engines on a machine with an NVIDIA GPU, and there is none here; build on the machine that will "
            "run them, or install TensorRT for RTX, whose builder needs none"
        )
    graph = EngineSource(source, kind)
    if options.embed_plugin and kind != "vq-plugin":
        raise UserError(f"a {kind} engine has no plugin to embed; leave --embed-plugin out")
    shapes = {"min": options.min_shapes, "opt": options.opt_shapes, "max": options.max_shapes}
    given = {bound: text for bound, text in shapes.items() if text}
    profiles = make_profiles(graph.inputs, given, context=options.context)
    if options.timing_cache is not None and options.timing_cache.is_dir():
        raise UserError(f"{options.timing_cache}: is a folder, expected a timing cache file; correct --timing-cache")
    library, plugin_sha256 = None, None
    if kind == "vq-plugin":
        library = options.plugin or require_library("vq_trt").path
        plugin_sha256 = load_plugin(here, library)
    job = _Job(here, graph, profiles, library, options)
    target = engine_folder(folder, here)
    try:
        target.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{kind}.", dir=target))
    except OSError as error:
        raise UserError(f"{target}: cannot write there ({error.strerror}); choose another output with -o") from error
    try:
        file = scratch / f"{kind}.onnx"
        data = graph.write_onnx(file)
        plan = scratch / f"{kind}.plan"
        found = _build(job, file, plan, options.timing_cache or target / "timing.cache", tell)
        if here.gpu is not None:
            found = _read_back(job, plan) or found
        for name in (plan.name, *data, file.name):
            _move(scratch / name, target / name)
        for old in target.glob("*.data"):
            if old.is_symlink() and not old.exists():
                old.unlink()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    plan = target / f"{kind}.plan"
    tied_to = here.gpu if here.flavour == "tensorrt" else None
    artifact = EngineArtifact(
        path=plan.name,
        onnx=f"{kind}.onnx",
        kind=kind,
        dtype=graph.dtype,
        flavour=here.flavour,
        tensorrt_version=here.version,
        gpu=tied_to.name if tied_to else None,
        compute_capability=tied_to.compute_capability if tied_to else None,
        plugin_sha256=plugin_sha256,
        source_sha256=graph.source_sha256(),
        profiles=profiles,
        options=options.to_record(),
        input_names=tuple(graph.inputs),
        output_names=graph.outputs,
        cache_shapes=graph.cache_shapes(),
        plugin_layers=found.plugins,
        layers=found.counts,
        layers_from=found.source,
        num_bytes=plan.stat().st_size,
        sha256=sha256(plan),
        versions=builder_versions(),
        **graph.head_output,
    )
    artifact.save(target / f"{kind}.json")
    return artifact


def engine_folder(folder: Path, here: TensorRT) -> Path:
    """<folder>/nvidia-orin-tensorrt-10.3.0; plans of TensorRT for RTX serve 'any' GPU that it supports."""
    gpu = here.gpu.name if here.gpu and here.flavour == "tensorrt" else "any"
    return folder / f"{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}-{here.flavour}-{here.version}"


def builder_versions() -> dict[str, str]:
    """Versions of the packages that shape a plan, besides TensorRT's own."""
    return {name: version(name) for name in ("export-vq", "onnx", "polygraphy")}


def _move(staged: Path, path: Path) -> None:
    """Put a finished file or link in its place; a link becomes relative."""
    if staged.is_symlink():
        origin = os.readlink(staged)
        staged.unlink()
        staged.symlink_to(os.path.relpath(origin, path.parent.resolve()))
    staged.replace(path)


# --------------------------------------------------------------------------------------------------------- building


@dataclass(frozen=True)
class _Job:
    """What is built, of what, with what."""

    here: TensorRT
    source: EngineSource
    profiles: tuple[EngineProfile, ...]
    library: Path | None
    options: EngineOptions


def _build(job: _Job, file: Path, plan: Path, cache: Path, tell: Tell | None) -> proof.Layers:
    """Parse, hold the network to what was meant, build, write the plan; returns the network's layers."""
    trt = job.here.module
    backend = polygraphy(job.here)
    log(job.here).clear()
    flags = getattr(trt.NetworkDefinitionCreationFlag, "__members__", {})
    load = backend.NetworkFromOnnxPath(str(file), strongly_typed="STRONGLY_TYPED" in flags)
    parsed = _refusable(job, f"cannot parse the {job.source.kind} graph", load)
    found = proof.network_layers(trt, parsed[1])
    _check(job, found)
    _check_outputs(job, parsed[1])

    monitor = make_monitor(trt, tell)
    config = _refusable(job, "refuses the options", lambda: _config(job, parsed, monitor))
    timings = config.create_timing_cache(cache.read_bytes() if cache.is_file() else b"")
    # One that is damaged or of another TensorRT is not taken, and the build then times everything anew.
    if timings is None or not config.set_timing_cache(timings, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    try:
        run = backend.EngineBytesFromNetwork(parsed, config=config)
        built = _refusable(job, f"cannot build the {job.source.kind} engine", run)
    except UserError:
        if monitor.interrupted:
            raise KeyboardInterrupt from None
        raise
    if told := proof.logged_layers(log(job.here).layers):
        _check(job, told)
    try:
        plan.write_bytes(built)
    except OSError as error:
        raise UserError(
            f"{plan.parent.parent}: cannot write the plan of {built.nbytes >> 20} MiB ({error.strerror}); free some room or "
            "choose another output with -o"
        ) from error
    # Polygraphy would write the cache in place; ours is there whole or not at all.
    with whole(cache) as staged:
        staged.write_bytes(config.get_timing_cache().serialize())
    return found


def _config(job: _Job, parsed: Any, monitor: Any) -> Any:
    """The builder configuration; equal for every kind but for the plugin."""
    trt, options = job.here.module, job.options
    backend = require("polygraphy.backend.trt")
    rtx = job.here.flavour == "tensorrt_rtx"
    create = require("polygraphy.backend.tensorrt_rtx").CreateConfigRTX if rtx else backend.CreateConfig
    profiles = []
    for wanted in job.profiles:
        profile = backend.Profile()
        for given in wanted.inputs:
            profile.add(given.name, given.min, given.opt, given.max)
        profiles.append(profile)
    limits = {} if options.workspace_bytes is None else {trt.MemoryPoolType.WORKSPACE: options.workspace_bytes}
    config = create(
        profiles=profiles,
        memory_pool_limits=limits,
        version_compatible=options.version_compatible,
        strip_plan=options.strip,
        progress_monitor=monitor,
        profiling_verbosity=trt.ProfilingVerbosity.DETAILED,  # else the inspector tells no types
    )(*parsed[:2])
    # On by default in TensorRT: an fp32 engine would multiply with 10 bits of mantissa.
    config.clear_flag(trt.BuilderFlag.TF32)
    if options.embed_plugin:
        config.plugins_to_serialize = [str(job.library)]
    return config


def _refusable(job: _Job, refusal: str, do: Callable[[], Any]) -> Any:
    """A step of TensorRT's, with Polygraphy quiet; a refusal becomes a UserError with TensorRT's own reason."""
    failed: type[Exception] = require("polygraphy.exception").PolygraphyException
    logger = require("polygraphy.logger").G_LOGGER
    try:
        with logger.verbosity(logger.CRITICAL + 1):
            return do()
    except (failed, RuntimeError, TypeError, ValueError) as error:
        reason = last_errors(job.here) if log(job.here).lines else str(error).strip().split("\n")[0]
        raise UserError(f"{job.source.path}: {job.here} {refusal}: {reason}") from error


def _check(job: _Job, found: proof.Layers) -> None:
    proof.check_layers(found, job.source.kind, job.source.dtype, job.source.nodes)
    proof.check_quantised(found, job.source.kind, job.source.quantised, job.source.products)


def _check_outputs(job: _Job, network: Any) -> None:
    source = job.source
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    dtypes = {tensor.name: DTYPES.get(tensor.dtype.name.lower()) for tensor in outputs}
    if set(dtypes) != set(source.outputs) or any(dtypes[name] != meant for name, meant in source.output_dtypes.items()):
        said = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise CheckFailed(
            f"{source.kind}: outputs {', '.join(source.outputs)} in {source.dtype} were meant, the network has {said}"
        )


def _read_back(job: _Job, plan: Path) -> proof.Layers | None:
    """The layers of the engine itself, held to what was meant.

    None where TensorRT for RTX does not support the GPU that is here: its plans are built for others too.
    """
    trt = job.here.module
    runtime = trt.Runtime(log(job.here))
    runtime.engine_host_code_allowed = job.options.embed_plugin or job.options.version_compatible
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        if job.here.flavour == "tensorrt_rtx":
            return None
        raise UserError(f"{job.source.path}: {job.here} cannot load the engine that it built: {last_errors(job.here)}")
    found = proof.engine_layers(trt, engine)
    _check(job, found)
    return found
