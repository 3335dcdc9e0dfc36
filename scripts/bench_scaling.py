#!/usr/bin/env python3
"""How the time of a VQ-Logits top-k head grows with its codebook and with the vocabulary, in ONNX Runtime on this CPU.

    .venv/bin/export-vq plugins build --no-cuda
    .venv/bin/python scripts/bench_scaling.py -o docs/results/bench_scaling.json

Batch 1, warm caches, hidden size 768, the dense head of the same vocabulary in the same run. Writes the plot beside the JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import onnxruntime
import torch

from export_vq.bench import Workload, run_benchmark
from export_vq.files import write_text
from export_vq.graph import head_graph
from export_vq.head import VQHead
from export_vq.head_output import HeadOutput
from export_vq.plots import curves_svg
from export_vq.records import BenchReport
from export_vq.runners import native_library
from export_vq.workloads import head_inputs, head_runner

HIDDEN_SIZE, TOP_K = 768, 50
CODES = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
AT_VOCABULARY = 131_072
VOCABULARIES = (32_768, 65_536, 131_072, 262_144, 524_288)
AT_CODES = 512
PRODUCT = (96, 256)  # num_codebooks, num_codes
SINGLE, PRODUCT_NAME, DENSE = f"single, K={AT_CODES}", "product, M=96, K=256", "dense, then top-k"


def single(num_codes: int, vocab_size: int) -> VQHead:
    random = torch.Generator().manual_seed(0)
    codebook = torch.randn(1, num_codes, HIDDEN_SIZE, generator=random) * 3 / HIDDEN_SIZE**0.5
    return VQHead.from_tensors("single", codebook, torch.randint(0, num_codes, (vocab_size, 1), generator=random))


def product(vocab_size: int) -> VQHead:
    random = torch.Generator().manual_seed(0)
    m, k = PRODUCT
    codebook = torch.randn(m, k, HIDDEN_SIZE // m, generator=random) * 3 / HIDDEN_SIZE**0.5
    return VQHead.from_tensors("product", codebook, torch.randint(0, k, (vocab_size, m), generator=random))


def measure(subject: str, ways: dict[str, tuple[VQHead, str]], threads: int, seconds: float) -> BenchReport:
    """One size: named heads, each as 'vq' or 'dense', taking turns."""
    output = HeadOutput("topk", TOP_K)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        runs = {}
        for i, (name, (head, kind)) in enumerate(ways.items()):
            native = kind == "vq"
            graph = head_graph(head, kind, output=output)
            runner = stack.enter_context(head_runner(graph, folder / f"{i}.onnx", threads=threads, native=native))
            runs[name] = runner.bound(head_inputs(head, 1, runner.signature))
            if native:
                runner.demand_native()
        backend = f"ONNX Runtime {onnxruntime.__version__}"
        return run_benchmark(
            [Workload(subject, 1, runs)], threads=threads, dtype="fp32", backend=backend, seconds=seconds
        )


def line(reports: dict[int, BenchReport], name: str) -> list[tuple[float, float]]:
    return [
        (size, t.median_ms)
        for size, report in reports.items()
        for t in report.timings
        if (t.runner, t.cache) == (name, "warm")
    ]


def show(title: str, reports: dict[int, BenchReport], names: Sequence[str]) -> None:
    print(f"\n{title:>10} " + " ".join(f"{name:>22}" for name in names))
    for size, report in reports.items():
        times = {t.runner: t.median_ms for t in report.timings if t.cache == "warm"}
        print(f"{size:>10,} " + " ".join(f"{times[name]:>19.4f} ms" for name in names), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="ONNX Runtime's intra-op threads")
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each way and size")
    parser.add_argument("-o", "--output", type=Path, help="write all timings there as JSON, and the plot beside it")
    args = parser.parse_args()
    if native_library() is None:
        parser.exit(2, "error: the native kernels are not built; build them with: export-vq plugins build\n")
    by_codes = {
        k: measure(
            f"K={k}, V={AT_VOCABULARY}", {"single": (single(k, AT_VOCABULARY), "vq")}, args.threads, args.seconds
        )
        for k in CODES
    }
    show("codes K", by_codes, ["single"])
    by_tokens = {}
    for v in VOCABULARIES:
        head = single(AT_CODES, v)
        ways = {SINGLE: (head, "vq"), PRODUCT_NAME: (product(v), "vq"), DENSE: (head, "dense")}
        by_tokens[v] = measure(f"V={v}", ways, args.threads, args.seconds)
    show("tokens V", by_tokens, [SINGLE, PRODUCT_NAME, DENSE])
    if args.output:
        reports = [*by_codes.values(), *by_tokens.values()]
        timings = tuple(t for report in reports for t in report.timings)
        dataclasses.replace(reports[0], timings=timings).save(args.output)
        panels = {
            f"codes K, at {AT_VOCABULARY:,} tokens": {"single": line(by_codes, "single")},
            "tokens V": {name: line(by_tokens, name) for name in (SINGLE, PRODUCT_NAME, DENSE)},
        }
        write_text(args.output.with_suffix(".svg"), curves_svg(panels, "time of a row, ms"))


if __name__ == "__main__":
    main()
