"""An exported model becomes a quantised one, with what that costs measured: batches -> ranges -> scales -> graph -> limits."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from export_vq.calibration.collect import collect
from export_vq.calibration.documents import Material, read_material
from export_vq.calibration.judge import compare, failures
from export_vq.calibration.options import WITH_RANGES, CalibrationOptions
from export_vq.calibration.products import Product, chosen, products
from export_vq.calibration.quantise import quantise
from export_vq.calibration.ranges import magnitude
from export_vq.calibration.sensitivity import sensitivity
from export_vq.calibration.smooth import smooth
from export_vq.calibration.source import TEXTS, Source, in_plain_form, open_source
from export_vq.files import sha256, write_text
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


def calibrate(folder: Path, options: CalibrationOptions, progress: Progress) -> CalibrationReport:
    """Quantise the graph of an output folder, into `<folder>/<precision>`, and measure what that costs.

    The new folder holds what the old one did, so `generate`, `build` and ONNX Runtime take it as they take that, and
    `calibration.json`, the report. Ranges that were counted stay in `<folder>/ranges`, for other precisions and methods.

    Args:
        folder: what `export-vq export` or the main job wrote.
        options: see CalibrationOptions.
        progress: told of every step.

    Returns:
        the report; falsy when a limit does not hold.

    Raises:
        UserError: the folder, a text or an option cannot be used.
    """
    source = open_source(folder, options)
    width = min(options.width, source.positions)
    material = read_material(options, source.tokenizer, source.artifact.spec.vocab_size, width)
    return _Run(source, material, options, progress).report()


class _Run:
    """One call of `calibrate`."""

    def __init__(self, source: Source, material: Material, options: CalibrationOptions, progress: Progress) -> None:
        self.source, self.material, self.options, self.progress = source, material, options, progress
        self.signature = signature_of(source.artifact)
        self.graph_sha256 = sha256(source.path)
        self.notes: list[str] = []

    def report(self) -> CalibrationReport:
        options, source = self.options, self.source
        model, kept, layers, costs = self._quantised()
        target = source.folder / options.precision
        artifact = self._write(model, target)
        stats = self._judge(artifact, target)
        report = CalibrationReport(
            path=artifact.path,
            precision=options.precision,
            runtime=options.runtime,
            method=options.method if options.precision in WITH_RANGES else "",
            block=options.block if _blockwise(options) else 0,
            smooth=self._alpha,
            head="quantised" if options.quantise_head else "as exported",
            samples=len(self.material.calibration),
            documents=self.material.documents,
            document_sha256=self.material.sha256,
            quantised=len(layers),
            kept=tuple(kept),
            total=stats,
            limits=options.limits,
            failures=failures(stats, options.limits),
            num_bytes=artifact.num_bytes,
            source_bytes=source.artifact.num_bytes,
            source_sha256=self.graph_sha256,
            versions={name: version(name) for name in ("export-vq", "onnx", "numpy")},
            sensitivity=costs,
            notes=tuple(self.notes),
        )
        report.save(target / REPORT)
        return report

    @property
    def _alpha(self) -> float:
        return self.options.smooth if self.options.precision == "int8" else 0.0

    def _quantised(self) -> tuple[ir.Model, list[str], list[Product], tuple[LayerDivergence, ...]]:
        """The graph quantised, the names that were kept, the products that were not, and what each costs alone."""
        options = self.options
        model = self.source.graph.clone()
        wanted = [] if options.keep.startswith("auto:") else [name for name in options.keep.split(",") if name]
        layers = chosen(products(model), wanted, head=options.quantise_head)
        if self._alpha:
            seen = self._counted(in_plain_form(self.source.graph), layers, {})
            done = smooth(model, layers, {name: h.channels for name, h in seen.items()}, self._alpha)
            self.notes.append(f"outliers of {done} of {len(seen)} inputs moved into the weights, alpha {self._alpha}")
            layers = chosen(products(model), wanted, head=options.quantise_head)
        magnitudes: dict[str, float] = {}
        if options.precision in WITH_RANGES:
            made = {"smooth": [self._alpha, [layer.name for layer in layers]]} if self._alpha else {}
            seen = self._counted(in_plain_form(model), layers, made)
            magnitudes = {name: magnitude(h, options.method, options.precision) for name, h in seen.items()}
        costs: tuple[LayerDivergence, ...] = ()
        if options.sensitivity or options.kept_most_sensitive:
            costs = self._costs(model, layers, magnitudes)
            spared = {cost.name for cost in costs if cost.kept}
            layers = [layer for layer in layers if layer.name not in spared]
        left = quantise(model, layers, options, magnitudes)
        if left:
            self.notes.append(f"left as they are, their sizes are no multiple of {options.block}: {', '.join(left)}")
        layers = [layer for layer in layers if layer.name not in left]
        names = {layer.name for layer in layers}
        kept = [p.name for p in products(self.source.graph) if p.name not in names]
        return model, kept, layers, costs

    def _counted(self, model: ir.Model, layers: list[Product], made: dict[str, Any]) -> dict[str, Any]:
        taps: dict[str, str] = {}
        for layer in layers:
            taps.setdefault(str(layer.activation.name), layer.name)
        with self.progress.step("ranges") as tell:
            return collect(
                model,
                taps,
                self.signature,
                self.material.calibration,
                self.source.folder / RANGES,
                {"graph": self.graph_sha256, "version": version("export-vq"), **made},
                threads=self.options.threads,
                tell=lambda part: tell("ranges", part),
            )

    def _costs(
        self, model: ir.Model, layers: list[Product], magnitudes: dict[str, float]
    ) -> tuple[LayerDivergence, ...]:
        with self.progress.step("sensitivity") as tell:
            found = sensitivity(
                in_plain_form(model),
                layers,
                self.options,
                magnitudes,
                self.signature,
                self.material.calibration[:PROBED],
                self.source.folder,
                lambda part: tell("sensitivity", part),
            )
        order = sorted(found, key=lambda name: -found[name])
        kept = set(order[: self.options.kept_most_sensitive])
        return tuple(LayerDivergence(name, found[name], name in kept) for name in order)

    def _write(self, model: ir.Model, target: Path) -> OnnxArtifact:
        source = self.source
        target.mkdir(parents=True, exist_ok=True)
        artifact = dataclasses.replace(source.artifact, precision=self.options.precision, file_sha256={})
        with self.progress.step("write"):
            done = write_graph(model, target, artifact)
            for name in TEXTS:
                if (source.folder / name).is_file():
                    write_text(target / name, (source.folder / name).read_text(encoding="utf-8"))
        return done

    def _judge(self, artifact: OnnxArtifact, target: Path) -> ErrorStats:
        threads = self.options.threads
        with (
            self.progress.step("test") as tell,
            OrtRunner(self.source.path, self.signature, threads=threads) as reference,
            OrtRunner(
                target / artifact.path,
                signature_of(artifact),
                threads=threads,
                fuse_quantised=self.options.precision != "fp8",
            ) as candidate,
        ):
            return compare(reference, candidate, self.material.test, lambda part: tell("test", part))


def _blockwise(options: CalibrationOptions) -> bool:
    return options.precision == "int4" or (options.precision == "w8" and options.runtime == "onnxruntime")
