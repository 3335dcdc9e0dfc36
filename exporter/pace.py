"""How fast text comes: the wait for the first token, and the rate of those after it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Pace:
    """Counts what passes, against a clock that starts when it is made.

    Attributes:
        tokens: how many have passed.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Args: gives seconds."""
        self._clock = clock
        self._start = clock()
        self._first = self._last = self._start
        self.tokens = 0

    def watch(self, tokens: Iterator[T]) -> Iterator[T]:
        """The same tokens, counted as they come."""
        for token in tokens:
            self._last = self._clock()
            if not self.tokens:
                self._first = self._last
            self.tokens += 1
            yield token

    def __str__(self) -> str:
        if not self.tokens:
            return "no tokens"
        text = f"{self.tokens} {'token' if self.tokens == 1 else 'tokens'}, the first after {self._first - self._start:.3f} s"
        seconds = self._last - self._first
        return f"{text}, then {(self.tokens - 1) / seconds:.1f} tokens/s" if seconds > 0 else text
