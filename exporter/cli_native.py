"""The commands around native code: `build` (TensorRT engines) and `plugins` (the libraries)."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from export_vq.terminal import Steps, console, plain, yes

if TYPE_CHECKING:
    from export_vq.plugins.library import Library
    from export_vq.records import EngineArtifact


@click.command()
@click.argument("source", metavar="MODEL_OR_FOLDER", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Output folder.  [default: FOLDER, or out for a MODEL]"
)
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    default="fp16",
    show_default=True,
    help="Type to export a MODEL in; a FOLDER has its own.",
)
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    type=click.Choice(["vq-plugin", "vq-plain", "dense"]),
    help="Engine to build; repeat for more.  [default: all that this machine can]",
)
@click.option("--min-shapes", default="", help="Smallest shapes, NAME:AxBx..,.. or prefill/NAME:.., decode/NAME:..")
@click.option("--opt-shapes", default="", help="Shapes to tune for.")
@click.option("--max-shapes", default="", help="Largest shapes.")
@click.option(
    "--timing-cache", type=click.Path(path_type=Path, dir_okay=False), help="Timing cache to read and to write."
)
@click.option("--version-compatible", is_flag=True, help="Plans that later TensorRT versions load too.")
@click.option("--strip", is_flag=True, help="Plans without weights; loading takes them from the .onnx beside.")
@click.option("--embed-plugin", is_flag=True, help="Put the plugin library into the vq-plugin plan.")
@click.option("--workspace-mb", type=click.IntRange(1), help="Most scratch memory that the builder may give a layer.")
@click.option(
    "--tensorrt", "flavour", type=click.Choice(["tensorrt", "tensorrt_rtx"]), help="Which one, where both are."
)
@click.option(
    "--plugin",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The libvq_trt.so to build with.  [default: the one built here]",
)
@click.option(
    "--for",
    "target",
    metavar="smNN-trtX.Y",
    help="Build nothing here: write a folder (-o) with graphs, plugin sources and a script that builds on that device.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the artifacts as JSON.")
def build(
    source: Path,
    output: Path | None,
    dtype: str,
    kinds: tuple[str, ...],
    min_shapes: str,
    opt_shapes: str,
    max_shapes: str,
    timing_cache: Path | None,
    version_compatible: bool,
    strip: bool,
    embed_plugin: bool,
    workspace_mb: int | None,
    flavour: str | None,
    plugin: Path | None,
    target: str | None,
    as_json: bool,
) -> None:
    """Build TensorRT engines of MODEL, or of the graphs in FOLDER: vq-plugin, vq-plain and dense.

    A MODEL is exported to the output folder first, where that holds no current graphs of it; what graphs there give, logits
    or the best tokens, stays.

    Every engine gets a prefill and a decode profile, printed when it is built; the shapes options move them.
    """
    from export_vq.engine import EngineOptions
    from export_vq.engines import build_engines, options_for
    from export_vq.manifest import seal

    steps = Steps()
    if (
        source.suffix != ".onnx"
        and source.exists()
        and not any((source / n).is_file() for n in ("model.onnx", "dense.onnx"))
    ):
        from export_vq.bundle import Bundle
        from export_vq.files import sha256
        from export_vq.load import load_model
        from export_vq.steps import export_step, options_in

        output = output or Path("out")
        bundle = Bundle(output)
        export_step(lambda: load_model(source), sha256(source), bundle, options_in(bundle, dtype), steps)
        source = output
    options = EngineOptions(
        min_shapes=min_shapes,
        opt_shapes=opt_shapes,
        max_shapes=max_shapes,
        timing_cache=timing_cache,
        version_compatible=version_compatible,
        strip=strip,
        embed_plugin=embed_plugin,
        workspace_bytes=None if workspace_mb is None else workspace_mb << 20,
        flavour=flavour,
        plugin=plugin,
    )
    if target is not None:
        from export_vq.device_kit import write_kit

        kit = output if output not in (None, source) else Path(target)
        write_kit(source / "model.onnx" if source.is_dir() else source, target, kit, options_for(source, options))
        click.echo(f"{kit}: copy it to the device and run {kit.name}/build.sh there")
        return
    out = output or (source if source.is_dir() else source.parent)
    built, not_done = build_engines(source, out, kinds, options_for(source, options), steps)
    if (out / "model.onnx.json").is_file():  # an output folder, not just a place for plans
        seal(out)
    if as_json:
        click.echo(json.dumps({"engines": [a.to_json() for a in built.values()], "not_done": not_done}, indent=1))
        return
    for artifact in built.values():
        print_engine(artifact)
    for line in not_done:
        console.print(f"not done: {plain(Exception(line))}", soft_wrap=True)


@click.group()
def plugins() -> None:
    """The native libraries: kernels, ONNX Runtime custom ops, TensorRT plugin."""


@plugins.command("build")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder of the libraries; default: the package's own."
)
@click.option(
    "--ort-include-dir",
    type=click.Path(path_type=Path),
    help="Folder of onnxruntime_cxx_api.h; default: fetched once (150 MB).",
)
@click.option(
    "--tensorrt-include-dir",
    type=click.Path(path_type=Path),
    help="Folder of NvInferRuntime.h; default: TENSORRT_ROOT, the system's, else fetched once.",
)
@click.option("--cuda/--no-cuda", default=True, show_default=True, help="Compile the CUDA kernels where nvcc is.")
@click.option(
    "--cuda-architectures",
    default="",
    metavar="LIST",
    help="Compute capabilities, as in 87,120; default: all that nvcc knows.",
)
@click.option("--jobs", type=click.IntRange(0), default=0, help="Compilers at a time; 0: one per core.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def build_plugins(
    output: Path | None,
    ort_include_dir: Path | None,
    tensorrt_include_dir: Path | None,
    cuda: bool,
    cuda_architectures: str,
    jobs: int,
    as_json: bool,
) -> None:
    """Build the libraries that this machine can build, and say why for those that it cannot."""
    from export_vq.plugins.build import BuildOptions, build_libraries
    from export_vq.plugins.library import LIB

    options = BuildOptions(
        output=output or LIB,
        ort_include_dir=ort_include_dir,
        tensorrt_include_dir=tensorrt_include_dir,
        cuda=cuda,
        cuda_architectures=tuple(cuda_architectures.replace(",", " ").split()),
        jobs=jobs,
    )
    result = build_libraries(options, Steps())
    if as_json:
        click.echo(json.dumps(asdict(result), default=str, indent=1))
        return
    for library in result.libraries:
        click.echo(f"built      {library.name:14s}{_library_line(library)}")
    for what, why in result.not_built.items():
        click.echo(f"not built  {what:14s}{why}")


@plugins.command("list")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_plugins(folder: Path | None, as_json: bool) -> None:
    """The libraries in FOLDER (default: the package's own), and whether they fit this version's sources."""
    from export_vq.plugins.library import LIB, LIBRARIES, build_command, find

    found = {name: find(name, folder) for name in LIBRARIES}
    if as_json:
        listed = {name: library and asdict(library) for name, library in found.items()}
        click.echo(json.dumps(listed, default=str, indent=1))
        return
    for name, library in found.items():
        state = "missing" if library is None else "current" if library.current else "stale"
        line = f"{LIBRARIES[name]}, not in {folder or LIB}" if library is None else _library_line(library)
        mend = "" if state == "current" else f"  ->  {build_command(folder)}"
        click.echo(f"{state:9s}{name:8s}{line}{mend}")


def _library_line(library: Library) -> str:
    return f"{library.path}  CUDA: {yes(library.cuda)}"


def print_engine(engine: EngineArtifact) -> None:
    from export_vq.profiles import describe
    from export_vq.wording import engine_sentence

    click.echo(engine_sentence(engine))
    for profile in engine.profiles:
        click.echo(f"  {profile.name}: {describe(profile)}")
