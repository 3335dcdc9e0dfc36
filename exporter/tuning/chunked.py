"""A loss over V logits a row, made for some rows at a time, its gradients taken there and then.

Nothing of size V stays behind for the backward pass, and no logits are computed twice. The loss is a sum over rows, so
its gradient with respect to hidden states, weight and bias is known up to one factor when the forward pass ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

LOGITS = 1 << 24
"""Logits held at once: 64 MiB in float32, as often as the loss has intermediate results; at least one row."""


def parts(rows: int, vocab_size: int) -> Iterator[slice]:
    """Slices of the rows such that a slice has at most LOGITS logits, or one row."""
    size = max(1, LOGITS // vocab_size)
    for start in range(0, rows, size):
        yield slice(start, start + size)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type that logits and sums are held in: float32, float64 for float64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def loss_by_rows(rows: Tensor, weight: Tensor, bias: Tensor | None, loss: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """Sum of `loss` over all rows' logits, differentiable once with respect to the three tensors.

    Under autocast the products run in its dtype; logits, losses and the sums of gradients are float32.

    Args:
        rows: hidden states [n, D].
        weight: [V, D].
        bias: [V] or None.
        loss: takes the logits [r, V] of some rows and which rows they are; returns the sum of their losses.

    Returns:
        float32 scalar, float64 for a float64 weight.
    """
    total: Tensor = _ByRows.apply(rows, weight, bias, loss, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return total


class _ByRows(torch.autograd.Function):
    """Sum of `loss(rows W^T + bias)`, some rows at a time, its gradients taken on the way (rows [n, D], W [V, D])."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        loss: Callable[[Tensor, slice], Tensor],
        differentiable: bool,
    ) -> Tensor:
        kind = rows.device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        exact = accumulator(weight.dtype)
        wanted = [differentiable and need for need in ctx.needs_input_grad[:3]]
        inputs = (rows, weight, bias)
        grads = [
            torch.zeros_like(x, dtype=exact) if x is not None and want else None
            for x, want in zip(inputs, wanted, strict=True)
        ]
        # Rounded once: the products run in the low precision, what they add up to does not.
        x, w = rows.to(low), weight.to(low)
        total = torch.zeros((), dtype=exact, device=rows.device)
        for part in parts(len(rows), len(weight)):
            logits = (x[part] @ w.T).to(exact)
            if bias is not None:
                logits += bias
            with torch.enable_grad() if any(wanted) else nullcontext():
                value = loss(logits.requires_grad_(any(wanted)), part)
            total += value.detach()
            if not any(wanted):
                continue
            (slope,) = torch.autograd.grad(value, logits)
            if grads[2] is not None:
                grads[2] += slope.sum(0)
            slope = slope.to(low)
            if grads[0] is not None:
                grads[0][part] = (slope @ w).to(exact)
            if grads[1] is not None:
                grads[1] += slope.T @ x[part]
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if grad is None else scale * grad for grad in ctx.saved_tensors)
        return (*grads, None, None)
