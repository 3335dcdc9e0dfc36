"""The walk: checkpoint -> graphs -> checks -> speed -> report. Every step is skipped while its inputs are unchanged."""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import torch

from export_vq import feeds, parity
from export_vq.bench import Workload, device_name, run_benchmark
from export_vq.bundle import Bundle
from export_vq.compress import CompressOptions, compress_model
from export_vq.compress.quality import measure_gap
from export_vq.errors import UserError
from export_vq.files import sha256, write_text
from export_vq.generate import generate
from export_vq.graph import TORCH_DTYPES, ExportOptions, export_onnx, head_graph
from export_vq.load import LoadedModel, load_dense, load_model, save_model
from export_vq.records import (
    BenchReport,
    Compressed,
    Continuation,
    HeadSpec,
    ModelGap,
    OnnxArtifact,
    ParityReport,
    RunReport,
)
from export_vq.report import render_html
from export_vq.require import require
from export_vq.runners import OrtRunner, TorchRunner, signature_of
from export_vq.text import read_text, token_blocks

PROMPT = "The capital of France is"
GAP_BLOCK = 256
_EXPORTERS = ("export-vq", "torch", "transformers", "onnx", "onnxscript")
"""Packages whose version shapes an exported graph."""


class Progress(Protocol):
    """Told what is being done and how far it is."""

    def step(self, name: str) -> Any:
        """A context manager around a step; yields a function that takes what is being done and the fraction done."""
        ...

    def skipped(self, name: str) -> None:
        """A step's result was current."""
        ...


@dataclass(frozen=True)
class RunOptions:
    """What the main job does.

    `text` is a UTF-8 file or folder to check and measure on (random tokens without), `baseline` the dense original,
    `positions` how many token positions the fp32 check covers, `gap_tokens` how many tokens the model gap, `threads`
    ONNX Runtime's intra-op threads (0: its own choice).
    """

    export: ExportOptions = field(default_factory=ExportOptions)
    text: Path | None = None
    baseline: Path | None = None
    prompt: str = PROMPT
    positions: int = 2048
    gap_tokens: int = 4096
    threads: int = 0


def run_pipeline(model: Path, out: Path, options: RunOptions, progress: Progress) -> RunReport:
    """Do everything this machine can do for one checkpoint, and write `report.json` and `report.html`.

    Args:
        model: a VQ-Logits model.pt or Hugging Face folder.
        out: output folder, made if missing; current results in it are kept.
        options: see RunOptions.
        progress: told of every step.

    Returns:
        the report; falsy when a check failed.

    Raises:
        UserError: an input cannot be used.
    """
    return _Run(model, Bundle(out), options, progress).report()


def compress_step(model: Path, text: Path, output: Path, options: CompressOptions, progress: Progress) -> HeadSpec:
    """Make a VQ-Logits checkpoint of a dense model, or keep the one on disk when it was made from the same things.

    Args:
        model: Hugging Face folder or GGUF file.
        text: UTF-8 text file or folder.
        output: model.pt or a folder; `<output>.json` beside it records what it was made from.
        options: see CompressOptions.
        progress: told of every step.

    Raises:
        UserError: an input cannot be used.
    """
    words = read_text(text)
    if not model.exists():
        raise UserError(
            f"{model}: no such file or folder; give a causal language model as a Hugging Face folder or GGUF file"
        )
    made_from = (sha256(model), hashlib.sha256(words.encode()).hexdigest(), asdict(options), version("export-vq"))
    record = output.with_name(output.name + ".json")
    if record.is_file() and output.exists():
        kept = Compressed.load(record)
        if (kept.source_sha256, kept.text_sha256, kept.options, kept.version) == made_from and kept.sha256 == sha256(
            output
        ):
            progress.skipped("compress")
            return kept.spec
    with progress.step("load"):
        dense = load_dense(model)
    with progress.step("compress") as tell:
        vq = compress_model(dense, words, options, tell)
    with progress.step("save"):
        save_model(vq, output)
    Compressed(*made_from, spec=vq.spec, sha256=sha256(output)).save(record)
    return vq.spec


def export_step(
    loaded: Callable[[], LoadedModel], source: str, bundle: Bundle, options: ExportOptions, progress: Progress
) -> dict[str, OnnxArtifact]:
    """Export, or the artifacts on disk when they were made from the same source with the same options and versions."""
    versions = tuple(version(name) for name in _EXPORTERS)
    wanted = (source, options.dtype, options.opset, options.external_data_bytes, *versions)
    kept = {"vq": bundle.artifact("model.onnx"), "dense": bundle.artifact("dense.onnx")}
    found = {name: a for name, a in kept.items() if a is not None}
    if len(found) == 2 and found["vq"].form == options.form and all(_made_from(a) == wanted for a in found.values()):
        progress.skipped("export")
        return found
    model = loaded()
    with progress.step("export"):
        artifacts = export_onnx(model, bundle.folder, options)
    files = {"config.json": json.dumps(model.config, indent=2) + "\n", **model.tokenizer_files}
    for name, text in files.items():
        write_text(bundle.folder / name, text)
    return artifacts


def _made_from(artifact: OnnxArtifact) -> tuple[Any, ...]:
    versions = tuple(artifact.versions.get(name) for name in _EXPORTERS)
    return (artifact.source_sha256, artifact.dtype, artifact.opset, artifact.external_data_bytes, *versions)


class _Run:
    """One run of the main job; the model is only read when a step needs it."""

    def __init__(self, model: Path, bundle: Bundle, options: RunOptions, progress: Progress) -> None:
        if not model.exists():
            raise UserError(f"{model}: no such file or folder; give a VQ-Logits model.pt or a Hugging Face folder")
        if options.baseline is not None and not options.baseline.exists():
            raise UserError(
                f"{options.baseline}: no such file or folder; give the dense model as a Hugging Face folder or GGUF file"
            )
        self.path, self.bundle, self.options, self.progress = model, bundle, options, progress
        self.source = sha256(model)
        self.not_done: list[str] = []

    @cached_property
    def loaded(self) -> LoadedModel:
        with self.progress.step("load"):
            return load_model(self.path)

    @cached_property
    def text(self) -> str | None:
        return None if self.options.text is None else read_text(self.options.text)

    @cached_property
    def text_key(self) -> str:
        return "" if self.text is None else hashlib.sha256(self.text.encode()).hexdigest()

    def report(self) -> RunReport:
        options, bundle = self.options, self.bundle
        key = {
            "source": self.source,
            "export": asdict(options.export),
            "text": self.text_key,
            "version": version("export-vq"),
        }
        artifacts = export_step(lambda: self.loaded, self.source, bundle, options.export, self.progress)
        if options.text is None:
            self.not_done.append("perplexity: measured on random tokens only; give a text with --text FILE")
        runs = self._can_run(artifacts["vq"])
        checks, bench, written = [], None, Continuation("", "")
        if runs:
            check_key = {**key, "positions": options.positions, "ort": version_of("onnxruntime")}
            checks = [
                self._step(
                    "check",
                    check_key,
                    ParityReport,
                    lambda tell: self._check(artifacts["vq"], tell),
                ),
                self._step(
                    "check-dense",
                    check_key,
                    ParityReport,
                    lambda tell: self._check(artifacts["dense"], tell),
                ),
            ]
            bench_key = {**check_key, "device": device_name(), "threads": options.threads}
            bench = self._step("bench", bench_key, BenchReport, lambda tell: self._bench(artifacts, tell))
            written = self._step(
                "write", {**key, "prompt": options.prompt}, Continuation, lambda _: self._write(artifacts["vq"])
            )
        gap = self._gap(key)
        report = RunReport(
            model=self.path.name,
            model_type=artifacts["vq"].model_type,
            dtype=options.export.dtype,
            spec=artifacts["vq"].spec,
            tied_embedding=artifacts["vq"].tied_embedding,
            total_numbers=self._total_numbers(artifacts["vq"]),
            artifacts=tuple(artifacts.values()),
            parity=tuple(checks),
            gap=gap,
            bench=bench,
            prompt=written.prompt,
            continuation=written.text,
            not_done=tuple(self.not_done),
            versions={name: version(name) for name in ("export-vq", "torch", "transformers", "onnx", "numpy")}
            | ({"onnxruntime": version_of("onnxruntime")} if runs else {}),
        )
        report.save(bundle.report_json)
        write_text(bundle.report_html, render_html(report))
        return report

    def _step(
        self, name: str, key: dict[str, Any], kind: type[Any], make: Callable[[Callable[[float], None]], Any]
    ) -> Any:
        def made() -> Any:
            _ = self.loaded  # its own step, not part of this one's time
            with self.progress.step(name) as tell:
                return make(lambda fraction: tell(name, fraction))

        record, new = self.bundle.remember(name, key, kind, made)
        if not new:
            self.progress.skipped(name)
        return record

    def _can_run(self, artifact: OnnxArtifact) -> bool:
        """Whether this machine can run the graph; if not, why is noted."""
        if artifact.form == "plugin":
            self.not_done.append(
                "check and bench: the plugin form runs in TensorRT only; export with --form portable to check it here"
            )
            return False
        try:
            OrtRunner(self.bundle.folder / artifact.path, signature_of(artifact)).close()
        except UserError as error:
            self.not_done.append(f"check and bench: {error}")
            return False
        return True

    def check(self, artifact: OnnxArtifact) -> ParityReport:
        """The export gap of one graph, measured now."""
        _ = self.loaded
        name = f"check {artifact.path}"
        with self.progress.step(name) as tell:
            return self._check(artifact, lambda fraction: tell(name, fraction))

    def _blocks(self, width: int, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Token blocks [count, width] of the text, or random ones."""
        if self.text is not None:
            blocks = token_blocks(
                self.loaded.tokenizer(), self.text, width, count, vocab_size=self.loaded.spec.vocab_size
            ).numpy()
            return np.resize(blocks, (count, width)) if len(blocks) < count else blocks
        return np.random.default_rng(0).integers(0, self.loaded.spec.vocab_size, (count, width))

    def _check(self, artifact: OnnxArtifact, tell: Callable[[float], None]) -> ParityReport:
        half = artifact.dtype != "fp32"
        # The float64 oracle and PyTorch's half types are slow: a quarter of the positions, and the dense twin likewise.
        positions = self.options.positions // (4 if half or artifact.head == "dense" else 1)
        signature = signature_of(artifact)
        dtype = TORCH_DTYPES[artifact.dtype]
        cases = parity.standard_cases(self._blocks, positions, self.loaded.max_positions)
        loaded = self.loaded
        with (
            TorchRunner(loaded, signature, torch.float64 if half else dtype) as reference,
            OrtRunner(self.bundle.folder / artifact.path, signature, threads=self.options.threads) as candidate,
        ):
            native = TorchRunner(loaded, signature, dtype) if half else None
            return parity.check_parity(reference, candidate, cases, dtype=artifact.dtype, native=native, progress=tell)

    def _bench(self, artifacts: dict[str, OnnxArtifact], tell: Callable[[float], None]) -> BenchReport:
        threads, dtype = self.options.threads, artifacts["vq"].dtype
        rng = np.random.default_rng(0)
        width = artifacts["vq"].spec.hidden_size
        number = np.float16 if dtype == "fp16" else np.float32
        bare = feeds.Signature((), False)
        assert self.loaded.head is not None
        head = copy.deepcopy(self.loaded.head).to(TORCH_DTYPES[dtype])
        with tempfile.TemporaryDirectory() as scratch:
            heads = {}
            for kind in ("vq", "dense"):
                file = Path(scratch, f"{kind}.onnx")
                ir.save(head_graph(head, kind, opset=self.options.export.opset), file, external_data=f"{kind}.data")
                heads[kind] = OrtRunner(file, bare, threads=threads)
            models = {
                k: OrtRunner(self.bundle.folder / a.path, signature_of(a), threads=threads)
                for k, a in artifacts.items()
            }
            work = []
            for batch in (1, 8):
                hidden = {"hidden_states": rng.standard_normal((batch, 1, width)).astype(number)}
                work.append(Workload("head", batch, dict(heads), dict.fromkeys(heads, hidden)))
            ids = self._blocks(min(128, self.loaded.max_positions - 1), 1)
            start = {k: r.infer(feeds.prefill(r.signature, ids, np.ones_like(ids))) for k, r in models.items()}
            mask = np.ones((1, ids.shape[1] + 1), np.int64)
            steps = {k: feeds.step(r.signature, ids[:, -1:], mask, start[k]) for k, r in models.items()}
            work.append(Workload("decode step", 1, dict(models), steps))
            return run_benchmark(
                work, threads=threads, dtype=dtype, backend=f"ONNX Runtime {version_of('onnxruntime')}", progress=tell
            )

    def _write(self, artifact: OnnxArtifact) -> Continuation:
        try:
            tokenizer = self.loaded.tokenizer()
        except UserError:
            return Continuation("", "")
        prompt = tokenizer(self.options.prompt)["input_ids"]
        ends = frozenset([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])
        with OrtRunner(
            self.bundle.folder / artifact.path, signature_of(artifact), threads=self.options.threads
        ) as runner:
            made = list(generate(runner, prompt, 32, ends))
        return Continuation(self.options.prompt, str(tokenizer.decode(made)))

    def _gap(self, key: dict[str, Any]) -> ModelGap | None:
        options = self.options
        if options.baseline is None or options.text is None:
            missing = " and ".join(f"--{n} {n.upper()}" for n in ("baseline", "text") if getattr(options, n) is None)
            self.not_done.append(f"model gap: what the VQ head costs against the dense original; give {missing}")
            return None
        baseline, text = options.baseline, options.text

        def measure(tell: Callable[[float], None]) -> ModelGap:
            dense = load_dense(baseline)
            width = min(GAP_BLOCK, self.loaded.max_positions)
            blocks = torch.from_numpy(self._blocks(width, options.gap_tokens // width))
            return measure_gap(dense, self.loaded, blocks, baseline=baseline.name, text=text.name, progress=tell)

        gap_key = {**key, "baseline": sha256(baseline), "tokens": options.gap_tokens}
        gap: ModelGap = self._step("model gap", gap_key, ModelGap, measure)
        return gap

    def _total_numbers(self, artifact: OnnxArtifact) -> int:
        """Parameters of the whole VQ model, read from the graph's weights."""
        model = ir.load(self.bundle.folder / artifact.path)
        weights = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
        return sum(w.size for w in weights if w.dtype.is_floating_point())


def check_folder(model: Path, folder: Path, options: RunOptions, progress: Progress) -> tuple[ParityReport, ...]:
    """Compare the graphs that lie in a folder, whoever put them there, with the checkpoint they should equal.

    Args:
        model: the checkpoint.
        folder: holds model.onnx with its record, and dense.onnx where it is wanted too.
        options: `text`, `positions` and `threads` count.
        progress: told of every step.

    Raises:
        UserError: there is no such graph, or this machine cannot run it.
    """
    run = _Run(model, Bundle(folder), options, progress)
    names = [name for name in ("model.onnx", "dense.onnx") if (folder / name).is_file()]
    if not names:
        raise UserError(f"{folder}: holds no model.onnx; export one with: export-vq export {model} -o {folder}")
    return tuple(run.check(OnnxArtifact.load(folder / f"{name}.json")) for name in names)


def version_of(module: str) -> str:
    """The version that a module says of itself: onnxruntime comes in packages of several names."""
    return str(require(module, extra="cpu").__version__)
