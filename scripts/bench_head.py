#!/usr/bin/env python3
"""Times output layers in ONNX Runtime on this machine's CPU: native VQ kernel, stock ops, plain Gather, dense MatMul.

    .venv/bin/export-vq plugins build
    .venv/bin/python scripts/bench_head.py --threads 1 -o bench_head.json

All of a head's rivals run in the same process, turn by turn. Warm: each in its own loop. Cold: the processor's caches are
evicted before every run, as the rest of the model does in a decode step.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import torch

from export_vq.bench import Workload, run_benchmark
from export_vq.feeds import Signature
from export_vq.forms import gather_scatter_nodes
from export_vq.graph import head_graph
from export_vq.head import VQHead
from export_vq.records import BenchReport
from export_vq.runners import OrtRunner, native_library
from export_vq.workloads import head_inputs, head_workloads

HEADS = {
    "single K=512, D=768, V=50257": ("single", 768, 50257, 1, 512),
    "product M=8, K=256, D=768, V=50257": ("product", 768, 50257, 8, 256),
    "product M=64, K=256, D=768, V=50257": ("product", 768, 50257, 64, 256),
    "product M=144, K=256, D=576, V=49152": ("product", 576, 49152, 144, 256),
}
GATHER = "plain Gather"


def random_head(kind: str, d: int, v: int, m: int, k: int) -> VQHead:
    """A head of random numbers: time does not depend on them."""
    random = torch.Generator().manual_seed(0)
    codebook = torch.randn(m, k, d // m if kind == "product" else d, generator=random)
    return VQHead.from_tensors(kind, codebook, torch.randint(0, k, (v, m), generator=random))


def gather_graph(head: VQHead) -> ir.Model:
    """The head as anyone would write it in ONNX: one Gather over all code logits, then a sum over codebooks."""
    model = head_graph(head, "vq")
    (node,) = gather_scatter_nodes(model)
    m, k = head.spec.num_codebooks, head.spec.num_codes
    entries = head.codes.long() + k * torch.arange(m)  # [V, M] into [M*K]
    indices = ir.val(
        "entries", const_value=ir.tensor(entries.squeeze(1).numpy() if m == 1 else entries.numpy(), name="entries")
    )
    model.graph.register_initializer(indices)
    scores = node.inputs[0]
    nodes = [ir.Node("", "Gather", [scores, indices], [ir.AttrInt64("axis", -1)])]
    if m > 1:
        axes = ir.val("axes", const_value=ir.tensor([-1], dtype=ir.DataType.INT64, name="axes"))
        model.graph.register_initializer(axes)
        nodes.append(ir.Node("", "ReduceSum", [nodes[0].outputs[0], axes], [ir.AttrInt64("keepdims", 0)]))
    logits = node.outputs[0]
    made = nodes[-1].outputs[0]
    made.name, made.dtype, made.shape = logits.name, logits.dtype, logits.shape
    model.graph.insert_before(node, nodes)
    model.graph.outputs[0] = made
    model.graph.remove(node, safe=True)
    model.functions.clear()
    return model


def measure(name: str, threads: int, batches: tuple[int, ...], seconds: float) -> BenchReport:
    """One head against its rivals, warm and cold."""
    head = random_head(*HEADS[name])
    with (
        tempfile.TemporaryDirectory() as scratch,
        head_workloads(head, Path(scratch), batches=batches, threads=threads) as work,
    ):
        file = Path(scratch, "gather.onnx")
        ir.save(gather_graph(head), file, external_data="gather.data")
        with OrtRunner(file, Signature((), False), threads=threads, native=False) as gather:
            work = [
                Workload(w.subject, w.batch, {**w.runs, GATHER: gather.bound(head_inputs(head, w.batch))}) for w in work
            ]
            report = run_benchmark(
                work, threads=threads, dtype="fp32", backend=f"ONNX Runtime {onnxruntime.__version__}", seconds=seconds
            )
    return replace(report, timings=tuple(replace(t, subject=name) for t in report.timings))


def table(report: BenchReport) -> str:
    """Medians with quartiles, and how many times faster than each rival the native kernel is."""
    lines = [f"{'batch':>5} {'caches':6} {'runs on':16} {'median ms':>10} {'q1 to q3':>20} {'vq is':>8}"]
    for t in report.timings:
        ratio = report.speedup(t.subject, t.batch, t.cache, over=t.runner)
        spread = f"{t.q1_ms:.4f} to {t.q3_ms:.4f}"
        lines.append(f"{t.batch:5} {t.cache:6} {t.runner:16} {t.median_ms:10.4f} {spread:>20} {ratio:7.1f}x")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="ONNX Runtime's intra-op threads")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each rival, batch size and cache state")
    parser.add_argument(
        "--heads", nargs="*", default=list(HEADS), choices=list(HEADS), metavar="HEAD", help=f"of: {'; '.join(HEADS)}"
    )
    parser.add_argument("-o", "--output", type=Path, help="write all timings there as JSON")
    args = parser.parse_args()
    if native_library() is None:
        parser.exit(
            2,
            "error: the native kernels are not built, or of another version; build them with: export-vq plugins build\n",
        )
    reports = []
    for name in args.heads:
        report = measure(name, args.threads, (1, 8), args.seconds)
        reports.append(report)
        print(f"\n{name}; {report.threads} threads; {report.backend}; {report.device}\n{table(report)}", flush=True)
    if args.output:
        replace(reports[0], timings=tuple(t for r in reports for t in r.timings)).save(args.output)


if __name__ == "__main__":
    main()
