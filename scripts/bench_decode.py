#!/usr/bin/env python3
"""Times whole decode steps of a model in ONNX Runtime: full softmax, VQ logits, VQ top-k, all in the same run.

    .venv/bin/python scripts/bench_decode.py .demo/model.pt -o docs/results/bench_decode.json

Every way ends in the best token: by an argmax over V logits where the graph gives logits, by the graph itself where it
gives the top k. The head's share is the time of the head alone, with cold caches, over that of the step: the rest of the
step evicts what the head would like to keep.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import onnxruntime

from export_vq import feeds
from export_vq.bench import Workload, run_benchmark
from export_vq.graph import ExportOptions, export_onnx, head_graph
from export_vq.head_output import HeadOutput
from export_vq.load import LoadedModel, load_model
from export_vq.records import BenchReport
from export_vq.runners import OrtRunner, native_library, signature_of
from export_vq.workloads import head_inputs, head_runner

TOP_K = 50
WAYS = {  # head kind, its output
    "VQ top-k": ("vq", "topk"),
    "VQ logits": ("vq", "logits"),
    "dense, then top-k": ("dense", "topk"),
    "dense logits": ("dense", "logits"),
}


def output_for(word: str) -> HeadOutput:
    return HeadOutput(word, TOP_K if word == "topk" else 0, last_token=True)


def export_all(loaded: LoadedModel, folder: Path) -> dict[str, tuple[Path, feeds.Signature]]:
    """The whole model in every way: file and signature."""
    models = {}
    for word in ("topk", "logits"):
        artifacts = export_onnx(loaded, folder / word, ExportOptions(output=word, top_k=TOP_K, last_token=True))
        for way, (kind, output) in WAYS.items():
            if output == word:
                models[way] = folder / word / artifacts[kind].path, signature_of(artifacts[kind])
    return models


def best_token(runner: OrtRunner, given: feeds.Feeds) -> Callable[[], int]:
    """A step that ends in a token id; the cache stays where it is, so that every run is the same step."""
    run = runner.bound(given)
    last = runner.infer(given)
    if "ids" in last:
        return lambda: run() or int(last["ids"][0, -1, 0])
    logits = last["logits"]

    def step() -> int:
        run()
        return int(np.argmax(logits[0, -1]))

    return step


def measure(
    loaded: LoadedModel,
    models: dict[str, tuple[Path, feeds.Signature]],
    threads: int,
    prompt: int,
    seconds: float,
    scratch: Path,
) -> BenchReport:
    """Decode steps and heads alone on so many threads."""
    assert loaded.head is not None
    ids = np.random.default_rng(0).integers(0, loaded.spec.vocab_size, (1, prompt))
    with ExitStack() as stack:
        steps, heads = {}, {}
        for way, (kind, output) in WAYS.items():
            native = kind == "vq"
            runner = stack.enter_context(OrtRunner(*models[way], threads=threads, native=native))
            steps[way] = best_token(runner, feeds.first_step(runner, ids))
            graph = head_graph(loaded.head, kind, output=output_for(output))
            alone = stack.enter_context(
                head_runner(graph, scratch / f"{output}-{kind}.onnx", threads=threads, native=native)
            )
            heads[way] = alone.bound(head_inputs(loaded.head, 1, alone.signature))
            if native:
                runner.demand_native()
                alone.demand_native()
        return run_benchmark(
            [Workload("decode step", 1, steps), Workload("head", 1, heads)],
            threads=threads,
            dtype="fp32",
            backend=f"ONNX Runtime {onnxruntime.__version__}",
            seconds=seconds,
        )


def table(report: BenchReport) -> str:
    times = {(t.subject, t.runner, t.cache): t.median_ms for t in report.timings}
    lines = [f"{'way':20} {'step ms':>9} {'tokens/s':>9} {'head ms, cold':>14} {'head share':>11}"]
    for way in WAYS:
        step, head = times["decode step", way, "warm"], times["head", way, "cold"]
        lines.append(f"{way:20} {step:9.2f} {1000 / step:9.1f} {head:14.3f} {head / step:10.1%}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a VQ-Logits model.pt or Hugging Face folder")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="ONNX Runtime's intra-op threads")
    parser.add_argument("--prompt", type=int, default=128, help="tokens in the cache")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each way and cache state")
    parser.add_argument("-o", "--output", type=Path, help="write all timings there as JSON")
    args = parser.parse_args()
    if native_library() is None:
        parser.exit(2, "error: the native kernels are not built; build them with: export-vq plugins build\n")
    loaded = load_model(args.model)
    reports = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        models = export_all(loaded, scratch)
        for threads in args.threads:
            report = measure(loaded, models, threads, args.prompt, args.seconds, scratch)
            reports.append(report)
            title = f"{args.model.name}, {threads} threads; {report.backend}; {report.device}"
            print(f"\n{title}\n{table(report)}", flush=True)
    if args.output:
        timings = tuple(
            dataclasses.replace(t, subject=f"{t.subject}, {r.threads} threads") for r in reports for t in r.timings
        )
        dataclasses.replace(reports[0], timings=timings).save(args.output)


if __name__ == "__main__":
    main()
