"""Quality, size and speed of a model in fp32, fp16, INT8, INT4 and FP8, with a VQ head and with the dense one.

    .venv/bin/python scripts/quantized.py .demo/model.pt --text .demo/calibration.txt --held-out .demo/heldout.txt \\
        --folder .demo/quantised -o docs/results/quantized.json --table docs/results/quantized.md

Every graph is held against the fp32 graph with the same head, on text that nothing was calibrated on. The VQ head stays in
fp32 (fp16 in the fp16 graphs), the dense head is quantised as the body is. FP8 is simulated on a CPU: its numbers are rounded to
E4M3 and multiplied in float32, so its time means nothing and is not taken. The head's share is the time of its nodes, by the
runtime's own profile, over that of a step that is not profiled. Every lot of timings holds the fp32 VQ graph too, and speeds
are relative to that. What is calibrated and judged stays in --folder: a run that was stopped goes on there, and a repeated
one measures only speeds anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor

from export_vq import feeds
from export_vq.bench import Workload, device_name, run_benchmark
from export_vq.bundle import Bundle
from export_vq.calibration import CalibrationOptions, calibrate
from export_vq.calibration.collect import saved, through_cache, with_outputs
from export_vq.calibration.documents import read_material
from export_vq.calibration.products import products
from export_vq.calibration.source import open_source
from export_vq.contract import HEAD_PREFIX
from export_vq.files import sha256, write_text
from export_vq.forms import read_graph
from export_vq.graph import ExportOptions
from export_vq.load import load_model
from export_vq.records import CalibrationReport, OnnxArtifact
from export_vq.runners import OrtRunner, signature_of
from export_vq.steps import export_step
from export_vq.terminal import Steps

FILES = {"vq": "model.onnx", "dense": "dense.onnx"}
CALIBRATED = {"fp16": "fp16", "int8": "int8 static", "w8": "int8 weights", "int4": "int4 weights", "fp8": "fp8"}
"""Precision of `calibrate` -> its name here."""
SIMULATED = ("fp8",)
TARGETS = {"int8 weights": 0.01, "int4 weights": 0.05}
"""Allowed relative increase of perplexity."""
MADE_WITH = "made_with.txt"
PROFILED_STEPS = 30


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

    @property
    def increase(self) -> float:
        return self.perplexity / self.reference - 1


def make_graphs(args: argparse.Namespace) -> dict[str, Path]:
    """Precision -> folder with both graphs."""
    out: Path = args.folder
    export_step(lambda: load_model(args.model), sha256(args.model), Bundle(out), ExportOptions(), Steps())
    folders = {"fp32": out, "int8 dynamic": out / "dynamic"}
    if not (folders["int8 dynamic"] / FILES["dense"]).is_file():
        make_dynamic(out, folders["int8 dynamic"])
    for precision, name in CALIBRATED.items():
        folders[name] = out / precision
        if not made_with(out, options(args, precision)):
            calibrate(out, options(args, precision), Steps())
            write_text(out / precision / MADE_WITH, str(options(args, precision)))
    return {name: folders[name] for name in ("fp32", "fp16", "int8 dynamic", *list(CALIBRATED.values())[1:])}


def made_with(out: Path, asked: CalibrationOptions) -> bool:
    """Whether a precision's graphs are there, made of this model with these options."""
    file, report = (out / asked.precision / name for name in (MADE_WITH, "calibration.json"))
    if not file.is_file() or file.read_text(encoding="utf-8") != str(asked):
        return False
    return CalibrationReport.load(report).source_sha256 == sha256(out / FILES["vq"])


def options(args: argparse.Namespace, precision: str) -> CalibrationOptions:
    return CalibrationOptions(
        precision,
        text=args.text,
        held_out=args.held_out,
        samples=args.samples,
        width=args.width,
        test_tokens=args.width,  # all are judged together, on more
        block=args.block,
        keep=args.int8_keep if precision == "int8" else "",
        eight=args.int4_eight if precision == "int4" else "",
        threads=args.threads,
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


def runner_of(
    folder: Path, kind: str, exported: Path, threads: int, *, file: Path | None = None, profiled: bool = False
) -> OrtRunner:
    """Of a folder's graph, or of another `file` made of it."""
    artifact = record(folder, kind, exported)
    return OrtRunner(
        file or folder / FILES[kind],
        signature_of(artifact),
        threads=threads,
        native=kind == "vq" and file is None,
        fuse_quantised=artifact.fusible,
        profiled=profiled,
    )


def read_by_the_head(model: ir.Model) -> list[str]:
    """Values of the backbone: all that depends on the constants of the head is the head."""
    inside: set[ir.Value] = {v for name, v in model.graph.initializers.items() if name.startswith(HEAD_PREFIX)}
    read: dict[str, None] = {}
    for node in model.graph:
        given = [v for v in node.inputs if v is not None]
        if not inside.intersection(given):
            continue
        inside.update(node.outputs)
        read.update({str(v.name): None for v in given if v not in inside and v.producer() is not None})
    return list(read)


def head_ms(folder: Path, kind: str, args: argparse.Namespace, ids: NDArray[np.int64]) -> float:
    """Milliseconds of the head's nodes in a decode step: those that the graph without its head does not have."""
    times = []
    full = read_graph(folder / FILES[kind])
    with saved(with_outputs(full, read_by_the_head(full)), args.folder) as cut:
        for file in (None, cut):
            with runner_of(folder, kind, args.folder, args.threads, file=file, profiled=True) as runner:
                step = runner.bound(feeds.first_step(runner, ids))
                for _ in range(PROFILED_STEPS):
                    step()
                times.append(runner.node_times())
    whole, backbone = times
    return sum(ms for name, ms in whole.items() if name not in backbone)


def timings(folder: Path, args: argparse.Namespace, ids: NDArray[np.int64]) -> dict[str, float]:
    """Median milliseconds of a decode step: 'vq', 'dense', and 'fp32' VQ beside them."""
    with ExitStack() as stack:
        runs = {"fp32": stack.enter_context(runner_of(args.folder, "vq", args.folder, args.threads))}
        for kind in FILES:
            runs[kind] = stack.enter_context(runner_of(folder, kind, args.folder, args.threads))
        steps = {name: runner.bound(feeds.first_step(runner, ids)) for name, runner in runs.items()}
        report = run_benchmark(
            [Workload("decode step", 1, steps)],
            threads=args.threads,
            dtype="",
            backend=runs["vq"].name,
            seconds=args.seconds,
        )
    return {t.runner: t.median_ms for t in report.timings if t.cache == "warm"}


class Tally:
    """Perplexity of a candidate and of its reference, mean KL and share of equal best tokens, over rows of logits."""

    def __init__(self) -> None:
        self.sums = np.zeros(4)
        self.positions, self.known = 0, 0

    def add(self, reference: Tensor, candidate: NDArray[np.floating], targets: Tensor) -> None:
        """Log-probabilities [S, V], logits [S, V], the next tokens [S], -1 where unknown."""
        logs = logarithms(candidate)
        kl = torch.nn.functional.kl_div(logs, reference, reduction="sum", log_target=True)
        known = targets >= 0
        at = targets[known, None]
        nll = [-float(which[known].gather(1, at).double().sum()) for which in (reference, logs)]
        self.sums += [*nll, float(kl), float((reference.argmax(1) == logs.argmax(1)).sum())]
        self.positions, self.known = self.positions + len(logs), self.known + int(known.sum())

    def row(self, precision: str, head: str, size: int) -> Row:
        reference, own = np.exp(self.sums[:2] / self.known)
        kl, top1 = self.sums[2:] / self.positions
        return Row(precision, head, size, float(own), float(reference), float(kl), float(top1))


def logarithms(logits: NDArray[np.floating]) -> Tensor:
    return torch.log_softmax(torch.from_numpy(logits.astype(np.float32)), 1)


def judge(args: argparse.Namespace, kind: str, folders: dict[str, Path]) -> list[Row]:
    """All graphs with one head, side by side, so that the reference runs once. What was judged before is read."""
    source = open_source(args.folder, options(args, "w8"))
    width = min(args.width, source.positions)
    asked = replace(options(args, "w8"), test_tokens=args.test_tokens)
    blocks = read_material(asked, source.tokenizer, source.artifact.spec.vocab_size, width).test
    names = {name: sha256(folder / FILES[kind]) for name, folder in folders.items()}
    key = {**names, "blocks": sha256_of(blocks)}
    kept = args.folder / f"judged.{kind}.json"
    if kept.is_file() and (read := json.loads(kept.read_text(encoding="utf-8")))["key"] == key:
        return [Row(**row) for row in read["rows"]]
    tallies = {name: Tally() for name in folders}
    with ExitStack() as stack:
        runners = {
            name: stack.enter_context(runner_of(f, kind, args.folder, args.threads)) for name, f in folders.items()
        }
        for i, block in enumerate(blocks):
            start = 0
            together = zip(*(through_cache(r, block[None]) for r in runners.values()), strict=True)
            for outputs in together:
                given = dict(zip(runners, (o["logits"][0] for o in outputs), strict=True))
                reference = logarithms(given["fp32"])
                targets = torch.from_numpy(np.append(block, -1)[start + 1 : start + 1 + len(reference)])
                for name, logits in given.items():
                    tallies[name].add(reference, logits, targets)
                start += len(reference)
            print(f"\r{kind}: block {i + 1} of {len(blocks)}", end="", flush=True)
    print()
    rows = [tallies[name].row(name, kind, num_bytes(folder / FILES[kind])) for name, folder in folders.items()]
    write_text(kept, json.dumps({"key": key, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    return rows


def sha256_of(blocks: NDArray[np.int64]) -> str:
    return hashlib.sha256(blocks.tobytes()).hexdigest()


def measure(args: argparse.Namespace) -> list[Row]:
    folders = make_graphs(args)
    vocab_size = OnnxArtifact.load(args.folder / "model.onnx.json").spec.vocab_size
    rows = {(row.precision, kind): row for kind in FILES for row in judge(args, kind, folders)}
    ids = np.random.default_rng(0).integers(0, vocab_size, (1, args.prompt))
    for precision, folder in folders.items():
        if precision in SIMULATED or args.seconds == 0:
            continue
        times = timings(folder, args, ids)
        for kind in FILES:
            step = times[kind]
            rows[precision, kind] = replace(
                rows[precision, kind],
                step_ms=step,
                tokens_per_second=1000 / step,
                against_fp32=times["fp32"] / step,
                head_share=head_ms(folder, kind, args, ids) / step,
            )
    return [rows[precision, kind] for precision in folders for kind in FILES]


def table(rows: list[Row]) -> str:
    """As Markdown."""
    lines = [
        "| precision | head | MiB | perplexity | increase | mean KL | same best token | tokens/s | against fp32 | head's share |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        speed = "- | - | -"
        if row.step_ms is not None:
            speed = f"{row.tokens_per_second:.1f} | {row.against_fp32:.2f}x | {row.head_share:.1%}"
        lines.append(
            f"| {row.precision} | {row.head} | {row.num_bytes / 2**20:.0f} | {row.perplexity:.2f} | {row.increase:+.2%} | "
            f"{row.kl_mean:.4f} | {row.top1:.1%} | {speed} |"
        )
    return "\n".join(lines)


def verdicts(rows: list[Row]) -> list[str]:
    return [
        f"{row.precision} with the {row.head} head: perplexity {row.increase:+.2%}, target {TARGETS[row.precision]:+.0%}: "
        f"{'met' if row.increase <= TARGETS[row.precision] else 'MISSED'}"
        for row in rows
        if row.precision in TARGETS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a VQ-Logits model.pt or Hugging Face folder")
    parser.add_argument("--text", type=Path, required=True, help="what to calibrate on")
    parser.add_argument("--held-out", type=Path, help="what to test on; default: an eighth of the documents of --text")
    parser.add_argument("--folder", type=Path, required=True, help="where the graphs go and stay")
    parser.add_argument("--samples", type=int, default=32, help="blocks to calibrate on")
    parser.add_argument("--width", type=int, default=256, help="tokens a block")
    parser.add_argument("--test-tokens", type=int, default=8192, help="positions to test on")
    parser.add_argument("--block", type=int, default=32, choices=(32, 64, 128), help="weights that share a scale")
    parser.add_argument("--int8-keep", default="", help="as --keep-in-fp16 of calibrate, for INT8 static")
    parser.add_argument("--int4-eight", default="down_proj,v_proj", help="as --keep-in-int8 of calibrate, for INT4")
    parser.add_argument("--prompt", type=int, default=128, help="tokens in the cache of a timed step")
    parser.add_argument("--threads", type=int, default=1, help="ONNX Runtime's intra-op threads")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="time for each graph and cache state; 0: quality alone"
    )
    parser.add_argument("-o", "--output", type=Path, help="write all rows there as JSON")
    parser.add_argument("--table", type=Path, help="write the table there as Markdown")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.folder.mkdir(parents=True, exist_ok=True)
    rows = measure(args)
    title = f"{args.model.name}, {args.test_tokens} positions, {args.threads} thread(s), {device_name()}"
    said = "\n".join([title, "", table(rows), "", *(f"- {line}" for line in verdicts(rows))])
    print(said)
    if args.table:
        write_text(args.table, said + "\n")
    if args.output:
        settings = {name: value.name if isinstance(value, Path) else value for name, value in vars(args).items()}
        made = {"device": device_name(), "settings": settings, "rows": [asdict(row) for row in rows]}
        write_text(args.output, json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
