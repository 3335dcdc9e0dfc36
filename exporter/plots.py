"""The report's plots: records in, inline SVG out, drawn by matplotlib."""

from __future__ import annotations

import html
import io
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

from export_vq.records import BenchReport, QualityReport, RunReport, Timing
from export_vq.wording import allowed_error, frontier, head_parts, number, share, size

ACCENT, SOFT, GREY, INK, ALARM = "#0f766e", "#7cc4bb", "#a3abb5", "#1f2933", "#b42318"
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it takes the page's font and can be searched and read aloud
    "svg.hashsalt": "export-vq",  # the same report gives the same bytes
    "text.parse_math": False,  # a '$' in a name is a '$'
    "text.color": INK,
    "font.size": 12,
    "xtick.color": "#52606d",
    "ytick.color": "#52606d",
    "axes.labelcolor": "#52606d",
    "axes.edgecolor": "#cbd2d9",
    "axes.spines.top": False,
    "axes.spines.right": False,
}
KIND_STYLES = {
    "product": (ACCENT, "o"),
    "additive": ("#7c3aed", "D"),
    "single": ("#c2710c", "^"),
    "int8": ("#64748b", "s"),
    "int4": ("#64748b", "v"),
    "dense": ("#64748b", "p"),
}
"""Colour and marker of each kind of output layer: told apart without colours too, and seen on white and on black."""
MOST_LAYERS = 12
"""Layers of a precision that its plot shows."""
_LABEL_INCHES, _BAR_INCHES, _GAP_INCHES, _AXIS_INCHES = 0.25, 0.21, 0.13, 0.55


class _Bar(NamedTuple):
    value: float
    color: str
    text: str
    span: tuple[float, float] | None = None


_Rows = Sequence[tuple[str, Sequence[_Bar]]]


def plot(name: str, label: str, report: RunReport) -> str:
    """The plot as an inline SVG that scales with its box; its ids begin with `name`, so they are unique in the page."""
    svg = _svg(lambda figure: _DRAW[name](figure, report), opaque=False)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg[svg.index("<svg") :], count=1, flags=re.S)
    view = re.search(r'viewBox="([^"]*)"', svg)
    attributes = f'role="img" aria-label="{html.escape(label)}" viewBox="{view and view.group(1)}"'
    body = re.sub(r'<(\w+) id="', rf'<\1 id="{name}-', svg[svg.index(">") + 1 :])
    body = body.replace('xlink:href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    return f"<svg {attributes}>{body}"


def frontier_svg(quality: QualityReport, against: str) -> str:
    """The frontier as an SVG file of its own, on white, so that a page of any colour can show it.

    Args:
        quality: what was measured.
        against: 'bytes' of the head, or its 'time'.
    """
    return _svg(lambda figure: _draw_frontier(figure, quality, against), opaque=True)


def latency_svg(bench: BenchReport) -> str:
    """Bars of a benchmark's medians as an SVG file of its own, on white; ways whose name begins with VQ stand out."""
    return _svg(lambda figure: _draw_latency(figure, bench.timings), opaque=True)


def curves_svg(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], ylabel: str) -> str:
    """Lines through points (x, y), both scales logarithmic, as an SVG file of its own, on white.

    Args:
        panels: what x is -> name of a line -> its points.
        ylabel: what y is.
    """
    return _svg(lambda figure: _draw_curves(figure, panels, ylabel), opaque=True)


def _svg(draw: Callable[[Figure], None], *, opaque: bool) -> str:
    stream = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.7, 3.2), layout="constrained")
        figure.patch.set_visible(opaque)
        draw(figure)
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return stream.getvalue()


def _draw_bars(figure: Figure, panels: Sequence[tuple[str, _Rows]], log_above: float = math.inf) -> None:
    """Panels of horizontal bars, one above the other, each row's name over its bars: they keep the width of a phone."""
    heights = [
        sum(_LABEL_INCHES + _BAR_INCHES * len(bars) + _GAP_INCHES for _, bars in rows) + _AXIS_INCHES
        for _, rows in panels
    ]
    figure.set_figheight(sum(heights))
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (title, rows), height in zip(axes, panels, heights, strict=True):
        values = [bar.value for _, bars in rows for bar in bars]
        log = max(values) > log_above * min(values)
        if log:
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        else:
            ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel(f"{title}, log scale" if log else title)
        ax.set_yticks([])
        ax.spines["left"].set_visible(not log)
        ax.set_ylim(height - _AXIS_INCHES, 0)
        _draw_rows(ax, rows, log)


def _draw_rows(ax: Axes, rows: _Rows, log: bool) -> None:
    y = 0.0
    for name, bars in rows:
        text = ax.text(0, y + 0.2, _short(name), transform=ax.get_yaxis_transform(), weight="bold")
        text.set_in_layout(False)
        y += _LABEL_INCHES + _BAR_INCHES / 2
        for bar in bars:
            if log:  # a bar has no foot on a log scale
                ax.plot(bar.value, y, "o", color=bar.color, markersize=7)
            else:
                ax.barh(y, bar.value, 0.86 * _BAR_INCHES, color=bar.color)
            if bar.span:
                ax.plot(bar.span, (y, y), color=INK, linewidth=1.2, marker="|", markersize=6)
            end = max(bar.value, *bar.span) if bar.span else bar.value
            ax.annotate(bar.text, (end, y), (7, 0), textcoords="offset points", va="center")
            y += _BAR_INCHES
        y += _GAP_INCHES - _BAR_INCHES / 2


def _draw_latency(figure: Figure, timings: Sequence[Timing]) -> None:
    panels = []
    for subject in dict.fromkeys(t.subject for t in timings):
        mine = [t for t in timings if t.subject == subject]
        workloads = dict.fromkeys((t.batch, t.cache) for t in mine)
        rows = [
            (f"batch {batch}, {cache}", [_latency_bar(t) for t in mine if (t.batch, t.cache) == (batch, cache)])
            for batch, cache in workloads
        ]
        panels.append((f"{subject}, ms", rows))
    _draw_bars(figure, panels, log_above=10)


def _latency_bar(timing: Timing) -> _Bar:
    color = ACCENT if timing.runner == "vq" or timing.runner.startswith("VQ") else GREY
    label = f"{timing.runner} {number(timing.median_ms)}"
    return _Bar(timing.median_ms, color, label, (timing.q1_ms, timing.p90_ms))


def _draw_curves(
    figure: Figure, panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], ylabel: str
) -> None:
    figure.set_size_inches(4.7 * len(panels), 3.6)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for i, (ax, (xlabel, lines)) in enumerate(zip(axes, panels.items(), strict=True)):
        for (name, points), (color, marker) in zip(lines.items(), KIND_STYLES.values(), strict=False):
            ax.plot(*zip(*points, strict=True), color=color, marker=marker, label=name)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel(xlabel)
        ax.set_ylabel("" if i else ylabel)
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        ax.grid(color="#94a3b8", alpha=0.25, linewidth=0.7)
        ax.legend(frameon=False)


def _draw_agreement(figure: Figure, report: RunReport) -> None:
    lowest: dict[str, tuple[float, float]] = {}
    for case in (case for parity in report.parity for case in parity.cases):
        top1, top5 = lowest.get(case.name, (1.0, 1.0))
        lowest[case.name] = (min(top1, case.stats.top1_agreement), min(top5, case.stats.top5_agreement))
    if report.gap:
        lowest["model gap: against the baseline"] = report.gap.top1_agreement, report.gap.top5_agreement
    rows = [
        (name, [_Bar(100 * top1, ACCENT, share(top1)), _Bar(100 * top5, SOFT, share(top5))])
        for name, (top1, top5) in lowest.items()
    ]
    _draw_bars(figure, [("agreement, %", rows)])


def _draw_bytes(figure: Figure, report: RunReport) -> None:
    spec = report.spec
    both = {"full softmax head": (spec.dense_bytes(), GREY), "VQ head": (spec.head_bytes(), ACCENT)}
    whole = [(name, [_Bar(count / 2**20, color, size(count))]) for name, (count, color) in both.items()]
    parts = [(name, [_Bar(count / 2**20, SOFT, size(count))]) for name, count in head_parts(spec).items()]
    _draw_bars(figure, [("MiB in fp16", whole), ("inside the VQ head, MiB", parts)])


def _draw_errors(figure: Figure, report: RunReport) -> None:
    """Share of the logits by size of their error, one outline a check, and the tightest limit."""
    ax = figure.subplots()
    colors = itertools.cycle((ACCENT, INK, SOFT, GREY))
    for parity, color in zip(report.parity, colors, strict=False):
        histogram = parity.total.error_histogram
        filled = [i for i, (_, count) in enumerate(histogram) if count]
        if len(histogram) > 1 and filled:
            first, last, step = filled[0], filled[-1] + 1, histogram[1][0] - histogram[0][0]
            shares = [100 * count / sum(n for _, n in histogram) for _, count in histogram[first:last]]
            edges = [histogram[first][0] - step, *(edge for edge, _ in histogram[first:last])]
            style: dict[str, Any] = {"fill": color == ACCENT, "color": color, "alpha": 0.85, "linewidth": 1.4}
            ax.stairs(shares, edges, label=_short(parity.candidate), **style)
    limits = [limit for limit in map(allowed_error, report.parity) if limit and math.isfinite(limit)]
    if limits:
        ax.axvline(math.log10(min(limits)), color=ALARM, linewidth=1.6, linestyle="--", label="largest error allowed")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.xaxis.set_major_formatter(lambda value, _: f"1e{value:.0f}")
    ax.set_xlabel("absolute logit error")
    ax.set_ylabel("% of logits")
    if ax.get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper left", frameon=False)


def _draw_frontier(figure: Figure, quality: QualityReport, against: str) -> None:
    """Every output layer as a point, and a line along those that nothing beats in both directions."""
    figure.set_figheight(4.2)
    ax = figure.subplots()
    points = frontier(quality, against)
    for kind in [kind for kind in KIND_STYLES if any(point.head.kind == kind for point in points)]:
        color, marker = KIND_STYLES[kind]
        mine = [point for point in points if point.head.kind == kind]
        x, y = [p.x for p in mine], [100 * p.increase for p in mine]
        ax.plot(x, y, marker, color=color, markersize=8, markeredgecolor="white", markeredgewidth=0.7, label=kind)
    best = [point for point in points if point.best]
    # A step: between two heads there is none, and the smaller one is what one gets.
    ax.step([p.x for p in best], [100 * p.increase for p in best], where="post", color=INK, linewidth=1, alpha=0.5)
    ax.set_xscale("log")
    ax.set_xlabel(
        "bytes, % of the fp16 head, log scale" if against == "bytes" else "time of the head alone, ms, log scale"
    )
    ax.set_ylabel("perplexity increase, %")
    # Straight up to 1 %, so that heads as good as the dense one, and better ones, have a place.
    ax.set_yscale("symlog", linthresh=1.0, linscale=0.4)
    lowest, highest = (limit(100 * point.increase for point in points) for limit in (min, max)) if points else (0, 1)
    decades = range(math.ceil(math.log10(max(highest, -lowest, 1))) + 1)
    ticks = [factor * 10.0**n for n in decades for factor in (1, 3)]
    ax.yaxis.set_major_locator(FixedLocator([*(-tick for tick in ticks), 0.0, *ticks]))
    ax.set_ylim(min(-0.3, 1.5 * lowest), max(1.0, 1.6 * highest))
    values = [point.x for point in points]
    span = max(values) / min(values) if points else 1.0
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 300 else (1,)))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_locator(NullLocator())
    ax.grid(color="#94a3b8", alpha=0.25, linewidth=0.7)
    ax.set_axisbelow(True)
    if points:
        figure.legend(loc="outside upper left", frameon=False, ncols=3, handletextpad=0.2, columnspacing=1.2)


def _of_quality(against: str) -> Callable[[Figure, RunReport], None]:
    def draw(figure: Figure, report: RunReport) -> None:
        assert report.quality is not None
        _draw_frontier(figure, report.quality, against)

    return draw


def _draw_sensitivity(figure: Figure, report: RunReport) -> None:
    """Of each precision, the layers that cost most when they alone are quantised."""
    panels = []
    for made in report.calibrations:
        rows = [
            (
                cost.name,
                [_Bar(1e3 * cost.kl, GREY if cost.kept else ACCENT, f"{number(1e3 * cost.kl)}{', kept' * cost.kept}")],
            )
            for cost in made.sensitivity[:MOST_LAYERS]
        ]
        panels += [(f"{made.precision}: KL in thousandths of a nat", rows)] * bool(rows)
    _draw_bars(figure, panels)


def _short(name: str, length: int = 38) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


_DRAW: dict[str, Callable[[Figure, RunReport], None]] = {
    "latency": lambda figure, report: _draw_latency(figure, report.bench.timings if report.bench else ()),
    "errors": _draw_errors,
    "agreement": _draw_agreement,
    "bytes": _draw_bytes,
    "sensitivity": _draw_sensitivity,
    "frontier-bytes": _of_quality("bytes"),
    "frontier-time": _of_quality("time"),
}
