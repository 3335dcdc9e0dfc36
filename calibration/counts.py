"""What is counted on the calibration text, for all products at once, so that every choice of layers finds it on disk."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

import onnx_ir as ir

from export_vq import feeds as fd
from export_vq.calibration.collect import collect
from export_vq.calibration.documents import Ids
from export_vq.calibration.extremes import add_extremes, magnitudes, with_types
from export_vq.calibration.histogram import Histogram, Largest
from export_vq.calibration.moments import Moments, second_moments
from export_vq.calibration.products import DENSE_HEAD, products
from export_vq.calibration.source import Source, in_plain_form
from export_vq.files import sha256
from export_vq.progress import Progress
from export_vq.runners import signature_of

RANGES = "ranges"
"""Folder in the output folder that keeps what calibration runs counted."""

T = TypeVar("T")


class _Count(Protocol[T]):
    """What collects of tensors: collect.collect or moments.second_moments."""

    def __call__(
        self,
        model: ir.Model,
        taps: dict[str, str],
        signature: fd.Signature,
        blocks: Ids,
        cache: Path,
        made_from: dict[str, Any],
        *,
        threads: int,
        tell: Callable[[float], None],
    ) -> dict[str, T]: ...


class Counts:
    """Runs an exported model over the calibration text, or finds what such a run has left in its folder."""

    def __init__(self, source: Source, blocks: Ids, threads: int, progress: Progress) -> None:
        """Args: the model, token ids int64 [n, S], threads of ONNX Runtime, who is told."""
        self._source, self._blocks, self._threads, self._progress = source, blocks, threads, progress
        self._signature = signature_of(source.artifact)
        self._graph_sha256 = sha256(source.path)

    def histograms(self, graph: ir.Model, made: dict[str, Any]) -> dict[str, Histogram]:
        """Of every input of a product, by its name; `made` is what was done to the model's own graph, {} for nothing."""
        return self._of_products(graph, made, partial(collect, kind=Histogram))

    def moments(self) -> Moments:
        """Second moments of every input of a product, by its name."""
        return self._of_products(self._source.graph, {}, second_moments)

    def check(self) -> None:
        """Run one block where nothing else is counted, for the error that names the layer whose input is NaN or infinite."""
        self._of_products(self._source.graph, {"counted": "largest"}, partial(collect, kind=Largest), self._blocks[:1])

    def extremes(self) -> dict[str, float]:
        """The largest magnitude of everything that the graph computes."""
        model = with_types(self._source.graph)
        seen = self._collect(model, add_extremes(model), {}, partial(collect, kind=Largest), self._blocks)
        return magnitudes({name: extreme.largest for name, extreme in seen.items()})

    def _of_products(
        self, graph: ir.Model, made: dict[str, Any], count: _Count[T], blocks: Ids | None = None
    ) -> dict[str, T]:
        """Of all of them, so that the counts serve whatever is kept later."""
        model = in_plain_form(graph)
        taps: dict[str, str] = {}
        for layer in products(model):
            taps.setdefault(str(layer.activation.name), layer.name)
        if self._source.dense is not None:
            taps |= {str(p.activation.name): p.name for p in products(self._source.dense) if p.name == DENSE_HEAD}
        return self._collect(model, taps, made, count, self._blocks if blocks is None else blocks)

    def _collect(
        self, model: ir.Model, taps: dict[str, str], made: dict[str, Any], count: _Count[T], blocks: Ids
    ) -> dict[str, T]:
        with self._progress.step("ranges") as tell:
            return count(
                model,
                taps,
                self._signature,
                blocks,
                self._source.folder / RANGES,
                {"graph": self._graph_sha256, "version": version("export-vq"), **made},
                threads=self._threads,
                tell=lambda part: tell("ranges", part),
            )
