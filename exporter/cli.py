"""The command line: parses, calls one verb, prints. Nothing imports this module, and heavy modules load when they are used."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from export_vq.cli_bench import bench
from export_vq.cli_bundle import serve_files
from export_vq.cli_calibrate import calibrate
from export_vq.cli_generate import generate
from export_vq.cli_inspect import doctor, inspect
from export_vq.cli_make import compress, tune
from export_vq.cli_matrix import OPTION, MatrixCommand, run_variants
from export_vq.cli_native import build, plugins
from export_vq.errors import CheckFailed, UserError
from export_vq.terminal import Steps, console, plain

_QUIET = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
"""Libraries keep quiet, as this tool shows its own progress, and never look for a model on the network."""


class _MainJobFirst(click.Group):
    """`export-vq model.pt` is `export-vq run model.pt`: a first word that names no command is the model."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            args = ["run", *args]
        return super().resolve_command(ctx, args)


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
            f"[red]error:[/] {plain(error)}" if isinstance(error, UserError) else f"[red]FAILED:[/] {plain(error)}",
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
    except OSError as error:
        if debug:
            raise
        console.print(
            f"[red]error:[/] {error.filename or 'a file'}: {error.strerror or plain(error)}; see that it may be read or "
            "written, and that the disk has room",
            soft_wrap=True,
        )
        sys.exit(2)
    except Exception as error:
        if debug:
            raise
        console.print(
            f"[red]internal error:[/] {type(error).__name__}: {plain(error)}; this is a bug of export-vq, "
            "please report it with the output of the same command and --debug",
            soft_wrap=True,
        )
        sys.exit(70)


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
            "--last-token",
            is_flag=True,
            help="The head sees the last position only, all that decoding needs of a prompt.",
        ),
        click.option(
            "--top-k",
            type=click.IntRange(1, 256),
            default=50,
            show_default=True,
            help="How many tokens a topk graph gives.",
        ),
        click.option(
            "--output",
            type=click.Choice(["logits", "topk", "sample"]),
            default="logits",
            show_default=True,
            help="What the graph gives: logits of the whole vocabulary, the best tokens with their logits and the "
            "normaliser, or one token drawn at a given random number.",
        ),
        click.option(
            "-o",
            "--out",
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


@cli.command(cls=MatrixCommand)
@_MODEL
@_export_options
@_check_options
@click.option(
    OPTION,
    "matrix",
    multiple=True,
    metavar="KEY=VALUE,...",
    help="Every combination of dtype=, output= and form= values, each in a folder of its own below --out, and one report of "
    "all: --matrix dtype=fp16,int8 output=topk,logits. int8, w8, int4 and fp8 are calibrated on --text.",
)
@click.option(
    "--baseline", type=click.Path(path_type=Path), help="The dense original (folder or GGUF): measures the model gap."
)
@click.option(
    "--prompt",
    default="The capital of France is",
    show_default=True,
    help="What the exported model is asked to continue.",
)
@click.option(
    "--bench-seconds",
    type=click.FloatRange(0, min_open=True),
    default=2.0,
    show_default=True,
    envvar="EXPORT_VQ_BENCH_SECONDS",
    show_envvar=True,
    help="Time for each way, batch size and cache state that is timed.",
)
@click.option("--json", "as_json", is_flag=True, help="Print report.json instead of the summary.")
@click.pass_context
def run(
    context: click.Context,
    model: Path,
    out: Path,
    dtype: str,
    opset: int,
    output: str,
    top_k: int,
    last_token: bool,
    text: Path | None,
    positions: int,
    threads: int,
    baseline: Path | None,
    prompt: str,
    bench_seconds: float,
    matrix: tuple[str, ...],
    as_json: bool,
) -> None:
    """The main job: export MODEL, check it, time it, report. MODEL is a model.pt or a Hugging Face folder."""
    from export_vq.graph import ExportOptions
    from export_vq.pipeline import RunOptions, run_pipeline
    from export_vq.report import render_summary

    export = ExportOptions(dtype=dtype, opset=opset, output=output, top_k=top_k, last_token=last_token)
    options = RunOptions(
        export=export,
        text=text,
        baseline=baseline,
        prompt=prompt,
        positions=positions,
        threads=threads,
        bench_seconds=bench_seconds,
    )
    if matrix:
        run_variants(model, out, matrix, options, as_json=as_json, context=context)
        return
    report = run_pipeline(model, out, options, Steps())
    click.echo(json.dumps(report.to_json(), indent=1) if as_json else render_summary(report))
    console.print(f"report: {out / 'report.html'}")
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
def export(model: Path, out: Path, form: str, external_data_mb: int, **chosen: Any) -> None:
    """Write MODEL's ONNX graph and its dense twin, nothing more."""
    from export_vq.bundle import Bundle
    from export_vq.files import sha256
    from export_vq.graph import ExportOptions
    from export_vq.load import load_model
    from export_vq.manifest import seal
    from export_vq.staging import staged
    from export_vq.steps import export_step

    loaded = load_model(model)
    options = ExportOptions(form=form, external_data_bytes=external_data_mb << 20, **chosen)
    source = sha256(model)
    with staged(out, f"{source} {options}") as folder:
        artifacts = export_step(lambda: loaded, source, Bundle(folder), options, Steps())
        seal(folder)
    for artifact in artifacts.values():
        click.echo(f"{out / artifact.path}  {artifact.form}, {artifact.dtype}, {artifact.num_bytes / 2**20:.1f} MiB")


@cli.command()
@_MODEL
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@_check_options
@click.option("--json", "as_json", is_flag=True, help="Print the full result.")
def check(model: Path, folder: Path, text: Path | None, positions: int, threads: int, as_json: bool) -> None:
    """Is the graph in FOLDER the same function as the checkpoint MODEL? Exit code 1 when it is not."""
    from export_vq.pipeline import RunOptions, check_folder
    from export_vq.wording import continued

    reports = check_folder(model, folder, RunOptions(text=text, positions=positions, threads=threads), Steps())
    if as_json:
        click.echo(json.dumps([report.to_json() for report in reports], indent=1))
    else:
        for report in reports:
            total = report.total
            click.echo(
                f"{'PASS' if report else 'FAIL'}  {report.candidate} against {report.reference}: max error {total.relative_max:.1e} of the logit "
                f"range, top-1 {total.top1_agreement:.2%} of {total.positions} positions, {continued(report)}"
            )
    failures = [failure for report in reports for failure in report.failures]
    if failures:
        raise CheckFailed("; ".join(failures))


for _command in (compress, tune, calibrate, bench, generate, inspect, build, serve_files, plugins, doctor):
    cli.add_command(_command)

if __name__ == "__main__":
    main()
