"""An exported graph with V logits, ended in the best tokens of the last position instead: what generation runs.

    code_logits [B, S, M*K] -> VQGatherScatter -> logits [B, S, V]
    code_logits [B, S, M*K] -> the last position -> VQTopK -> values, ids [B, 1, k], logsumexp [B, 1]

Backbone and constants stay what they are, so the two are the same function.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import tape

from export_vq import forms
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
    nodes = forms.head_nodes(model)
    replaceable = (artifact.output, artifact.form) == ("logits", "portable") and len(nodes) == 1
    if not replaceable or not nodes[0].outputs[0].is_graph_output() or nodes[0].op_identifier() not in model.functions:
        return None
    node, op = nodes[0], tape.Tape()
    code_logits, *constants = [value for value in node.inputs if value is not None]
    if not artifact.last_token:
        code_logits.name, told = "every_code_logits", code_logits
        code_logits = last_position(op, model.graph, told)
        code_logits.name, code_logits.type = "code_logits", told.type
    output = HeadOutput("topk", min(DEFAULT_TOP_K, artifact.spec.vocab_size), last_token=True)
    select(model, op, node, [code_logits, *constants], artifact.spec, output)
    del model.functions[node.op_identifier()]
    forms.convert(model, "portable")
    return output
