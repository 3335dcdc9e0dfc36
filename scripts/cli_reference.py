"""Writes the reference of the command line, read from the command line itself:

.venv/bin/python scripts/cli_reference.py docs/cli.md
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from export_vq.cli import cli

HEAD = """\
# The command line

<!-- Written by scripts/cli_reference.py from the command line itself; a test holds the two together. -->

Every command and option of `export-vq`, as `export-vq COMMAND -h` prints them. What they are for is in the
[README](../README.md#use-it); which exit code means what is in [troubleshooting](troubleshooting.md#exit-codes).
"""


def commands(command: click.Command, context: click.Context) -> Iterator[tuple[click.Command, click.Context]]:
    """The commands of a group and, after each group, those in it, in the order in which they were added."""
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            below = click.Context(inner, info_name=name, parent=context)
            yield inner, below
            yield from commands(inner, below)


def plain(text: str) -> str:
    """Text in which Markdown sees nothing but text."""
    return re.sub(r"([\\`*_<>\[\]|])", r"\\\1", " ".join(text.split()))


def prose(help_text: str) -> str:
    """The paragraphs of a help text; those after click's mark against wrapping as they stand."""
    paragraphs = inspect.cleandoc(help_text).split("\n\n")
    return "\n\n".join(
        "```text\n" + text.removeprefix("\b\n") + "\n```" if text.startswith("\b") else plain(text)
        for text in paragraphs
    )


def usage(command: click.Command, context: click.Context) -> str:
    return f"```text\n{' '.join([context.command_path, *command.collect_usage_pieces(context)])}\n```"


def options(command: click.Command, context: click.Context) -> str:
    """A table of the options, or nothing where there are none but those of help and version."""
    rows = []
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record and isinstance(parameter, click.Option) and not parameter.is_eager:
            name = record[0].replace("|", "\\|")
            rows.append(f"| `{name}` | {plain(record[1])} |")
    return "\n".join(["| option | |", "|---|---|", *rows]) if rows else ""


def link(context: click.Context) -> str:
    return f"[`{context.command_path}`](#{context.command_path.replace(' ', '-')})"


def reference() -> str:
    top = click.Context(cli, info_name="export-vq")
    found = list(commands(cli, top))
    summary = [f"| {link(context)} | {plain(command.get_short_help_str(500))} |" for command, context in found]
    parts = [HEAD.rstrip(), prose(cli.help or ""), "\n".join(["| command | |", "|---|---|", *summary])]
    for command, context in found:
        parts += [f"## {context.command_path}", usage(command, context), prose(command.help or "")]
        parts += [options(command, context)] if options(command, context) else []
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
