"""A graph as it was decided: quantised, or in a 16-bit type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export_vq.calibration.extremes import with_types
from export_vq.calibration.gptq import Grid
from export_vq.calibration.half import convert, islands
from export_vq.calibration.options import HALF, CalibrationOptions
from export_vq.calibration.products import DENSE_HEAD, Product, products
from export_vq.calibration.quantise import quantise
from export_vq.calibration.smooth import smooth
from export_vq.progress import Progress
from export_vq.records import LayerDivergence


@dataclass(frozen=True)
class Decisions:
    """What is quantised, and with which numbers: names of products; whose outliers move, and the largest magnitudes [D] that
    say how far; ranges of inputs by name; what each product costs alone; which products int4 gives 8 bits, and how it
    finds 4 bits of the others, None for the nearest. Of a 16-bit type the ranges are those of all values, and nothing else counts."""

    names: list[str] = field(default_factory=list)
    smoothed: list[str] = field(default_factory=list)
    largest: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    magnitudes: dict[str, float] = field(default_factory=dict)
    costs: tuple[LayerDivergence, ...] = ()
    in_8_bits: frozenset[str] = frozenset()
    grid: Callable[[Product], Grid] | None = None


class Made(NamedTuple):
    """A graph, the names of the products that were changed, and of those that were not."""

    model: ir.Model
    changed: tuple[str, ...]
    kept: tuple[str, ...]


class Maker:
    """Makes graphs for one call of `calibrate`; `notes` says once what a user should know of it."""

    def __init__(self, options: CalibrationOptions, progress: Progress) -> None:
        self._options, self._progress = options, progress
        self.notes: list[str] = []

    def made(self, graph: ir.Model, decisions: Decisions) -> Made:
        """A copy as decided."""
        if self._options.precision in HALF:
            return self.narrowed(graph, decisions)
        return self._quantised(graph, decisions)

    def narrowed(self, graph: ir.Model, decisions: Decisions, *, simulated: bool = False) -> Made:
        """A copy in the 16-bit type; `simulated`: in float32, with every result rounded to that type."""
        model, dtype = with_types(graph), self._options.precision
        wide, large = islands(model, decisions.magnitudes, dtype)
        names = {p.name: str(p.node.outputs[0].name) in wide for p in products(model)}
        convert(model, wide, dtype, simulated=simulated)
        if not self.notes:
            largest = max(decisions.magnitudes, key=lambda name: decisions.magnitudes[name])
            near = (
                f"; {len(large)} values come too near to what {dtype} holds: {', '.join(list(large)[:8])}"
                if large
                else ""
            )
            self.notes.append(
                f"largest activation {decisions.magnitudes[largest]:.4g} ({largest}); {len(wide)} nodes stay float32, norms and "
                f"positions as always{near}"
            )
        changed = tuple(name for name, kept in names.items() if not kept)
        return Made(model, changed, tuple(name for name, kept in names.items() if kept))

    def _quantised(self, graph: ir.Model, decisions: Decisions) -> Made:
        model = graph.clone()
        self.smooth(model, decisions)
        everything = products(model)
        wanted = {*decisions.names, DENSE_HEAD}
        with self._progress.step("round"):
            left = quantise(
                model,
                [p for p in everything if p.name in wanted],
                self._options,
                decisions.magnitudes,
                grid=decisions.grid,
                in_8_bits=decisions.in_8_bits,
            )
        if decisions.in_8_bits:
            self._note(f"in 8 bits: {', '.join(sorted(decisions.in_8_bits))}")
        if left:
            self._note(f"left as they are, their sizes are no multiple of {self._options.block}: {', '.join(left)}")
        changed = tuple(p.name for p in everything if p.name in wanted and p.name not in left)
        return Made(model, changed, tuple(p.name for p in everything if p.name not in changed))

    def smooth(self, model: ir.Model, decisions: Decisions) -> None:
        """Move outliers from inputs into weights, in place."""
        names, alpha = set(decisions.smoothed), self._options.alpha
        layers = [p for p in products(model) if p.name in names and not p.is_head]
        done = smooth(model, layers, decisions.largest, alpha) if layers else 0
        if layers and not self.notes:
            inputs = len({layer.activation for layer in layers})
            self.notes.append(f"outliers of {done} of {inputs} inputs moved into the weights, alpha {alpha}")

    def _note(self, note: str) -> None:
        self.notes += [note] * (note not in self.notes)
