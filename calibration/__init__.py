"""An exported model becomes a quantised one, with what that costs measured: batches -> ranges -> scales -> graph -> limits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export_vq import feeds as fd
from export_vq.calibration.collect import collect, saved
from export_vq.calibration.documents import Material, read_material
from export_vq.calibration.extremes import add_extremes, magnitudes, with_types
from export_vq.calibration.gptq import Grid, gptq
from export_vq.calibration.half import convert, islands
from export_vq.calibration.histogram import Histogram, Largest
from export_vq.calibration.judge import compare, failures
from export_vq.calibration.moments import Moments, second_moments
from export_vq.calibration.options import HALF, WITH_RANGES, CalibrationOptions
from export_vq.calibration.products import Product, chosen, products
from export_vq.calibration.quantise import quantise
from export_vq.calibration.ranges import magnitude
from export_vq.calibration.sensitivity import sensitivity
from export_vq.calibration.smooth import smooth
from export_vq.calibration.source import TEXTS, Source, in_plain_form, open_source
from export_vq.contract import HEAD_PREFIX
from export_vq.files import sha256, write_text
from export_vq.genai import write_genai_config
from export_vq.graph import write_graph
from export_vq.progress import Progress
from export_vq.records import CalibrationReport, ErrorStats, LayerDivergence, OnnxArtifact
from export_vq.runners import OrtRunner, signature_of

__all__ = ["CalibrationOptions", "calibrate"]

REPORT = "calibration.json"
RANGES = "ranges"
"""Folder in the output folder that keeps what calibration runs counted."""
PROBED = 1
"""Blocks of the calibration text that a layer's sensitivity is measured on."""
DENSE_HEAD = "lm_head.weight"
"""The dense twin's output layer is quantised like any other: what a VQ head is honestly held against."""


def calibrate(
    folder: Path, options: CalibrationOptions, progress: Progress, target: Path | None = None
) -> CalibrationReport:
    """Quantise the graph of an output folder, into `<folder>/<precision>`, and measure what that costs.

    The new folder holds what the old one did, so `generate`, `build` and ONNX Runtime take it as they take that, and
    `calibration.json`, the report. The dense twin, where it is there, is quantised in the same way, its output layer too. Ranges that were counted stay in `<folder>/ranges`, for other precisions and methods.

    Args:
        folder: what `export-vq export` or the main job wrote.
        options: see CalibrationOptions.
        progress: told of every step.
        target: another folder to write into.

    Returns:
        the report; falsy when a limit does not hold.

    Raises:
        UserError: the folder, a text or an option cannot be used.
    """
    source = open_source(folder, options)
    width = min(options.width, source.positions)
    material = read_material(options, source.tokenizer, source.artifact.spec.vocab_size, width)
    run = _Run(source, material, options, progress)
    if target is not None:
        run.target = target
    return run.report()


@dataclass(frozen=True)
class _Decisions:
    """What is quantised, and with which numbers: names of products; whose outliers move, and the largest magnitudes [D] that
    say how far; ranges of inputs by name; what each product costs alone; which products int4 gives 8 bits."""

    names: list[str]
    smoothed: list[str] = field(default_factory=list)
    largest: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    magnitudes: dict[str, float] = field(default_factory=dict)
    costs: tuple[LayerDivergence, ...] = ()
    in_8_bits: frozenset[str] = frozenset()


T = TypeVar("T")
_histograms = partial(collect, kind=Histogram)


class _Count(Protocol[T]):
    """What collects of tensors: collect.collect or moments.second_moments."""

    def __call__(
        self,
        model: ir.Model,
        taps: dict[str, str],
        signature: fd.Signature,
        blocks: NDArray[np.int64],
        cache: Path,
        made_from: dict[str, Any],
        *,
        threads: int,
        tell: Callable[[float], None],
    ) -> dict[str, T]: ...


class _Run:
    """One call of `calibrate`."""

    def __init__(self, source: Source, material: Material, options: CalibrationOptions, progress: Progress) -> None:
        self.source, self.material, self.options, self.progress = source, material, options, progress
        self.target, self.ranges = source.folder / options.precision, source.folder / RANGES
        self.signature = signature_of(source.artifact)
        self.graph_sha256 = sha256(source.path)
        self.notes: list[str] = []
        self.moments: Moments = {}
        self.grids: dict[str, Grid] = {}

    def report(self) -> CalibrationReport:
        options, source = self.options, self.source
        decisions = self._decided() if options.precision not in HALF else _Decisions([], magnitudes=self._extremes())
        target = self.target
        model, names, kept = self._made(source.graph, decisions)
        artifact = self._write(model, source.artifact, target)
        if source.dense is not None:
            dense, _, _ = self._made(source.dense, decisions)
            self._write(dense, OnnxArtifact.load(source.folder / "dense.onnx.json"), target)
        for name in TEXTS:
            if (source.folder / name).is_file():
                write_text(target / name, (source.folder / name).read_text(encoding="utf-8"))
        write_genai_config(target, artifact, source.config)
        stats = self._judge(artifact, target, decisions)
        if stats.perplexity_reference > source.artifact.spec.vocab_size:
            self.notes.append(
                f"the unquantised model's perplexity on the text is {stats.perplexity_reference:.4g}, worse than guessing among "
                f"its {source.artifact.spec.vocab_size} tokens: is this text in its language, and tokenizer.json its own?"
            )
        report = CalibrationReport(
            path=artifact.path,
            precision=options.precision,
            runtime=options.runtime,
            method=options.method
            if options.precision in WITH_RANGES
            else options.rounding * (options.precision == "int4"),
            block=options.block if _blockwise(options) else 0,
            smooth=self._alpha,
            head="quantised" if options.quantise_head else "as exported",
            samples=len(self.material.calibration),
            documents=self.material.documents,
            document_sha256=self.material.sha256,
            quantised=len(names),
            kept=kept,
            total=stats,
            limits=options.limits,
            failures=failures(stats, options.limits),
            num_bytes=artifact.num_bytes,
            source_bytes=source.artifact.num_bytes,
            source_sha256=self.graph_sha256,
            versions={name: version(name) for name in ("export-vq", "onnx", "numpy")},
            sensitivity=decisions.costs,
            notes=tuple(self.notes),
        )
        report.save(target / REPORT)
        return report

    @property
    def _alpha(self) -> float:
        return self.options.smooth if self.options.precision == "int8" else 0.0

    def _decided(self) -> _Decisions:
        """What to do, found on the VQ graph; its dense twin is treated in the same way."""
        options, graph = self.options, self.source.graph
        found = products(graph)
        names = [p.name for p in chosen(found, _names(options.keep), head=options.quantise_head)]
        four = {p.name for p in chosen(found, _names(options.eight), head=True)}
        decisions = _Decisions(names, in_8_bits=frozenset(p.name for p in found if p.name not in four))
        if self._alpha:
            seen = self._counted(graph, {}, _histograms)
            largest = {name: histogram.channels for name, histogram in seen.items()}
            decisions = dataclasses.replace(decisions, smoothed=names, largest=largest)
        smoothed = graph.clone()
        self._smooth(smoothed, decisions)
        if options.precision in WITH_RANGES:
            made = {"smooth": [self._alpha, names]} if self._alpha else {}
            seen = self._counted(smoothed, made, _histograms)
            ranges = {name: magnitude(h, options.method, options.precision) for name, h in seen.items()}
            decisions = dataclasses.replace(decisions, magnitudes=ranges)
        if self._by_moments:
            self.moments = self._counted(graph, {}, second_moments)
        if options.sensitivity or options.kept_most_sensitive or options.eight_most_sensitive or options.quantise_head:
            costs = self._costs(smoothed, decisions)
            spared = {cost.name for cost in costs if cost.kept}
            left = [name for name in names if name not in spared]
            eight = [cost.name for cost in costs if not cost.kept][: options.eight_most_sensitive]
            decisions = dataclasses.replace(
                decisions, names=left, costs=costs, in_8_bits=decisions.in_8_bits | frozenset(eight)
            )
        return decisions

    @property
    def _by_moments(self) -> bool:
        return self.options.precision == "int4" and self.options.rounding == "gptq"

    def _grid(self, layer: Product) -> Grid:
        """A product's weight in 4 bits; found once for the VQ graph, its dense twin and the sensitivities."""
        if layer.name not in self.grids:
            symmetric = self.options.runtime == "tensorrt"
            moments = self.moments[str(layer.activation.name)]
            self.grids[layer.name] = gptq(layer.numbers(), moments, self.options.block, symmetric=symmetric)
        return self.grids[layer.name]

    def _smooth(self, model: ir.Model, decisions: _Decisions) -> None:
        names = set(decisions.smoothed)
        layers = [p for p in products(model) if p.name in names and not p.is_head]
        done = smooth(model, layers, decisions.largest, self._alpha) if layers else 0
        if layers and not self.notes:
            inputs = len({layer.activation for layer in layers})
            self.notes.append(f"outliers of {done} of {inputs} inputs moved into the weights, alpha {self._alpha}")

    def _extremes(self) -> dict[str, float]:
        """The largest magnitude of everything that the graph computes."""
        model = with_types(self.source.graph)
        seen = self._collect(model, add_extremes(model), {}, partial(collect, kind=Largest))
        return magnitudes({name: extreme.largest for name, extreme in seen.items()})

    def _made(self, graph: ir.Model, decisions: _Decisions) -> tuple[ir.Model, list[str], tuple[str, ...]]:
        """A graph as decided; the names of the products that were changed, and of those that were not."""
        if self.options.precision in HALF:
            return self._narrowed(graph, decisions)
        return self._quantised(graph, decisions)

    def _narrowed(
        self, graph: ir.Model, decisions: _Decisions, *, simulated: bool = False
    ) -> tuple[ir.Model, list[str], tuple[str, ...]]:
        model, dtype = with_types(graph), self.options.precision
        wide, large = islands(model, decisions.magnitudes, dtype)
        names = {p.name: str(p.node.outputs[0].name) in wide for p in products(model)}
        convert(model, wide, dtype, simulated=simulated)
        if not self.notes:
            largest = max(decisions.magnitudes, key=lambda name: decisions.magnitudes[name])
            self.notes.append(
                f"largest activation {decisions.magnitudes[largest]:.4g} ({largest}); float32 stay {len(wide)} nodes, as "
                f"their type is too small for {len(large)} values{': ' if large else ''}{', '.join(list(large)[:8])}"
            )
        return model, [name for name, kept in names.items() if not kept], tuple(n for n, kept in names.items() if kept)

    def _quantised(self, graph: ir.Model, decisions: _Decisions) -> tuple[ir.Model, list[str], tuple[str, ...]]:
        """A graph quantised as decided; the names that were, and those that were not."""
        model = graph.clone()
        self._smooth(model, decisions)
        everything = products(model)
        wanted = {*decisions.names, DENSE_HEAD}
        with self.progress.step("round"):
            left = quantise(
                model,
                [p for p in everything if p.name in wanted],
                self.options,
                decisions.magnitudes,
                grid=self._grid if self._by_moments else None,
                in_8_bits=decisions.in_8_bits,
            )
        if decisions.in_8_bits:
            note = f"in 8 bits: {', '.join(sorted(decisions.in_8_bits))}"
            self.notes += [note] * (note not in self.notes)
        names = [p.name for p in everything if p.name in wanted and p.name not in left]
        if left:
            note = f"left as they are, their sizes are no multiple of {self.options.block}: {', '.join(left)}"
            self.notes += [note] * (note not in self.notes)
        return model, names, tuple(p.name for p in everything if p.name not in names)

    def _counted(self, graph: ir.Model, made: dict[str, Any], count: _Count[T]) -> dict[str, T]:
        """Of what enters the products; of all of them, so that the counts serve whatever is kept later."""
        model = in_plain_form(graph)
        taps: dict[str, str] = {}
        for layer in products(model):
            taps.setdefault(str(layer.activation.name), layer.name)
        if self.source.dense is not None:
            taps |= {str(p.activation.name): p.name for p in products(self.source.dense) if p.name == DENSE_HEAD}
        return self._collect(model, taps, made, count)

    def _collect(self, model: ir.Model, taps: dict[str, str], made: dict[str, Any], count: _Count[T]) -> dict[str, T]:
        with self.progress.step("ranges") as tell:
            return count(
                model,
                taps,
                self.signature,
                self.material.calibration,
                self.ranges,
                {"graph": self.graph_sha256, "version": version("export-vq"), **made},
                threads=self.options.threads,
                tell=lambda part: tell("ranges", part),
            )

    def _costs(self, graph: ir.Model, decisions: _Decisions) -> tuple[LayerDivergence, ...]:
        """Of the layers, or of a quantised codebook alone, whose cost is always told."""
        everything = self.options.sensitivity or "auto:" in self.options.keep + self.options.eight
        with self.progress.step("sensitivity") as tell:
            found = sensitivity(
                in_plain_form(graph),
                [name for name in decisions.names if everything or name.startswith(HEAD_PREFIX)],
                self.options,
                decisions.magnitudes,
                self.signature,
                self.material.calibration[:PROBED],
                self.source.folder,
                lambda part: tell("sensitivity", part),
                grid=self._grid if self._by_moments else None,
            )
        order = sorted(found, key=lambda name: -found[name])
        kept = set(order[: self.options.kept_most_sensitive])
        return tuple(LayerDivergence(name, found[name], name in kept) for name in order)

    def _write(self, model: ir.Model, exported: OnnxArtifact, target: Path) -> OnnxArtifact:
        target.mkdir(parents=True, exist_ok=True)
        precision, dtype = self.options.precision, exported.dtype
        precision, dtype = ("", precision) if precision in HALF else (precision, dtype)
        artifact = dataclasses.replace(exported, precision=precision, dtype=dtype, file_sha256={})
        with self.progress.step(f"write {artifact.path}"):
            return write_graph(model, target, artifact)

    def _judge(self, artifact: OnnxArtifact, target: Path, decisions: _Decisions) -> ErrorStats:
        threads = self.options.threads
        with (
            self.progress.step("test") as tell,
            OrtRunner(self.source.path, self.signature, threads=threads) as reference,
            self._candidate(artifact, target, decisions) as candidate,
        ):
            return compare(reference, candidate, self.material.test, lambda part: tell("test", part))

    @contextmanager
    def _candidate(self, artifact: OnnxArtifact, target: Path, decisions: _Decisions) -> Iterator[OrtRunner]:
        """What was made, ready to run. 16-bit types are simulated: ONNX Runtime's CPU provider has no kernels for bf16, and
        leaves out the roundings between its float32 kernels for fp16, so that what overflows elsewhere would not here."""
        threads = self.options.threads
        if self.options.precision not in HALF:
            path, signature = target / artifact.path, signature_of(artifact)
            with OrtRunner(path, signature, threads=threads, fuse_quantised=artifact.fusible) as runner:
                yield runner
            return
        self.notes.append(f"tested in float32 with every result rounded to {self.options.precision}")
        model, _, _ = self._narrowed(self.source.graph, decisions, simulated=True)
        with saved(model, target) as path, OrtRunner(path, self.signature, threads=threads) as runner:
            yield runner


def _names(said: str) -> list[str]:
    return [] if said.startswith("auto:") else [name for name in said.split(",") if name]


def _blockwise(options: CalibrationOptions) -> bool:
    return options.precision == "int4" or (options.precision == "w8" and options.runtime == "onnxruntime")
