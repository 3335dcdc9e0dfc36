"""The quality table: heads of every kind and size for one model, measured on held-out text.

    python scripts/quality.py MODEL TEXT WORK

TEXT holds tune/, test/ and unseen/ (scripts/quality_text.py). Heads and measurements are kept in WORK and not made again.
Writes docs/results/quality-smollm2.json, the plot beside it, and the tables of docs/quality.md.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export_vq.bench import Workload, run_benchmark
from export_vq.compress import CompressOptions, make_head, with_head
from export_vq.compress.statistics import OutputLayer, Statistics, hidden_states, quick_matmul
from export_vq.files import write_text
from export_vq.head import VQHead
from export_vq.load import LoadedModel, load_dense, tie_embedding
from export_vq.plots import frontier_svg
from export_vq.quality import RIVALS, continuations
from export_vq.quality.judge import HeldOut, Rival, measure_heads
from export_vq.records import HeadQuality, QualityReport
from export_vq.report import quality_markdown
from export_vq.rival_graphs import integer_graph
from export_vq.runners import native_library
from export_vq.text import read_text, token_blocks
from export_vq.trim import bits_per_byte, trim_vocabulary
from export_vq.tuning import FinetuneOptions, finetune
from export_vq.workloads import head_inputs, head_runner, head_workloads

BLOCK = 256
TUNE_BLOCKS = 128  # of each source: 131,072 tokens in all
TEST_BLOCKS = {"test": 20, "unseen": 20}  # of each source
TUNE_TOKENS = 262_144
DOCUMENT = Path("docs/quality.md")
RESULTS = Path("docs/results")
MARKS = ("<!-- tables: scripts/quality.sh writes what follows -->", "<!-- end of tables -->")

SINGLE = {"kind": "single", "num_codes": 512}
HEADS = {
    # product heads over sizes; everything counted they take 4.5, 7.4, 14.4 and 27 % of the fp16 head
    "product M=32, no bias": CompressOptions(num_codebooks=32, bias=False),
    "product M=64": CompressOptions(num_codebooks=64),
    "product M=144": CompressOptions(num_codebooks=144),
    "product M=288": CompressOptions(num_codebooks=288),
    # what each part of a product head's making is worth
    "product M=64, not tuned": CompressOptions(num_codebooks=64, tune_tokens=0),
    "product M=64, not tuned, no rotation": CompressOptions(num_codebooks=64, tune_tokens=0, rotation=False),
    "product M=144, not tuned": CompressOptions(num_codebooks=144, tune_tokens=0),
    # the paper's head over codebook sizes
    "single K=128": CompressOptions(kind="single", num_codes=128),
    "single K=512": CompressOptions(**SINGLE),
    "single K=2048": CompressOptions(kind="single", num_codes=2048),
    "single K=4096": CompressOptions(kind="single", num_codes=4096),
    # ... and over mapping strategies and initialisations
    **{
        f"single K=512, {method}, not tuned": CompressOptions(**SINGLE, assign=method, tune_tokens=0)
        for method in ("random", "contiguous", "frequency", "kmeans", "weighted", "activation", "private")
    },
    "single K=512, kmeans, balanced, not tuned": CompressOptions(
        **SINGLE, assign="kmeans", balanced=True, tune_tokens=0
    ),
    "single K=512, learned from random": CompressOptions(**SINGLE, assign="random"),
    "single K=512, learned from kmeans": CompressOptions(**SINGLE, assign="kmeans"),
    "additive M=2": CompressOptions(kind="additive", num_codebooks=2),
    "additive M=4": CompressOptions(kind="additive", num_codebooks=4),
    "additive M=8": CompressOptions(kind="additive", num_codebooks=8),
    "additive M=16": CompressOptions(kind="additive", num_codebooks=16),
}
END_TO_END = FinetuneOptions(last_layers=2, steps=100, batch_size=8, eval_every=20, dtype="bf16")
PROMPTS = ("The capital of France is", "To install the package, first", "My fellow citizens, the state of the union")


class Work:
    """The model, the texts, and what is made of them already."""

    def __init__(self, model: Path, text: Path, folder: Path) -> None:
        self.folder, self.text = folder, text
        self.dense = load_dense(model)
        self.layer = OutputLayer.of(self.dense)
        self.tests = {
            file.stem: self._blocks(file, count)
            for part, count in TEST_BLOCKS.items()
            for file in sorted((text / part).glob("*.txt"))
        }
        self.tune = torch.cat([self._blocks(file, TUNE_BLOCKS) for file in sorted((text / "tune").glob("*.txt"))])
        self.measured: dict[str, HeadQuality] = {}

    def _blocks(self, file: Path, count: int) -> Tensor:
        return token_blocks(
            self.dense.tokenizer(), read_text(file), BLOCK, count, vocab_size=self.dense.config["vocab_size"]
        )

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """A tensor or a head in a file of that name, made where it is missing."""
        file = self.folder / "made" / f"{slug(name)}.pt"
        if not file.exists():
            start = time.perf_counter()
            found = make()
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(found, file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
            say(f"{name}: made in {time.perf_counter() - start:.0f} s")
        return torch.load(file, weights_only=True)

    def hidden(self, model: LoadedModel, blocks: Tensor) -> Tensor:
        return hidden_states(model, blocks).unflatten(0, blocks.shape)

    def own_hidden(self, name: str, model: LoadedModel) -> dict[str, Tensor]:
        return self.kept(
            f"hidden {name}", lambda: {text: self.hidden(model, blocks) for text, blocks in self.tests.items()}
        )

    def statistics(self) -> Statistics:
        with quick_matmul():
            hidden = self.kept("hidden of the tuning text", lambda: hidden_states(self.dense, self.tune))
            return Statistics.of(self.layer, hidden)

    def measure(
        self,
        heads: dict[str, VQHead | Rival | OutputLayer],
        own: dict[str, dict[str, Tensor]] | None = None,
        methods: dict[str, str] | None = None,
    ) -> None:
        """Judge heads, or read what was judged before."""
        files = {name: self.folder / "measured" / f"{slug(name)}.json" for name in heads}
        missing = {name: head for name, head in heads.items() if not files[name].exists()}
        if missing:
            dense = self.own_hidden("dense", self.dense)
            texts = {name: HeldOut(blocks, dense[name]) for name, blocks in self.tests.items()}
            mine = {name: states for name, states in (own or {}).items() if name in missing}
            for record in measure_heads(self.layer, texts, missing, own_hidden=mine):
                files[record.name].parent.mkdir(parents=True, exist_ok=True)
                method = (methods or {}).get(record.name, "")
                dataclasses.replace(record, method=method, seed=0).save(files[record.name])
                total = record.total
                say(f"{record.name}: {record.bytes_share:.1%} of the bytes, perplexity {total.perplexity:.2f}")
        for name, file in files.items():
            self.measured[name] = HeadQuality.load(file)

    def time(self, heads: dict[str, VQHead]) -> None:
        """How long a row takes in ONNX Runtime: one thread, caches cold as they are in a decode step."""
        rivals = {f"int{rival.bits}": name for name, rival in RIVALS.items()}
        for name in [name for name in heads if self.measured[name].head_ms is None]:
            with tempfile.TemporaryDirectory() as scratch:
                found = head_times(self.layer, heads[name], Path(scratch), tuple(rivals))
            others = {"dense": "dense", **rivals}
            for way, milliseconds in found.items():
                self._set_time(others.get(way, name), milliseconds)
            say(f"{name}: " + ", ".join(f"{way} {ms:.3f} ms" for way, ms in found.items()))

    def _set_time(self, name: str, milliseconds: float) -> None:
        self.measured[name] = dataclasses.replace(self.measured[name], head_ms=milliseconds)
        self.measured[name].save(self.folder / "measured" / f"{slug(name)}.json")


def head_times(layer: OutputLayer, head: VQHead, scratch: Path, rivals: tuple[str, ...]) -> dict[str, float]:
    """Median milliseconds of one row: 'vq' (native kernels), 'dense', and the dense layer in integers."""
    with ExitStack() as stack:
        (work,) = stack.enter_context(head_workloads(head, scratch, batches=(1,), threads=1))
        runs = {"vq": work.runs["vq"], "dense": work.runs["dense"]}
        for name in rivals:
            graph = integer_graph(layer.weight, int(name.removeprefix("int")))
            runner = stack.enter_context(head_runner(graph, scratch / f"{name}.onnx", threads=1, native=False))
            runs[name] = runner.bound(head_inputs(head, 1, runner.signature))
        report = run_benchmark([Workload("head", 1, runs)], threads=1, dtype="fp32", backend="", seconds=0.5)
    return {timing.runner: timing.median_ms for timing in report.timings if timing.cache == "cold"}


def slug(name: str) -> str:
    return re.sub(r"[^\w=]+", "-", name)


def say(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, flush=True)


def make_heads(work: Work) -> dict[str, VQHead]:
    """Every head of HEADS, in groups that are judged as soon as they are there."""
    work.measure({"dense": work.layer, **RIVALS})
    stats: list[Statistics] = []

    def made(options: CompressOptions) -> dict[str, Any]:
        if not stats:
            stats.append(work.statistics())
        return make_head(work.layer, stats[0], options).tensors

    heads: dict[str, VQHead] = {}
    for name, options in HEADS.items():
        chosen = options if options.tune_tokens == 0 else dataclasses.replace(options, tune_tokens=TUNE_TOKENS)
        heads[name] = VQHead.from_tensors(**work.kept(name, lambda chosen=chosen: made(chosen)))
        if len(heads) % 6 == 0 or len(heads) == len(HEADS):
            work.measure(dict(heads))
    return heads


class EndToEnd:
    """Models tuned with their last layers, each towards the model that it was made from, on the same text."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.models: dict[str, LoadedModel] = {}
        self._held = torch.arange(len(work.tune)) % 32 == 16

    def tuned(
        self,
        name: str,
        start: LoadedModel,
        teacher: LoadedModel,
        options: FinetuneOptions = END_TO_END,
        rounds: int = 1,
    ) -> LoadedModel:
        """`start` after a round of tuning, measured as `name`; `rounds` is how many it has been through then."""
        work, begin = self.work, time.perf_counter()
        folder = work.folder / "end-to-end" / slug(name)
        result = finetune(start, work.tune[~self._held], work.tune[self._held], options, folder, teacher=teacher)
        before, after = result.report.perplexity_before, result.report.perplexity_after
        say(f"{name}: {before:.2f} -> {after:.2f}, {time.perf_counter() - begin:.0f} s")
        model = result.model
        tokens = rounds * options.steps * options.batch_size * BLOCK
        work.measure(
            {name: model.head or OutputLayer.of(model)},
            {name: work.own_hidden(name, model)},
            {name: f"last {options.last_layers} layers too, {tokens:,} tokens"},
        )
        self.models[name] = model
        return model

    def made_of(self, model: LoadedModel) -> LoadedModel:
        """A tuned model with a product head of its own."""
        work = self.work

        def make() -> dict[str, Any]:
            with quick_matmul():
                layer = OutputLayer.of(model)
                stats = Statistics.of(layer, hidden_states(model, work.tune))
                options = dataclasses.replace(HEADS["product M=144"], tune_tokens=TUNE_TOKENS)
                return make_head(layer, stats, options).tensors

        return with_head(model, VQHead.from_tensors(**work.kept("product M=144 of the tuned model", make)))


def tune_end_to_end(work: Work, heads: dict[str, VQHead]) -> dict[str, LoadedModel]:
    """Heads and dense controls of the same budget: once on the frozen heads, and once tune, compress, tune."""
    runs = EndToEnd(work)
    dense = runs.tuned("dense, end to end", work.dense, work.dense)
    for name in ("product M=144", "single K=512"):
        runs.tuned(f"{name}, end to end", with_head(work.dense, heads[name]), work.dense)
    runs.tuned("dense, end to end, two rounds", dense, dense, rounds=2)
    # The text has taught the dense model what it can by now; what is left to learn is the dense model.
    options = dataclasses.replace(END_TO_END, alpha=1.0)
    runs.tuned("product M=144, end to end, two rounds", runs.made_of(dense), dense, options, rounds=2)
    return runs.models


def tie(work: Work, heads: dict[str, VQHead]) -> None:
    """The input embedding read from the head, not tuned for it."""
    name = "product M=144, embedding tied"
    tied = tie_embedding(with_head(work.dense, heads["product M=144"]))
    work.measure({name: tied.head}, {name: work.own_hidden(name, tied)})


def trimmed(work: Work) -> list[list[str]]:
    """Vocabulary trimming, by bits a byte of text: perplexities of different vocabularies do not compare."""
    text = read_text(work.text / "tune")
    rows = [["vocabulary", "tokens", "head, fp16", "bits a byte, held-out text", "bits a byte, unseen text"]]
    places = {part: read_text(work.text / part)[:60_000] for part in ("test", "unseen")}
    for keep in (None, "32768", "16384"):
        model = work.dense if keep is None else trim_vocabulary(work.dense, keep, text).model
        v, d = OutputLayer.of(model).weight.shape
        found = work.kept(
            f"bits {keep}",
            lambda model=model: {part: bits_per_byte(model, text) for part, text in places.items()},
        )
        label = "all" if keep is None else f"--keep-tokens {keep}"
        rows.append([label, f"{v:,}", f"{2 * v * d / 2**20:.1f} MiB", *(f"{found[part]:.3f}" for part in places)])
    return rows


def main() -> None:
    if native_library() is None:
        sys.exit("error: the native kernels are not built; build them with: export-vq plugins build")
    model, text, folder = map(Path, sys.argv[1:])
    work = Work(model, text, folder)
    heads = make_heads(work)
    tie(work, heads)
    tuned = tune_end_to_end(work, heads)
    writers = {"dense": work.dense, "product M=144": with_head(work.dense, heads["product M=144"]), **tuned}
    samples = continuations(writers, PROMPTS, 32)
    work.time(heads)
    report = QualityReport("SmolLM2-135M-Instruct", BLOCK, tuple(work.measured.values()), samples)
    report.save(RESULTS / "quality-smollm2.json")
    write_text(RESULTS / "quality-smollm2.svg", frontier_svg(report, "bytes"))
    write_text(RESULTS / "quality-smollm2-time.svg", frontier_svg(report, "time"))
    rows = trimmed(work)
    table = ["", "### Trimmed vocabularies", ""] + ["| " + " | ".join(row) + " |" for row in rows]
    table.insert(4, "|---|---:|---:|---:|---:|")
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    body = quality_markdown(report) + "\n".join(table) + "\n"
    write_text(DOCUMENT, f"{before}{MARKS[0]}\n\n{body}\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
