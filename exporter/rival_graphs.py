"""The dense output layer in integers as ONNX Runtime multiplies it: what a VQ head's speed is honestly held against."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import tape
from torch import Tensor

from export_vq.quality.rivals import packed_groups

MICROSOFT = "com.microsoft"
GROUP = 64
"""Neighbours along hidden_size that share a scale."""
INTEGER_PRODUCTS = 4
"""MatMulNBits' accuracy_level: the input is rounded to int8 too, the fastest way it has on a CPU."""


def integer_graph(weight: Tensor, bits: int, *, opset: int = 20) -> ir.Model:
    """hidden_states float32 [rows, 1, D] -> logits float32 [rows, 1, V], by `MatMulNBits`.

    Args:
        weight: floating [V, D].
        bits: 8 or 4.
        opset: of the default domain.

    Raises:
        UserError: ONNX Runtime is not installed.
    """
    v, d = weight.shape
    integers, scales = packed_groups(weight, bits, GROUP)
    hidden = ir.val("hidden_states", ir.DataType.FLOAT, ["rows", 1, d])
    constants = [
        ir.val(name, const_value=ir.tensor(numbers, name=name))
        for name, numbers in (("weight", integers), ("scales", scales.astype("float32")))
    ]
    op = tape.Tape()
    logits = op.op(
        "MatMulNBits",
        [hidden, *constants],
        {"K": d, "N": v, "bits": bits, "block_size": GROUP, "accuracy_level": INTEGER_PRODUCTS},
        domain=MICROSOFT,
    )
    logits.name, logits.dtype, logits.shape = "logits", ir.DataType.FLOAT, ir.Shape(["rows", 1, v])
    graph = ir.Graph(
        [hidden],
        [logits],
        nodes=op.nodes,
        initializers=constants,
        opset_imports={"": opset, MICROSOFT: 1},
        name=f"int{bits}",
    )
    return ir.Model(graph, ir_version=10, producer_name="export-vq")
