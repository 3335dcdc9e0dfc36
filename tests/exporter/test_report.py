"""The report page and its summary: right, self-contained, safe with hostile text, and readable in a real browser."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from export_vq import plots, wording
from export_vq import report as rp
from export_vq.records import (
    BenchReport,
    CalibrationReport,
    EngineArtifact,
    EngineProfile,
    ErrorStats,
    HeadQuality,
    HeadSpec,
    LayerDivergence,
    OnnxArtifact,
    ParityCase,
    ParityReport,
    PluginLayer,
    QualityReport,
    RunReport,
    Sample,
    TextQuality,
    Timing,
)

HOSTILE = "<script>alert(1)</script>\"'$x_1$ & <img src=x onerror=alert(2)>"
SPEC = HeadSpec("product", hidden_size=576, vocab_size=49152, num_codebooks=8, num_codes=256, has_bias=True)


def stats(scale: float = 1.0, top1: float = 1.0, seed: float = -7.2) -> ErrorStats:
    """Statistics whose errors are `scale` times what float32 leaves."""
    edges = [-12 + 0.5 * i for i in range(1, 31)]
    centre = seed + math.log10(scale)
    histogram = tuple((edge, int(20000 * math.exp(-((edge - 0.25 - centre) ** 2) / 0.6))) for edge in edges)
    return ErrorStats(
        positions=1248,
        max_abs=2.9e-6 * scale,
        mean_abs=6.3e-8 * scale,
        logit_range=38.41,
        cosine_min=0.99999998,
        kl_mean=3.1e-13 * scale,
        kl_p99=2.2e-12 * scale,
        top1_agreement=top1,
        top5_agreement=(1 + top1) / 2,
        perplexity_reference=22.931,
        perplexity_candidate=22.932,
        error_histogram=histogram,
    )


def parity(candidate: str, *, failures: tuple[str, ...] = (), scale: float = 1.0, top1: float = 1.0) -> ParityReport:
    shapes = [(1, 16, 8, False), (1, 128, 8, False), (4, 32, 8, False), (4, 32, 8, True)]
    cases = tuple(
        ParityCase(
            name=f"batch {batch}, {prefill} + {steps}{', left padded' if padded else ''}",
            batch=batch,
            prefill=prefill,
            decode_steps=steps,
            left_padded=padded,
            stats=stats(scale * (1 + i / 10), top1),
            cache_max_abs=1.4e-6,
        )
        for i, (batch, prefill, steps, padded) in enumerate(shapes)
    )
    limits = {"relative_max": 1e-5, "cache_relative_max": 1e-5, "top1_agreement": 1.0}
    return ParityReport(
        "PyTorch fp32", candidate, "fp32", stats(scale, top1), cases, limits, failures, None, None, 32, 32
    )


def timing(subject: str, runner: str, batch: int, cache: str, median: float) -> Timing:
    return Timing(
        subject,
        runner,
        batch,
        cache,
        300,
        median,
        1.2 * median,
        1.5 * median,
        0.9 * median,
        0.97 * median,
        1.06 * median,
    )


def bench(vq_factor: float = 1.0) -> BenchReport:
    """Timings where VQ is about 4 times as fast as dense, `vq_factor` slower than that."""
    medians = {
        ("head", 1, "warm"): (0.412, 1.83),
        ("head", 1, "cold"): (0.655, 3.94),
        ("head", 4, "warm"): (1.51, 4.4),
        ("head", 4, "cold"): (1.9, 6.2),
        ("decode step", 1, "warm"): (10.6, 12.1),
        ("decode step", 1, "cold"): (17.2, 21.3),
    }
    timings = [
        timing(subject, runner, batch, cache, median * (vq_factor if runner == "vq" else 1.0))
        for (subject, batch, cache), pair in medians.items()
        for runner, median in zip(("vq", "dense"), pair, strict=True)
    ]
    return BenchReport("a processor with AVX2, 2 cores", 2, "fp32", "ONNX Runtime 1.30 with libvq_ort", tuple(timings))


def artifact(path: str, head: str, form: str) -> OnnxArtifact:
    return OnnxArtifact(
        path, head, form, "fp32", 21, "llama", SPEC, ("input_ids",), ("logits",), ((3, 64),), "ab" * 32, 431_234_567,
        {path: "cd" * 32}, {"onnx": "1.22.0"}, True, ("code ids are int32",) if head == "vq" else (),
    )  # fmt: skip


def engine(kind: str, gpu: str | None, layers_from: str) -> EngineArtifact:
    plugin = PluginLayer("lm_head", "VQGatherScatter", "1", "com.vqlogits", ("half", "int32"), ("half",))
    return EngineArtifact(
        f"{kind}.plan", f"{kind}.onnx", kind, "fp16", "tensorrt", "10.3.0", gpu, "8.7" if gpu else None, None, {},
        (EngineProfile("decode", ()),), {}, ("input_ids",), ("logits",), ((3, 64),),
        (plugin,) if kind == "vq-plugin" else (), {"MATRIX_MULTIPLY": 210, "PLUGIN_V3": 1}, layers_from, 287_000_000,
        "ef" * 32, {},
    )  # fmt: skip


def with_engines() -> RunReport:
    """A run on a machine with a GPU: engines built, checked and timed."""
    steps = [
        timing("decode step", runner, 1, cache, median)
        for cache, medians in {"warm": (3.1, 3.6, 4.2), "cold": (3.3, 3.9, 5.0)}.items()
        for runner, median in zip(("vq", "vq, stock ops", "dense"), medians, strict=True)
    ]
    return dataclasses.replace(
        passing(),
        parity=(*passing().parity, parity("vq-plugin in TensorRT 10.3.0")),
        engines=tuple(engine(kind, "Orin", "engine") for kind in ("vq-plugin", "vq-plain", "dense")),
        engine_bench=BenchReport("Orin", 0, "fp16", "TensorRT 10.3.0", tuple(steps)),
    )


def passing() -> RunReport:
    return RunReport(
        model="SmolLM2-135M-vq",
        model_type="llama",
        dtype="fp32",
        spec=SPEC,
        tied_embedding=True,
        total_numbers=134_712_000,
        artifacts=(artifact("model.onnx", "vq", "portable"), artifact("dense.onnx", "dense", "dense")),
        parity=(parity("model.onnx, native kernel"), parity("model.onnx, stock runtime", scale=2.3)),
        quality=QualityReport(
            "SmolLM2-135M", 256, (head_quality("this model", "product", SPEC.head_bytes(), 25.765, SPEC),)
        ),
        bench=bench(),
        prompt="The capital of France is",
        continuation=" Paris, which is also the largest city of the country and the seat of its government.",
        not_done=("TensorRT engines: no NVIDIA GPU on this machine; run the same command on one that has it",),
        versions={"export-vq": "0.1.0", "onnx": "1.22.0", "onnxruntime": "1.30.0", "torch": "2.14.0"},
    )


def head_quality(
    name: str, kind: str, num_bytes: int, perplexity: float, spec: HeadSpec | None = None, head_ms: float | None = None
) -> HeadQuality:
    texts = tuple(
        TextQuality(
            text,
            6120,
            factor * perplexity,
            factor * 23.045,
            0.0942,
            0.651,
            0.8397,
            0.8458,
            1.0 if spec is None else 1.032,
        )
        for text, factor in {"plays": 2.2, "manual": 0.6}.items()
    )
    total = dataclasses.replace(texts[0], text="all", positions=12240, perplexity=perplexity, perplexity_dense=23.045)
    return HeadQuality(
        name, kind, spec.float_numbers if spec else 442_368, num_bytes, 56_623_104, total, texts, spec,
        None if spec is None else 3, "" if spec is None else "rotated, weighted", None if spec is None else 0, head_ms,
    )  # fmt: skip


def quality(name: str = "product, M=16") -> QualityReport:
    """The dense layer, its integer forms, and heads of every kind; one is worse than another in both directions."""
    single = HeadSpec("single", 576, 49152, 1, 512, True)
    product = dataclasses.replace(SPEC, num_codebooks=16)
    return QualityReport(
        dense="SmolLM2-135M",
        block=256,
        heads=(
            head_quality("dense", "dense", 56_623_104, 23.045, head_ms=8.9),
            head_quality("INT8", "int8", 28_409_856, 23.064),
            head_quality("INT4", "int4", 15_040_512, 26.622),
            head_quality(name, "product", product.head_bytes(), 25.765, product, 0.32),
            head_quality("single, K=512", "single", single.head_bytes(), 181.25, single, 0.041),
            head_quality("single, untuned", "single", single.head_bytes(), 1122.4, single, 0.041),
        ),
        samples=(Sample("The capital of", {"dense": " France is Paris.", name: " France is | Lyon."}),),
    )


def with_quality() -> RunReport:
    return dataclasses.replace(passing(), quality=quality())


def calibrated(precision: str, *failures: str, name: str = "model.layers.0.mlp.down_proj") -> CalibrationReport:
    return CalibrationReport(
        path="model.onnx",
        precision=precision,
        runtime="onnxruntime",
        method="mse",
        block=0,
        smooth=0.5,
        head="as exported",
        samples=32,
        documents=(70, 10),
        document_sha256=("a", "b"),
        quantised=209,
        kept=(name, "lm_head.codebook"),
        total=dataclasses.replace(stats(), kl_mean=0.0042, perplexity_candidate=23.16, top1_agreement=0.957),
        limits={"perplexity_increase": 0.01, "kl_mean": 0.00995, "top1_agreement": 0.929},
        failures=failures,
        num_bytes=150 << 20,
        source_bytes=542 << 20,
        source_sha256="c",
        versions={},
        sensitivity=(
            LayerDivergence(name, 0.0123, True),
            LayerDivergence("model.layers.3.mlp.down_proj", 0.0007, False),
        ),
    )


def with_calibrations() -> RunReport:
    return dataclasses.replace(
        passing(), calibrations=(calibrated("int8"), calibrated("int4", "mean KL is 0.0600 nats"))
    )


def failing() -> RunReport:
    failure = "largest logit error is 7.55e-02 of the logit range, allowed 1e-05"
    bad = parity("model.onnx, native kernel", failures=(failure,), scale=1e6, top1=0.62)
    return dataclasses.replace(passing(), parity=(bad, parity("model.onnx, stock runtime")), tied_embedding=False)


def bare() -> RunReport:
    """No baseline, no timings, nothing generated, nothing left out."""
    return dataclasses.replace(
        passing(), quality=None, bench=None, prompt="", continuation="", not_done=(), artifacts=(), versions={}
    )


def hostile() -> RunReport:
    base = passing()
    cases = tuple(dataclasses.replace(case, name=f"{i} {HOSTILE}") for i, case in enumerate(base.parity[0].cases))
    bad = dataclasses.replace(base.parity[0], candidate=HOSTILE, reference=HOSTILE, cases=cases, failures=(HOSTILE,))
    assert base.bench
    return dataclasses.replace(
        base,
        model=HOSTILE,
        model_type=HOSTILE,
        parity=(bad,),
        bench=dataclasses.replace(base.bench, device=HOSTILE, backend=HOSTILE),
        artifacts=(dataclasses.replace(base.artifacts[0], path=HOSTILE, notes=(HOSTILE,)),),
        prompt=HOSTILE,
        continuation=HOSTILE + "\x1b[31m\n",
        not_done=(HOSTILE,),
        versions={HOSTILE: HOSTILE},
        calibrations=(calibrated("int8", HOSTILE, name=HOSTILE),),
        quality=dataclasses.replace(
            quality(HOSTILE), dense=HOSTILE, samples=(Sample(HOSTILE, {HOSTILE: HOSTILE + "\x1b[31m"}),)
        ),
    )


SAMPLES = {
    "passing": passing,
    "failing": failing,
    "bare": bare,
    "hostile": hostile,
    "engines": with_engines,
    "quality": with_quality,
    "calibrations": with_calibrations,
}


class Page(html.parser.HTMLParser):
    """Collects elements, attributes and text of a page; checks that elements close in order."""

    VOID = frozenset({"meta", "path", "use", "rect", "line", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {name: rp.render_html(build()) for name, build in SAMPLES.items()}


@pytest.mark.parametrize("name", SAMPLES)
def test_report_survives_json(name: str) -> None:
    report = SAMPLES[name]()
    assert RunReport.from_json(json.loads(json.dumps(report.to_json()))) == report


@pytest.mark.parametrize("name", SAMPLES)
def test_page_loads_nothing(pages: dict[str, str], name: str) -> None:
    page = Page(pages[name])
    assert not {"script", "link", "img", "iframe", "object", "embed", "image", "base"} & set(page.tags)
    for attribute, value in page.attributes:
        assert not attribute.startswith("on")
        assert attribute not in ("src", "srcset", "action", "data")
        if attribute in ("href", "xlink:href"):
            assert value.startswith("#")
        assert not re.search(r"url\((?!#)", value)
    assert "http:" not in pages[name]
    assert "https:" not in pages[name]
    assert "@import" not in pages[name]


@pytest.mark.parametrize("name", SAMPLES)
def test_ids_are_unique_and_links_arrive(pages: dict[str, str], name: str) -> None:
    attributes = Page(pages[name]).attributes
    ids = [value for attribute, value in attributes if attribute == "id"]
    assert len(ids) == len(set(ids))
    wanted = {value for attribute, value in attributes if attribute.endswith("href")}
    wanted |= {target for _, value in attributes for target in re.findall(r"url\((#[^)]*)\)", value)}
    assert wanted <= {f"#{value}" for value in ids}


def test_same_report_same_bytes(pages: dict[str, str]) -> None:
    assert rp.render_html(passing()) == pages["passing"]


def test_passing_page_has_the_numbers(pages: dict[str, str]) -> None:
    text = " ".join("".join(Page(pages["passing"]).text).split())
    assert "PASS The exported graphs compute what PyTorch computes." in text
    for expected in (
        "1.74e-7",  # worst of the two graphs: 2.9e-6 * 2.3 / 38.41
        "+11.8 %",
        "6.02×",  # batch 1, cold
        "768 KiB",
        "54.1 MiB",
        "nothing is saved on disk",
        "84 %",
        "The capital of France is Paris",
        "32 of 32 tokens equal",
        "no NVIDIA GPU on this machine",
        "torch 2.14.0",
        "411 MiB",
        "abababababab",
    ):
        assert expected in text


def test_engines_page_says_what_is_in_them_and_how_fast(pages: dict[str, str]) -> None:
    page = html.unescape(pages["engines"])
    assert "vq-plugin in TensorRT 10.3.0 for Orin: fp16, 274 MiB; 211 layers read back from the engine itself" in page
    assert "by plugins: VQGatherScatter (half)" in page
    assert page.count("by plugins: none") == 2
    assert "The decode step runs at 1.35× to 1.52× the speed of the same with the full softmax head." in page
    summary = rp.render_summary(with_engines())
    assert "- engine: dense in TensorRT 10.3.0 for Orin" in summary
    assert "- speed of engines: the decode step runs at 1.35× to 1.52×" in summary
    assert "Engines" not in pages["passing"]


def test_failing_page_lists_the_failures(pages: dict[str, str]) -> None:
    text = " ".join("".join(Page(pages["failing"]).text).split())
    assert "FAIL Not the same function as PyTorch within the limits: model.onnx, native kernel." in text
    assert "largest logit error is 7.55e-02 of the logit range" in text
    assert "Export gap 0.0755 largest logit error as a share of the logit range" in text
    assert "the whole model goes from" in text
    assert "nothing is saved on disk" not in text


def test_bare_page_says_what_is_missing(pages: dict[str, str]) -> None:
    text = "".join(Page(pages["bare"]).text)
    for expected in ("no baseline given", "Not measured in this run", "No text was generated", "Nothing was left out"):
        assert expected in text


def test_hostile_text_stays_text(pages: dict[str, str]) -> None:
    assert "<script" not in pages["hostile"]
    assert "<img" not in pages["hostile"]
    assert HOSTILE in "".join(Page(pages["hostile"]).text)


def test_unchecked_run_is_no_pass() -> None:
    report = dataclasses.replace(passing(), parity=())
    assert "NOT CHECKED" in rp.render_html(report)
    assert rp.render_summary(report).startswith("NOT CHECKED: ")


def test_not_a_number_is_shown_and_drawn() -> None:
    broken = dataclasses.replace(stats(), max_abs=math.nan, logit_range=math.nan, perplexity_candidate=math.nan)
    bad = dataclasses.replace(parity("model.onnx", failures=("NaN",)), total=broken)
    report = dataclasses.replace(passing(), parity=(parity("fine"), bad))
    assert wording.worst_parity(report) is bad
    assert "nan of the logit range" in rp.render_summary(report)
    assert "FAIL" in rp.render_html(report)


def test_half_precision_shows_the_oracle() -> None:
    half = dataclasses.replace(
        parity("model.onnx"), dtype="fp16", limits={"max_abs": 0.04}, native_error=0.02, oracle_error=0.019
    )
    page = rp.render_html(dataclasses.replace(passing(), parity=(half,)))
    assert "Largest error against the float64 oracle 0.019; PyTorch's own in fp16 0.02." in page
    assert wording.allowed_error(half) == 0.04


def test_summary() -> None:
    lines = rp.render_summary(passing()).splitlines()
    assert lines[0] == "PASS: the exported graphs compute what PyTorch computes"
    assert any("perplexity 25.8 against 23 of SmolLM2-135M (+11.8 %)" in line for line in lines)
    assert any(line.startswith("- speed: the head runs at 2.91× to 6.02× the speed") for line in lines)
    assert any("nothing is saved on disk" in line for line in lines)
    failed = rp.render_summary(failing())
    assert failed.startswith("FAIL: ")
    assert "- failed: model.onnx, native kernel: largest logit error" in failed
    bare_lines = rp.render_summary(bare())
    assert "- model gap: no baseline given" in bare_lines
    assert "- speed: not measured" in bare_lines


def test_summary_cannot_steer_the_terminal() -> None:
    summary = rp.render_summary(hostile())
    assert "\x1b" not in summary
    assert summary.isascii() or all(c.isprintable() or c == "\n" for c in summary)


@pytest.mark.parametrize(("factor", "words"), [(20.0, "it does not help"), (3.5, "there it does not help")])
def test_slower_is_said_plainly(factor: float, words: str) -> None:
    report = dataclasses.replace(passing(), bench=bench(factor))
    assert words in rp.render_summary(report)
    assert words in rp.render_html(report)


def test_head_parts_add_up() -> None:
    for spec in (
        SPEC,
        HeadSpec("single", 64, 1000, 1, 300),
        HeadSpec("additive", 64, 70000, 2, 70000),
        dataclasses.replace(SPEC, has_rotation=True),
    ):
        assert sum(wording.head_parts(spec).values()) == spec.head_bytes()


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (wording.number(0.0), "0"),
        (wording.number(2.1e-7), "2.1e-7"),
        (wording.number(9.999e-8), "1e-7"),
        (wording.number(12345.6), "12,346"),
        (wording.number(0.03125), "0.0312"),
        (wording.number(math.inf), "inf"),
        (wording.number(None), "–"),
        (wording.share(1.0), "100 %"),
        (wording.share(0.99996), ">99.99 %"),
        (wording.share(0.9996), "99.96 %"),
        (wording.size(1023), "0.999 KiB"),
        (wording.size(5 * 2**30), "5 GiB"),
        (wording.times(0.996), "0.996×"),
        (wording.change(0.1416), "+14.2 %"),
        (wording.change(0.0008), "+0.08 %"),
        (wording.change(-0.02), "-2.0 %"),
        (wording.change(11.6), "+1,160 %"),
        (wording.change(math.nan), "+nan %"),
        (wording.perplexity(23.064), "23.06"),
        (wording.perplexity(181.25), "181.2"),
        (wording.perplexity(1122.4), "1,122"),
    ],
)
def test_numbers_for_people(shown: str, expected: str) -> None:
    assert shown == expected


def test_page_shows_the_quality(pages: dict[str, str]) -> None:
    text = " ".join(" ".join(Page(pages["quality"]).text).split())
    assert "12,240 positions of text held out, in blocks of 256 tokens: plays (6,120), manual (6,120)" in text
    assert "dense 442,368 54 MiB 100 % 23.05 +0.00 % 1.00" in text
    assert "INT4 442,368 14.3 MiB 26.6 % 26.62 +15.5 %" in text
    assert "product, M=16 rotated, weighted 0 16 × 256" in text
    assert "single, untuned rotated, weighted 0 1 × 512" in text
    assert "1,122 +4,770 % 1.03 0.0942 0.651 84 % 84.6 % 3 0.041" in text
    assert "INT4 58.57 (+15.5 %) 15.97 (+15.5 %)" in text
    assert "What they write after “The capital of” dense France is Paris. product, M=16 France is | Lyon." in text
    assert "Quality" not in "".join(Page(pages["bare"]).text)


def test_page_shows_the_quantised_graphs(pages: dict[str, str]) -> None:
    text = " ".join(" ".join(Page(pages["calibrations"]).text).split())
    assert "int8 150 MiB of 542 MiB 23.2 +1.00 % +1.0 % 0.0042 95.7 % 209 quantised, 2 kept pass" in text
    assert "int4: mean KL is 0.0600 nats" in text
    assert "12.3, kept" in text
    assert "Which layers cost most" not in "".join(Page(pages["passing"]).text)
    assert "- int4: perplexity +1.00 % against the unquantised graph, 150 MiB of 542 MiB, above its limits" in (
        rp.render_summary(with_calibrations())
    )


def test_frontier_is_what_nothing_beats() -> None:
    points = wording.frontier(quality(), "bytes")
    assert [point.head.name for point in points if point.best] == ["single, K=512", "product, M=16", "INT8", "dense"]
    assert [point.x for point in points] == sorted(100 * head.bytes_share for head in quality().heads)
    timed = wording.frontier(quality(), "time")
    assert [(point.x, point.head.name) for point in timed if point.best] == [
        (0.041, "single, K=512"), (0.32, "product, M=16"), (8.9, "dense")
    ]  # fmt: skip
    broken = dataclasses.replace(
        quality().heads[3], total=dataclasses.replace(quality().heads[3].total, perplexity=math.nan)
    )
    assert broken not in [p.head for p in wording.frontier(dataclasses.replace(quality(), heads=(broken,)), "bytes")]


@pytest.mark.parametrize("against", ["bytes", "time"])
def test_frontier_file(against: str) -> None:
    """Also with nothing to draw, with one head only, and with one that is better than the dense layer."""
    whole = quality()
    better = dataclasses.replace(whole, heads=(*whole.heads, head_quality("b", "additive", 9_000_000, 22.1, SPEC, 0.5)))
    for shown in (
        whole,
        dataclasses.replace(whole, heads=()),
        dataclasses.replace(whole, heads=whole.heads[:1]),
        better,
    ):
        svg = plots.frontier_svg(shown, against)
        ElementTree.fromstring(svg)
        assert svg == plots.frontier_svg(shown, against)
        kinds = {point.head.kind for point in wording.frontier(shown, against)}
        assert {kind for kind in plots.KIND_STYLES if f">{kind}</text>" in svg} == kinds


def test_quality_in_markdown() -> None:
    page = rp.quality_markdown(quality())
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    assert [line for line in page.splitlines() if line.startswith("#")] == [
        "### The dense layer and its integer forms", "### Single heads", "### Product heads", "### By text",
        "### What they write",
    ]  # fmt: skip
    int4 = next(row for row in rows if row[0] == "| INT4")
    assert int4[1:6] == ["442,368", "14.3 MiB", "26.6 %", "26.62", "+15.5 %"]
    tables = [part.splitlines() for part in page.split("\n\n") if part.startswith("|")]
    assert [len(table) for table in tables] == [2 + 3, 2 + 2, 2 + 1, 2 + 6, 2 + 2]
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert r"France is \| Lyon." in page
    hostile = rp.quality_markdown(quality(HOSTILE))
    assert "<script" not in hostile.replace("\\<", "")
    assert "\x1b" not in hostile


def test_quality_comes_back_from_json() -> None:
    assert QualityReport.from_json(json.loads(json.dumps(quality().to_json()))) == quality()
    assert RunReport.from_json(json.loads(json.dumps(with_quality().to_json()))) == with_quality()
    assert RunReport.from_json({k: v for k, v in bare().to_json().items() if k != "quality"}) == bare()


WIDTHS = (1280, 390, 360)
_MEASURE = """<!doctype html><body>%s<script>
onload = () => document.body.textContent = JSON.stringify([...document.querySelectorAll('iframe')].map(frame => {
  const page = frame.contentDocument, root = page.documentElement, box = e => e.getBoundingClientRect();
  const verdict = box(page.querySelector('#verdict strong'));
  return {width: root.clientWidth, scroll: root.scrollWidth,
    plots: [...page.querySelectorAll('figure svg')].map(s => [box(s).width, box(s).height]),
    letters: Math.min(...[...page.querySelectorAll('svg text')].map(t => box(t).height)),
    outside: [...page.querySelectorAll('svg text')].filter(t => box(t).right > box(t.closest('.card')).right + 1
      || box(t).left < box(t.closest('.card')).left - 1).map(t => t.textContent),
    verdict: page.querySelector('#verdict').innerText,
    seen: verdict.height > 0 && verdict.top < 600 && verdict.left >= 0 && verdict.right <= root.clientWidth};
}));
</script>"""


def browse(folder: Path, page: str) -> list[dict[str, Any]]:
    """What a headless browser makes of the page at each of the WIDTHS."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if browser is None:
        pytest.skip("no chromium or google-chrome on the PATH; install one to check the page in a real browser")
    (folder / "report.html").write_text(page, encoding="utf-8")
    frames = "".join(f'<iframe src="report.html" style="width:{w}px;height:900px;border:0"></iframe>' for w in WIDTHS)
    (folder / "measure.html").write_text(_MEASURE % frames, encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}", "--window-size=1800,1000",
               "--virtual-time-budget=5000", "--dump-dom", (folder / "measure.html").as_uri()]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    body = re.search(r"<body>(.*)</body>", dom, re.S)
    assert body, dom
    return json.loads(html.unescape(body.group(1)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["passing", "hostile", "quality"])
def test_page_in_a_browser(pages: dict[str, str], tmp_path: Path, name: str) -> None:
    for width, seen in zip(WIDTHS, browse(tmp_path, pages[name]), strict=True):
        assert seen["width"] in range(width - 20, width + 1)
        assert seen["scroll"] <= seen["width"], f"the page scrolls sideways at {width} px"
        assert len(seen["plots"]) == {"passing": 5, "quality": 6, "hostile": 7}[name]
        assert all(w > 200 and h > 100 for w, h in seen["plots"])
        assert seen["letters"] > 9
        assert not seen["outside"]
        assert seen["seen"]
        assert seen["verdict"].startswith("FAIL" if name == "hostile" else "PASS")
