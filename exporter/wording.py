"""What a run found, in words and numbers for people: derived from the records, shared by the page, its plots and the terminal."""

from __future__ import annotations

import math
from typing import NamedTuple

from export_vq.records import BenchReport, EngineArtifact, ErrorStats, HeadSpec, ParityReport, RunReport


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
    if report.tied_embedding:
        return (
            f"{head}. The input embedding is that same full matrix and stays dense, so nothing is saved on disk: "
            f"the VQ head comes on top. What shrinks is what each decode step reads for the head."
        )
    whole = 2 * (report.total_numbers - spec.float_numbers) + dense
    return f"{head}; the whole model goes from {size(whole)} to {size(whole - dense + vq)}."


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


def share(value: float) -> str:
    """A fraction as a percentage that says 100 % only when it is all of it."""
    if 0.9999 <= value < 1:
        return ">99.99 %"
    return f"{100 * value:.4g} %" if value > 0.99 else f"{100 * value:.3g} %"


def change(value: float) -> str:
    """A relative change: '+14.2 %'."""
    return f"{100 * value:+.1f} %"


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
