"""A quantised graph against the unquantised one on documents that it was not made with."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from export_vq import feeds as fd
from export_vq.calibration.collect import through_cache
from export_vq.errors import UserError
from export_vq.logit_errors import ErrorAccumulator
from export_vq.records import ErrorStats


def compare(
    reference: fd.Runner,
    candidate: fd.Runner,
    blocks: NDArray[np.int64],
    tell: Callable[[float], None] = lambda _: None,
) -> ErrorStats:
    """Both over blocks of tokens int64 [n, S], prefill and decode steps, each through its own KV cache.

    Raises:
        UserError: the reference gives NaN or infinity, so nothing can be held against it.
    """
    account = ErrorAccumulator()
    for i, block in enumerate(blocks):
        row, start = block[None], 0
        for first, second in zip(through_cache(reference, row), through_cache(candidate, row), strict=True):
            a, b = first["logits"][0], second["logits"][0]  # [S, V]
            if not np.isfinite(a).all():
                raise UserError(
                    "the unquantised graph's logits hold NaN or infinity on the text to test on; the checkpoint is damaged, or its "
                    "type is too small: export it with --dtype fp32"
                )
            targets = np.append(block, -1)[start + 1 : start + 1 + len(a)]
            account.add(a, b, targets)
            start += len(a)
        tell((i + 1) / len(blocks))
    return account.stats()


def failures(stats: ErrorStats, limits: dict[str, float]) -> tuple[str, ...]:
    """Which limits of CalibrationOptions.limits do not hold; NaN holds none."""
    increase = stats.perplexity_candidate / stats.perplexity_reference - 1
    found = []
    if not math.isfinite(stats.max_abs):
        found.append("logits hold NaN or infinity")
    if not increase <= limits["perplexity_increase"]:
        found.append(
            f"perplexity is {increase:+.2%} against the unquantised graph, allowed {limits['perplexity_increase']:+.2%}"
        )
    if not stats.kl_mean <= limits["kl_mean"]:
        found.append(f"mean KL is {stats.kl_mean:.4f} nats, allowed {limits['kl_mean']:.4f}")
    if not stats.top1_agreement >= limits["top1_agreement"]:
        found.append(
            f"the best token is the same at {stats.top1_agreement:.1%} of positions, expected {limits['top1_agreement']:.1%}"
        )
    return tuple(found)
