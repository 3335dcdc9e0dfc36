"""What the commands print with: progress on standard error, results on standard output."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

console = Console(stderr=True, highlight=False)
"""Progress and messages; results go to standard output."""


class Steps:
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


def plain(error: BaseException) -> str:
    """The message with rich's markup switched off."""
    return str(error).replace("[", r"\[")


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    table = Table.grid(padding=(0, 2))
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    Console(highlight=False).print(table)


def mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.2f} MiB"


def yes(flag: bool) -> str:
    return "yes" if flag else "no"
