"""What a run found, in words and numbers for people: derived from the records, shared by the page, its plots and the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from export_vq.records import (
    BenchReport,
    CalibrationReport,
    EngineArtifact,
    ErrorStats,
    HeadQuality,
    HeadSpec,
    ParityReport,
    QualityReport,
    RunReport,
)


class Speedup(NamedTuple):
    """Dense over VQ, medians of one workload."""

    subject: str
    batch: int
    cache: str
    ratio: float


def verdict(report: RunReport) -> tuple[str, str]:
    """A word, PASS, FAIL or NOT CHECKED, and what it means."""
    if not report.parity:
        return "NOT CHECKED", "no exported graph was compared with PyTorch"
    if report:
        return "PASS", "the exported graphs compute what PyTorch computes"
    failed = ", ".join(parity.candidate for parity in report.parity if not parity)
    return "FAIL", f"not the same function as PyTorch within the limits: {failed}"


def worst_parity(report: RunReport) -> ParityReport | None:
    """The check with the largest relative error (NaN above all), None when nothing was checked."""
    errors = {i: parity.total.relative_max for i, parity in enumerate(report.parity)}
    return report.parity[max(errors, key=lambda i: (math.isnan(errors[i]), errors[i]))] if errors else None


def speedups(bench: BenchReport | None) -> list[Speedup]:
    """One entry for each workload that both heads ran, in the order of the timings."""
    timings = bench.timings if bench else ()
    workloads = dict.fromkeys((t.subject, t.batch, t.cache) for t in timings)
    runners = {key: {t.runner for t in timings if (t.subject, t.batch, t.cache) == key} for key in workloads}
    return [Speedup(*key, bench.speedup(*key)) for key in workloads if bench and {"vq", "dense"} <= runners[key]]


def headline_speedup(bench: BenchReport | None) -> Speedup | None:
    """The head at its smallest batch with cold caches, as a decode step finds them; warm where cold was not measured."""
    heads = [entry for entry in speedups(bench) if entry.subject == "head"]
    return min(heads, key=lambda entry: (entry.batch, entry.cache != "cold"), default=None)


def speed_sentences(bench: BenchReport | None) -> list[str]:
    """One plain sentence for each thing timed; it says so where VQ is the slower one."""
    entries = speedups(bench)
    return [
        _speed_sentence(subject, [entry for entry in entries if entry.subject == subject])
        for subject in dict.fromkeys(entry.subject for entry in entries)
    ]


def _speed_sentence(subject: str, entries: list[Speedup]) -> str:
    ratios = sorted(entry.ratio for entry in entries)
    span = times(ratios[0]) if len(ratios) == 1 else f"{times(ratios[0])} to {times(ratios[-1])}"
    what = f"the {subject} runs at {span} the speed of the same with the full softmax head"
    slow = [f"batch {e.batch} {e.cache} ({times(e.ratio)})" for e in entries if e.ratio < 1]
    if not slow:
        return f"{what}."
    if len(slow) == len(entries):
        return f"{what}: VQ is slower in every workload measured; on this machine it does not help."
    return f"{what}: VQ is slower at {', '.join(slow)}; there it does not help."


class FrontierPoint(NamedTuple):
    """An output layer where it stands: `x` is % of the dense bytes, or ms; `best` where no other is as good in both."""

    x: float
    increase: float
    best: bool
    head: HeadQuality


def frontier(quality: QualityReport, against: str) -> list[FrontierPoint]:
    """The output layers that have both numbers, finite ones, by rising x.

    Args:
        quality: what was measured.
        against: 'bytes', or 'time' where `head_ms` is known.
    """
    places = [(100 * head.bytes_share if against == "bytes" else head.head_ms, head) for head in quality.heads]
    known = sorted(
        (
            (x, head.total.perplexity_increase, head)
            for x, head in places
            if x is not None and 0 < x < math.inf and math.isfinite(head.total.perplexity_increase)
        ),
        key=lambda point: point[:2],
    )
    points: list[FrontierPoint] = []
    for x, increase, head in known:
        points.append(FrontierPoint(x, increase, all(increase < point.increase for point in points), head))
    return points


def quality_groups(quality: QualityReport) -> dict[str, list[HeadQuality]]:
    """The output layers under a title for each kind, those of the dense model first; by falling bytes inside."""
    titles = {
        "The dense layer and its integer forms": ("dense", "int8", "int4"),
        "Single heads": ("single",),
        "Additive heads": ("additive",),
        "Product heads": ("product",),
    }
    groups = {title: [head for head in quality.heads if head.kind in kinds] for title, kinds in titles.items()}
    return {title: sorted(heads, key=lambda head: -head.num_bytes) for title, heads in groups.items() if heads}


def quality_table(heads: list[HeadQuality]) -> list[list[str]]:
    """A header and one row an output layer; a column that is empty for all of them is left out."""
    columns = {
        "output layer": [head.name for head in heads],
        "method": [head.method for head in heads],
        "seed": ["" if head.seed is None else str(head.seed) for head in heads],
        "M × K": [f"{h.spec.num_codebooks} × {h.spec.num_codes:,}" if h.spec else "" for h in heads],
        "float numbers": [f"{head.float_numbers:,}" for head in heads],
        "bytes": [size(head.num_bytes) for head in heads],
        "of fp16": [share(head.bytes_share) for head in heads],
        "perplexity": [perplexity(head.total.perplexity) for head in heads],
        "increase": [change(head.total.perplexity_increase) for head in heads],
        "floor": [perplexity(head.total.floor) for head in heads],
        "KL mean": [number(head.total.kl_mean) for head in heads],
        "KL p99": [number(head.total.kl_p99) for head in heads],
        "top-1": [share(head.total.top1_agreement) for head in heads],
        "top-5": [share(head.total.top5_agreement) for head in heads],
        "dead codes": ["" if head.dead_codes is None else f"{head.dead_codes:,}" for head in heads],
        "head ms": ["" if head.head_ms is None else number(head.head_ms) for head in heads],
    }
    filled = {name: cells for name, cells in columns.items() if any(cells)}
    return [list(filled), *(list(row) for row in zip(*filled.values(), strict=True))]


def quality_by_text(heads: list[HeadQuality]) -> list[list[str]]:
    """A header and one row an output layer: perplexity and its increase on each text."""
    names = [text.text for text in heads[0].texts] if heads else []
    rows = [
        [head.name, *(f"{perplexity(text.perplexity)} ({change(text.perplexity_increase)})" for text in head.texts)]
        for head in heads
    ]
    return [["output layer", *names], *rows]


def quality_sentence(quality: QualityReport) -> str:
    """What was measured, on what, and how to read it."""
    texts = ", ".join(f"{name} ({count:,})" for name, count in quality.positions.items())
    return (
        f"Every output layer against that of {quality.dense}, at the same {sum(quality.positions.values()):,} positions of "
        f"text held out, in blocks of {quality.block:,} tokens: {texts}. Bytes count everything, floating-point numbers in "
        "fp16; float numbers are floating-point parameters, so code ids and quantised weights count in the bytes only. "
        "Floor: the lowest perplexity that any training could reach with the head's mapping of tokens to codes."
    )


def engine_sentence(engine: EngineArtifact) -> str:
    """One line on an engine: what it is, and how it is known what computes its head."""
    plugins = [f"{layer.plugin} ({', '.join(dict.fromkeys(layer.output_dtypes))})" for layer in engine.plugin_layers]
    where = "the engine itself" if engine.layers_from == "engine" else "the parsed network"
    version = f"{'TensorRT' if engine.flavour == 'tensorrt' else 'TensorRT for RTX'} {engine.tensorrt_version}"
    return (
        f"{engine.kind} in {version} for {engine.gpu or 'any GPU that it supports'}: {engine.dtype}, {size(engine.num_bytes)}; "
        f"{sum(engine.layers.values()):,} layers read back from {where}, by plugins: {', '.join(plugins) or 'none'}"
    )


def size_sentence(report: RunReport) -> str:
    """Bytes of the head, and what that means for the file on disk."""
    spec = report.spec
    dense, vq = spec.dense_bytes(), spec.head_bytes()
    head = f"the head takes {size(vq)} in fp16, {share(vq / dense)} of the full softmax head's {size(dense)}"
    others = 2 * (report.total_numbers - spec.float_numbers)
    if spec.tie_embedding:
        before = others + 2 * spec.vocab_size * spec.hidden_size + (0 if report.tied_embedding else dense)
        return (
            f"{head}. The input embedding is read from the same codes, so the whole model goes from {size(before)} to "
            f"{size(others + vq)}."
        )
    if report.tied_embedding:
        return (
            f"{head}. The input embedding is that same full matrix and stays dense, so nothing is saved on disk: "
            f"the VQ head comes on top. What shrinks is what each decode step reads for the head."
        )
    return f"{head}; the whole model goes from {size(others + dense)} to {size(others + vq)}."


def head_parts(spec: HeadSpec) -> dict[str, int]:
    """fp16 bytes of each part that the VQ head has; they add up to `spec.head_bytes()`."""
    books, codes, width = spec.codebook_shape
    parts = {
        "codebook": 2 * books * codes * width,
        "code ids (packed)": spec.code_bytes,
        "bias": 2 * spec.vocab_size * spec.has_bias,
        "rotation": 2 * spec.hidden_size**2 * spec.has_rotation,
    }
    return {name: count for name, count in parts.items() if count}


def continued(parity: ParityReport) -> str:
    """What followed token by token: greedy tokens, or draws where the graph makes those."""
    if parity.boundary_draws is None:
        return f"{parity.greedy_equal}/{parity.greedy_tokens} greedy tokens"
    return f"{parity.boundary_draws} draws decided by rounding at a boundary of the distribution"


def allowed_error(parity: ParityReport) -> float | None:
    """The limit on the absolute logit error, None where the check had none."""
    if "max_abs" in parity.limits:
        return parity.limits["max_abs"]
    if "relative_max" in parity.limits:
        return parity.limits["relative_max"] * parity.total.logit_range
    return None


def error_quantile(stats: ErrorStats, fraction: float) -> float:
    """The histogram edge with at least this fraction of the sampled errors below it; NaN without a histogram."""
    seen, wanted = 0, fraction * sum(count for _, count in stats.error_histogram)
    for edge, count in stats.error_histogram:
        seen += count
        if count and seen >= wanted:
            return float(10.0**edge)
    return math.nan


def number(value: float | None) -> str:
    """Three digits; scientific when tiny or huge: '2.1e-7', '0.0312', '12,345'."""
    if value is None or not math.isfinite(value):
        return "–" if value is None else str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e3:
        return f"{value:.3g}"
    if 1e3 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def perplexity(value: float) -> str:
    """Digits enough to tell two heads apart: '23.06', '181.3', '1,122'."""
    return number(value) if not 0 <= value < 1e3 else f"{value:.2f}" if value < 100 else f"{value:.1f}"


def share(value: float) -> str:
    """A fraction as a percentage that says 100 % only when it is all of it."""
    if 0.9999 <= value < 1:
        return ">99.99 %"
    return f"{100 * value:.4g} %" if value > 0.99 else f"{100 * value:.3g} %"


def change(value: float) -> str:
    """A relative change: '+14.2 %', '+0.08 %', '+1,160 %'."""
    percent = 100 * value
    return f"{percent:+.1f} %" if 1 <= abs(percent) < 1000 else f"{percent:+,.{0 if abs(percent) >= 1000 else 2}f} %"


def size(count: float) -> str:
    """Bytes in the binary unit that keeps the number below 1024."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.3g} GiB"


def times(ratio: float) -> str:
    """'4.52×'."""
    return f"{ratio:.3g}×"


def printable(text: str) -> str:
    """The text on one line, without what could steer a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def calibration_table(reports: Sequence[CalibrationReport]) -> list[list[str]]:
    """A header, and a row for each quantised graph."""
    header = ["precision", "size", "perplexity", "increase", "allowed", "KL mean", "top-1", "layers", "verdict"]
    rows = [
        [
            made.precision,
            f"{size(made.num_bytes)} of {size(made.source_bytes)}",
            number(made.total.perplexity_candidate),
            change(made.perplexity_increase),
            change(made.limits["perplexity_increase"]),
            number(made.total.kl_mean),
            share(made.total.top1_agreement),
            f"{made.quantised} quantised, {len(made.kept)} kept",
            "pass" if made else "fail",
        ]
        for made in reports
    ]
    return [header, *rows]
