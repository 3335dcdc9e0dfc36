"""The products with weights of a graph: what can be quantised, and nothing else can."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export_vq.contract import HEAD_PREFIX
from export_vq.errors import UserError

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
QUANTISERS = ("QuantizeLinear", "DequantizeLinear", "MatMulNBits", "DynamicQuantizeLinear", "MatMulInteger")
DENSE_HEAD = f"{HEAD_PREFIX}weight"
"""The dense twin's output layer is quantised like any other: what a VQ head is honestly held against."""
_HEADS = (f"{HEAD_PREFIX}codebook", DENSE_HEAD)


@dataclass(frozen=True)
class Product:
    """A MatMul or Gemm by a constant weight, [K, N], or of a product head's codebooks [M, D/M, K].

    `name` is its module's, or the weight's where that is the head's.
    """

    name: str
    node: ir.Node
    weight: ir.Value
    transposed: bool
    """The node reads the weight through a Transpose, as the dense twin of a tied embedding does."""

    @property
    def activation(self) -> ir.Value:
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def is_head(self) -> bool:
        return self.name.startswith(HEAD_PREFIX)

    @property
    def dtype(self) -> ir.DataType:
        """What it multiplies in."""
        tensor = self.weight.const_value
        assert tensor is not None
        return tensor.dtype

    def numbers(self) -> NDArray[np.float32]:
        """The weight as it is multiplied with."""
        tensor = self.weight.const_value
        assert tensor is not None
        numbers = tensor.numpy().astype(np.float32)
        return numbers.T if self.transposed else numbers


def products(model: ir.Model) -> list[Product]:
    """All of the main graph, in its order. The nodes of our own domain and the bodies of functions are not looked at: a
    head is quantised in its codebook, before its op, or not at all."""
    found = []
    for node in model.graph:
        if node.domain or node.op_type not in ("MatMul", "Gemm") or node.inputs[1] is None:
            continue
        if node.op_type == "Gemm" and any(node.attributes.get_int(name, 0) for name in ("transA", "transB")):
            continue
        weight, transposed = node.inputs[1], False
        producer = weight.producer()
        if producer is not None and producer.op_type == "Transpose" and producer.inputs[0] is not None:
            weight, transposed = producer.inputs[0], True
        if weight.const_value is None or weight.const_value.dtype not in _FLOATS or weight.name is None:
            continue
        in_head = weight.name.startswith(HEAD_PREFIX)
        if in_head and (weight.name not in _HEADS or (transposed and weight.name != DENSE_HEAD)):
            continue  # the rotation, and what a tied embedding reads of the head
        if len(weight.const_value.shape) == 2 or in_head:
            found.append(Product(weight.name if in_head else str(node.name), node, weight, transposed))
    return found


def chosen(found: list[Product], keep: list[str], *, head: bool, option: str = "--keep-in-fp16") -> list[Product]:
    """Those to quantise: all but the kept ones, and the head's only with `head`.

    Args:
        found: of `products`.
        keep: names, or beginnings or ends of names, parted at a dot.
        head: whether the head's is among them.
        option: where the names were said, for the message.

    Raises:
        UserError: a name fits no product.
    """
    spared = set()
    for name in keep:
        part = name.strip(".")
        fitting = {
            p.name for p in found if f".{p.name}.".startswith(f".{part}.") or f".{p.name}.".endswith(f".{part}.")
        }
        if not fitting:
            raise UserError(
                f"{option} names {name!r}, which no layer is called; the layers are {found[0].name} to {found[-1].name}"
            )
        spared |= fitting
    return [p for p in found if p.name not in spared and (head or not p.is_head)]


def check_unquantised(path: str, model: ir.Model) -> None:
    """Raises UserError where a graph has been quantised already."""
    for node in model.graph:
        if node.op_type in QUANTISERS:
            raise UserError(
                f"{path}: is quantised already (its node {node.name} is a {node.op_type}); give the folder that "
                "export-vq export wrote"
            )
