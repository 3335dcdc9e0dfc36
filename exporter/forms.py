"""Three forms of one graph, made by small rewrites in place.

portable  the head's node, `VQGatherScatter`, `VQTopK` or `VQSample`, plus a model-local function of the same name whose
          body is standard ONNX (bodies.py): stock runtimes inline it, runtimes with our kernel registered use that.
plain     the function inlined: standard ops only.
plugin    the function dropped, `plugin_namespace`, `plugin_version`, `code_bits` and `vocab_size` set, the code ids
          packed into int32 words: what TensorRT's parser needs to pick the plugin on every version from 10.0. An embedding
          tied to the head reads its ids out of the same words.

Each rewrite reports how many nodes it changed, and where it refused, why.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir import tape
from onnx_ir.passes.common import (
    InlinePass,
    RemoveUnusedFunctionsPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)

from export_vq import contract
from export_vq.bodies import function_body
from export_vq.errors import UserError
from export_vq.outputs import OPS

FORMS = ("portable", "plain", "plugin")
MIN_OPSET = 18
"""First opset with everything the bodies use (ReduceMax over an axes input; Shape with start and end)."""


@dataclass(frozen=True)
class Rewrite:
    """`count` nodes were rewritten; `refusals` name the nodes that were not, with the reason."""

    count: int
    refusals: tuple[str, ...] = ()


def read_graph(path: Path) -> ir.Model:
    """An ONNX file, its large weights left on disk.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return ir.load(path)
    except Exception as error:  # protobuf's and onnx_ir's errors share no base
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path}: not a readable ONNX file ({reason}); export it again") from error


def convert(model: ir.Model, form: str) -> Rewrite:
    """Bring a graph whose head is a node of ours, with or without its function, into a form, in place.

    Args:
        model: from graph.py or read from a portable file.
        form: one of FORMS.

    Raises:
        UserError: the graph has no such node, or a node refused; the sentence has the reason.
    """
    nodes = head_nodes(model)
    if not nodes:
        raise UserError(
            f"the graph has no {contract.DOMAIN} node ({', '.join(OPS.values())}), so it cannot be brought to the {form} form; "
            "give the portable model.onnx"
        )
    done = {"portable": _to_portable, "plain": _to_plain, "plugin": _to_plugin}[form](model, nodes)
    if done.refusals:
        raise UserError(f"the graph cannot be brought to the {form} form: {'; '.join(done.refusals)}")
    return done


def head_nodes(model: ir.Model) -> list[ir.Node]:
    """Our ops' nodes in the main graph."""
    return [n for n in model.graph if n.domain == contract.DOMAIN and n.op_type in OPS.values()]


def _to_portable(model: ir.Model, nodes: list[ir.Node]) -> Rewrite:
    for node in nodes:
        function = function_body(
            node.op_type,
            num_codebooks=node.attributes.get_int(contract.NUM_CODEBOOKS),
            has_bias=len(node.inputs) > 2 and node.inputs[2] is not None,
            opset=model.graph.opset_imports[""],
        )
        model.functions[function.identifier()] = function
    return Rewrite(len(nodes))


def _to_plain(model: ir.Model, nodes: list[ir.Node]) -> Rewrite:
    _to_portable(model, nodes)
    InlinePass()(model)
    _sort_codes(model)
    RemoveUnusedOpsetsPass()(model)
    return Rewrite(len(nodes))


def _sort_codes(model: ir.Model) -> None:
    """Make constants of the order by (code, token id) that a draw from one codebook wants.

    TensorRT cannot sort them: its TopK gives 3,840 numbers at most.
    """
    for node in [n for n in model.graph if n.op_type == "TopK" and n.attributes.get_int("largest", 1) == 0]:
        codes = node.inputs[0]
        squeeze = codes.producer() if codes is not None else None
        source = squeeze.inputs[0] if squeeze is not None else None
        tensor = None if source is None else ir.convenience.get_const_tensor(source)
        if source is None or tensor is None:
            continue
        ids = tensor.numpy()[:, 0]
        order = ids.argsort(kind="stable")
        for old, name, numbers in zip(node.outputs, ("sorted", "order"), (ids[order], order), strict=True):
            constant = ir.val(f"{source.name}.{name}", const_value=ir.tensor(numbers, name=f"{source.name}.{name}"))
            model.graph.register_initializer(constant)
            ir.convenience.replace_all_uses_with(old, constant)
    RemoveUnusedNodesPass()(model)


def _to_plugin(model: ir.Model, nodes: list[ir.Node]) -> Rewrite:
    refusals = []
    for node in nodes:
        codes = node.inputs[1]
        tensor = None if codes is None else ir.convenience.get_const_tensor(codes)
        if codes is None or tensor is None:
            refusals.append(f"node {node.name}: its codes are computed in the graph, a constant was expected")
            continue
        ids = tensor.numpy()
        if ids.ndim != 2 or int(ids.max()) >= 1 << 16:
            refusals.append(
                f"node {node.name}: its codes go up to {int(ids.max())} in shape {list(ids.shape)}, expected [V, M] below 65536"
            )
            continue
        num_codes = _num_codes(node, ids.shape[1])
        if num_codes is not None and int(ids.max()) >= num_codes:
            refusals.append(
                f"node {node.name}: its codes go up to {int(ids.max())}, but {contract.GATHER_SCATTER_INPUTS[0]} has {num_codes} "
                "codes a codebook"
            )
            continue
        bits = contract.code_bits(int(ids.max()) + 1)
        packed = ir.val(
            f"{codes.name}.packed{bits}",
            const_value=ir.tensor(pack_codes(ids, bits), name=f"{codes.name}.packed{bits}"),
        )
        model.graph.register_initializer(packed)
        node.replace_input_with(1, packed)
        _drop_missing_bias(node)
        node.attributes.update(
            {
                a.name: a
                for a in (
                    ir.AttrInt64(contract.CODE_BITS, bits),
                    ir.AttrInt64(contract.VOCAB_SIZE, ids.shape[0]),
                    ir.AttrString(contract.PLUGIN_NAMESPACE, contract.DOMAIN),
                    ir.AttrString(contract.PLUGIN_VERSION, str(contract.VERSION)),
                )
            }
        )
        for reader in [user for user, _ in codes.uses() if (user.domain, user.op_type) == ("", "Gather")]:
            _gather_packed(model.graph, reader, packed, bits)
        if not codes.uses():
            model.graph.initializers.pop(str(codes.name))
    for node in nodes:
        model.functions.pop(node.op_identifier(), None)
    RemoveUnusedFunctionsPass()(model)
    return Rewrite(len(nodes) - len(refusals), tuple(refusals))


def _drop_missing_bias(node: ir.Node) -> None:
    """TensorRT's parser hands a plugin no tensor for an empty input, and refuses the layer; the plugin counts its inputs."""
    bias = contract.SAMPLE_INPUTS.index("bias")
    if len(node.inputs) <= bias or node.inputs[bias] is not None:
        return
    for i, value in enumerate(node.inputs[bias + 1 :], bias):
        node.replace_input_with(i, value)
    node.resize_inputs(len(node.inputs) - 1)


def _gather_packed(graph: ir.Graph, gather: ir.Node, packed: ir.Value, bits: int) -> None:
    """Replace Gather(codes [V, M], tokens [B, S]) by arithmetic on the packed words: still int32 [B, S, M].

    Token v is digit v mod n of word v div n, with n digits of `bits` bits a word. Words are signed, so a digit is what is
    left of the word once the lower digits are taken away, modulo the base: ONNX's Mod of integers is never negative here.
    """
    tokens = gather.inputs[1]
    assert tokens is not None
    digits = 32 // bits
    op = tape.Tape()

    def constant(name: str, numbers: NDArray[np.integer]) -> ir.Value:
        value = ir.val(f"{packed.name}.{name}", const_value=ir.tensor(numbers, name=f"{packed.name}.{name}"))
        graph.register_initializer(value)
        return value

    units = constant("units", (1 << bits * np.arange(digits)).astype(np.int32))
    n = constant("digits", np.array(digits, np.int64))
    base = constant("base", np.array(1 << bits, np.int32))
    words = op.op("Gather", [packed, op.op("Div", [tokens, n])], {"axis": 1})  # [M, B, S]
    unit = op.op("Gather", [units, op.op("Mod", [tokens, n])])  # [B, S]
    upper = op.op("Div", [op.op("Sub", [words, op.op("Mod", [words, unit])]), unit])
    ids = op.op("Transpose", [op.op("Mod", [upper, base])], {"perm": [1, 2, 0]})
    ir.convenience.replace_nodes_and_values(graph, gather, [gather], op.nodes, list(gather.outputs), [ids])
    ids.shape, ids.dtype = gather.outputs[0].shape, ir.DataType.INT32


def _num_codes(node: ir.Node, num_codebooks: int) -> int | None:
    """K, where the graph says the last dimension of the code logits."""
    scores = node.inputs[0]
    width = scores.shape[-1] if scores is not None and scores.shape is not None else None
    return width // num_codebooks if isinstance(width, int) else None


def pack_codes(codes: NDArray[np.integer], bits: int) -> NDArray[np.int32]:
    """Code ids [V, M] -> int32 words [M, W]: codebook by codebook, each one's V ids of `bits` bits, little-endian.

    Rows are padded with zeros to 16 bytes: neighbouring threads read neighbouring ids, and every codebook starts where
    a 16-byte load may. TensorRT plugins take neither uint8 nor uint16 tensors, so the ids travel in words.
    """
    rows = np.ascontiguousarray(codes.T).astype({8: "<u1", 16: "<u2"}[bits])  # [M, V]
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % (128 // bits))))
    return padded.view("<i4").astype(np.int32)


def unpack_codes(words: NDArray[np.int32], bits: int, vocab_size: int) -> NDArray[np.int32]:
    """The inverse of `pack_codes`: int32 words [M, W] -> int32 [V, M]."""
    rows = words.astype("<i4").view({8: "<u1", 16: "<u2"}[bits])
    return np.ascontiguousarray(rows[:, :vocab_size].T).astype(np.int32)
