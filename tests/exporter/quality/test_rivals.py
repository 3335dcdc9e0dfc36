"""The dense layer in integers: by definition, by the runtime that computes with it, and within the error of rounding."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from export_vq.quality.rivals import quantised

HALF = 2.0**-11
"""fp16 rounds to within this share of a number."""


def some_weight(v: int, d: int, seed: int = 0) -> Tensor:
    """Rows of very different size, as those of rare and frequent tokens are, with one that is zero."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(v, d, generator=random) * torch.logspace(-2, 1, v)[:, None]
    weight[v // 2] = 0
    return weight


def grouped(weight: Tensor, group: int) -> Tensor:
    """[V, D] -> [V, groups, group], filled up with zeros."""
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % group)).reshape(len(weight), -1, group)


def test_int8_by_definition() -> None:
    weight = some_weight(37, 29)
    found = quantised(weight, 8)
    scale = (weight.abs().amax(1) / 127).half().double()
    for row, step, rounded in zip(weight.double(), scale, found.weight, strict=True):
        integers = (row / step).round().clamp(-127, 127) if step else torch.zeros_like(row)
        torch.testing.assert_close(rounded.double(), integers * step, rtol=2e-7, atol=0)
    assert (found.num_bytes, found.scales) == (37 * 29 + 2 * 37, 37)


@pytest.mark.parametrize(("d", "groups"), [(64, 1), (128, 2), (100, 2), (40, 1)])
def test_int4_by_definition(d: int, groups: int) -> None:
    """Integers from -8 to 7 times fp16 scales; the number with the largest magnitude of its group stands at -8."""
    weight = some_weight(21, d)
    found = quantised(weight, 4, 64)
    exact, rounded = (grouped(part, 64).double() for part in (weight.half(), found.weight))
    peak = exact.gather(-1, exact.abs().argmax(-1, keepdim=True))
    scale = (peak / -8).half().double()
    integers = torch.where(scale == 0, 0.0, rounded / scale)
    assert torch.equal(integers, integers.round())
    assert -8 <= integers.min() <= integers.max() <= 7
    # The runtime divides by the scale before that is fp16.
    wanted = torch.where(scale == 0, 0.0, exact / scale).clamp(-8, 7)
    assert bool(((integers - wanted).abs() <= 0.5 + 8 * HALF).all())
    assert (found.num_bytes, found.scales) == (21 * groups * (32 + 2), 21 * groups)


def test_int4_is_what_the_runtime_computes() -> None:
    """A MatMulNBits node that holds the same integers and scales, run by ONNX Runtime."""
    v, d, group = 48, 128, 64
    weight = some_weight(v, d)
    hidden = torch.randn(5, d, generator=torch.Generator().manual_seed(1))
    found = quantised(weight, 4, group)
    values = grouped(found.weight, group)
    exact = grouped(weight.half().float(), group)
    scale = (exact.gather(-1, exact.abs().argmax(-1, keepdim=True)) / -8).half().float()
    ids = (torch.where(scale == 0, 0.0, values / scale) + 8).to(torch.uint8).numpy()
    packed = ids[..., 0::2] | ids[..., 1::2] << 4
    node = helper.make_node(
        "MatMulNBits", ["h", "w", "s"], ["y"], domain="com.microsoft", K=d, N=v, bits=4, block_size=group
    )
    graph = helper.make_graph(
        [node],
        "rival",
        [helper.make_tensor_value_info("h", TensorProto.FLOAT, [5, d])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, v])],
        [numpy_helper.from_array(packed, "w"), numpy_helper.from_array(scale[..., 0].numpy().reshape(-1), "s")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"h": hidden.numpy()})
    expected = hidden.double() @ found.weight.double().T
    # D products, each sum rounded in float32
    bound = d * 2.0**-24 * (hidden.abs().double() @ found.weight.abs().double().T)
    assert np.all(np.abs(result - expected.numpy()) <= bound.numpy() + 1e-30)


@settings(deadline=None, max_examples=60)
@given(
    v=st.integers(1, 9),
    d=st.integers(1, 150),
    group=st.sampled_from([16, 32, 64, 128]),
    bits=st.sampled_from([4, 8]),
    seed=st.integers(0, 10**6),
)
@example(v=4, d=110, group=16, bits=4, seed=111)  # a group whose largest numbers are x and -x
def test_groups_stay_within_a_step(v: int, d: int, group: int, bits: int, seed: int) -> None:
    """Half a step; a whole one where the side opposite the peak is cut at 2^(bits - 1) - 1."""
    weight = some_weight(v, d, seed)
    found = quantised(weight, bits, group)
    exact = grouped(weight.half().double(), group)
    step = exact.abs().amax(-1, keepdim=True) / 2 ** (bits - 1)
    # The side opposite the peak; where +x and -x are both the peak, either may be it.
    peaks = (exact.abs() == exact.abs().amax(-1, keepdim=True)) * exact.sign()
    opposite = ((exact * peaks.amax(-1, keepdim=True)) < 0) | ((exact * peaks.amin(-1, keepdim=True)) < 0)
    cut = opposite & (exact.abs() > (2 ** (bits - 1) - 1.5) * step)
    error = (grouped(found.weight, group).double() - exact).abs()
    # fp16 moves a scale by HALF (2^-24 where it is tiny), and so the largest multiple by 2^(bits - 1) times that.
    slack = 2 ** (bits - 1) * (HALF * step + 2.0**-24)
    assert bool((error <= torch.where(cut, 1.0, 0.5) * step + slack).all())
    assert found.weight.shape == weight.shape
    assert found.scales == v * -(-d // group)
    assert found.num_bytes == found.scales * (group * bits // 8 + 2)


@settings(deadline=None, max_examples=60)
@given(v=st.integers(1, 9), d=st.integers(1, 90), bits=st.sampled_from([4, 8]), seed=st.integers(0, 10**6))
def test_rows_stay_within_half_a_step(v: int, d: int, bits: int, seed: int) -> None:
    weight = some_weight(v, d, seed).double()
    found = quantised(weight.float(), bits)
    top = 2 ** (bits - 1) - 1
    step = weight.abs().amax(1, keepdim=True) / top
    error = (found.weight.double() - weight).abs()
    assert bool((error <= 0.5 * step + top * (HALF * step + 2.0**-24)).all())
    assert found.num_bytes == v * (-(-d * bits // 8) + 2)


def test_more_rows_than_are_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = some_weight(23, 64)
    whole = [quantised(weight, 8), quantised(weight, 4, 64)]
    monkeypatch.setattr("export_vq.quality.rivals.ROWS", 5)
    for expected, (bits, group) in zip(whole, [(8, None), (4, 64)], strict=True):
        found = quantised(weight, bits, group)
        assert torch.equal(found.weight, expected.weight)
        assert found[1:] == expected[1:]


def test_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 4 or 8"):
        quantised(some_weight(3, 4), 3)
