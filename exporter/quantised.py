"""Quantised folders of their own: an exported graph in fewer bits, with any output and form, checked and timed.

    fp32-logits --calibrate--> int8-logits --another end--> int8-topk

Quantising is measured on logits, so a graph that gives chosen tokens is made of the quantised one that gives logits, and
held to it number by number; what fewer bits cost is the same for both.
"""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export_vq import forms, parity
from export_vq.bench import device_name, run_benchmark
from export_vq.bundle import Bundle
from export_vq.calibration import CalibrationOptions, calibrate
from export_vq.checkpoint import TOKENIZER_FILES, positions_of, read_json
from export_vq.errors import UserError
from export_vq.feeds import Feeds, HeadTables, Signature
from export_vq.files import write_text
from export_vq.forms import read_graph
from export_vq.genai import write_genai_config
from export_vq.graph import write_graph
from export_vq.head import VQHead
from export_vq.head_output import HeadOutput
from export_vq.progress import Progress
from export_vq.records import BenchReport, CalibrationReport, OnnxArtifact, ParityReport
from export_vq.runners import OrtRunner, native_library, read_head, signature_of
from export_vq.text import read_text
from export_vq.top_k_graph import end_dense_in, end_in
from export_vq.workloads import CONTEXT, head_workloads, step_workload

Blocks = Callable[[int, int], NDArray[np.int64]]
"""(width, count) -> token ids int64 [count, width]."""
GRAPHS = ("model.onnx", "dense.onnx")


def quantise_folder(
    source: Bundle, target: Bundle, options: CalibrationOptions, progress: Progress
) -> CalibrationReport:
    """Quantise an exported folder into another one, or keep what was made from the same things.

    Args:
        source: what `export_step` wrote, with logits of every position.
        target: gets both graphs, tokenizer and configs, and calibration.json.
        options: with a text.
        progress: told of every step.

    Raises:
        UserError: as `calibrate`.
    """
    assert options.text is not None
    key = {
        "source": _hashes(source),
        "options": {name: value for name, value in asdict(options).items() if name not in ("text", "threads")},
        "text": hashlib.sha256(read_text(options.text).encode()).hexdigest(),
        "version": version("export-vq"),
    }
    _forget_unless_whole(target, "calibrate")
    made, new = target.remember(
        "calibrate", key, CalibrationReport, lambda: calibrate(source.folder, options, progress, target.folder)
    )
    if not new:
        progress.skipped("calibrate")
    copy_texts(source, target)
    return made


def end_folder(source: Bundle, target: Bundle, output: HeadOutput, form: str, progress: Progress) -> None:
    """Write the graphs of a quantised folder with another end or in another form, or keep those that are there.

    Args:
        source: what `quantise_folder` wrote.
        target: gets both graphs, tokenizer and configs.
        output: what they are to give.
        form: of model.onnx, one of forms.FORMS.
        progress: told of every step.

    Raises:
        UserError: the model changes its logits after the output layer.
    """
    key = {"source": _hashes(source), "output": asdict(output), "form": form, "version": version("export-vq")}

    def make() -> OnnxArtifact:
        with progress.step("write graphs"):
            _write_ended(source.folder, target.folder, "dense.onnx", output, "dense")
            return _write_ended(source.folder, target.folder, "model.onnx", output, form)

    _forget_unless_whole(target, "end")
    _, new = target.remember("end", key, OnnxArtifact, make)
    if not new:
        progress.skipped("write graphs")
    copy_texts(source, target)


def check_ended(
    source: Bundle, target: Bundle, blocks: Blocks, text_sha256: str, positions: int, progress: Progress
) -> ParityReport:
    """Is what a folder gives chosen as its source's logits say? Both are in the same bits, so fp32's limits hold.

    Args:
        source, target: see `end_folder`.
        blocks: see Blocks.
        text_sha256: of what they are cut from.
        positions: token positions to compare.
        progress: told of every step.
    """

    def make() -> ParityReport:
        with (
            progress.step("check") as tell,
            open_graph(source, "model.onnx") as logits,
            open_graph(target, "model.onnx") as candidate,
        ):
            cases = parity.standard_cases(blocks, positions, _positions(source))
            reference = _Logits(logits, candidate.signature)
            return parity.check_parity(
                reference, candidate, cases, dtype="fp32", progress=lambda part: tell("check", part)
            )

    library = native_library()
    key = {
        "source": _hashes(source),
        "target": _hashes(target),
        "positions": positions,
        "native": library.sha256 if library else "",
        "text": text_sha256,
        "version": version("export-vq"),
    }
    found, new = target.remember("check", key, ParityReport, make)
    if not new:
        progress.skipped("check")
    return found


def bench_quantised(
    bundle: Bundle, head: Callable[[], VQHead], blocks: Blocks, threads: int, seconds: float, progress: Progress
) -> BenchReport:
    """Time the VQ head, which stays in the graph's type, and a decode step of the quantised model and of its dense twin.

    Args:
        bundle: holds both graphs.
        head: gives the head in float32.
        blocks: see Blocks; gives the prompt of the step.
        threads: ONNX Runtime's (0: its own choice).
        seconds: for each way, batch size and cache state.
        progress: told of every step.
    """
    artifact = _record(bundle, "model.onnx")
    output = HeadOutput(artifact.output, artifact.top_k, artifact.last_token)

    def make() -> BenchReport:
        given = head()  # loading is no part of the step's time
        with (
            progress.step("bench") as tell,
            tempfile.TemporaryDirectory() as scratch,
            head_workloads(given, Path(scratch), opset=artifact.opset, threads=threads, output=output) as heads,
            open_graph(bundle, "model.onnx", threads) as vq,
            open_graph(bundle, "dense.onnx", threads) as dense,
        ):
            # The dense head of these workloads is not quantised, so it is no rival here.
            ours = [dataclasses.replace(w, runs={n: r for n, r in w.runs.items() if n != "dense"}) for w in heads]
            step = step_workload({"vq": vq, "dense": dense}, blocks(min(CONTEXT, _positions(bundle) - 1), 1))
            return run_benchmark(
                [*ours, step],
                threads=threads,
                dtype=artifact.precision,
                backend=vq.name,
                seconds=seconds,
                progress=lambda part: tell("bench", part),
            )

    library = native_library()
    key = {
        "graphs": _hashes(bundle),
        "threads": threads,
        "seconds": seconds,
        "device": device_name(),
        "native": library.sha256 if library else "",
        "version": version("export-vq"),
    }
    found, new = bundle.remember("bench", key, BenchReport, make)
    if not new:
        progress.skipped("bench")
    return found


def open_graph(bundle: Bundle, name: str, threads: int = 0) -> OrtRunner:
    """One of the graphs of a folder in ONNX Runtime on the CPU."""
    artifact = _record(bundle, name)
    return OrtRunner(
        bundle.folder / name,
        signature_of(artifact),
        threads=threads,
        native=artifact.head == "vq",
        fuse_quantised=artifact.fusible,
    )


class _Logits:
    """A graph with logits of every position as the reference of one that chooses from them."""

    def __init__(self, runner: OrtRunner, signature: Signature) -> None:
        self.name, self.signature, self._runner = runner.name, signature, runner

    @property
    def head(self) -> HeadTables | None:
        return self._runner.head

    def infer(self, feeds: Feeds) -> Feeds:
        outputs = self._runner.infer({n: a for n, a in feeds.items() if n not in ("temperature", "uniform")})
        if self.signature.last_token:
            outputs["logits"] = outputs["logits"][:, -1:]
        return outputs


def copy_texts(source: Bundle, target: Bundle) -> None:
    """Tokenizer and configs, so that the folder is whole."""
    for name in ("config.json", *TOKENIZER_FILES):
        if (source.folder / name).is_file():
            write_text(target.folder / name, (source.folder / name).read_text(encoding="utf-8"))
    config = read_json(target.folder / "config.json")
    write_genai_config(target.folder, _record(target, "model.onnx"), config)


def _write_ended(source: Path, target: Path, name: str, output: HeadOutput, form: str) -> OnnxArtifact:
    artifact = OnnxArtifact.load(source / f"{name}.json")
    graph = read_graph(source / name)
    if output.word != "logits":
        if artifact.head == "dense":
            tables = read_head(source / "model.onnx")
            assert tables is not None, "the folder's other graph has a VQ head"
            end_dense_in(graph, artifact, output, tables.codes)
        elif not end_in(graph, artifact, output):
            raise UserError(
                f"{source / name}: changes its logits after the output layer, as a softcap does, and the best token is chosen "
                "inside it; use output=logits"
            )
    if form == "plain":
        forms.convert(graph, form)
    ended = dataclasses.replace(
        artifact,
        form=form,
        input_names=tuple(str(value.name) for value in graph.graph.inputs),
        output_names=tuple(str(value.name) for value in graph.graph.outputs),
        output=output.word,
        top_k=output.top_k,
        last_token=output.last_token,
        file_sha256={},
    )
    target.mkdir(parents=True, exist_ok=True)
    return write_graph(graph, target, ended)


def _positions(bundle: Bundle) -> int:
    config = read_json(bundle.folder / "config.json")
    return int(positions_of(config) or parity.LONGEST)


def _record(bundle: Bundle, name: str) -> OnnxArtifact:
    return OnnxArtifact.load(bundle.folder / f"{name}.json")


def _hashes(bundle: Bundle) -> list[dict[str, Any]]:
    return [_record(bundle, name).file_sha256 for name in GRAPHS]


def _forget_unless_whole(bundle: Bundle, step: str) -> None:
    """What a step is remembered by is worth nothing where a file that it wrote is gone or changed."""
    if any(bundle.artifact(name) is None for name in GRAPHS):
        (bundle.folder / "steps" / f"{step}.json").unlink(missing_ok=True)
