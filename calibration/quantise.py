"""A graph's products with weights become quantised ones, in place.

======== =============================================== ======================================================
int8     Q/DQ around the input, one scale; int8 weights   one scale an output channel
fp8      the same in E4M3
w8       weights alone, 8 bits                            MatMulNBits (ONNX Runtime), by channel (TensorRT)
int4     weights alone, 4 bits, in blocks, some in 8      MatMulNBits (ONNX Runtime), block-wise DequantizeLinear
======== =============================================== ======================================================

Scales are in the graph's own type, so a product computes and gives what it did: float32, float16 or bfloat16. All else,
the head's node and its function among it, stays as it is, and so does the form of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir import tape

from export_vq.calibration.gptq import Grid
from export_vq.calibration.options import BLOCKS_OPSET, NARROW_OPSET, CalibrationOptions
from export_vq.calibration.products import Product
from export_vq.calibration.ranges import TOP
from export_vq.calibration.rounding import Packed, Rounded, by_block, by_channel, on_grid, packed, packed_grid
from export_vq.errors import UserError

MICROSOFT = "com.microsoft"
BITS = {"w8": 8, "int4": 4}
_TYPES: dict[str, Any] = {"int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn)}
_INTEGER_PRODUCTS = 4
"""MatMulNBits' accuracy_level: it rounds its input to int8 too, block by block, which is its fastest way on a CPU."""


def needed_opset(options: CalibrationOptions, *, narrow: bool) -> int:
    """The first opset that holds what the options ask for, of a graph in float32 or, `narrow`, in a 16-bit type."""
    if options.runtime == "tensorrt" and options.precision == "int4":
        return BLOCKS_OPSET
    pairs = options.precision in TOP or (options.precision in BITS and options.runtime == "tensorrt")
    return NARROW_OPSET if pairs and (narrow or options.precision == "fp8") else 0


def quantise(
    model: ir.Model,
    layers: Sequence[Product],
    options: CalibrationOptions,
    magnitudes: Mapping[str, float],
    *,
    grid: Callable[[Product], Grid] | None = None,
    in_8_bits: Collection[str] = (),
) -> tuple[str, ...]:
    """Quantise these products, in place.

    Args:
        model: whose products they are.
        layers: in the graph's order.
        options: `precision`, `block`, `runtime` count.
        magnitudes: of each input by name, where the precision rounds inputs.
        grid: a product's weight in 4 bits; None: rounded to nearest.
        in_8_bits: names of products that 'int4' gives 8 bits, as 'w8' does.

    Returns:
        names of products that were left, as their sizes do not fit the blocks.

    Raises:
        UserError: the graph's opset is too old.
    """
    narrow = any(layer.dtype != ir.DataType.FLOAT for layer in layers)
    opset, needed = model.graph.opset_imports[""], needed_opset(options, narrow=narrow)
    if opset < needed:
        raise UserError(
            f"the graph has opset {opset}, {options.precision} needs {needed}; export it again with --opset {needed}"
        )
    pairs: dict[str, ir.Value] = {}
    left = []
    eight = replace(options, precision="w8", eight="") if in_8_bits else options
    for layer in layers:
        asked = eight if layer.name in in_8_bits else options
        if asked.precision in BITS and options.runtime == "onnxruntime":
            four = grid(layer) if grid is not None and asked.precision == "int4" else None
            numbers = (
                packed(layer.numbers(), BITS[asked.precision], options.block)
                if four is None
                else packed_grid(four, options.block)
            )
            _as_nbits(model, layer, numbers, asked)
        elif asked.precision == "int4" and layer.numbers().shape[0] % options.block:
            left.append(layer.name)
        else:
            _replace_weight(model, layer, rounded(layer, asked, grid))
            if options.precision in TOP:
                _round_input(model, layer, magnitudes, options, pairs)
    _drop_unused(model)
    return tuple(left)


def rounded(layer: Product, options: CalibrationOptions, grid: Callable[[Product], Grid] | None = None) -> Rounded:
    """A product's weight as the options quantise it; in 4 bits by `grid` where it is given."""
    if options.precision == "int4" and grid is not None:
        return on_grid(grid(layer), options.block)
    weight = layer.numbers()
    if options.precision == "int4" or (options.precision in BITS and options.runtime == "onnxruntime"):
        return by_block(weight, BITS[options.precision], options.block, positive=options.runtime == "tensorrt")
    return by_channel(weight, "int8" if options.precision == "w8" else options.precision)


def round_trip(
    model: ir.Model, layer: Product, magnitude: float, precision: str, *, unique: str = "", moved: bool = False
) -> ir.Value:
    """Insert a Q/DQ pair before a product: its input as `precision` holds it, one scale for all.

    Names begin with the input's and end in `unique`. `moved`: int8 as uint8 with a zero point of 128, the same numbers.
    """
    value, dtype = layer.activation, layer.dtype
    zero = np.array(128, np.uint8) if moved and precision == "int8" else np.zeros((), _TYPES[precision])
    name = f"{value.name}.{precision}{unique}"
    scale = _constant(model, f"{name}.scale", _like(dtype, np.array(magnitude / TOP[precision], np.float32)))
    zero_point = _constant(model, f"{name}.zero", zero)
    op = tape.Tape()
    quantised = op.op("QuantizeLinear", [value, scale, zero_point])
    back = op.op("DequantizeLinear", [quantised, scale, zero_point])
    _describe(quantised, f"{name}.quantised", ir.DataType.from_numpy(zero.dtype), value.shape)
    _describe(back, f"{name}.dequantised", dtype, value.shape)
    for node, verb in zip(op.nodes, ("quantise", "dequantise"), strict=True):
        node.name = f"{name}.{verb}"
    model.graph.insert_before(layer.node, op.nodes)
    return back


def _round_input(
    model: ir.Model,
    layer: Product,
    magnitudes: Mapping[str, float],
    options: CalibrationOptions,
    pairs: dict[str, ir.Value],
) -> None:
    """Products that share an input share the pair."""
    name = str(layer.activation.name)
    if name not in pairs:
        # ONNX Runtime (1.31) multiplies uint8 by int8. It moves int8 inputs itself, but not shared ones: their products would
        # run in float32, with weights brought back at every step. TensorRT knows int8 only.
        moved = options.runtime == "onnxruntime"
        pairs[name] = round_trip(model, layer, magnitudes[name], options.precision, moved=moved)
    layer.node.replace_input_with(0, pairs[name])


def _replace_weight(model: ir.Model, layer: Product, new: Rounded) -> None:
    weight = layer.weight
    name = f"{weight.name}.quantised"
    if new.columns is not None:
        _scale_columns(model, layer, new.columns)
    inputs = [
        _constant(model, name, new.numbers),
        _constant(model, f"{name}.scale", _like(layer.dtype, new.scales)),
    ]
    attributes = {} if new.axis is None else {"axis": new.axis}
    if new.block:
        attributes["block_size"] = new.block
    else:
        inputs.append(_constant(model, f"{name}.zero", np.zeros(new.scales.shape, new.numbers.dtype)))
    op = tape.Tape()
    back = op.op("DequantizeLinear", inputs, attributes)
    _describe(back, f"{weight.name}.dequantised", layer.dtype, ir.Shape(new.numbers.shape))
    op.nodes[0].name = f"{weight.name}.dequantise"  # what engines tell of their layers is by the names of nodes
    model.graph.insert_before(layer.node, op.nodes)
    layer.node.replace_input_with(1, back)


def _scale_columns(model: ir.Model, layer: Product, columns: NDArray[np.float32]) -> None:
    """The finer scales of a product head's codebooks, on what the product gives."""
    product = layer.node.outputs[0]
    op = tape.Tape()
    scale = _constant(model, f"{layer.weight.name}.columns", _like(layer.dtype, columns))
    scaled = op.op("Mul", [product, scale])
    _describe(scaled, f"{layer.weight.name}.product", layer.dtype, product.shape)
    ir.convenience.replace_all_uses_with(product, scaled)
    op.nodes[0].replace_input_with(0, product)
    model.graph.insert_after(layer.node, op.nodes)


def _as_nbits(model: ir.Model, layer: Product, numbers: Packed, options: CalibrationOptions) -> None:
    """Replace the node; MatMulNBits adds a Gemm's bias itself."""
    node, bits = layer.node, BITS[options.precision]
    name = f"{layer.weight.name}.{options.precision}"
    inputs: list[ir.Value | None] = [
        layer.activation,
        _constant(model, name, numbers.numbers),
        _constant(model, f"{name}.scale", _like(layer.dtype, numbers.scales)),
        None if numbers.zeros is None else _constant(model, f"{name}.zero", numbers.zeros),
    ]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        inputs += [None, node.inputs[2]]
    k, n = layer.numbers().shape
    attributes = {"K": k, "N": n, "bits": bits, "block_size": options.block, "accuracy_level": _INTEGER_PRODUCTS}
    op = tape.Tape()
    product = op.op("MatMulNBits", inputs, attributes, domain=MICROSOFT)
    op.nodes[0].name = layer.name
    old = node.outputs[0]
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], op.nodes, [old], [product])
    _describe(product, str(old.name), old.dtype, old.shape)
    model.graph.opset_imports[MICROSOFT] = 1


def _like(dtype: ir.DataType, numbers: NDArray[np.float32]) -> NDArray[Any]:
    """Scales in the type of what they scale."""
    type_: Any = dtype.numpy()
    scales: NDArray[Any] = numbers.astype(type_)
    # A scale may be negative, where the largest number of a block is; none may become 0.
    return np.where(scales == 0, ml_dtypes.finfo(type_).smallest_subnormal, scales).astype(type_)


def _constant(model: ir.Model, name: str, numbers: NDArray[Any]) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(numbers, name=name))
    model.graph.register_initializer(value)
    return value


def _describe(value: ir.Value, name: str, dtype: ir.DataType | None, shape: ir.Shape | None) -> None:
    value.name, value.shape = name, shape
    if dtype is not None:
        value.type = ir.TensorType(dtype)


def _drop_unused(model: ir.Model) -> None:
    """The weights that were replaced, and the Transpose that a tied one was read through. A pass that drops all that is
    unused would also change the body of the head's function."""
    for node in [n for n in model.graph if n.op_type == "Transpose" and not n.outputs[0].uses()]:
        if not node.outputs[0].is_graph_output():
            model.graph.remove(node, safe=True)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
