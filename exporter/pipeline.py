"""The walk: checkpoint -> graphs -> checks -> speed -> report. Every step is skipped while its inputs are unchanged."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from export_vq import genai, parity
from export_vq.bench import device_name, run_benchmark
from export_vq.bundle import Bundle
from export_vq.calibrated import calibrations
from export_vq.engine_steps import bench_engines, make_engines, sidecar
from export_vq.errors import UserError
from export_vq.feeds import Runner
from export_vq.files import sha256, write_text
from export_vq.generate import generate
from export_vq.graph import TORCH_DTYPES, ExportOptions
from export_vq.load import LoadedModel, load_dense, load_model
from export_vq.manifest import seal
from export_vq.progress import Progress
from export_vq.quality import continuations, quality_report
from export_vq.records import (
    BenchReport,
    Continuation,
    EngineArtifact,
    OnnxArtifact,
    ParityReport,
    QualityReport,
    RunReport,
)
from export_vq.report import render_html
from export_vq.require import require
from export_vq.runners import OrtRunner, TorchRunner, native_library, signature_of
from export_vq.staging import staged
from export_vq.steps import export_step
from export_vq.text import filled_blocks, read_text
from export_vq.trt_runner import TrtRunner
from export_vq.workloads import CONTEXT, head_workloads, runners, step_workload

PROMPT = "The capital of France is"
GAP_BLOCK = 256


@dataclass(frozen=True)
class RunOptions:
    """What the main job does.

    `text` is a UTF-8 file or folder to check and measure on (random tokens without), `baseline` the dense original,
    `positions` how many token positions the fp32 check covers, `gap_tokens` how many tokens the model gap, `threads`
    ONNX Runtime's intra-op threads (0: its own choice), `bench_seconds` the time for each way, batch size and cache state
    that is timed.
    """

    export: ExportOptions = field(default_factory=ExportOptions)
    text: Path | None = None
    baseline: Path | None = None
    prompt: str = PROMPT
    positions: int = 2048
    gap_tokens: int = 4096
    threads: int = 0
    bench_seconds: float = 2.0


def run_pipeline(model: Path, out: Path, options: RunOptions, progress: Progress) -> RunReport:
    """Do everything this machine can do for one checkpoint, write `report.json` and `report.html`, and seal the folder.
    Until it has come to its end, the folder stays what it was.

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
    source = _source(model, options)
    with staged(out, f"{source} {options.export}") as folder:
        return _Run(model, source, Bundle(folder), options, progress).report()


def _source(model: Path, options: RunOptions) -> str:
    """SHA-256 of the model, when all that the options name is there."""
    if not model.exists():
        raise UserError(f"{model}: no such file or folder; give a VQ-Logits model.pt or a Hugging Face folder")
    if options.baseline is not None and not options.baseline.exists():
        raise UserError(
            f"{options.baseline}: no such file or folder; give the dense model as a Hugging Face folder or GGUF file"
        )
    return sha256(model)


class _Run:
    """One run of the main job; the model is only read when a step needs it."""

    def __init__(self, model: Path, source: str, bundle: Bundle, options: RunOptions, progress: Progress) -> None:
        self.path, self.source, self.bundle, self.options, self.progress = model, source, bundle, options, progress
        self.not_done: list[str] = []

    @cached_property
    def loaded(self) -> LoadedModel:
        with self.progress.step("load"):
            return load_model(self.path)

    @cached_property
    def baseline(self) -> LoadedModel:
        assert self.options.baseline is not None
        with self.progress.step("load baseline"):
            return load_dense(self.options.baseline)

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
        if why := genai.refusal(artifacts["vq"]):
            self.not_done.append(f"onnxruntime-genai: {why}")
        runs = self._can_run(artifacts["vq"])
        checks, bench, written = [], None, Continuation("", "")
        if runs:
            library = native_library()
            native = self._is_native(artifacts["vq"])
            check_key = {
                **key,
                "positions": options.positions,
                "ort": version_of("onnxruntime"),
                "native": library.sha256 if library else "",
            }
            judged = {"check": ("vq", native), "check-dense": ("dense", False)}
            if library is None:
                self.not_done.append(
                    "native kernels: the VQ head runs as stock ops, which is slow on a CPU; build them with: export-vq plugins build"
                )
            if native:
                judged["check-stock"] = ("vq", False)
            checks = [
                self._step(
                    name,
                    check_key,
                    ParityReport,
                    partial(self._check, artifacts[graph], native=native),
                )
                for name, (graph, native) in judged.items()
            ]
            bench_key = check_key | {
                "device": device_name(),
                "threads": options.threads,
                "seconds": options.bench_seconds,
            }
            bench = self._step("bench", bench_key, BenchReport, lambda tell: self._bench(artifacts, tell))
            if artifacts["vq"].output == "sample":
                self.not_done.append(
                    "continuation: this graph draws its tokens, the greedy one is not among its outputs; export with --output topk"
                )
            written = self._step(
                "write", {**key, "prompt": options.prompt}, Continuation, lambda _: self._write(artifacts["vq"])
            )
        engines, engine_checks, engine_bench = self._engines(key)
        quality = self._quality(key)
        report = RunReport(
            model=self.path.name,
            model_type=artifacts["vq"].model_type,
            dtype=options.export.dtype,
            spec=artifacts["vq"].spec,
            tied_embedding=artifacts["vq"].tied_embedding,
            total_numbers=self._total_numbers(artifacts["vq"]),
            artifacts=tuple(artifacts.values()),
            parity=(*checks, *engine_checks),
            quality=quality,
            bench=bench,
            prompt=written.prompt,
            continuation=written.text,
            engines=engines,
            engine_bench=engine_bench,
            calibrations=calibrations(bundle.folder),
            not_done=tuple(self.not_done),
            versions={name: version(name) for name in ("export-vq", "torch", "transformers", "onnx", "numpy")}
            | ({"onnxruntime": version_of("onnxruntime")} if runs else {}),
        )
        report.save(bundle.report_json)
        write_text(bundle.report_html, render_html(report))
        seal(bundle.folder)
        return report

    def _step(
        self, name: str, key: dict[str, Any], kind: type[Any], make: Callable[[Callable[[float], None]], Any]
    ) -> Any:
        def made() -> Any:
            _ = self.loaded  # its own step, not part of this one's time
            if name == "quality":
                _ = self.baseline
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
            return self._check(artifact, lambda fraction: tell(name, fraction), native=self._is_native(artifact))

    def _blocks(self, width: int, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Token blocks [count, width] of the text, or random ones."""
        if self.text is not None:
            vocab_size = self.loaded.spec.vocab_size
            return filled_blocks(self.loaded.tokenizer(), self.text, width, count, vocab_size=vocab_size)
        return np.random.default_rng(0).integers(0, self.loaded.spec.vocab_size, (count, width))

    def _is_native(self, artifact: OnnxArtifact) -> bool:
        """Whether our kernels run this graph's head: the portable form leaves the node for them."""
        return native_library() is not None and (artifact.head, artifact.form) == ("vq", "portable")

    def _check(self, artifact: OnnxArtifact, tell: Callable[[float], None], *, native: bool) -> ParityReport:
        # What is checked besides the main graph gets a quarter of the positions.
        secondary = artifact.head == "dense" or native != self._is_native(artifact)
        with OrtRunner(
            self.bundle.folder / artifact.path, signature_of(artifact), threads=self.options.threads, native=native
        ) as candidate:
            positions = self.options.positions // (4 if secondary else 1)
            report = self._compare(candidate, artifact.dtype, positions, tell)
            if native:
                candidate.demand_native()
            return report

    def _compare(self, candidate: Runner, dtype: str, positions: int, tell: Callable[[float], None]) -> ParityReport:
        half = dtype != "fp32"
        loaded, signature, type_ = self.loaded, candidate.signature, TORCH_DTYPES[dtype]
        # The float64 oracle and PyTorch's half types are slow: a quarter of the positions.
        cases = parity.standard_cases(self._blocks, positions // (4 if half else 1), loaded.max_positions)
        with TorchRunner(loaded, signature, torch.float64 if half else type_) as reference:
            native = TorchRunner(loaded, signature, type_) if half else None
            return parity.check_parity(reference, candidate, cases, dtype=dtype, native=native, progress=tell)

    def _engines(
        self, key: dict[str, Any]
    ) -> tuple[tuple[EngineArtifact, ...], list[ParityReport], BenchReport | None]:
        """Build what this machine can; where it has the GPU, check and time it."""
        folder = self.bundle.folder
        engines, here, not_done = make_engines(folder, self.progress)
        self.not_done += not_done
        if here is None or here.gpu is None or not engines:
            return tuple(engines.values()), [], None

        def check(kind: str) -> Callable[[Callable[[float], None]], ParityReport]:
            def compared(tell: Callable[[float], None]) -> ParityReport:
                with TrtRunner(sidecar(folder, here, kind)) as candidate:
                    return self._compare(candidate, engines[kind].dtype, self.options.positions, tell)

            return compared

        plans = {kind: artifact.sha256 for kind, artifact in engines.items()}
        key = {**key, "positions": self.options.positions, "gpu": here.gpu.name}
        checks = [
            self._step(f"check-{kind}", {**key, "plan": plan}, ParityReport, check(kind))
            for kind, plan in plans.items()
        ]
        ids = self._blocks(min(CONTEXT, self.loaded.max_positions - 1), 1)
        bench = self._step(
            "bench-engines",
            {**key, "plans": plans},
            BenchReport,
            lambda tell: bench_engines(folder, here, engines, ids, tell),
        )
        return tuple(engines.values()), checks, bench

    def _bench(self, artifacts: dict[str, OnnxArtifact], tell: Callable[[float], None]) -> BenchReport:
        threads, dtype = self.options.threads, artifacts["vq"].dtype
        assert self.loaded.head is not None
        head = copy.deepcopy(self.loaded.head).to(TORCH_DTYPES[dtype])
        with (
            tempfile.TemporaryDirectory() as scratch,
            head_workloads(
                head,
                Path(scratch),
                opset=self.options.export.opset,
                threads=threads,
                output=self.options.export.head_output,
            ) as heads,
            runners(self.bundle.folder, artifacts, threads, native=self._is_native(artifacts["vq"])) as models,
        ):
            step = step_workload(models, self._blocks(min(CONTEXT, self.loaded.max_positions - 1), 1))
            backend = f"ONNX Runtime {version_of('onnxruntime')}"
            if native_library() is not None:
                backend += " with native kernels"
            seconds = self.options.bench_seconds
            return run_benchmark(
                [*heads, step], threads=threads, dtype=dtype, backend=backend, seconds=seconds, progress=tell
            )

    def _write(self, artifact: OnnxArtifact) -> Continuation:
        if artifact.output == "sample":
            return Continuation("", "")
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

    def _quality(self, key: dict[str, Any]) -> QualityReport | None:
        """What the VQ head costs against the dense original, and what INT8 and INT4 would cost instead."""
        options = self.options
        if options.baseline is None or options.text is None:
            missing = " and ".join(f"--{n} {n.upper()}" for n in ("baseline", "text") if getattr(options, n) is None)
            self.not_done.append(f"model gap: what the VQ head costs against the dense original; give {missing}")
            return None
        text = options.text

        def judge(tell: Callable[[float], None]) -> QualityReport:
            width = min(GAP_BLOCK, self.loaded.max_positions)
            blocks = torch.from_numpy(self._blocks(width, options.gap_tokens // width))
            models = {"this model": self.loaded}
            report = quality_report(self.baseline, models, {text.name: blocks}, progress=lambda _, part: tell(part))
            samples = continuations({"dense": self.baseline, **models}, (options.prompt,), 32)
            return dataclasses.replace(report, samples=samples)

        judged = {"baseline": sha256(options.baseline), "tokens": options.gap_tokens, "prompt": options.prompt}
        quality: QualityReport = self._step("quality", {**key, **judged}, QualityReport, judge)
        return quality

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
    run = _Run(model, _source(model, options), Bundle(folder), options, progress)
    names = [name for name in ("model.onnx", "dense.onnx") if (folder / name).is_file()]
    if not names:
        raise UserError(f"{folder}: holds no model.onnx; export one with: export-vq export {model} -o {folder}")
    return tuple(run.check(OnnxArtifact.load(folder / f"{name}.json")) for name in names)


def version_of(module: str) -> str:
    """The version that a module says of itself: onnxruntime comes in packages of several names."""
    return str(require(module, extra="cpu").__version__)
