"""SmoothQuant: outliers of activations move into the weights that multiply them, before anything is rounded.

An input of products is divided channel by channel by s, and the rows of their weights are multiplied by it: the same
function, but one scale for all channels wastes fewer bits (Xiao et al., arXiv 2211.10438, section 4). The division costs
nothing where the input is what a norm gives, then it goes into the norm's own weight; and where it is a product's output
times a gate, then it goes into the columns of that product's weight. Other inputs are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export_vq.calibration.products import Product

_LEAST = 1e-5
"""Channels that are never larger are not scaled."""


def smooth(model: ir.Model, layers: list[Product], largest: Mapping[str, NDArray[np.float32]], alpha: float) -> int:
    """Move outliers, in place.

    Args:
        model: whose products they are.
        layers: products that will be quantised.
        largest: of each input by name, its largest magnitudes [D].
        alpha: share of the move, 0 none, 1 all.

    Returns:
        how many inputs were smoothed.
    """
    by_input: dict[str, list[Product]] = {}
    for layer in layers:
        by_input.setdefault(str(layer.activation.name), []).append(layer)
    done = 0
    for name, readers in by_input.items():
        value = readers[0].activation
        gains = _gains(value)
        others = {user for user, _ in value.uses()} - {layer.node for layer in readers}
        if not gains or others or value.is_graph_output():
            continue
        rows = np.max([np.abs(layer.numbers()).max(axis=1) for layer in readers], axis=0)  # [D]
        scale = np.maximum(largest[name], _LEAST) ** alpha / np.maximum(rows, _LEAST) ** (1 - alpha)
        scale = np.where((largest[name] > _LEAST) & (rows > _LEAST), scale, 1)
        for node, place in gains:
            _scale_input(model, node, place, 1 / scale)
        for layer in readers:
            _scale_input(model, layer.node, 1, scale[:, None])
        done += 1
    return done


def _gains(value: ir.Value) -> list[tuple[ir.Node, int]]:
    """The constant inputs [.., D] that a value [.., D] is linear in: a norm's weight, and its bias where it has one; or the
    weight [K, D] of the product that a gate lets through, and its bias."""
    node = value.producer()
    if node is None or node.op_type not in ("LayerNormalization", "Mul"):
        return []
    if node.op_type == "LayerNormalization":
        return _constants(node, (1, 2), ndim=1)
    for place, factor in enumerate(node.inputs):
        if found := _constants(node, (place,), ndim=1):
            return found
        product = None if factor is None else factor.producer()
        if product is not None and product.op_type in ("MatMul", "Gemm") and len(factor.uses()) == 1:  # type: ignore[union-attr]
            return [] if product.attributes.get_int("transB", 0) else _constants(product, (1, 2))
    return []


def _constants(node: ir.Node, places: tuple[int, ...], ndim: int | None = None) -> list[tuple[ir.Node, int]]:
    """These inputs of a node, those that it has; none where one is no constant, or has another number of dimensions."""
    given = [(i, node.inputs[i]) for i in places if i < len(node.inputs) and node.inputs[i] is not None]
    tensors = [value.const_value for _, value in given if value is not None]
    fit = all(t is not None and len(t.shape) in ((1, 2) if ndim is None else (ndim,)) for t in tensors)
    return [(node, i) for i, _ in given] if fit else []


def _scale_input(model: ir.Model, node: ir.Node, place: int, scale: NDArray[np.floating[Any]]) -> None:
    """A constant of a node times a factor, as a constant of its own: others may read the old one."""
    old = node.inputs[place]
    assert old is not None
    assert old.const_value is not None
    numbers = old.const_value.numpy()
    name = f"{old.name}.smooth"
    while name in model.graph.initializers:
        name += "_"
    scaled = (numbers.astype(np.float32) * scale).astype(numbers.dtype)
    new = ir.val(name, const_value=ir.tensor(scaled, name=name))
    model.graph.register_initializer(new)
    node.replace_input_with(place, new)
