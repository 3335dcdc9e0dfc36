#!/usr/bin/env python3
"""Times output layers of real models' shapes in ONNX Runtime on this machine's CPU, VQ against what one would otherwise use.

    .venv/bin/export-vq plugins build --no-cuda
    .venv/bin/python scripts/bench_head.py -o docs/results/bench_head.json

All ways of one head run in the same process and take turns. Warm: each in its own loop. Cold: the processor's caches are
evicted before every run, as the rest of the model does in a decode step. "Floor" is the roofline: the time that this
machine takes to read the bytes that the way must read, or for its multiplications or look-ups at the rate that it reaches
in its caches, whichever is longer.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import torch
from roofline import Machine, Work

from export_vq.bench import Workload, run_benchmark
from export_vq.files import write_text
from export_vq.forms import head_nodes
from export_vq.graph import head_graph
from export_vq.head import VQHead
from export_vq.head_output import HeadOutput
from export_vq.plots import latency_svg
from export_vq.records import BenchReport
from export_vq.rival_graphs import GROUP, integer_graph
from export_vq.runners import OrtRunner, native_library
from export_vq.workloads import head_inputs, head_runner

MODELS = {  # vocab_size, hidden_size, M of the product head
    "GPT-2": (50257, 768, 96),
    "SmolLM2-135M": (49152, 576, 144),
    "Qwen3-0.6B": (151936, 1024, 128),
    "Llama-3.2-1B": (128256, 2048, 128),
    "Gemma-3-270M": (262144, 640, 160),
    "Llama-3.1-8B": (128256, 4096, 128),
}
SINGLE_CODES, PRODUCT_CODES, CUT = 512, 256, 16384
TOP_K = 50
PERPLEXITY = 30
ISAS = ("portable", "neon", "avx2", "avx512", "avx512vbmi")
VQ, VQ_LOGITS, GATHER = "VQ top-k", "VQ logits", "VQ logits, plain Gather"
DENSE, DENSE_LOGITS, INT8, INT4 = "dense, then top-k", "dense logits", "dense INT8 logits", "dense INT4 logits"
CUT_DENSE = f"dense, {CUT:,} tokens, then top-k"
WAYS = (VQ, VQ_LOGITS, GATHER, DENSE, DENSE_LOGITS, CUT_DENSE, INT8, INT4)


def random_head(kind: str, d: int, v: int, m: int, k: int) -> VQHead:
    """A head of random numbers, whose logits are as far apart as a language model's.

    Normal logits of deviation s make a softmax over V tokens of perplexity V * exp(-s^2 / 2).
    """
    random = torch.Generator().manual_seed(0)
    spread = math.sqrt(2 * math.log(v / PERPLEXITY))
    codebook = torch.randn(m, k, d // m if kind == "product" else d, generator=random) * spread / d**0.5
    return VQHead.from_tensors(kind, codebook, torch.randint(0, k, (v, m), generator=random))


def gather_graph(head: VQHead) -> ir.Model:
    """The head as anyone would write it in ONNX: one Gather over all code logits, then a sum over codebooks."""
    model = head_graph(head, "vq")
    (node,) = head_nodes(model)
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


def cut(head: VQHead) -> VQHead:
    """The first tokens of a head."""
    bias = None if head.bias is None else head.bias[:CUT]
    return VQHead.from_tensors(head.spec.kind, head.codebook, head.codes[:CUT], bias, head.rotation)


def graphs(head: VQHead) -> Iterator[tuple[str, ir.Model]]:
    """Every way to run a head, by name."""
    best = HeadOutput("topk", TOP_K)
    yield VQ, head_graph(head, "vq", output=best)
    yield VQ_LOGITS, head_graph(head, "vq")
    yield GATHER, gather_graph(head)
    yield DENSE, head_graph(head, "dense", output=best)
    yield DENSE_LOGITS, head_graph(head, "dense")
    yield CUT_DENSE, head_graph(cut(head), "dense", output=best)
    weight = head.dense_twin().weight
    yield INT8, integer_graph(weight, 8)
    yield INT4, integer_graph(weight, 4)


@contextmanager
def runners(head: VQHead, threads: int, without: tuple[str, ...]) -> Iterator[dict[str, OrtRunner]]:
    """A session for each way; the files go with the context."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        named = {}
        for i, (name, graph) in enumerate(graphs(head)):
            if name in without:
                continue
            runner = head_runner(graph, folder / f"{i}.onnx", threads=threads, native=name in (VQ, VQ_LOGITS))
            named[name] = stack.enter_context(runner)
        yield named


def work_of(name: str, head: VQHead, batch: int) -> Work:
    """What a way cannot do without: bytes read, multiplications and additions, look-ups."""
    spec = head.spec
    v, d, m, k = spec.vocab_size, spec.hidden_size, spec.num_codebooks, spec.num_codes
    if name.startswith("VQ"):
        codebook = 4 * head.codebook.numel()
        operations = 2 * batch * head.codebook.numel()
        if name == VQ and m == 1:
            return Work(codebook, operations, 0)
        written = 0 if name == VQ else 4 * batch * v
        return Work(codebook + v * m * (1 if k <= 256 else 2) + written, operations, batch * v * m)
    rows = min(v, CUT) if name == CUT_DENSE else v
    width = {INT8: 1 + 4 / GROUP, INT4: 0.5 + 4 / GROUP}.get(name, 4)
    return Work(int(rows * d * width), 2 * batch * rows * d, 0)


def measure(
    head: VQHead, subject: str, threads: int, batches: tuple[int, ...], seconds: float, without: tuple[str, ...]
) -> BenchReport:
    """One head in all ways but some, warm and cold."""
    with runners(head, threads, without) as named:
        work = [
            Workload(
                subject, batch, {name: r.bound(head_inputs(head, batch, r.signature)) for name, r in named.items()}
            )
            for batch in batches
        ]
        named[VQ].demand_native()
        return run_benchmark(
            work, threads=threads, dtype="fp32", backend=f"ONNX Runtime {onnxruntime.__version__}", seconds=seconds
        )


def lookups_per_ms(threads: int) -> float:
    """What the library's kernel reaches with code ids in the nearer caches: the cost of more tokens, the call taken off."""
    m, few, more = 128, 4096, 12288
    times = []
    for v in (few, more):
        with tempfile.TemporaryDirectory() as scratch:
            head = random_head("product", 512, v, m, PRODUCT_CODES)
            graph = head_graph(head, "vq", output=HeadOutput("topk", 1))
            with head_runner(graph, Path(scratch, "head.onnx"), threads=threads, native=True) as runner:
                work = Workload("look-ups", 1, {"vq": runner.bound(head_inputs(head, 1, runner.signature))})
                report = run_benchmark([work], threads=threads, dtype="fp32", backend="", seconds=0.5)
        times.append(next(t.min_ms for t in report.timings if t.cache == "warm"))
    return (more - few) * m / (times[1] - times[0])


def table(report: BenchReport, head: VQHead, machine: Machine) -> str:
    """Medians with quartiles and p99, the floor, and how many times faster VQ top-k is."""
    lines = [
        f"{'batch':>5} {'caches':6} {'way':32} {'median ms':>10} {'q1 to q3':>20} {'p99':>9} {'floor':>8} {'top-k is':>9}"
    ]
    for t in report.timings:
        ratio = report.speedup(t.subject, t.batch, t.cache, over=t.runner, of=VQ)
        floor = machine.floor_ms(work_of(t.runner, head, t.batch), cold=t.cache == "cold")
        spread = f"{t.q1_ms:.4f} to {t.q3_ms:.4f}"
        lines.append(
            f"{t.batch:5} {t.cache:6} {t.runner:32} {t.median_ms:10.4f} {spread:>20} {t.p99_ms:9.4f} {floor:8.4f} {ratio:8.1f}x"
        )
    return "\n".join(lines)


def heads_of(model: str) -> dict[str, VQHead]:
    v, d, m = MODELS[model]
    return {
        f"{model}, single K={SINGLE_CODES}": random_head("single", d, v, 1, SINGLE_CODES),
        f"{model}, product M={m}, K={PRODUCT_CODES}": random_head("product", d, v, m, PRODUCT_CODES),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="ONNX Runtime's intra-op threads")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each way, batch size and cache state")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 64], help="rows of hidden states")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS), metavar="MODEL")
    parser.add_argument(
        "--without",
        nargs="*",
        default=[],
        choices=WAYS[1:],
        metavar="WAY",
        help=f"ways to leave out: {'; '.join(WAYS[1:])}",
    )
    parser.add_argument("--isa", choices=ISAS, help="the native kernels' instruction set, where the processor has it")
    parser.add_argument("-o", "--output", type=Path, help="write all timings there as JSON, and a plot beside it")
    args = parser.parse_args()
    if native_library() is None:
        parser.exit(
            2,
            "error: the native kernels are not built, or of another version; build them with: export-vq plugins build\n",
        )
    if args.isa:
        os.environ["EXPORT_VQ_ISA"] = args.isa
    machine = Machine(args.threads, functools.partial(lookups_per_ms, args.threads))
    reports = []
    for model in args.models:
        for subject, head in heads_of(model).items():
            report = measure(head, subject, args.threads, tuple(args.batches), args.seconds, tuple(args.without))
            reports.append(report)
            print(f"\n{subject}; {report.threads} threads; {report.backend}; {report.device}")
            print(table(report, head, machine), flush=True)
            if args.output:
                timings = tuple(t for r in reports for t in r.timings)
                dataclasses.replace(report, timings=timings).save(args.output)
                one_row = dataclasses.replace(report, timings=tuple(t for t in timings if t.batch == min(args.batches)))
                write_text(args.output.with_suffix(".svg"), latency_svg(one_row))


if __name__ == "__main__":
    main()
