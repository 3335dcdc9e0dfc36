"""The dense output layer in INT8 and INT4, rounded to nearest: what a VQ head has to beat at its size."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export_vq.require import require

ROWS = 16384
"""Rows quantised together: the scratch stays small beside the weight."""


class Quantised(NamedTuple):
    """A weight as its integers and scales stand for it.

    `weight` float32 [V, D] is what the runtime multiplies with; `num_bytes` counts packed integers and fp16 scales;
    `scales` is how many scales there are.
    """

    weight: Tensor
    num_bytes: int
    scales: int


def quantised(weight: Tensor, bits: int, group: int | None = None) -> Quantised:
    """Round a weight to integers of so many bits, symmetric (zero is 0, no zero points), with fp16 scales.

    Args:
        weight: floating [V, D].
        bits: 8 or 4.
        group: one scale for so many neighbours along D, by ONNX Runtime's own quantiser for MatMulNBits: 16, 32, 64, 128
            or 256, the last group filled up with zeros, which count in the bytes. None: one scale a row, as for weights
            of QLinearMatMul and Q/DQ pairs (largest magnitude at 2^(bits - 1) - 1).

    Raises:
        UserError: ONNX Runtime is missing and `group` is given.
        ValueError: no such `bits`.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits}, expected 4 or 8")
    parts = [_by_row(part, bits) if group is None else _by_group(part, bits, group) for part in weight.split(ROWS)]
    return Quantised(
        torch.cat([part.weight for part in parts]),
        sum(part.num_bytes for part in parts),
        sum(part.scales for part in parts),
    )


def _by_row(weight: Tensor, bits: int) -> Quantised:
    v, d = weight.shape
    top = 2 ** (bits - 1) - 1
    rows = weight.detach().float()
    scales = (rows.abs().amax(1) / top).half().float()
    # Where fp16 rounds a scale to 0 its row is 0; the divisor is then of no matter.
    safe = torch.where(scales > 0, scales, torch.ones_like(scales))
    zero = torch.zeros(v, dtype=torch.int32)
    rounded = torch.fake_quantize_per_channel_affine(rows, safe, zero, 0, -top, top)
    return Quantised(rounded * (scales > 0)[:, None], v * -(-d * bits // 8) + 2 * v, v)


def _by_group(weight: Tensor, bits: int, group: int) -> Quantised:
    v, d = weight.shape
    packed, scales = packed_groups(weight, bits, group)
    # MatMulNBits packs the lower of two neighbours into the lower half of the byte, and takes the middle off.
    integers = np.stack([packed & 15, packed >> 4], -1) if bits == 4 else packed
    centred = torch.from_numpy(integers.reshape(*scales.shape, group)).float() - 2 ** (bits - 1)
    values = centred * torch.from_numpy(scales).float()[:, :, None]
    return Quantised(values.reshape(v, -1)[:, :d], packed.nbytes + scales.nbytes, scales.size)


def packed_groups(weight: Tensor, bits: int, group: int) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """A weight [V, D] as MatMulNBits takes it: integers uint8 [V, groups, group * bits / 8], scales [V, groups].

    Raises:
        UserError: ONNX Runtime is missing.
    """
    native = require("onnxruntime.capi._pybind_state", extra="cpu")  # where ONNX Runtime's own tools find it
    v, d = weight.shape
    groups = -(-d // group)
    columns = weight.detach().half().T.contiguous().numpy()  # [D, V]
    packed = np.zeros((v, groups, group * bits // 8), np.uint8)
    scales = np.zeros((v, groups), np.float16)
    unused = np.zeros((v, -(-groups * bits // 8)), np.uint8)  # zero points of the asymmetric form
    getattr(native, f"quantize_matmul_{bits}bits")(packed, columns, scales, unused, group, v, d, True)
    return packed, scales
