"""Is a candidate the same function as its reference? Prefill, then decode through the KV cache, judged by numbers.

Limits:

fp32        largest error at most 1e-5 of the logit range: ten times what float32 sums over a few thousand terms and a few
            dozen layers leave (eps 6e-8), and far below what one wrong code id or token does. Top-1 equal everywhere.
fp16, bf16  no worse than twice the error of PyTorch computing in the same type, both against the float64 oracle.

Graphs that give chosen tokens instead of logits are held to the same limits in what they say of those tokens
(choice_errors.py), and every draw to the exact distribution, but for boundaries that rounding moves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export_vq import feeds as fd
from export_vq.choice_errors import TEMPERATURE, ChoiceErrors
from export_vq.generate import generate
from export_vq.logit_errors import ErrorAccumulator, largest
from export_vq.ranking import order_of_draws
from export_vq.records import COMPARED, ErrorStats, ParityCase, ParityReport

RELATIVE_MAX_FP32 = 1e-5
HALF_FACTOR = 2.0
LONGEST = 256
STEPS = 8
"""Tokens of a standard case, and how many of them are decode steps."""


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
        reference: PyTorch in float32 for an fp32 candidate; the float64 oracle for fp16 and bf16. It gives
            what the candidate gives, and with chosen tokens the `logits` that they were chosen from, as TorchRunner does.
        candidate: what was exported.
        cases: at least one.
        dtype: 'fp32', 'fp16' or 'bf16', the candidate's.
        native: PyTorch in the candidate's type; needed for fp16 and bf16.
        greedy_tokens: length of the greedy continuation that must agree (fp32; counted only otherwise); 0 skips it,
            and so does a graph that draws its tokens.
        relative_max: fp32 limit on max error over logit range.
        progress: called with the fraction done.

    Raises:
        ValueError: fp16 or bf16 without `native`.
    """
    if dtype != "fp32" and native is None:
        raise ValueError(f"a {dtype} check needs PyTorch in {dtype} to compare with")
    output = candidate.signature.output
    if output == "sample":
        greedy_tokens = 0
    total, own = _errors(reference, output), _errors(reference, output)
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
        limits = {"relative_max": relative_max, "cache_relative_max": relative_max}
        if output == "logits":
            limits["top1_agreement"] = 1.0
        failures = _fp32_failures(stats, results, limits, COMPARED[output], equal, greedy_tokens)
    else:
        limits = {"max_abs": HALF_FACTOR * own.stats().max_abs, "mean_abs": HALF_FACTOR * own.stats().mean_abs}
        failures = [
            f"{name} error {getattr(stats, name):.3g} against the float64 oracle is above {limit:.3g}, twice PyTorch's own in {dtype}"
            for name, limit in limits.items()
            if not getattr(stats, name) <= limit
        ]
    boundary_draws = None
    if isinstance(total, ChoiceErrors) and isinstance(own, ChoiceErrors):
        if dtype == "fp32":
            allowed = relative_max * stats.logit_range, relative_max * total.code_scale
        else:
            allowed = HALF_FACTOR * own.logit_error, HALF_FACTOR * own.code_error
        found, boundary, boundary_draws = total.judge(*allowed)
        failures += found
        limits |= boundary
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
        output=output,
        boundary_draws=boundary_draws,
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


def _errors(reference: fd.Runner, output: str) -> ErrorAccumulator | ChoiceErrors:
    """An empty account of what the graphs give."""
    if output == "logits":
        return ErrorAccumulator()
    tables = reference.head
    assert tables is not None, "graphs that choose tokens have a VQ head"
    return ChoiceErrors(order_of_draws(tables.codes))


def _fp32_failures(
    stats: ErrorStats,
    results: list[tuple[ParityCase, float]],
    limits: dict[str, float],
    said: str,
    equal: int,
    greedy_tokens: int,
) -> list[str]:
    failures = []
    limit = limits["relative_max"]
    if not stats.relative_max <= limit:  # written so that NaN fails
        failures.append(f"largest {said} error is {stats.relative_max:.2e} of the logit range, allowed {limit:.0e}")
    if "top1_agreement" in limits and stats.top1_agreement != 1.0:
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
    case: CaseInput, reference: fd.Runner, candidate: fd.Runner, total: ErrorAccumulator | ChoiceErrors
) -> tuple[ParityCase, float]:
    """One case through both, each with its own cache. Returns the case and the cache error over the cache's range."""
    signature = candidate.signature
    here = _errors(reference, signature.output)
    random = np.random.default_rng(0)
    batch = len(case.ids)
    mask = np.ones_like(case.ids)
    for row, padding in enumerate(case.padding):
        mask[row, :padding] = 0
    outputs: list[fd.Feeds] = []
    cache_error, cache_scale = 0.0, 0.0
    for start, stop in [(0, case.prefill)] + [(i, i + 1) for i in range(case.prefill, case.ids.shape[1])]:
        ids, seen = case.ids[:, start:stop], mask[:, :stop]
        draw = fd.draws(signature, ids, random, TEMPERATURE)
        outputs = [
            runner.infer(
                draw
                | (
                    fd.prefill(runner.signature, ids, seen)
                    if start == 0
                    else fd.step(runner.signature, ids, seen, outputs[i])
                )
            )
            for i, runner in enumerate((reference, candidate))
        ]
        real = mask[:, start:stop].astype(bool)
        targets = np.concatenate(
            [case.ids[:, start + 1 : stop + 1], np.full((batch, int(stop == case.ids.shape[1])), -1)], 1
        )
        if signature.last_token:
            real, targets = real[:, -1:], targets[:, -1:]
        first, second = (
            {name: array[real] for name, array in out.items() if not name.startswith("present.")} for out in outputs
        )
        for account in (here, total):
            if isinstance(account, ChoiceErrors):
                account.add(first, second, targets[real], draw["uniform"][real] if draw else None)
            else:
                account.add(first["logits"], second["logits"], targets[real])
    valid = mask.astype(bool)[:, None, :, None]  # what padding left in the cache is never read
    for name in outputs[0]:
        if name.startswith("present."):
            pair = [np.where(valid, out[name].astype(np.float64), 0.0) for out in outputs]
            cache_error = max(cache_error, largest(np.abs(pair[0] - pair[1])))
            cache_scale = max(cache_scale, largest(np.abs(pair[0])))
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


def _equal_greedy(reference: fd.Runner, candidate: fd.Runner, case: CaseInput, length: int) -> int:
    """How many leading greedy tokens agree after half of the first row's prefill."""
    if not length:
        return 0
    prompt = case.ids[
        0, case.padding[0] : case.prefill // 2 + 1
    ].tolist()  # half: leaves the model positions to write in
    pairs = zip(generate(reference, prompt, length), generate(candidate, prompt, length), strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), length)
