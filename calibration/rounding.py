"""Weights as integers or FP8 with their scales."""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from export_vq.calibration.gptq import MIDDLE, Grid
from export_vq.calibration.ranges import TOP
from export_vq.quality.rivals import packed_groups

Floats = NDArray[np.float32]


class Rounded(NamedTuple):
    """`numbers` times `scales` is the weight, times `columns` behind the product where there are any.

    Scales go along `axis`, one a channel, or one a block of `block` of it; axis None: one scale for all.
    """

    numbers: NDArray[Any]
    scales: Floats
    axis: int | None
    block: int = 0
    columns: Floats | None = None

    def dequantised(self) -> Floats:
        """What a runtime multiplies with, `columns` included."""
        wide = self.numbers.astype(np.float32)
        if self.block:
            assert self.axis is not None
            return wide * np.repeat(self.scales, self.block, self.axis).take(range(wide.shape[self.axis]), self.axis)
        return wide * self.scales * (1 if self.columns is None else self.columns)


def by_channel(weight: Floats, precision: str) -> Rounded:
    """Symmetric, to nearest, one scale an output channel, its largest magnitude at the top.

    A pair of Quantize- and DequantizeLinear has scales along one axis. The channels of codebooks [M, D/M, K] are along two:
    their scales are parted into one for all and [M, 1, K] that multiply behind the product.

    Args:
        weight: [K, N], or codebooks [M, D/M, K].
        precision: 'int8' or 'fp8'.
    """
    top = TOP[precision]
    largest = np.abs(weight).max(axis=-2, keepdims=True)
    scales = (np.where(largest > 0, largest, 1) / top).astype(np.float32)
    ratio = np.clip(weight / scales, -top, top)
    numbers = ratio.astype(ml_dtypes.float8_e4m3fn) if precision == "fp8" else np.rint(ratio).astype(np.int8)
    if weight.ndim == 2:
        return Rounded(numbers, scales[0], axis=1)
    return Rounded(numbers, scales.max(), axis=None, columns=scales / scales.max())


class Packed(NamedTuple):
    """As MatMulNBits takes it: bytes uint8 [N, groups, block * bits / 8], scales float32 [N, groups], zeros uint8
    [N, (groups + 1) / 2], two in a byte; None: the middle."""

    numbers: NDArray[np.uint8]
    scales: Floats
    zeros: NDArray[np.uint8] | None = None


def packed(weight: Floats, bits: int, block: int) -> Packed:
    """A weight [K, N] in blocks along K, by ONNX Runtime's own quantiser."""
    numbers, scales = packed_groups(torch.from_numpy(np.ascontiguousarray(weight.T)), bits, block)
    return Packed(numbers, scales.astype(np.float32))


def packed_grid(grid: Grid, block: int) -> Packed:
    """A grid for MatMulNBits; what fills up the last block of a row is 0."""
    k, n = grid.integers.shape
    rows = np.repeat(grid.zeros, block, axis=0)  # [groups * block, N]
    rows[:k] = grid.integers
    return Packed(
        _two_in_a_byte(rows.T).reshape(n, len(grid.scales), block // 2),
        np.ascontiguousarray(grid.scales.T),
        None if (grid.zeros == MIDDLE).all() else _two_in_a_byte(grid.zeros.T),
    )


def _two_in_a_byte(numbers: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Of each row [.., n], the first of two neighbours in the lower half; an odd one beside 0."""
    even = np.pad(numbers, [(0, 0), (0, numbers.shape[1] % 2)])
    return np.ascontiguousarray(even[:, ::2] | (even[:, 1::2] << 4))


def on_grid(grid: Grid, block: int) -> Rounded:
    """A grid as `by_block` lays it out; one with zeros other than the middle has no form in int4, but its numbers count."""
    centred = grid.integers.astype(np.int16) - np.repeat(grid.zeros, block, axis=0)[: len(grid.integers)]
    type_: Any = ml_dtypes.int4 if (grid.zeros == MIDDLE).all() else np.int8
    return Rounded(centred.astype(type_), grid.scales, 0, block)


def by_block(weight: Floats, bits: int, block: int, *, positive: bool = False) -> Rounded:
    """The same numbers as `packed`, laid out as a weight [K, N] with scales [groups, N].

    ONNX Runtime puts the largest number of a block at the lowest integer, with a negative scale where that number is
    positive. TensorRT asks for scales above 0: with `positive`, such blocks are rounded anew, that number at the top.
    """
    numbers, scales, _ = packed(weight, bits, block)
    least, top = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    lower_first = np.stack([numbers & 15, numbers >> 4], -1) if bits == 4 else numbers
    centred = lower_first.reshape(*scales.shape, block).astype(np.int16) + least  # [N, groups, block]
    if positive:
        filled = np.zeros((len(numbers), scales.shape[1] * block), np.float32)
        filled[:, : len(weight)] = weight.T
        anew = np.where(scales < 0, scales * least / top, 1)[:, :, None]
        fresh = np.clip(np.rint(filled.reshape(centred.shape) / anew), least, top)
        centred = np.where((scales < 0)[:, :, None], fresh, centred)
        scales = np.where(scales < 0, scales * least / top, scales)
    type_: Any = ml_dtypes.int4 if bits == 4 else np.int8
    laid_out = centred.reshape(len(numbers), -1)[:, : len(weight)].T.astype(type_)
    return Rounded(np.ascontiguousarray(laid_out), np.ascontiguousarray(scales.T), 0, block)
