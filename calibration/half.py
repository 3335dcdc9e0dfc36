"""A float32 graph in float16 or bfloat16, with islands of float32 where numbers do not fit.

Float32 stay: powers, roots, reciprocals, means and sums, exponentials, and norms, as in PyTorch's autocast; what depends on
positions alone, as the angles of rotary embeddings; what computes with float32 results only, products aside; and whatever
was seen to get larger than the type holds. All else, weights and caches and logits too, is in the 16-bit type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from export_vq.contract import DOMAIN
from export_vq.errors import UserError

TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
HEADROOM = 4
"""Times the largest number seen must fit: other text goes beyond the text at hand."""
_WIDE = {
    *("Pow", "Sqrt", "Reciprocal", "Exp", "Log", "CumSum", "LayerNormalization", "RMSNormalization"),
    *("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceProd"),
}
_PRODUCTS = {"MatMul", "Gemm", "Conv", "Einsum"}


def islands(model: ir.Model, seen: Mapping[str, float], dtype: str) -> tuple[set[str], dict[str, float]]:
    """Which nodes of a graph with types stay float32, by the name of their first output.

    Args:
        model: in float32.
        seen: largest magnitude of each value, by name.
        dtype: 'fp16' or 'bf16'.

    Returns:
        them, and those of the values whose numbers do not fit.

    Raises:
        UserError: the logits, or what the head's op reads, do not fit; or a node has a graph of its own.
    """
    limit = float(ml_dtypes.finfo(TYPES[dtype].numpy()).max) / HEADROOM
    large = {name: size for name, size in seen.items() if size > limit}
    kept: set[str] = set()
    wide: set[ir.Value] = set()
    for node in model.graph:
        inputs, outputs = _floats(node.inputs), _floats(node.outputs)
        if not inputs and not outputs:
            continue
        _check(model, node, {v.name: large[str(v.name)] for v in (*inputs, *outputs) if v.name in large}, dtype)
        computed = [v for v in inputs if v.const_value is None]
        tables = [v for v in inputs if v.const_value is not None and v.const_value.size > 1]
        too_large = any(v.name in large for v in (*computed, *outputs)) or any(_largest(v) > limit for v in tables)
        follows = all(v in wide for v in computed) and not (tables and not computed)
        if node.domain == DOMAIN:
            continue
        if node.op_type in _WIDE or too_large or (follows and node.op_type not in _PRODUCTS):
            kept.add(str(node.outputs[0].name))
            wide.update(outputs)
    return kept, large


def _check(model: ir.Model, node: ir.Node, large: Mapping[str | None, float], dtype: str) -> None:
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        raise UserError(
            f"the node {node.name} ({node.op_type}) holds a graph of its own, which cannot be put into {dtype} here; export "
            f"the model anew with --dtype {dtype}"
        )
    given = [v.name for v in model.graph.outputs]
    for name, size in large.items():
        if name in given or node.domain == DOMAIN:
            raise UserError(
                f"{name} reaches {size:.4g}, which {dtype} does not hold with a factor of {HEADROOM} to spare; use bf16, or "
                "stay with fp32"
            )


def convert(model: ir.Model, kept: set[str], dtype: str, *, simulated: bool = False) -> None:
    """Put a graph with types into a 16-bit type, in place.

    Args:
        model: in float32.
        kept: nodes that stay float32, by the name of their first output.
        dtype: 'fp16' or 'bf16'.
        simulated: the graph stays in float32, and what would be in the type is rounded to it: for runtimes that have no
            kernels for the type.
    """
    made = _Simulated(model, dtype) if simulated else _Converted(model, dtype)
    for value in list(model.graph.initializers.values()):
        if _is_float(value) and value.const_value is not None and value.const_value.size == 1:
            made.clamp(value)
    for value in _floats(model.graph.inputs):
        made.narrowed(value)
    for node in list(model.graph):
        wide = str(node.outputs[0].name) in kept
        for i, given in enumerate(node.inputs):
            if given is None or given.dtype not in (ir.DataType.FLOAT, made.type):
                continue
            if not (wide and given.const_value is not None):
                node.replace_input_with(i, made.up(given) if wide else made.down(given))
        if not wide:
            made.produced(node)
    made.finish()


class _Converted:
    """Values in the type itself."""

    def __init__(self, model: ir.Model, dtype: str) -> None:
        self.model, self.type = model, TYPES[dtype]
        self.numpy: Any = self.type.numpy()
        self._done: dict[tuple[ir.Value, str], ir.Value] = {}

    def clamp(self, value: ir.Value) -> None:
        """Masks add the lowest number there is, which must not become infinity: a row of only such gives NaN."""
        assert value.const_value is not None
        numbers, top = value.const_value.numpy(), float(ml_dtypes.finfo(self.numpy).max)
        value.const_value = ir.tensor(np.clip(numbers, -top, top).astype(np.float32), name=value.name)

    def narrowed(self, value: ir.Value) -> None:
        value.type = ir.TensorType(self.type)

    def produced(self, node: ir.Node) -> None:
        for value in _floats(node.outputs):
            self.narrowed(value)
        if node.op_type == "Cast" and node.attributes.get_int("to") == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", self.type)

    def up(self, value: ir.Value) -> ir.Value:
        return value if value.dtype == ir.DataType.FLOAT else self._cast(value, ir.DataType.FLOAT, "wide")

    def down(self, value: ir.Value) -> ir.Value:
        if value.dtype == self.type:
            return value
        if value.const_value is not None:
            return self._constant(value, value.const_value.numpy().astype(self.numpy))
        return self._cast(value, self.type, "narrow")

    def finish(self) -> None:
        """Outputs are in the type, under their names; constants that nobody reads are gone."""
        graph = self.model.graph
        for i, value in enumerate(graph.outputs):
            if _is_float(value):
                name, value.name = str(value.name), f"{value.name}.float32"
                graph.outputs[i] = self.down(value)
                graph.outputs[i].name = name
        self._drop_unused()

    def _drop_unused(self) -> None:
        graph = self.model.graph
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del graph.initializers[name]

    def _constant(self, value: ir.Value, numbers: Any) -> ir.Value:
        key = (value, "narrow")
        if key not in self._done:
            name = f"{value.name}.{self.type.name.lower()}"
            self._done[key] = ir.val(name, const_value=ir.tensor(numbers, name=name))
            self.model.graph.register_initializer(self._done[key])
        return self._done[key]

    def _cast(self, value: ir.Value, dtype: ir.DataType, kind: str) -> ir.Value:
        key = (value, kind)
        if key not in self._done:
            op = tape.Tape()
            cast = op.op("Cast", [value], {"to": int(dtype)})
            cast.name, cast.type, cast.shape = f"{value.name}.{kind}", ir.TensorType(dtype), value.shape
            self._insert(value, op.nodes)
            self._done[key] = cast
        return self._done[key]

    def _insert(self, value: ir.Value, nodes: Any) -> None:
        """After what gives the value, or first of all for an input."""
        producer = value.producer()
        if producer is None:
            self.model.graph.insert_before(self.model.graph[0], nodes)
        else:
            self.model.graph.insert_after(producer, nodes)


class _Simulated(_Converted):
    """Values in float32, rounded to the type."""

    def __init__(self, model: ir.Model, dtype: str) -> None:
        super().__init__(model, dtype)
        self._rounded: set[ir.Value] = set()

    def narrowed(self, value: ir.Value) -> None:
        """Caches come out rounded, so they go in rounded."""

    def produced(self, node: ir.Node) -> None:
        for value in _floats(node.outputs):
            users = list(value.uses())
            rounded = self.down(value)
            for user, place in users:
                user.replace_input_with(place, rounded)
            for i, output in enumerate(self.model.graph.outputs):
                if output is value:
                    rounded.name, value.name = value.name, f"{value.name}.exact"
                    self.model.graph.outputs[i] = rounded

    def up(self, value: ir.Value) -> ir.Value:
        return value

    def down(self, value: ir.Value) -> ir.Value:
        if value.const_value is not None:
            return self._constant(value, value.const_value.numpy().astype(self.numpy).astype(np.float32))
        if value in self._rounded:
            return value
        rounded = self._cast(self._cast(value, self.type, "narrow"), ir.DataType.FLOAT, "rounded")
        self._rounded.add(rounded)
        return rounded

    def finish(self) -> None:
        self._drop_unused()


def _is_float(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.FLOAT


def _floats(values: Any) -> list[ir.Value]:
    return [v for v in values if v is not None and _is_float(v)]


def _largest(value: ir.Value) -> float:
    assert value.const_value is not None
    return float(np.abs(value.const_value.numpy()).max())
