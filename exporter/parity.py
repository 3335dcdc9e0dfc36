"""Is a candidate the same function as its reference? Prefill, then decode through the KV cache, judged by numbers.

Limits:

fp32        largest error at most 1e-5 of the logit range: ten times what float32 sums over a few thousand terms and a few
            dozen layers leave (eps 6e-8), and far below what one wrong code id or token does. Top-1 equal everywhere.
fp16, bf16  no worse than twice the error of PyTorch computing in the same type, both against the float64 oracle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export_vq import feeds as fd
from export_vq.generate import generate
from export_vq.records import ErrorStats, ParityCase, ParityReport

RELATIVE_MAX_FP32 = 1e-5
HALF_FACTOR = 2.0
LONGEST = 256
STEPS = 8
"""Tokens of a standard case, and how many of them are decode steps."""

Floats = NDArray[np.floating[Any]]
_EDGES = np.arange(-12.0, 3.01, 0.5)
_SAMPLE = 13  # every 13th token enters the histogram: prime, so no structure of the vocabulary is favoured


@dataclass(frozen=True)
class CaseInput:
    """Tokens of one case: `ids` int64 [B, prefill + decode_steps]; `padding` tokens on the left of each row are not real."""

    name: str
    ids: NDArray[np.int64]
    prefill: int
    padding: tuple[int, ...]

    @property
    def decode_steps(self) -> int:
        return int(self.ids.shape[1]) - self.prefill


def check_parity(
    reference: fd.Runner,
    candidate: fd.Runner,
    cases: Sequence[CaseInput],
    *,
    dtype: str,
    native: fd.Runner | None = None,
    greedy_tokens: int = 32,
    relative_max: float = RELATIVE_MAX_FP32,
    progress: Callable[[float], None] = lambda _: None,
) -> ParityReport:
    """Run both through every case and judge.

    Args:
        reference: PyTorch in float32 for an fp32 candidate; the float64 oracle for fp16 and bf16.
        candidate: what was exported.
        cases: at least one.
        dtype: 'fp32', 'fp16' or 'bf16', the candidate's.
        native: PyTorch in the candidate's type; needed for fp16 and bf16.
        greedy_tokens: length of the greedy continuation that must agree (fp32; counted only otherwise); 0 skips it.
        relative_max: fp32 limit on max error over logit range.
        progress: called with the fraction done.

    Raises:
        ValueError: fp16 or bf16 without `native`.
    """
    if dtype != "fp32" and native is None:
        raise ValueError(f"a {dtype} check needs PyTorch in {dtype} to compare with")
    total, own = ErrorAccumulator(), ErrorAccumulator()
    done, work = 0, sum(case.ids.size for case in cases)
    results = []
    for case in cases:
        results.append(_run_case(case, reference, candidate, total))
        if native is not None:
            _run_case(case, reference, native, own)
        done += case.ids.size
        progress(done / work)
    equal = _equal_greedy(reference, candidate, cases[0], greedy_tokens)
    stats = total.stats()
    if dtype == "fp32":
        limits = {"relative_max": relative_max, "cache_relative_max": relative_max, "top1_agreement": 1.0}
        failures = _fp32_failures(stats, results, relative_max, equal, greedy_tokens)
    else:
        limits = {"max_abs": HALF_FACTOR * own.stats().max_abs, "mean_abs": HALF_FACTOR * own.stats().mean_abs}
        failures = [
            f"{name} error {getattr(stats, name):.3g} against the float64 oracle is above {limit:.3g}, twice PyTorch's own in {dtype}"
            for name, limit in limits.items()
            if not getattr(stats, name) <= limit
        ]
    return ParityReport(
        reference=reference.name,
        candidate=candidate.name,
        dtype=dtype,
        total=stats,
        cases=tuple(case for case, _ in results),
        limits=limits,
        failures=tuple(failures),
        native_error=own.stats().max_abs if native is not None else None,
        oracle_error=stats.max_abs if native is not None else None,
        greedy_tokens=greedy_tokens,
        greedy_equal=equal,
    )


def standard_cases(
    blocks: Callable[[int, int], NDArray[np.int64]], positions: int, longest: int = LONGEST
) -> list[CaseInput]:
    """Cases that cover batch sizes, lengths, left padding and decode steps, `positions` or a few more in all.

    Args:
        blocks: (width, count) -> token ids int64 [count, width].
        positions: token positions to compare in all.
        longest: positions that the model has; no case is longer, nor than LONGEST.
    """
    longest = min(longest, LONGEST)
    one, three = min(longest, 72), min(longest, 48)
    cases = [
        CaseInput("one prompt", blocks(one, 1), one - STEPS, (0,)),
        CaseInput("three prompts, left padding", blocks(three, 3), three - STEPS, (0, three // 7, three // 2)),
    ]
    left = positions - sum(case.ids.size - sum(case.padding) for case in cases)
    wide = blocks(longest, -(-max(left, longest) // longest))
    cases += [
        CaseInput(f"text {i + 1}", rows, longest - STEPS, (0,) * len(rows))
        for i, rows in enumerate(np.array_split(wide, -(-len(wide) // 2)))
    ]
    return cases


def _fp32_failures(
    stats: ErrorStats, results: list[tuple[ParityCase, float]], limit: float, equal: int, greedy_tokens: int
) -> list[str]:
    failures = []
    if not stats.relative_max <= limit:  # written so that NaN fails
        failures.append(f"largest logit error is {stats.relative_max:.2e} of the logit range, allowed {limit:.0e}")
    if stats.top1_agreement != 1.0:
        failures.append(
            f"top-1 tokens agree at {stats.top1_agreement:.4%} of {stats.positions} positions, expected all"
        )
    for case, relative in results:
        if not relative <= limit:
            failures.append(
                f"KV cache of case '{case.name}' is off by {relative:.2e} of its range, allowed {limit:.0e}"
            )
    if equal != greedy_tokens:
        failures.append(f"greedy continuations agree for {equal} of {greedy_tokens} tokens")
    return failures


def _run_case(
    case: CaseInput, reference: fd.Runner, candidate: fd.Runner, total: ErrorAccumulator
) -> tuple[ParityCase, float]:
    """One case through both, each with its own cache. Returns the case and the cache error over the cache's range."""
    here = ErrorAccumulator()
    batch = len(case.ids)
    mask = np.ones_like(case.ids)
    for row, padding in enumerate(case.padding):
        mask[row, :padding] = 0
    outputs: list[fd.Feeds] = []
    cache_error, cache_scale = 0.0, 0.0
    for start, stop in [(0, case.prefill)] + [(i, i + 1) for i in range(case.prefill, case.ids.shape[1])]:
        ids, seen = case.ids[:, start:stop], mask[:, :stop]
        outputs = [
            runner.infer(
                fd.prefill(runner.signature, ids, seen)
                if start == 0
                else fd.step(runner.signature, ids, seen, outputs[i])
            )
            for i, runner in enumerate((reference, candidate))
        ]
        real = mask[:, start:stop].astype(bool)
        targets = np.concatenate(
            [case.ids[:, start + 1 : stop + 1], np.full((batch, int(stop == case.ids.shape[1])), -1)], 1
        )
        rows = [out["logits"][real] for out in outputs]
        for accumulator in (here, total):
            accumulator.add(rows[0], rows[1], targets[real])
    valid = mask.astype(bool)[:, None, :, None]  # what padding left in the cache is never read
    for name in outputs[0]:
        if name.startswith("present."):
            pair = [np.where(valid, out[name].astype(np.float64), 0.0) for out in outputs]
            cache_error = max(cache_error, _max(np.abs(pair[0] - pair[1])))
            cache_scale = max(cache_scale, _max(np.abs(pair[0])))
    result = ParityCase(
        name=case.name,
        batch=batch,
        prefill=case.prefill,
        decode_steps=case.decode_steps,
        left_padded=any(case.padding),
        stats=here.stats(),
        cache_max_abs=cache_error,
    )
    return result, cache_error / cache_scale if cache_scale else cache_error


def _max(values: Floats) -> float:
    """The maximum, NaN if any is NaN."""
    return float(values.max(initial=0.0))


def _equal_greedy(reference: fd.Runner, candidate: fd.Runner, case: CaseInput, length: int) -> int:
    """How many leading greedy tokens agree after half of the first row's prefill."""
    if not length:
        return 0
    prompt = case.ids[
        0, case.padding[0] : case.prefill // 2 + 1
    ].tolist()  # half: leaves the model positions to write in
    pairs = zip(generate(reference, prompt, length), generate(candidate, prompt, length), strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), length)


@dataclass
class ErrorAccumulator:
    """Streaming statistics of candidate logits against reference logits, row by row."""

    positions: int = 0
    elements: int = 0
    max_abs: float = 0.0
    sum_abs: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    cosine: float = 1.0
    kl: list[Floats] = field(default_factory=list)
    nll: list[Floats] = field(default_factory=list)
    top1: int = 0
    top5: float = 0.0
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(_EDGES) - 1, np.int64))

    def add(self, reference: Floats, candidate: Floats, targets: NDArray[np.int64]) -> None:
        """Take in rows: both [rows, V]; `targets` [rows] the next token, -1 where unknown."""
        for start in range(0, len(reference), 64):  # bounded scratch: 64 x V in float64
            part = slice(start, start + 64)
            self._add(reference[part].astype(np.float64), candidate[part].astype(np.float64), targets[part])

    def _add(self, a: Floats, b: Floats, targets: NDArray[np.int64]) -> None:
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            self.max_abs, a, b = (
                math.nan,
                np.nan_to_num(a),
                np.nan_to_num(b),
            )  # NaN stays NaN below, and fails every limit
        error = np.abs(a - b)
        self.positions += len(a)
        self.elements += a.size
        self.max_abs = float(np.maximum(self.max_abs, _max(error)))
        self.sum_abs += float(error.sum())
        self.low, self.high = min(self.low, float(a.min())), max(self.high, float(a.max()))
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        self.cosine = float(np.minimum(self.cosine, ((a * b).sum(1) / np.maximum(norms, 1e-300)).min()))
        log_a, log_b = _log_softmax(a), _log_softmax(b)
        self.kl.append((np.exp(log_a) * (log_a - log_b)).sum(1))
        known = np.flatnonzero(targets >= 0)
        self.nll.append(np.stack([-log_a[known, targets[known]], -log_b[known, targets[known]]]))
        for row_a, row_b in zip(a, b, strict=True):
            best_a, best_b = top_ids(row_a, 5), top_ids(row_b, 5)
            self.top1 += int(best_a[0] == best_b[0])
            self.top5 += len(np.intersect1d(best_a, best_b)) / len(best_a)
        sample = np.log10(np.maximum(error[:, ::_SAMPLE], 10.0 ** _EDGES[0]))
        self.histogram += np.histogram(np.minimum(sample, _EDGES[-1]), _EDGES)[0]

    def stats(self) -> ErrorStats:
        """The numbers so far."""
        kl = np.concatenate(self.kl) if self.kl else np.zeros(1)
        nll = np.concatenate(self.nll, axis=1) if self.nll else np.zeros((2, 0))
        perplexity = np.exp(nll.mean(axis=1)) if nll.size else np.full(2, np.nan)
        return ErrorStats(
            positions=self.positions,
            max_abs=self.max_abs,
            mean_abs=self.sum_abs / max(self.elements, 1),
            logit_range=self.high - self.low,
            cosine_min=self.cosine,
            kl_mean=float(kl.mean()),
            kl_p99=float(np.quantile(kl, 0.99)),
            top1_agreement=self.top1 / max(self.positions, 1),
            top5_agreement=self.top5 / max(self.positions, 1),
            perplexity_reference=float(perplexity[0]),
            perplexity_candidate=float(perplexity[1]),
            error_histogram=tuple((float(edge), int(n)) for edge, n in zip(_EDGES[1:], self.histogram, strict=True)),
        )


def top_ids(row: Floats, k: int) -> NDArray[np.int64]:
    """The k best token ids of logits [V], falling by value; equal values by rising id."""
    k = min(k, row.size)
    bound = np.partition(row, -k)[-k]
    ids = np.flatnonzero(row >= bound)  # all that tie at the boundary
    return ids[np.lexsort((ids, -row[ids]))][:k]


def _log_softmax(logits: Floats) -> Floats:
    shifted: Floats = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted
