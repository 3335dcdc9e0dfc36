"""How far everything that a graph computes is from zero: what a type with fewer exponent bits must hold."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir import tape
from onnx_ir.passes.common import ShapeInferencePass

from export_vq.calibration.products import products

_LARGEST = float(np.finfo(np.float32).max)


def with_types(model: ir.Model) -> ir.Model:
    """A copy in which every value has its type."""
    copy = model.clone()
    ShapeInferencePass(check_type=False, strict_mode=False)(copy)
    return copy


def add_extremes(model: ir.Model) -> dict[str, str]:
    """Give a graph with types scalars of the least and the largest number of everything that it computes in float32.

    Infinity, as masks have it, becomes the largest finite number; NaN stays.

    Returns:
        the scalars' names -> the product that was computed last before them, for error texts.
    """
    graph = model.graph
    bounds = []
    for name, bound in (("extremes.low", -_LARGEST), ("extremes.high", _LARGEST)):
        bounds.append(ir.val(name, const_value=ir.tensor(np.array(bound, np.float32), name=name)))
        graph.register_initializer(bounds[-1])
    named = {id(product.node): product.name for product in products(model)}
    last, taps = "the embedding", {}
    for node in list(graph):
        last = named.get(id(node), last)
        for value in [v for v in node.outputs if v.dtype == ir.DataType.FLOAT]:
            for reduce, prefix in (("ReduceMin", "least"), ("ReduceMax", "most")):
                op = tape.Tape()
                scalar = op.op("Clip", [op.op(reduce, [value], {"keepdims": 0}), *bounds])
                scalar.name, scalar.type, scalar.shape = f"{prefix}.{value.name}", value.type, ir.Shape([])
                graph.insert_after(node, op.nodes)
                taps[str(scalar.name)] = last
    return taps


def magnitudes(largest: Mapping[str, float]) -> dict[str, float]:
    """By value, the largest magnitude of what `add_extremes` gave.

    Args:
        largest: magnitude of each scalar. The lowest number of float32 is a mask's and counts for nothing.
    """
    found: dict[str, float] = {}
    for scalar, size in largest.items():
        prefix, name = scalar.split(".", 1)
        if not (prefix == "least" and size >= _LARGEST):
            found[name] = max(found.get(name, 0.0), size)
    return found
