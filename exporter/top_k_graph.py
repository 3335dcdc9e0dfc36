"""An exported graph with V logits, ended in something else instead: in the best tokens of the last position for one, which is
what generation runs.

    code_logits [B, S, M*K] -> VQGatherScatter -> logits [B, S, V]
    code_logits [B, S, M*K] -> the last position -> VQTopK -> values, ids [B, 1, k], logsumexp [B, 1]

Backbone and constants stay what they are, so the two are the same function.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir import tape

from export_vq import contract, forms
from export_vq.head_output import HeadOutput, select
from export_vq.layers import last_position
from export_vq.outputs import DEFAULT_TOP_K
from export_vq.records import OnnxArtifact


def end_in_top_k(model: ir.Model, artifact: OnnxArtifact) -> HeadOutput | None:
    """Make the graph that `--output topk --last-token` would have exported, in place.

    Args:
        model: model.onnx as export_onnx writes it.
        artifact: its record.

    Returns:
        what the graph gives now. None, and nothing is changed, where it has no head of V logits to replace: it gives
        something else already, its head is spelled out in standard ops, or it changes the logits afterwards.
    """
    output = HeadOutput("topk", min(DEFAULT_TOP_K, artifact.spec.vocab_size), last_token=True)
    return output if end_in(model, artifact, output) else None


def end_in(model: ir.Model, artifact: OnnxArtifact, output: HeadOutput) -> bool:
    """Make the graph that gives chosen tokens, in place.

    Args:
        model: model.onnx as export_onnx or calibrate writes it.
        artifact: its record.
        output: 'topk' or 'sample'.

    Returns:
        whether it does now; nothing is changed where it has no head of V logits to replace, see end_in_top_k.
    """
    nodes = forms.head_nodes(model)
    replaceable = (artifact.output, artifact.form) == ("logits", "portable") and len(nodes) == 1
    if not replaceable or not nodes[0].outputs[0].is_graph_output() or nodes[0].op_identifier() not in model.functions:
        return False
    node, op = nodes[0], tape.Tape()
    code_logits, *constants = [value for value in node.inputs if value is not None]
    if output.last_token and not artifact.last_token:
        code_logits.name, told = "every_code_logits", code_logits
        code_logits = last_position(op, model.graph, told)
        code_logits.name, code_logits.type = "code_logits", told.type
    select(model, op, node, [code_logits, *constants], artifact.spec, output)
    del model.functions[node.op_identifier()]
    forms.convert(model, "portable")
    return True


def end_dense_in(model: ir.Model, artifact: OnnxArtifact, output: HeadOutput, codes: NDArray[np.integer[Any]]) -> None:
    """The same of the dense twin, by standard ops on its logits.

    Args:
        model: dense.onnx as export_onnx or calibrate writes it, with logits of every position.
        artifact: its record.
        output: 'topk' or 'sample'.
        codes: [V, M] of the head whose twin it is.
    """
    op, graph = tape.Tape(), model.graph
    place = next(i for i, value in enumerate(graph.outputs) if value.name == "logits")
    told = graph.outputs[place]
    told.name = "every_logits"
    placeholder = ir.node("Identity", [told])
    logits = placeholder.outputs[0]
    logits.name, logits.type, logits.shape = "logits", told.type, told.shape
    graph.append(placeholder)
    graph.outputs[place] = logits
    given = last_position(op, graph, told) if output.last_token else told
    select(model, op, placeholder, [given], artifact.spec, output, codes)
    graph.opset_imports.pop(contract.DOMAIN, None)
