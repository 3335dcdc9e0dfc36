"""What a quantised graph means: which nodes round, and which products are to be computed with rounded numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import onnx_ir as ir

_NAMES = {ir.DataType.FLOAT8E4M3FN: "fp8"}


@dataclass(frozen=True)
class QuantisedProduct:
    """A MatMul or Gemm with a weight of `numbers` numbers in `dtype`, 'int8', 'fp8' or 'int4'.

    `name` is the node's, `weight` that of the node that brings the weight back. `input_too`: what it multiplies the weight by
    was rounded to the same type; otherwise its weight alone is meant to be small.
    """

    name: str
    weight: str
    dtype: str
    numbers: int
    input_too: bool


def quantised_products(model: ir.Model) -> tuple[QuantisedProduct, ...]:
    """The products of a graph whose weight is read through a DequantizeLinear, in its order."""
    found = []
    for node in model.graph:
        if node.domain or node.op_type not in ("MatMul", "Gemm"):
            continue
        weight = _dequantises(node.inputs[1])
        numbers = None if weight is None or weight.inputs[0] is None else weight.inputs[0].const_value
        if weight is None or numbers is None:
            continue
        dtype, rounds = _NAMES.get(numbers.dtype, numbers.dtype.name.lower()), _dequantises(node.inputs[0])
        input_too = rounds is not None and _type(rounds) == dtype
        found.append(QuantisedProduct(str(node.name), str(weight.name), dtype, int(numbers.size), input_too))
    return tuple(found)


def rounding_nodes(model: ir.Model) -> dict[str, int]:
    """How many nodes of a graph quantise or dequantise, by type: 'int8', 'fp8' or 'int4'."""
    nodes = (node for node in model.graph if node.op_type in ("QuantizeLinear", "DequantizeLinear"))
    return dict(Counter(filter(None, map(_type, nodes))))


def _dequantises(value: ir.Value | None) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _type(node: ir.Node) -> str | None:
    """The type that a node quantises to or dequantises from; None where the graph does not tell it."""
    low = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    constant = None if low is None else low.const_value
    dtype = constant.dtype if constant is not None else None if low is None else low.dtype
    return None if dtype is None else _NAMES.get(dtype, dtype.name.lower())
