"""`--matrix` of the main job: how it is written on the command line, and what it prints."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from export_vq.errors import CheckFailed, UserError
from export_vq.terminal import Steps, console
from export_vq.variants import parse_matrix, variants

if TYPE_CHECKING:
    from export_vq.pipeline import RunOptions

OPTION = "--matrix"
_AXIS = re.compile(r"[\w-]+=")


class MatrixCommand(click.Command):
    """Lets `--matrix` be followed by several KEY=VALUE,.. words, as click's options take a fixed number of them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread(args))


def spread(args: list[str]) -> list[str]:
    """The same words with `--matrix` before each KEY=VALUE,.. that follows one."""
    words: list[str] = []
    inside = False
    for word in args:
        inside = word == OPTION or (inside and bool(_AXIS.match(word)))
        if inside and word != OPTION and words[-1] != OPTION:
            words.append(OPTION)
        words.append(word)
    return words


def run_variants(
    model: Path, out: Path, texts: Sequence[str], options: RunOptions, *, as_json: bool, context: click.Context
) -> None:
    """Make what `--matrix` asks for; CheckFailed when a variant failed."""
    from export_vq.matrix import run_matrix
    from export_vq.matrix_report import summarise

    axes = parse_matrix(texts)
    for key in axes:
        if context.get_parameter_source(key) is ParameterSource.COMMANDLINE:
            raise UserError(f"--{key} is given, and {key}= in --matrix too, expected one of them; leave --{key} out")
    export = options.export
    report = run_matrix(
        model,
        out,
        variants(axes, export.dtype, export.output, export.last_token),
        options,
        Steps(),
        lambda name: console.print(f"[bold]{name}[/]"),
    )
    click.echo(json.dumps(report.to_json(), indent=1) if as_json else summarise(report))
    console.print(f"report: {out / 'matrix.html'}")
    failed = [f"{variant.name}: {variant.failures[0]}" for variant in report.variants if not variant]
    if failed:
        raise CheckFailed(f"{len(failed)} of {len(report.variants)} variants: {'; '.join(failed)}")
