"""Weights in 4 bits so that a product's results change least on the text, not the weights themselves (GPTQ).

Rows are rounded one after the other, and what rounding one loses is made up for by those that are not rounded yet, by the
second moments of the inputs (Frantar et al., arXiv 2210.17323). ONNX Runtime's `gptq` gives rounded weights without their
scales, and rounds them again to find some; here scales are chosen once and kept.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_TOP = 15
MIDDLE = 8
_DAMPING = 0.01
"""Share of the mean second moment that is added to each, as in the paper."""
_SHRINKS = tuple(1 - i / 32 for i in range(11))
"""Shares of a block's range that are tried: clipping its largest number may cost less than coarse steps for all."""


class Grid(NamedTuple):
    """Weights [K, N] as (integers - zeros) * scales: integers 0 to 15 [K, N], scales float32 [groups, N], zeros [groups, N]."""

    integers: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.uint8]


def gptq(weight: NDArray[np.float32], moments: NDArray[np.float32], block: int, *, symmetric: bool) -> Grid:
    """Round a weight.

    Args:
        weight: [K, N].
        moments: of the inputs, the sum of their outer products [K, K].
        block: rows that share a scale; the last block may be shorter.
        symmetric: zeros are 8, as TensorRT wants it.
    """
    k, n = weight.shape
    left = torch.from_numpy(np.array(weight))  # [K, N], what is still to be rounded
    inverse = _inverse(torch.from_numpy(np.array(moments)).double()).float()  # upper triangle [K, K]
    importance = torch.from_numpy(np.diag(moments).copy())
    integers = torch.empty(k, n)
    scales, zeros = torch.empty(-(-k // block), n), torch.empty(-(-k // block), n)
    for g, start in enumerate(range(0, k, block)):
        stop = min(start + block, k)
        part, lost = left[start:stop].clone(), torch.empty(stop - start, n)
        scale, zero = _grid(part, importance[start:stop], symmetric)
        for i in range(stop - start):
            rounded = _rounded(part[i], scale, zero)
            row = inverse[start + i, start + i : stop]
            lost[i] = (part[i] - (rounded - zero) * scale) / row[0]
            part[i:].addr_(row, lost[i], alpha=-1)
            integers[start + i] = rounded
        left[stop:].addmm_(inverse[start:stop, stop:].T, lost, alpha=-1)
        scales[g], zeros[g] = scale, zero
    return Grid(integers.numpy().astype(np.uint8), scales.numpy(), zeros.numpy().astype(np.uint8))


def _inverse(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped moments."""
    diagonal = moments.diagonal()
    diagonal += torch.where(
        diagonal == 0, 1.0, _DAMPING * diagonal.mean()
    )  # inputs that are always 0 count for nothing
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _grid(part: Tensor, importance: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero [N] of a block [rows, N]: of those tried, what squares of errors, weighed, are least with."""
    low, high = part.amin(0).clamp(max=0), part.amax(0).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    best, scale, zero = torch.full_like(low, torch.inf), torch.ones_like(low), torch.full_like(low, MIDDLE)
    for share in _SHRINKS:
        tried = torch.where(high > low, (high - low) * share / _TOP, 1.0)
        around = torch.full_like(low, MIDDLE) if symmetric else (-low * share / tried).round().clamp(0, _TOP)
        off = (_rounded(part, tried, around) - around) * tried - part
        error = (off**2 * importance[:, None]).sum(0)
        better = error < best
        best, scale, zero = (
            torch.where(better, new, old) for new, old in ((error, best), (tried, scale), (around, zero))
        )
    return scale, zero


def _rounded(numbers: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (numbers / scale).round_().add_(zero).clamp_(0, _TOP)
