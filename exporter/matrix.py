"""Several variants of one checkpoint, each a whole folder of its own, side by side in one report.

What the main job can export is its job, done once for each; what has fewer bits is calibrated from the fp32 variant with
logits, which is made where the matrix does not name it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export_vq.bench import device_name
from export_vq.bundle import Bundle
from export_vq.calibration import CalibrationOptions
from export_vq.errors import CheckFailed, UserError
from export_vq.files import sha256, write_text
from export_vq.graph import ExportOptions
from export_vq.head import VQHead
from export_vq.load import LoadedModel, load_model
from export_vq.manifest import seal
from export_vq.matrix_report import MatrixReport, VariantResult, render_matrix
from export_vq.pipeline import RunOptions, run_pipeline
from export_vq.progress import Progress
from export_vq.quantised import (
    bench_quantised,
    check_ended,
    end_folder,
    quantise_folder,
)
from export_vq.records import OnnxArtifact, ParityReport
from export_vq.steps import export_step
from export_vq.text import filled_blocks, read_text
from export_vq.variants import Variant

SIMULATED = ("fp8",)
"""Types that ONNX Runtime's CPU provider computes step by step in another one: their times say nothing."""


def run_matrix(
    model: Path,
    out: Path,
    variants: Sequence[Variant],
    options: RunOptions,
    progress: Progress,
    begin: Callable[[str], None] = lambda _: None,
) -> MatrixReport:
    """Make every variant in a folder of its own below `out`, and write `matrix.json` and `matrix.html`.

    A variant that fails is a row of the report, and the others go on. What is current is kept.

    Args:
        model: a VQ-Logits model.pt or Hugging Face folder.
        out: output folder, made if missing.
        variants: at least one.
        options: of the main job; `export` says what the variants do not. `text` is what quantised variants are calibrated
            and, in other documents of it, tested on.
        progress: told of every step.
        begin: told the name of each variant before its steps.

    Returns:
        the report; falsy when a variant failed.

    Raises:
        UserError: there is no such model, or a quantised variant has no text.
    """
    if not model.exists():
        raise UserError(f"{model}: no such file or folder; give a VQ-Logits model.pt or a Hugging Face folder")
    if options.baseline is not None:
        raise UserError(
            "--baseline measures the model, which is the same in every variant, so it is not for --matrix; run export-vq with "
            "it once, without --matrix"
        )
    unread = [variant.dtype for variant in variants if variant.quantised and options.text is None]
    if unread:
        raise UserError(f"--matrix has dtype={unread[0]}, which is calibrated on a text; give one with --text FILE")
    matrix = _Matrix(model, out, options, progress)
    results = []
    for variant in variants:
        begin(variant.name)
        results.append(matrix.result(variant))
    report = MatrixReport(
        model=model.name,
        device=device_name(),
        variants=tuple(results),
        versions={name: version(name) for name in ("export-vq", "torch", "transformers", "onnx", "numpy")},
    )
    report.save(out / "matrix.json")
    write_text(out / "matrix.html", render_matrix(report))
    return report


class _Matrix:
    """What the variants of one run share; the model is only read when a step needs it."""

    def __init__(self, model: Path, out: Path, options: RunOptions, progress: Progress) -> None:
        self._model, self._out, self._options, self._progress = model, out, options, progress

    def result(self, variant: Variant) -> VariantResult:
        try:
            return self._quantised(variant) if variant.quantised else self._exported(variant)
        except (UserError, CheckFailed) as error:
            return self._row(variant, error=str(error))
        except Exception as error:  # one variant's bug must not cost the others their work
            return self._row(
                variant,
                error=f"internal error: {type(error).__name__}: {error}; this is a bug of export-vq, please report it with the "
                "output of this variant alone and --debug",
            )

    def _row(self, variant: Variant, **found: Any) -> VariantResult:
        return VariantResult(variant.name, variant.dtype, variant.output, variant.form, variant.last_token, **found)

    def _bundle(self, variant: Variant) -> Bundle:
        return Bundle(self._out / variant.name)

    def _export(self, variant: Variant) -> ExportOptions:
        return dataclasses.replace(
            self._options.export,
            dtype=variant.dtype,
            output=variant.output,
            form=variant.form,
            last_token=variant.last_token,
        )

    def _exported(self, variant: Variant) -> VariantResult:
        options = dataclasses.replace(self._options, export=self._export(variant))
        report = run_pipeline(self._model, self._bundle(variant).folder, options, self._progress)
        sizes = {artifact.head: artifact.num_bytes for artifact in report.artifacts}
        return self._row(
            variant,
            num_bytes=sizes["vq"],
            dense_bytes=sizes["dense"],
            parity=report.parity,
            bench=report.bench,
            not_done=report.not_done,
        )

    def _quantised(self, variant: Variant) -> VariantResult:
        options, target = self._options, self._bundle(variant)
        if variant.last_token and variant.output == "logits":
            raise UserError(
                f"{variant.dtype} is measured on the logits of every position; leave --last-token out, or use output=topk"
            )
        source = self._bundle(Variant("fp32", "logits"))
        export_step(lambda: self._loaded, self._source, source, self._export(Variant("fp32", "logits")), self._progress)
        seal(source.folder)
        with_logits = self._bundle(Variant(variant.dtype, "logits"))
        chosen = CalibrationOptions(variant.dtype, text=options.text, threads=options.threads)
        calibration = quantise_folder(source, with_logits, chosen, self._progress)
        seal(with_logits.folder)
        parity: tuple[ParityReport, ...] = ()
        if target != with_logits:
            output = self._export(variant).head_output
            end_folder(with_logits, target, output, variant.form, self._progress)
            parity = (
                check_ended(
                    with_logits, target, self._blocks, self._text_sha256, options.positions // 4, self._progress
                ),
            )
            seal(target.folder)
        bench, not_done = None, []
        if variant.dtype in SIMULATED:
            not_done.append(f"times: ONNX Runtime's CPU provider only simulates {variant.dtype}")
        else:
            bench = bench_quantised(
                target, self._head, self._blocks, options.threads, options.bench_seconds, self._progress
            )
        sizes = [OnnxArtifact.load(target.folder / f"{name}.onnx.json").num_bytes for name in ("model", "dense")]
        return self._row(
            variant,
            num_bytes=sizes[0],
            dense_bytes=sizes[1],
            parity=parity,
            calibration=calibration,
            bench=bench,
            not_done=tuple(not_done),
        )

    @cached_property
    def _source(self) -> str:
        return sha256(self._model)

    @cached_property
    def _loaded(self) -> LoadedModel:
        with self._progress.step("load"):
            return load_model(self._model)

    @cached_property
    def _text(self) -> str:
        assert self._options.text is not None
        return read_text(self._options.text)

    @cached_property
    def _text_sha256(self) -> str:
        return hashlib.sha256(self._text.encode()).hexdigest()

    def _head(self) -> VQHead:
        assert self._loaded.head is not None
        return self._loaded.head

    def _blocks(self, width: int, count: int) -> NDArray[np.int64]:
        loaded = self._loaded
        return filled_blocks(loaded.tokenizer(), self._text, width, count, vocab_size=loaded.spec.vocab_size)
