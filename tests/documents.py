"""The Markdown documents of the repository, parsed as GitHub parses them, and the commands that they name."""

from __future__ import annotations

import functools
import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
from markdown_it import MarkdownIt
from markdown_it.token import Token

from export_vq.cli import cli
from export_vq.cli_matrix import spread

ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])
SHELLS = ("sh", "bash", "shell", "console")
"""Languages of code blocks that hold commands."""
_OPERATORS = frozenset("();<>|&")


@dataclass(frozen=True)
class Table:
    """`heading` is the one that it stands under; cells are text, marks such as code spans taken off."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@functools.cache
def tokens(path: Path) -> tuple[Token, ...]:
    return tuple(MARKDOWN.parse(path.read_text(encoding="utf-8")))


def inline(path: Path) -> Iterator[Token]:
    """Everything inside paragraphs, headings and cells: text, code spans, links, images."""
    for token in tokens(path):
        yield from token.children or ()


def text_of(token: Token) -> str:
    """What a reader sees of an inline token."""
    return "".join(child.content for child in token.children or ())


def headings(path: Path) -> list[tuple[int, str]]:
    """(level, text)."""
    parsed = tokens(path)
    return [
        (int(opening.tag[1]), text_of(content))
        for opening, content in itertools.pairwise(parsed)
        if opening.type == "heading_open"
    ]


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings: equal ones are numbered from the second on."""
    found: dict[str, int] = {}
    names = set()
    for _, text in headings(path):
        name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        count = found.get(name, 0)
        found[name] = count + 1
        names.add(f"{name}-{count}" if count else name)
    return names


def tables(path: Path) -> list[Table]:
    found: list[Table] = []
    heading = ""
    lines: list[list[str]] = []
    for token, before in zip(tokens(path), (None, *tokens(path)), strict=False):
        if token.type == "inline" and before is not None and before.type == "heading_open":
            heading = text_of(token)
        elif token.type == "table_open":
            lines = []
        elif token.type == "tr_open":
            lines.append([])
        elif token.type == "inline" and before is not None and before.type in ("th_open", "td_open"):
            lines[-1].append(text_of(token))
        elif token.type == "table_close":
            columns, *rows = [tuple(cells) for cells in lines]
            found.append(Table(heading, columns, tuple(rows)))
    return found


def shell_blocks(path: Path) -> list[str]:
    """The code blocks that hold commands; those without a language are indented ones, which are commands here too."""
    blocks = []
    for token in tokens(path):
        words = token.info.split()
        if token.type == "code_block" or (token.type == "fence" and words and words[0] in SHELLS):
            blocks.append(token.content)
    return blocks


def commands(shell: str) -> list[list[str]]:
    """The words after `export-vq` of every call of it in a piece of shell."""
    found = []
    for line in shell.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        call: list[str] | None = None
        first = True  # in its command
        for word in lexer:
            ends = bool(word) and set(word) <= _OPERATORS
            if ends:
                call = None
            elif call is not None:
                call.append(word)
            elif first and Path(word).name == "export-vq":
                call = []
                found.append(call)
            first = ends
    return found


def command_of(words: list[str]) -> tuple[click.Context, list[str]]:
    """The command, or the group, that words call, by the rules of the command line itself, and the words left for it."""
    context = click.Context(cli, info_name="export-vq", **cli.context_settings)
    command: click.Command = cli
    while isinstance(command, click.Group) and words:
        _, inner, words = command.resolve_command(context, list(words))
        assert inner is not None
        command = inner
        context = click.Context(command, info_name=command.name, parent=context)
    return context, words


def check_call(words: list[str]) -> None:
    """Raise click.UsageError unless the command line would take these words, whatever files there are."""
    if words in (["-h"], ["--help"], ["--version"]):
        return
    context, rest = command_of(words)
    if set(rest) & {"-h", "--help"}:
        return
    command = context.command
    if isinstance(command, click.Group):
        raise click.UsageError(f"{command.name} needs one of its commands")
    words = spread([word for word in rest if word != "--debug"])
    given, more, _ = command.make_parser(context).parse_args(words)
    if more:
        raise click.UsageError(f"{' '.join(more)} is left over")
    for parameter in command.params:
        value = given.get(str(parameter.name))
        values = [word for word in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(word, str)]
        if parameter.required and not values:
            raise click.UsageError(f"{parameter.name} is missing")
        if not isinstance(parameter.type, click.Path):
            for word in values:
                parameter.type.convert(word, parameter, context)
