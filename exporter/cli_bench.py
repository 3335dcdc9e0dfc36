"""The command `bench`: how fast an exported folder is here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from export_vq.terminal import Steps, print_table

if TYPE_CHECKING:
    from export_vq.records import BenchReport

_HEAD = ("decode step", "caches", "median ms", "p90", "p99", "tokens/s")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--context", type=click.IntRange(1), help="Tokens in the KV cache.  [default: 128, if the model has as many]"
)
@click.option("--threads", type=click.IntRange(0), default=0, help="ONNX Runtime's threads; 0: its own choice.")
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=2.0,
    show_default=True,
    envvar="EXPORT_VQ_BENCH_SECONDS",
    show_envvar=True,
    help="Time for each way and cache state that is timed.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with all quantiles.")
def bench(folder: Path, context: int | None, threads: int, seconds: float, as_json: bool) -> None:
    """How fast is what lies in FOLDER on this machine? A decode step of its graphs and engines, with the VQ head and with
    the full softmax head; no checkpoint is needed, so a folder is timed where it was copied to.

    Cold: the caches were emptied before each step. "vq" is the VQ head on the native kernels where these are built.
    """
    from export_vq.folder_bench import bench_folder
    from export_vq.wording import speed_sentences

    reports = bench_folder(folder, Steps(), context=context, threads=threads, seconds=seconds)
    if as_json:
        click.echo(json.dumps([report.to_json() for report in reports], indent=1))
        return
    for report in reports:
        click.echo(f"{report.backend}, {report.dtype}, {report.device}")
        print_table([_HEAD, *_rows(report)])
        for sentence in speed_sentences(report):
            click.echo(sentence)


def _rows(report: BenchReport) -> list[tuple[str, ...]]:
    return [
        (t.runner, t.cache, f"{t.median_ms:.2f}", f"{t.p90_ms:.2f}", f"{t.p99_ms:.2f}", f"{1e3 / t.median_ms:.1f}")
        for t in report.timings
    ]
