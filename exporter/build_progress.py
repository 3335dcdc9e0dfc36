"""How far a TensorRT build is, told while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

Tell = Callable[[str, float], None]
"""Takes what is being done and the fraction done."""

_SLOWEST = 0.1
"""Seconds between two calls."""


class Phases:
    """How far a build is, from the phases that TensorRT announces: each has steps, and some a phase inside."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[str | None, int, int]] = {}
        """phase -> (the phase around it, its steps, steps done)"""

    def start(self, name: str, parent: str | None, steps: int) -> None:
        self._open[name] = (parent, max(1, steps), 0)

    def step(self, name: str, index: int) -> None:
        parent, steps, _ = self._open[name]
        self._open[name] = (parent, steps, min(index + 1, steps))

    def finish(self, name: str) -> None:
        self._open.pop(name, None)

    def fraction(self) -> float:
        """Of the outermost phase; a phase inside counts as its share of one step of the phase around it."""
        return max(
            (self._done(name) for name, (parent, _, _) in self._open.items() if parent not in self._open), default=0
        )

    def _done(self, name: str) -> float:
        _, steps, done = self._open[name]
        inside = max((self._done(n) for n, (parent, _, _) in self._open.items() if parent == name), default=0.0)
        return min(1.0, (done + inside) / steps)


def make_monitor(trt: Any, tell: Tell | None) -> Any:
    """TensorRT's progress monitor, handing on to `tell`; Ctrl-C stops the build at the next step."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases = Phases()
            self.interrupted = False
            self.told = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._hear(lambda: self.phases.start(phase_name, parent_phase, num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._hear(lambda: self._step(phase_name, step))
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            self._hear(lambda: self.phases.finish(phase_name))

        def _step(self, phase: str, index: int) -> None:
            self.phases.step(phase, index)
            now = time.monotonic()
            if tell is not None and now - self.told > _SLOWEST:
                self.told = now
                tell(phase, self.phases.fraction())

        def _hear(self, do: Callable[[], None]) -> None:
            # An exception cannot pass through TensorRT; Ctrl-C is kept until the build has stopped.
            try:
                do()
            except KeyboardInterrupt:
                self.interrupted = True

    return Monitor()
