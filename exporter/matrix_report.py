"""The report of `--matrix`: a row for each variant, as a record, a page and a few lines of Markdown."""

from __future__ import annotations

from dataclasses import dataclass, field

import jinja2

from export_vq.records import BenchReport, CalibrationReport, ParityReport, Record
from export_vq.wording import change, number, printable, share, size, times


@dataclass(frozen=True)
class VariantResult(Record):
    """What became of one variant; truthy when it was made and every check held.

    `name` is its folder's. `parity` is against PyTorch; of a quantised variant that gives chosen tokens, against its own
    logits, and `calibration` says what fewer bits cost. Bytes are of a graph and its weights. `error` is why it was not made.
    """

    name: str
    dtype: str
    output: str
    form: str
    last_token: bool
    error: str = ""
    num_bytes: int = 0
    dense_bytes: int = 0
    parity: tuple[ParityReport, ...] = ()
    calibration: CalibrationReport | None = None
    bench: BenchReport | None = None
    not_done: tuple[str, ...] = ()

    @property
    def failures(self) -> tuple[str, ...]:
        judged = [report.failures for report in (*self.parity, self.calibration) if report is not None]
        return (*([self.error] if self.error else []), *(failure for failures in judged for failure in failures))

    def __bool__(self) -> bool:
        return not self.failures

    @property
    def verdict(self) -> str:
        """A word: PASS, FAIL, or NOT CHECKED where this machine cannot run it."""
        if not self:
            return "FAIL"
        return "PASS" if self.parity or self.calibration is not None else "NOT CHECKED"

    def median_ms(self, subject: str, runner: str) -> float | None:
        """Of one row with cold caches, as a decode step finds them; None where it was not timed."""
        timings = self.bench.timings if self.bench is not None else ()
        wanted = (subject, runner, 1, "cold")
        return next((t.median_ms for t in timings if (t.subject, t.runner, t.batch, t.cache) == wanted), None)


@dataclass(frozen=True)
class MatrixReport(Record):
    """All variants of one run: matrix.json. Truthy when each of them is."""

    model: str
    device: str
    variants: tuple[VariantResult, ...]
    versions: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return all(self.variants)


HEADER = (
    "variant", "verdict", "size", "dense twin", "largest error", "same top token", "perplexity", "head ms", "step ms",
    "dense step ms", "step",
)  # fmt: skip
LEGEND = (
    "Size: the graph with its weights. Largest error: of the graph against PyTorch, as a share of the logit range; of a "
    "quantised variant with chosen tokens, against its own logits. Same top token: against the same; of a quantised variant "
    "with logits, against the fp32 graph. Perplexity: change by fewer bits, against the fp32 graph on documents that were not "
    "calibrated on. Head and step: median milliseconds of batch 1 with cold caches; the last column is the dense twin's step "
    "over this one, above 1 where VQ is faster. Timings of two variants were not taken in turns: small differences say nothing."
)


def table(report: MatrixReport) -> list[list[str]]:
    """The header, and a row for each variant."""
    return [list(HEADER), *(_row(variant) for variant in report.variants)]


def _row(variant: VariantResult) -> list[str]:
    worst = max(
        variant.parity, key=lambda p: (p.total.relative_max != p.total.relative_max, p.total.relative_max), default=None
    )
    made = variant.calibration
    judged = worst or made
    step, dense = variant.median_ms("decode step", "vq"), variant.median_ms("decode step", "dense")
    return [
        variant.name,
        variant.verdict,
        size(variant.num_bytes) if variant.num_bytes else "–",
        size(variant.dense_bytes) if variant.dense_bytes else "–",
        number(None if worst is None else worst.total.relative_max),
        "–" if judged is None else share(judged.total.top1_agreement),
        "–" if made is None else change(made.perplexity_increase),
        number(variant.median_ms("head", "vq")),
        number(step),
        number(dense),
        "–" if step is None or dense is None else times(dense / step),
    ]


def notes(report: MatrixReport) -> list[str]:
    """What failed and what was not done, each with its variant."""
    failed = [f"{variant.name}: failed: {failure}" for variant in report.variants for failure in variant.failures]
    return failed + [f"{variant.name}: not done: {item}" for variant in report.variants for item in variant.not_done]


def render_matrix(report: MatrixReport) -> str:
    """One HTML page that loads nothing from anywhere."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("export_vq", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["printable"] = printable
    template = environment.get_template("matrix.html.j2")
    return template.render(report=report, rows=table(report), notes=notes(report), legend=LEGEND)


def summarise(report: MatrixReport) -> str:
    """The table and the notes as Markdown."""
    rows = [" | ".join(printable(cell).replace("|", "\\|") for cell in row) for row in table(report)]
    lines = [f"| {row} |" for row in rows]
    lines.insert(1, "|---|---|" + "---:|" * (len(HEADER) - 2))
    return (
        "\n".join([*lines, *([""] if notes(report) else []), *(f"- {printable(note)}" for note in notes(report))])
        + "\n"
    )
