"""How a verb tells what it is doing; the command line shows it."""

from __future__ import annotations

from typing import Any, Protocol


class Progress(Protocol):
    """Told what is being done and how far it is."""

    def step(self, name: str) -> Any:
        """A context manager around a step; yields a function that takes what is being done and the fraction done."""
        ...

    def skipped(self, name: str) -> None:
        """A step's result was current."""
        ...
