"""The layers that VQ replaces, as ONNX ops: the head and the embedding tied to it, or their dense twins.

What the head ends in, V logits, the k best tokens or a drawn one, is built by head_output.py.

graph.py traces a model with a placeholder where each of them stands; `attach` builds over the placeholders.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from onnx_ir import tape
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor

from export_vq import contract
from export_vq.head import VQHead
from export_vq.head_output import HeadOutput, op_node, select, tell_one_position

HEAD = "Head"
"""Placeholder: hidden states T [.., D] in, logits T [.., V] out."""
ROWS = "Rows"
"""Placeholder: token ids int64 [B, S] in, rows of the tied embedding T [B, S, D] out."""


def attach(model: ir.Model, head: VQHead, kind: str, output: HeadOutput | None = None) -> None:
    """Build the layers of a kind where their placeholders stand, in place.

    Args:
        model: a graph with one `HEAD` node and at most one `ROWS` node, both of the contract's domain.
        head: in the graph's dtype.
        kind: 'vq', or 'dense' for the dense twin.
        output: see HeadOutput; None: V logits of every position. The graph's inputs and outputs follow it.

    Raises:
        UserError: the model changes its logits after the head, and the output is to be made of them inside the head.
    """
    output = output or HeadOutput()
    found = {n.op_type: n for n in model.graph if n.domain == contract.DOMAIN}
    rows = found.get(ROWS)
    op, graph, placeholder = tape.Tape(), model.graph, found[HEAD]
    hidden = _input(placeholder)
    if output.last_token:
        hidden = last_position(op, graph, hidden)
    if kind == "vq":
        inputs = _code_space(op, graph, hidden, head)
    else:
        inputs = [_dense_head(op, graph, hidden, head, tied=rows is not None)]
    if output.word == "logits":
        built = op_node(op, inputs, head.spec, output)[0] if kind == "vq" else inputs[0]
        _replace(graph, placeholder, op, built)
        logits = placeholder.outputs[0]
        built.name = logits.name if logits.name == "logits" else "head_logits"
        if output.last_token:
            tell_one_position(built)
    else:
        select(model, op, placeholder, inputs, head.spec, output, None if kind == "vq" else head.codes.numpy())
    if rows is not None:
        op, tokens = tape.Tape(), _input(rows)
        if kind == "vq":
            built = _vq_rows(op, model.graph, tokens, head)
        else:
            built = op.op("Gather", [model.graph.initializers["lm_head.weight"], tokens], {"axis": 0})  # [B, S, D]
        _replace(model.graph, rows, op, built)
    if kind == "dense":
        model.graph.opset_imports.pop(contract.DOMAIN, None)
    else:
        model.graph.opset_imports[contract.DOMAIN] = contract.VERSION
    RemoveUnusedNodesPass()(model)


def last_position(op: tape.Tape, graph: ir.Graph, value: ir.Value) -> ir.Value:
    """[B, S, ..] -> [B, 1, ..]; once in a graph, as its constants have names."""
    start, end, axis = (
        _ints(graph, *named) for named in (("last", [-1]), ("past_last", [2**63 - 1]), ("positions", [1]))
    )
    return op.op("Slice", [value, start, end, axis])


def _input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _replace(graph: ir.Graph, placeholder: ir.Node, op: tape.Tape, built: ir.Value) -> None:
    old = placeholder.outputs[0]
    ir.convenience.replace_nodes_and_values(graph, placeholder, [placeholder], op.nodes, [old], [built])
    built.shape, built.type = old.shape, old.type


def _constant(graph: ir.Graph, name: str, tensor: Tensor) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor_adapters.TorchTensor(tensor.detach().contiguous(), name=name))
    graph.register_initializer(value)
    return value


def _ints(graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
    return _constant(graph, f"lm_head.{name}", torch.tensor(numbers, dtype=torch.int64))


def _dense_head(op: tape.Tape, graph: ir.Graph, hidden: ir.Value, head: VQHead, *, tied: bool) -> ir.Value:
    twin = head.dense_twin()
    if tied:
        # One matrix [V, D] for both ends. Runtimes turn a constant when they load it, so the head's product is the same.
        weight = op.op("Transpose", [_constant(graph, "lm_head.weight", twin.weight)], {"perm": [1, 0]})
    else:
        weight = _constant(graph, "lm_head.weight", twin.weight.T)
    logits = op.op("MatMul", [hidden, weight])  # [.., V]
    return logits if head.bias is None else op.op("Add", [logits, _constant(graph, "lm_head.bias", twin.bias)])


def _code_space(op: tape.Tape, graph: ir.Graph, hidden: ir.Value, head: VQHead) -> list[ir.Value]:
    """What every op of ours takes first: code logits [.., M*K], codes and, where there is one, bias."""
    m, k, width = head.spec.codebook_shape
    if head.spec.kind == "product":
        if head.rotation is not None:
            hidden = op.op("MatMul", [hidden, _constant(graph, "lm_head.rotation", head.rotation)])  # [.., D]
        lead = op.op("Shape", [hidden], {"start": 0, "end": -1})
        rows = op.op("Flatten", [hidden], {"axis": -1})  # [rows, D]
        slices = op.op("Reshape", [rows, _ints(graph, "slices", [0, m, width])])  # [rows, M, D/M]
        books = _constant(graph, "lm_head.codebook", head.codebook.transpose(1, 2))  # [M, D/M, K]
        turned = op.op("Transpose", [slices], {"perm": [1, 0, 2]})  # [M, rows, D/M]
        # The reshape changes nothing, but keeps ONNX Runtime (1.31) from fusing the transpose into the product: its fused
        # kernel divides by zero on an empty batch.
        apart = op.op("Reshape", [turned, _ints(graph, "turned", [m, 0, width])])
        scores = op.op("MatMul", [apart, books])  # [M, rows, K]
        flat = op.op("Reshape", [op.op("Transpose", [scores], {"perm": [1, 0, 2]}), _ints(graph, "flat", [0, m * k])])
        shape = op.op("Concat", [lead, _ints(graph, "width", [m * k])], {"axis": 0})
        code_logits = op.op("Reshape", [flat, shape], {"allowzero": 1})  # [.., M*K]
    else:
        books = _constant(graph, "lm_head.codebook", head.codebook.reshape(m * k, width).T)  # [D, M*K]
        code_logits = op.op("MatMul", [hidden, books])  # [.., M*K]
    code_logits.name = "code_logits"
    # Told, because inference does not see through the product head's reshapes: with K known, codes are held to it.
    assert books.const_value is not None
    code_logits.type = ir.TensorType(books.const_value.dtype)
    code_logits.shape = ir.Shape([None, None, m * k])  # [B, S, M*K]
    inputs = [code_logits, _constant(graph, "lm_head.codes", head.codes)]
    if head.bias is not None:
        inputs.append(_constant(graph, "lm_head.bias", head.bias))
    return inputs


# ----------------------------------------------------------------------------------------------- the tied embedding


def _vq_rows(op: tape.Tape, graph: ir.Graph, tokens: ir.Value, head: VQHead) -> ir.Value:
    """Rows of the dense twin, read through the initializers of the head.

    They stay as the head wants them, codes int32 [V, M] and each codebook turned, so that the file holds each number
    once: narrower ids would need a Cast before the op, whose native kernel takes a constant only, and TensorRT has no
    constants of uint8 or int16. Turning a codebook back is one small constant, folded when a runtime loads the file.
    """
    m, k, width = head.spec.codebook_shape
    weights = graph.initializers
    entries = op.op("Gather", [weights["lm_head.codes"], tokens], {"axis": 0})  # [B, S, M]
    if m > 1:
        starts = k * torch.arange(m, dtype=torch.int32)
        entries = op.op("Add", [entries, _constant(graph, "lm_head.starts", starts)])
    product = head.spec.kind == "product"
    books = op.op("Transpose", [weights["lm_head.codebook"]], {"perm": [0, 2, 1] if product else [1, 0]})
    table = op.op("Reshape", [books, _ints(graph, "table", [m * k, width])]) if product else books
    vectors = op.op("Gather", [table, entries], {"axis": 0})  # [B, S, M, D or D/M]
    if head.spec.kind == "additive":
        return _sum(op, graph, vectors, head.codebook.dtype)
    rows = op.op("Reshape", [vectors, _ints(graph, "rows", [0, 0, head.spec.hidden_size])])  # [B, S, D]
    if head.rotation is None:
        return rows
    return op.op("MatMul", [rows, op.op("Transpose", [weights["lm_head.rotation"]], {"perm": [1, 0]})])


def _sum(op: tape.Tape, graph: ir.Graph, vectors: ir.Value, dtype: torch.dtype) -> ir.Value:
    """[B, S, M, D] -> [B, S, D], summed in float32 and rounded once."""
    axes = _ints(graph, "codebooks", [2])
    if dtype == torch.float32:
        return op.op("ReduceSum", [vectors, axes], {"keepdims": 0})
    wide = op.op("Cast", [vectors], {"to": int(ir.DataType.FLOAT)})
    return op.op("CastLike", [op.op("ReduceSum", [wide, axes], {"keepdims": 0}), vectors])
