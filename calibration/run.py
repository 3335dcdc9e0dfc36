"""One call of `calibrate`: an output folder becomes a quantised one beside it, with a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir

from export_vq.calibration.collect import saved
from export_vq.calibration.decide import decide
from export_vq.calibration.documents import Material, read_material
from export_vq.calibration.judge import compare, failures
from export_vq.calibration.make import Decisions, Maker
from export_vq.calibration.options import HALF, WITH_RANGES, CalibrationOptions
from export_vq.calibration.source import TEXTS, Source, open_source
from export_vq.files import sha256, write_text
from export_vq.genai import write_genai_config
from export_vq.graph import write_graph
from export_vq.progress import Progress
from export_vq.records import CalibrationReport, ErrorStats, OnnxArtifact
from export_vq.runners import OrtRunner, signature_of

REPORT = "calibration.json"


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
    return _Run(source, material, options, progress, target or folder / options.precision).report()


class _Run:
    """One call of `calibrate`."""

    def __init__(
        self, source: Source, material: Material, options: CalibrationOptions, progress: Progress, target: Path
    ) -> None:
        self.source, self.material, self.options, self.progress = source, material, options, progress
        self.target = target
        self.signature = signature_of(source.artifact)
        self.maker = Maker(options, progress)

    def report(self) -> CalibrationReport:
        options, source, target, notes = self.options, self.source, self.target, self.maker.notes
        decisions = decide(source, self.material.calibration, options, self.maker, self.progress)
        made = self.maker.made(source.graph, decisions)
        artifact = self._write(made.model, source.artifact)
        if source.dense is not None:
            dense = self.maker.made(source.dense, decisions)
            self._write(dense.model, OnnxArtifact.load(source.folder / "dense.onnx.json"))
        for name in TEXTS:
            if (source.folder / name).is_file():
                write_text(target / name, (source.folder / name).read_text(encoding="utf-8"))
        write_genai_config(target, artifact, source.config)
        stats = self._judge(artifact, decisions)
        if stats.perplexity_reference > source.artifact.spec.vocab_size:
            notes.append(
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
            block=options.block if options.blockwise else 0,
            smooth=options.alpha,
            head="quantised" if options.quantise_head else "as exported",
            samples=len(self.material.calibration),
            documents=self.material.documents,
            document_sha256=self.material.sha256,
            quantised=len(made.changed),
            kept=made.kept,
            total=stats,
            limits=options.limits,
            failures=failures(stats, options.limits),
            num_bytes=artifact.num_bytes,
            source_bytes=source.artifact.num_bytes,
            source_sha256=sha256(source.path),
            versions={name: version(name) for name in ("export-vq", "onnx", "numpy")},
            sensitivity=decisions.costs,
            notes=tuple(notes),
        )
        report.save(target / REPORT)
        return report

    def _write(self, model: ir.Model, exported: OnnxArtifact) -> OnnxArtifact:
        self.target.mkdir(parents=True, exist_ok=True)
        precision, dtype = self.options.precision, exported.dtype
        precision, dtype = ("", precision) if precision in HALF else (precision, dtype)
        artifact = dataclasses.replace(exported, precision=precision, dtype=dtype, file_sha256={})
        with self.progress.step(f"write {artifact.path}"):
            return write_graph(model, self.target, artifact)

    def _judge(self, artifact: OnnxArtifact, decisions: Decisions) -> ErrorStats:
        threads = self.options.threads
        with (
            self.progress.step("test") as tell,
            OrtRunner(self.source.path, self.signature, threads=threads) as reference,
            self._candidate(artifact, decisions) as candidate,
        ):
            return compare(reference, candidate, self.material.test, lambda part: tell("test", part))

    @contextmanager
    def _candidate(self, artifact: OnnxArtifact, decisions: Decisions) -> Iterator[OrtRunner]:
        """What was made, ready to run. 16-bit types are simulated: ONNX Runtime's CPU provider has no kernels for bf16, and
        leaves out the roundings between its float32 kernels for fp16, so that what overflows elsewhere would not here."""
        threads = self.options.threads
        if self.options.precision not in HALF:
            path, signature = self.target / artifact.path, signature_of(artifact)
            with OrtRunner(path, signature, threads=threads, fuse_quantised=artifact.fusible) as runner:
                yield runner
            return
        self.maker.notes.append(f"tested in float32 with every result rounded to {self.options.precision}")
        model = self.maker.narrowed(self.source.graph, decisions, simulated=True).model
        with saved(model, self.target) as path, OrtRunner(path, self.signature, threads=threads) as runner:
            yield runner
