"""What a run found, for people: records in, one HTML page or a few lines of Markdown out. Nothing here measures or judges.

The page needs nothing but itself: styles are in it, plots are inline SVG, there is no script.
"""

from __future__ import annotations

import re

import jinja2

from export_vq.plots import plot
from export_vq.records import QualityReport, RunReport
from export_vq.wording import (
    allowed_error,
    calibration_table,
    change,
    engine_sentence,
    error_quantile,
    frontier,
    head_parts,
    headline_speedup,
    number,
    printable,
    quality_by_text,
    quality_groups,
    quality_sentence,
    quality_table,
    share,
    size,
    size_sentence,
    speed_sentences,
    speedups,
    times,
    verdict,
    worst_parity,
)


def render_html(report: RunReport) -> str:
    """The whole report as one HTML page that loads nothing from anywhere."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("export_vq", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    formats = (number, share, change, size, times, printable, frontier)
    environment.filters.update({function.__name__: function for function in formats})
    return environment.get_template("report.html.j2").render(
        report=report,
        verdict=verdict(report),
        worst=worst_parity(report),
        speedups=speedups(report.bench),
        headline=headline_speedup(report.bench),
        speed_sentences=speed_sentences(report.bench),
        engine_sentences=[engine_sentence(engine) for engine in report.engines],
        engine_speed_sentences=speed_sentences(report.engine_bench),
        size_sentence=size_sentence(report),
        parts=head_parts(report.spec),
        quantile=error_quantile,
        allowed=allowed_error,
        calibration_table=calibration_table,
        quality_groups=quality_groups,
        quality_table=quality_table,
        quality_by_text=quality_by_text,
        quality_sentence=quality_sentence,
        plot=lambda name, label: plot(name, label, report),
    )


def render_summary(report: RunReport) -> str:
    """The report in a few lines of Markdown, the verdict first."""
    spec, gap, quality = report.spec, report.gap, report.quality
    lines = [": ".join(verdict(report)), ""]
    lines += [f"- failed: {parity.candidate}: {failure}" for parity in report.parity for failure in parity.failures]
    lines.append(
        f"- model: {report.model} ({report.model_type}, {report.dtype}); {spec.kind} head, V={spec.vocab_size:,} "
        f"D={spec.hidden_size:,} M={spec.num_codebooks} K={spec.num_codes:,}"
    )
    lines += [
        f"- export gap, {parity.candidate}: largest {parity.compared} error {number(parity.total.max_abs)} "
        f"({number(parity.total.relative_max)} of the logit range), same top token at "
        f"{share(parity.total.top1_agreement)} of {parity.total.positions:,} positions"
        for parity in report.parity
    ]
    if gap is None or quality is None:
        lines.append("- model gap: no baseline given")
    else:
        lines.append(
            f"- model gap: perplexity {number(gap.perplexity)} against {number(gap.perplexity_dense)} of {quality.dense} "
            f"({change(gap.perplexity_increase)}), floor {number(gap.floor)}, same top token at "
            f"{share(gap.top1_agreement)} of positions"
        )
    lines += [f"- speed: {sentence}" for sentence in speed_sentences(report.bench) or ("not measured",)]
    lines += [f"- engine: {engine_sentence(engine)}" for engine in report.engines]
    lines += [f"- speed of engines: {sentence}" for sentence in speed_sentences(report.engine_bench)]
    lines += [
        f"- {made.precision}: perplexity {change(made.perplexity_increase)} against the unquantised graph, "
        f"{size(made.num_bytes)} of {size(made.source_bytes)}{'' if made else ', above its limits'}"
        for made in report.calibrations
    ]
    lines.append(f"- size: {size_sentence(report)}")
    if report.continuation:
        lines.append(f"- the model writes: {report.prompt}|{report.continuation}")
    lines += [f"- not done: {item}" for item in report.not_done]
    return "\n".join(printable(line) for line in lines) + "\n"


def quality_markdown(quality: QualityReport) -> str:
    """The quality report as Markdown: a table for each kind of output layer, one by text, the samples."""
    groups = quality_groups(quality)
    lines = [_cell(quality_sentence(quality))]
    for title, heads in groups.items():
        lines += ["", f"### {title}", "", *_markdown_table(quality_table(heads))]
    everything = [head for heads in groups.values() for head in heads]
    lines += ["", "### By text", "", *_markdown_table(quality_by_text(everything))]
    for i, sample in enumerate(quality.samples):
        rows = [["output layer", "writes"], *([name, text] for name, text in sample.texts.items())]
        lines += [*(["", "### What they write"] if i == 0 else []), "", f"> {_cell(sample.prompt)}", ""]
        lines += _markdown_table(rows)
    return "\n".join(lines) + "\n"


def _markdown_table(rows: list[list[str]]) -> list[str]:
    """The first row is the header; numbers stand to the right."""
    text = ("output layer", "method", "writes")
    lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return [lines[0], "|" + "|".join("---" if name in text else "---:" for name in rows[0]) + "|", *lines[1:]]


def _cell(text: str) -> str:
    """Text that stays text and stays in its cell."""
    return re.sub(r"([\\`*_\[\]<>|#~$&])", r"\\\1", printable(text))
