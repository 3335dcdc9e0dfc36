"""The command line: parses, calls one verb, prints. Nothing imports this module, and heavy modules load when they are used."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from export_vq.errors import CheckFailed, UserError

if TYPE_CHECKING:
    from export_vq.plugins.library import Library

_QUIET = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
"""Libraries keep quiet, as this tool shows its own progress, and never look for a model on the network."""

console = Console(stderr=True, highlight=False)
"""Progress and messages; results go to standard output."""


class _MainJobFirst(click.Group):
    """`export-vq model.pt` is `export-vq run model.pt`: a first word that names no command is the model."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            args = ["run", *args]
        return super().resolve_command(ctx, args)


class _Steps:
    """Progress on the terminal: one line a step, a bar while it runs."""

    def __init__(self) -> None:
        self._live = console.is_terminal

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[Callable[[str, float], None]]:
        start = time.perf_counter()
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:16s}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        if not self._live:
            console.print(f"  {name} ...")
        with Progress(*columns, console=console, transient=True, disable=not self._live) as bar:
            task = bar.add_task(name, total=None)
            yield lambda what, fraction: bar.update(task, description=what, total=1.0, completed=fraction)
        console.print(f"[green]✓[/] {name:24s} {time.perf_counter() - start:6.1f} s")

    def skipped(self, name: str) -> None:
        console.print(f"[green]✓[/] {name:24s} unchanged, skipped")


def main() -> None:
    """Entry point: exit code 0 done, 1 a check failed, 2 usage or input; a traceback only with --debug."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    debug = "--debug" in sys.argv
    try:
        cli.main(args=[a for a in sys.argv[1:] if a != "--debug"], standalone_mode=False)
    except (UserError, CheckFailed) as error:
        if debug:
            traceback.print_exc()
        console.print(
            f"[red]error:[/] {_plain(error)}" if isinstance(error, UserError) else f"[red]FAILED:[/] {_plain(error)}",
            soft_wrap=True,
        )
        sys.exit(error.exit_code)
    except click.exceptions.Abort:
        console.print("interrupted; what was finished is kept, run again to go on")
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except ModuleNotFoundError as error:
        if debug or str(error.name).startswith("export_vq"):
            raise
        console.print(
            f"[red]error:[/] {error.name} cannot be imported; install it with: pip install -c constraints.txt export-vq"
        )
        sys.exit(2)
    except MemoryError:
        console.print("[red]error:[/] out of memory; close other programs, or use a machine with more")
        sys.exit(2)
    except Exception as error:
        if debug:
            raise
        console.print(
            f"[red]internal error:[/] {type(error).__name__}: {_plain(error)}; this is a bug of export-vq, "
            "please report it with the output of the same command and --debug",
            soft_wrap=True,
        )
        sys.exit(70)


def _plain(error: BaseException) -> str:
    """The message with rich's markup switched off."""
    return str(error).replace("[", r"\[")


def _export_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--opset", type=int, default=20, show_default=True, help="ONNX opset."),
        click.option(
            "--dtype",
            type=click.Choice(["fp32", "fp16", "bf16"]),
            default="fp32",
            show_default=True,
            help="Type of weights, cache and logits.",
        ),
        click.option(
            "-o",
            "--output",
            type=click.Path(path_type=Path),
            default=Path("out"),
            show_default=True,
            help="Output folder.",
        ),
    ):
        command = option(command)
    return command


def _check_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--threads", type=click.IntRange(0), default=0, help="Threads of ONNX Runtime; 0 lets it choose."),
        click.option(
            "--positions", type=click.IntRange(256), default=2048, show_default=True, help="Token positions to compare."
        ),
        click.option(
            "--text",
            type=click.Path(path_type=Path),
            help="UTF-8 text, or a folder of .txt files, to check and measure on.",
        ),
    ):
        command = option(command)
    return command


_MODEL = click.argument("model", type=click.Path(path_type=Path))


@click.group(cls=_MainJobFirst, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("export-vq"), prog_name="export-vq")
def cli() -> None:
    """Deploy language models with a VQ-Logits output layer.

    \b
    export-vq model.pt        checkpoint to checked, timed ONNX graphs and a report
    export-vq COMMAND -h      the options of a command

    Every command takes --debug, which prints a traceback with an error.
    """


@cli.command()
@_MODEL
@_export_options
@_check_options
@click.option(
    "--baseline", type=click.Path(path_type=Path), help="The dense original (folder or GGUF): measures the model gap."
)
@click.option(
    "--prompt",
    default="The capital of France is",
    show_default=True,
    help="What the exported model is asked to continue.",
)
@click.option("--json", "as_json", is_flag=True, help="Print report.json instead of the summary.")
def run(
    model: Path,
    output: Path,
    dtype: str,
    opset: int,
    text: Path | None,
    positions: int,
    threads: int,
    baseline: Path | None,
    prompt: str,
    as_json: bool,
) -> None:
    """The main job: export MODEL, check it, time it, report. MODEL is a model.pt or a Hugging Face folder."""
    from export_vq.graph import ExportOptions
    from export_vq.pipeline import RunOptions, run_pipeline
    from export_vq.report import render_summary

    export = ExportOptions(dtype=dtype, opset=opset)
    options = RunOptions(
        export=export, text=text, baseline=baseline, prompt=prompt, positions=positions, threads=threads
    )
    report = run_pipeline(model, output, options, _Steps())
    click.echo(json.dumps(report.to_json(), indent=1) if as_json else render_summary(report))
    console.print(f"report: {output / 'report.html'}")
    if not report:
        raise CheckFailed("; ".join(failure for check in report.parity for failure in check.failures))


@cli.command()
@_MODEL
@_export_options
@click.option(
    "--form",
    type=click.Choice(["portable", "plain", "plugin"]),
    default="portable",
    show_default=True,
    help="Form of the VQ node.",
)
@click.option(
    "--external-data-mb",
    type=click.IntRange(0),
    default=100,
    show_default=True,
    help="Weights above this go to a .data file.",
)
def export(model: Path, output: Path, dtype: str, opset: int, form: str, external_data_mb: int) -> None:
    """Write MODEL's ONNX graph and its dense twin, nothing more."""
    from export_vq.bundle import Bundle
    from export_vq.files import sha256
    from export_vq.graph import ExportOptions
    from export_vq.load import load_model
    from export_vq.steps import export_step

    loaded = load_model(model)
    options = ExportOptions(dtype=dtype, form=form, opset=opset, external_data_bytes=external_data_mb << 20)
    artifacts = export_step(lambda: loaded, sha256(model), Bundle(output), options, _Steps())
    for artifact in artifacts.values():
        click.echo(f"{output / artifact.path}  {artifact.form}, {artifact.dtype}, {artifact.num_bytes / 2**20:.1f} MiB")


@cli.command()
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
    as_json: bool,
) -> None:
    """Build TensorRT engines of MODEL, or of the graphs in FOLDER: vq-plugin, vq-plain and dense.

    Every engine gets a prefill and a decode profile, printed when it is built; the shapes options move them.
    """
    from export_vq.engine import EngineOptions
    from export_vq.engines import build_engines, options_for
    from export_vq.profiles import describe

    steps = _Steps()
    if (
        source.suffix != ".onnx"
        and source.exists()
        and not any((source / n).is_file() for n in ("model.onnx", "dense.onnx"))
    ):
        from export_vq.bundle import Bundle
        from export_vq.files import sha256
        from export_vq.graph import ExportOptions
        from export_vq.load import load_model
        from export_vq.steps import export_step

        output = output or Path("out")
        export_step(lambda: load_model(source), sha256(source), Bundle(output), ExportOptions(dtype=dtype), steps)
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
    out = output or (source if source.is_dir() else source.parent)
    built, not_done = build_engines(source, out, kinds, options_for(source, options), steps)
    if as_json:
        click.echo(json.dumps({"engines": [a.to_json() for a in built.values()], "not_done": not_done}, indent=1))
        return
    for artifact in built.values():
        for profile in artifact.profiles:
            click.echo(f"{artifact.kind:10s} {profile.name}: {describe(profile)}")
        plugins = ", ".join(
            f"{p.plugin} {p.output_dtypes[0] if p.output_dtypes else ''}" for p in artifact.plugin_layers
        )
        click.echo(
            f"{artifact.kind:10s} {artifact.dtype}, {artifact.num_bytes / 2**20:.1f} MiB, {sum(artifact.layers.values())} layers in the "
            f"{artifact.layers_from}, by plugins: {plugins or 'none'}"
        )
    for line in not_done:
        console.print(f"not done: {_plain(Exception(line))}", soft_wrap=True)


@cli.command()
@_MODEL
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@_check_options
@click.option("--json", "as_json", is_flag=True, help="Print the full result.")
def check(model: Path, folder: Path, text: Path | None, positions: int, threads: int, as_json: bool) -> None:
    """Is the graph in FOLDER the same function as the checkpoint MODEL? Exit code 1 when it is not."""
    from export_vq.pipeline import RunOptions, check_folder

    reports = check_folder(model, folder, RunOptions(text=text, positions=positions, threads=threads), _Steps())
    if as_json:
        click.echo(json.dumps([report.to_json() for report in reports], indent=1))
    else:
        for report in reports:
            total = report.total
            click.echo(
                f"{'PASS' if report else 'FAIL'}  {report.candidate} against {report.reference}: max error {total.relative_max:.1e} of the logit "
                f"range, top-1 {total.top1_agreement:.2%} of {total.positions} positions, {report.greedy_equal}/{report.greedy_tokens} greedy tokens"
            )
    failures = [failure for report in reports for failure in report.failures]
    if failures:
        raise CheckFailed("; ".join(failures))


@cli.command()
@_MODEL
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    required=True,
    help="UTF-8 text, or a folder of .txt files, like what the model will meet.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("model.pt"),
    show_default=True,
    help="model.pt, or a folder for Hugging Face form.",
)
@click.option(
    "--kind", type=click.Choice(["product", "single"]), default="product", show_default=True, help="Head kind."
)
@click.option(
    "--num-codebooks",
    type=click.IntRange(1),
    help="M of a product head; default: the largest divisor of hidden_size up to a quarter of it.",
)
@click.option(
    "--num-codes", type=click.IntRange(1, 65536), default=256, show_default=True, help="K, codes per codebook."
)
@click.option("--bias/--no-bias", default=True, show_default=True, help="A bias per token.")
@click.option(
    "--calibration-tokens",
    type=click.IntRange(256),
    default=32768,
    show_default=True,
    help="How much of the text to run through the model.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the clustering.")
def compress(
    model: Path,
    text: Path,
    output: Path,
    kind: str,
    num_codebooks: int | None,
    num_codes: int,
    bias: bool,
    calibration_tokens: int,
    seed: int,
) -> None:
    """Make a VQ-Logits model out of MODEL, a causal language model as a Hugging Face folder or a GGUF file."""
    from export_vq.compress import CompressOptions
    from export_vq.steps import compress_step

    options = CompressOptions(
        kind=kind,
        num_codebooks=num_codebooks,
        num_codes=num_codes,
        bias=bias,
        seed=seed,
        calibration_tokens=calibration_tokens,
    )
    spec = compress_step(model, text, output, options, _Steps())
    click.echo(
        f"{output}: {spec.kind} head, M={spec.num_codebooks}, K={spec.num_codes}, {spec.head_bytes() / 2**20:.1f} MiB in fp16, "
        f"{spec.head_bytes() / spec.dense_bytes():.1%} of the dense head's {spec.dense_bytes() / 2**20:.1f} MiB"
    )


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="UTF-8 text: prints the lowest perplexity that the mapping allows on it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(path: Path, text: Path | None, as_json: bool) -> None:
    """Say what PATH is: a checkpoint or an ONNX file."""
    from export_vq.inspection import inspect_path

    found = inspect_path(path, text)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=1))
        return
    spec = found.spec
    rows = [
        ("what", f"{found.what}, {found.model_type}, {found.dtype}"),
        ("file", _mib(found.file_bytes)),
        (
            "head",
            f"{spec.kind}: V={spec.vocab_size} D={spec.hidden_size} M={spec.num_codebooks} K={spec.num_codes}, bias: {_yes(spec.has_bias)}, rotation: {_yes(spec.has_rotation)}",
        ),
        (
            "head numbers",
            f"{spec.float_numbers:,} against {spec.dense_numbers:,} dense ({1 - spec.float_numbers / spec.dense_numbers:.1%} fewer)",
        ),
        (
            "head bytes",
            f"{_mib(found.head_bytes)} against {_mib(found.dense_head_bytes)} dense ({found.head_bytes / found.dense_head_bytes:.1%})",
        ),
        ("model bytes", f"{_mib(found.model_bytes)} against {_mib(found.dense_model_bytes)} with the dense head"),
    ]
    if found.tied_embedding:
        rows.append(
            (
                "tied",
                "the input embedding stays dense, so nothing is saved on disk; bandwidth and time of the output layer are",
            )
        )
    if found.floor is not None:
        rows.append(("perplexity floor", f"{found.floor:.3f} on this text: no training of this mapping can go below"))
    rows += [("note", note) for note in found.notes]
    _print_table(rows)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """What this machine has, what it lacks, and how to mend it."""
    from export_vq.doctor import examine

    findings = examine()
    if as_json:
        click.echo(json.dumps([finding.to_json() for finding in findings], indent=1))
        return
    _print_table([(f"{f.state:8s}{f.subject}", f.detail + (f"  ->  {f.mend}" if f.mend else "")) for f in findings])


@cli.group()
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
    result = build_libraries(options, _Steps())
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
    return f"{library.path}  CUDA: {_yes(library.cuda)}"


def _print_table(rows: list[tuple[str, str]]) -> None:
    table = Table.grid(padding=(0, 2))
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    Console(highlight=False).print(table)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.2f} MiB"


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


if __name__ == "__main__":
    main()
