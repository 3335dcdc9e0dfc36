#!/usr/bin/env python3
"""Quality, size and speed of a model in fp32, fp16, INT8, INT4 and FP8, with a VQ head and with the dense one.

    .venv/bin/python scripts/quantized.py .demo/model.pt --text .demo/calibration.txt --held-out .demo/heldout.txt \\
        -o docs/results/quantized.json

Every graph is held against the fp32 graph with the same head, on text that nothing was calibrated on. The VQ head stays in
fp32 (fp16 in the fp16 graphs), the dense head is quantised as the body is. FP8 is simulated on a CPU: its numbers are rounded to
E4M3 and multiplied in float32, so its time means nothing and is not taken. The head's share is what a decode step takes
less when the head is cut off. Every lot of timings holds the fp32 VQ graph too, and speeds are relative to that.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnxruntime.quantization import QuantType, quantize_dynamic

from export_vq import feeds
from export_vq.bench import Workload, device_name, run_benchmark
from export_vq.bundle import Bundle
from export_vq.calibration import CalibrationOptions, calibrate
from export_vq.calibration.collect import saved, with_outputs
from export_vq.calibration.documents import read_material
from export_vq.calibration.judge import compare
from export_vq.calibration.products import products
from export_vq.calibration.source import open_source
from export_vq.files import sha256
from export_vq.forms import read_graph
from export_vq.graph import ExportOptions, export_onnx
from export_vq.load import load_model
from export_vq.records import OnnxArtifact
from export_vq.runners import OrtRunner, signature_of
from export_vq.steps import export_step
from export_vq.terminal import Steps

FILES = {"vq": "model.onnx", "dense": "dense.onnx"}
SIMULATED = ("fp8",)


@dataclass(frozen=True)
class Row:
    """One graph. Perplexity of the fp32 graph with the same head is `reference`; `head_share` and speeds None where they
    were not measured."""

    precision: str
    head: str
    num_bytes: int
    perplexity: float
    reference: float
    kl_mean: float
    top1: float
    step_ms: float | None = None
    tokens_per_second: float | None = None
    against_fp32: float | None = None
    head_share: float | None = None


def make_graphs(args: argparse.Namespace) -> dict[str, Path]:
    """Precision -> folder with both graphs."""
    out: Path = args.folder
    loaded = load_model(args.model)
    export_step(lambda: loaded, sha256(args.model), Bundle(out), ExportOptions(), Steps())
    folders = {"fp32": out, "fp16": out / "fp16", "int8 dynamic": out / "dynamic"}
    if not (folders["fp16"] / "dense.onnx.json").is_file():
        export_onnx(loaded, folders["fp16"], ExportOptions(dtype="fp16"))
    make_dynamic(out, folders["int8 dynamic"])
    for precision in ("int8", "w8", "int4", "fp8"):
        report = calibrate(out, options(args, precision), Steps())
        print(f"{precision}: {'; '.join(report.failures) or 'within its limits'}", flush=True)
        folders[{"int8": "int8 static"}.get(precision, precision)] = out / precision
    return folders


def options(args: argparse.Namespace, precision: str) -> CalibrationOptions:
    return CalibrationOptions(
        precision,
        text=args.text,
        held_out=args.held_out,
        samples=args.samples,
        width=args.width,
        test_tokens=args.test_tokens,
        block=args.block,
        keep=args.keep if precision in ("int8", "fp8") else "",
    )


def make_dynamic(source: Path, target: Path) -> None:
    """ONNX Runtime's own dynamic quantisation of the same products: inputs get their scale as they come."""
    target.mkdir(exist_ok=True)
    for kind, name in FILES.items():
        model = read_graph(source / name)
        chosen = [p for p in products(model) if kind == "dense" or not p.is_head]
        for product in chosen:
            product.node.name = product.name
        with saved(model, source) as named:
            quantise_dynamically(named, target / name, [product.name for product in chosen])


def quantise_dynamically(source: Path, target: Path, names: list[str]) -> None:
    quantize_dynamic(
        source,
        target,
        op_types_to_quantize=["MatMul", "Gemm"],
        nodes_to_quantize=names,
        per_channel=True,
        weight_type=QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True},
    )


def record(folder: Path, kind: str, exported: Path) -> OnnxArtifact:
    """What is known of a graph; ONNX Runtime's own quantiser writes no record, its graph has the exported one's inputs."""
    own = folder / f"{FILES[kind]}.json"
    return OnnxArtifact.load(own if own.is_file() else exported / own.name)


def num_bytes(path: Path) -> int:
    """The graph and the weights files that it refers to."""
    weights = (v.const_value for v in read_graph(path).graph.initializers.values())
    files = {path.with_name(str(w.location)) for w in weights if isinstance(w, ir.ExternalTensor)}
    return sum(file.stat().st_size for file in {path, *files})


def runner_of(folder: Path, kind: str, exported: Path, threads: int) -> OrtRunner:
    artifact = record(folder, kind, exported)
    return OrtRunner(
        folder / FILES[kind],
        signature_of(artifact),
        threads=threads,
        native=kind == "vq",
        fuse_quantised=artifact.fusible,
    )


def timings(folder: Path, args: argparse.Namespace, vocab_size: int) -> dict[str, float]:
    """Median milliseconds of a decode step: 'vq', 'dense', both without their heads, and 'fp32' VQ beside them."""
    ids = np.random.default_rng(0).integers(0, vocab_size, (1, args.prompt))
    with ExitStack() as stack:
        runs = {"fp32": stack.enter_context(runner_of(args.folder, "vq", args.folder, args.threads))}
        for kind in FILES:
            runs[kind] = stack.enter_context(runner_of(folder, kind, args.folder, args.threads))
            headless = with_outputs(read_graph(folder / FILES[kind]))
            path = stack.enter_context(saved(headless, args.folder))
            runs[f"{kind}, no head"] = stack.enter_context(
                OrtRunner(path, runs[kind].signature, threads=args.threads, native=False)
            )
        steps = {}
        for name, runner in runs.items():
            given = feeds.first_step(runner, ids)
            steps[name] = runner.bound(given)
        report = run_benchmark(
            [Workload("decode step", 1, steps)],
            threads=args.threads,
            dtype="",
            backend=runs["vq"].name,
            seconds=args.seconds,
        )
    return {t.runner: t.median_ms for t in report.timings if t.cache == "warm"}


def measure(args: argparse.Namespace) -> list[Row]:
    folders = make_graphs(args)
    source = open_source(args.folder, options(args, "w8"))
    vocab_size = source.artifact.spec.vocab_size
    width = min(args.width, source.positions)
    test = read_material(options(args, "w8"), source.tokenizer, vocab_size, width).test
    rows = []
    for precision, folder in folders.items():
        times = {} if precision in SIMULATED else timings(folder, args, vocab_size)
        for kind, name in FILES.items():
            with (
                runner_of(args.folder, kind, args.folder, args.threads) as reference,
                runner_of(folder, kind, args.folder, args.threads) as candidate,
            ):
                stats = compare(reference, candidate, test)
            step = times.get(kind)
            rows.append(
                Row(
                    precision=precision,
                    head=kind,
                    num_bytes=num_bytes(folder / name),
                    perplexity=stats.perplexity_candidate,
                    reference=stats.perplexity_reference,
                    kl_mean=stats.kl_mean,
                    top1=stats.top1_agreement,
                    step_ms=step,
                    tokens_per_second=None if step is None else 1000 / step,
                    against_fp32=None if step is None else times["fp32"] / step,
                    head_share=None if step is None else max(0.0, 1 - times[f"{kind}, no head"] / step),
                )
            )
            print(table(rows[-1:]), flush=True)
    return rows


def table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        speed = (
            "not timed"
            if row.step_ms is None
            else f"{row.tokens_per_second:6.1f} tokens/s {row.against_fp32:5.2f}x  head {row.head_share:5.1%}"
        )
        lines.append(
            f"{row.precision:13} {row.head:6} {row.num_bytes / 2**20:8.1f} MiB  perplexity {row.perplexity:8.3f} "
            f"({row.perplexity / row.reference - 1:+7.2%})  KL {row.kl_mean:.5f}  top-1 {row.top1:6.2%}  {speed}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a VQ-Logits model.pt or Hugging Face folder")
    parser.add_argument("--text", type=Path, required=True, help="what to calibrate on")
    parser.add_argument("--held-out", type=Path, help="what to test on; default: an eighth of the documents of --text")
    parser.add_argument("--folder", type=Path, help="where the graphs go and stay; default: a scratch folder")
    parser.add_argument("--samples", type=int, default=32, help="blocks to calibrate on")
    parser.add_argument("--width", type=int, default=256, help="tokens a block")
    parser.add_argument("--test-tokens", type=int, default=8192, help="positions to test on")
    parser.add_argument("--block", type=int, default=32, choices=(32, 64, 128), help="weights that share an INT4 scale")
    parser.add_argument("--keep", default="", help="as --keep-in-fp16 of calibrate, for INT8 static and FP8")
    parser.add_argument("--prompt", type=int, default=128, help="tokens in the cache of a timed step")
    parser.add_argument("--threads", type=int, default=1, help="ONNX Runtime's intra-op threads")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each graph and cache state")
    parser.add_argument("-o", "--output", type=Path, help="write all rows there as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        args.folder = args.folder or Path(scratch)
        rows = measure(args)
    print(f"\n{args.model.name}, {args.threads} threads; {device_name()}\n{table(rows)}")
    if args.output:
        made = {
            "device": device_name(),
            "threads": args.threads,
            "block": args.block,
            "rows": [asdict(r) for r in rows],
        }
        args.output.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
