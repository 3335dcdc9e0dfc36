"""What a head ends in: V logits, the k best tokens or a drawn one, as nodes, inputs and outputs of the graph.

The dense twin ends in the same, made of its logits by standard ops, so that the two graphs can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir import tape
from onnx_ir.passes.common import InlinePass

from export_vq import contract
from export_vq.errors import UserError
from export_vq.outputs import OPS, TENSORS
from export_vq.ranking import order_of_draws
from export_vq.records import HeadSpec
from export_vq.selection import dense_selection


@dataclass(frozen=True)
class HeadOutput:
    """What the head gives: `word` is a key of outputs.OPS; `top_k` counts for 'topk'; `last_token`: of the last position only."""

    word: str = "logits"
    top_k: int = 0
    last_token: bool = False


def tell_one_position(logits: ir.Value) -> None:
    """The traced shapes [B, S, V] of the logits, and of what some architectures do to them next, become [B, 1, V]."""
    if logits.shape is not None and len(logits.shape) == 3:
        logits.shape = ir.Shape([logits.shape[0], 1, logits.shape[2]])
        for node, _ in logits.uses():
            for value in node.outputs:
                tell_one_position(value)


def select(
    model: ir.Model,
    op: tape.Tape,
    placeholder: ir.Node,
    inputs: list[ir.Value],
    spec: HeadSpec,
    output: HeadOutput,
    dense_codes: NDArray[np.integer[Any]] | None = None,
) -> None:
    """End the graph in what `VQTopK` or `VQSample` gives, in the place where its logits were.

    Args:
        model: the graph; its inputs and outputs are changed.
        op: holds the nodes that made `inputs`, which go in before the placeholder.
        placeholder: the node that stands for the head, with logits T [B, S, V].
        inputs: what the op takes first, code logits, codes and any bias; of a dense twin, logits.
        spec: of the head.
        output: see HeadOutput.
        dense_codes: codes [V, M] of the head whose dense twin this is; None: it is the head.

    Raises:
        UserError: the logits are not the graph's output.
    """
    graph, logits = model.graph, placeholder.outputs[0]
    if logits.uses() or not logits.is_graph_output():
        raise UserError(
            f"--output is {output.word}, expected logits: this model changes its logits after the output layer, as a softcap "
            "does, and the best token is chosen inside it; export with --output logits"
        )
    assert logits.shape is not None
    lead: list[int | str | None] = [_size(logits.shape[0]), 1 if output.last_token else _size(logits.shape[1])]
    drawn_with = []
    if output.word == "sample":
        drawn_with = [ir.val("temperature", ir.DataType.FLOAT, [1]), ir.val("uniform", ir.DataType.FLOAT, lead)]
        graph.inputs.extend(drawn_with)
    if dense_codes is None:
        results = [*op_node(op, inputs, spec, output, drawn_with)]
    else:
        order = [_order(graph, dense_codes)] if output.word == "sample" and spec.num_codebooks == 1 else []
        function = dense_selection(OPS[output.word], graph.opset_imports[""], ordered=bool(order))
        model.functions[function.identifier()] = function
        results = [*_node(op, function.name, [*inputs, *drawn_with, *order], output, {})]
    for value, name in zip(results, TENSORS[OPS[output.word]][1], strict=True):
        value.name = name
        value.dtype = ir.DataType.INT64 if name == "ids" else ir.DataType.FLOAT
        value.shape = ir.Shape([*lead, output.top_k] if name in ("values", "ids") and output.word == "topk" else lead)
    if output.word == "topk" and dense_codes is None:
        inputs[0].shape = ir.Shape([*lead, spec.num_codebooks * spec.num_codes])
        results.append(inputs[0])
    place = graph.outputs.index(logits)
    graph.outputs[place : place + 1] = results
    graph.insert_before(placeholder, op.nodes)
    graph.remove(placeholder)
    if dense_codes is not None:
        InlinePass()(model)


def _order(graph: ir.Graph, codes: NDArray[np.integer[Any]]) -> ir.Value:
    """The order of the tokens in a draw, int64 [V], as a constant."""
    value = ir.val("lm_head.order", const_value=ir.tensor(order_of_draws(codes), name="lm_head.order"))
    graph.register_initializer(value)
    return value


def _size(dim: int | ir.SymbolicDim) -> int | str | None:
    return dim if isinstance(dim, int) else dim.value


def op_node(
    op: tape.Tape,
    inputs: list[ir.Value],
    spec: HeadSpec,
    output: HeadOutput,
    drawn_with: Sequence[ir.Value] = (),
) -> Sequence[ir.Value]:
    """The op on code logits, codes and, where there is one, bias."""
    given: list[ir.Value | None] = [*inputs]
    if drawn_with and not spec.has_bias:
        given.append(None)
    return _node(op, OPS[output.word], [*given, *drawn_with], output, {contract.NUM_CODEBOOKS: spec.num_codebooks})


def _node(
    op: tape.Tape, name: str, inputs: Sequence[ir.Value | None], output: HeadOutput, attributes: dict[str, int]
) -> Sequence[ir.Value]:
    """A node of our domain, `lm_head`, with the outputs of the op that `output` means."""
    best = {contract.NUM_BEST: output.top_k} if output.word == "topk" else {}
    return op.op_multi_out(
        name,
        inputs,
        {**attributes, **best},
        num_outputs=len(TENSORS[OPS[output.word]][1]),
        domain=contract.DOMAIN,
        version=contract.VERSION,
        name="lm_head",
    )
