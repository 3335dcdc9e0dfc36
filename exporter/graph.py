"""A loaded model becomes ONNX files: the VQ graph and its dense twin, from one trace of the backbone.

Inputs and outputs of both graphs (T is the export dtype, L layers, names follow the Hugging Face ONNX convention):

========================================= ===== ==============================================================
input_ids                                 int64 [batch_size, sequence_length]
attention_mask                            int64 [batch_size, total_sequence_length], 1 = token, 0 = padding
position_ids (where the model has them)   int64 [batch_size, sequence_length]
past_key_values.{i}.key / .value, i < L   T     [batch_size, num_key_value_heads, past_sequence_length, head_dim]
present.{i}.key / .value, i < L           T     [batch_size, num_key_value_heads, total_sequence_length, head_dim]
========================================= ===== ==============================================================

and, by what the head is to give (`--output`), with S = sequence_length, or 1 with `--last-token`, where the head sees the
last position only; k is `--top-k`:

====== ================================== ======= ============================================================
logits logits                             T       [batch_size, S, vocab_size]
topk   values                             float32 [batch_size, S, k], the best logits, falling
topk   ids                                int64   [batch_size, S, k], equal values by rising id
topk   logsumexp                          float32 [batch_size, S], over all of the vocabulary
topk   code_logits (VQ graph only)        T       [batch_size, S, num_codebooks * num_codes], for other tokens' logits
sample temperature (an input)             float32 [1], above 0
sample uniform (an input)                 float32 [batch_size, S] in [0, 1)
sample ids                                int64   [batch_size, S], drawn at `uniform`
sample logprob                            float32 [batch_size, S], of the drawn token under the tempered softmax
====== ================================== ======= ============================================================

total_sequence_length = past_sequence_length + sequence_length; a prefill passes a past of length 0. The backbone is
traced once with a placeholder where the head stands, and one for the input embedding where that is tied to it; the VQ
and the dense layers are then built in their places (layers.py), so that the two graphs differ in nothing else.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import hashlib
import inspect
import io
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
)
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn

from export_vq import contract, forms, layers
from export_vq.embedding import VQEmbedding
from export_vq.errors import UserError
from export_vq.files import free_bytes, sha256, whole
from export_vq.head import VQHead
from export_vq.head_output import HeadOutput
from export_vq.load import LoadedModel, convert
from export_vq.outputs import DEFAULT_TOP_K, OPS
from export_vq.records import OnnxArtifact

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EXTERNAL_DATA_BYTES = 100 << 20
"""Weights above this go to one .data file beside the graph."""
DEFAULT_OPSET = 20
METADATA_KEY = f"{contract.DOMAIN}.artifact"
"""Model metadata: the artifact record as JSON, so that the file alone says what it is."""


@dataclass(frozen=True)
class ExportOptions:
    """How to export: `dtype` fp32, fp16 or bf16; `form` one of forms.FORMS; `opset` of the default domain.

    `output` is 'logits', 'topk' or 'sample', `top_k` how many tokens 'topk' gives; `last_token`: only of the last position.
    """

    dtype: str = "fp32"
    form: str = "portable"
    opset: int = DEFAULT_OPSET
    external_data_bytes: int = EXTERNAL_DATA_BYTES
    output: str = "logits"
    top_k: int = DEFAULT_TOP_K
    last_token: bool = False

    @property
    def head_output(self) -> HeadOutput:
        """What the head is to give; `top_k` only where it counts."""
        return HeadOutput(self.output, self.top_k if self.output == "topk" else 0, self.last_token)


def export_onnx(loaded: LoadedModel, folder: Path, options: ExportOptions) -> dict[str, OnnxArtifact]:
    """Write `model.onnx` (VQ head) and `dense.onnx` (its dense twin), each with its record `*.onnx.json`.

    Args:
        loaded: a VQ-Logits model.
        folder: made if missing. A weights file is named after its content, and the graph that refers to it is renamed
            into place last, so an interrupted run leaves the old pair or the new one.
        options: see ExportOptions.

    Returns:
        {"vq": artifact, "dense": artifact}.

    Raises:
        UserError: the options ask for something impossible, or the folder cannot hold the files.
    """
    spec = loaded.spec
    if options.opset < forms.MIN_OPSET:
        raise UserError(
            f"--opset is {options.opset}, expected {forms.MIN_OPSET} or more; leave it out for {DEFAULT_OPSET}"
        )
    _check_output(options, spec.vocab_size)
    _check_room(loaded, folder, options)
    dtype = TORCH_DTYPES[options.dtype]
    model = loaded.model if dtype == torch.float32 else convert(copy.deepcopy(loaded.model), dtype)
    head = model.lm_head
    assert isinstance(head, VQHead)
    cache_shapes = _cache_shapes(model)
    output = options.head_output
    artifacts = {}
    trace = _trace(model, head, cache_shapes, dtype, options.opset)
    for kind, name in (("vq", "model.onnx"), ("dense", "dense.onnx")):
        graph = trace.clone() if kind == "vq" else trace
        layers.attach(graph, head, kind, output)
        if kind == "vq":
            forms.convert(graph, options.form)
        artifact = OnnxArtifact(
            path=name,
            head=kind,
            form=options.form if kind == "vq" else "dense",
            dtype=options.dtype,
            opset=options.opset,
            model_type=loaded.model_type,
            spec=spec,
            input_names=tuple(str(v.name) for v in graph.graph.inputs),
            output_names=tuple(str(v.name) for v in graph.graph.outputs),
            cache_shapes=cache_shapes,
            source_sha256=loaded.sha256,
            num_bytes=0,
            file_sha256={},
            versions={n: version(n) for n in ("export-vq", "torch", "transformers", "onnx", "onnxscript")},
            tied_embedding=loaded.tied_embedding,
            notes=loaded.notes,
            external_data_bytes=options.external_data_bytes,
            output=output.word,
            top_k=output.top_k,
            last_token=output.last_token,
        )
        artifacts[kind] = write_graph(graph, folder, artifact)
    return artifacts


def head_graph(head: VQHead, kind: str, *, opset: int = DEFAULT_OPSET, output: HeadOutput | None = None) -> ir.Model:
    """The head alone, as it stands in the whole graph: hidden_states T [rows, 1, D] -> logits T [rows, 1, V], or what
    `output` gives instead.

    Args:
        head: in the dtype to export.
        kind: 'vq' (portable form) or 'dense'.
        output: see head_output.HeadOutput; None: logits.
    """
    dtype = ir.DataType[str(head.codebook.dtype).removeprefix("torch.").replace("float32", "float").upper()]
    hidden = ir.val("hidden_states", dtype, ["rows", 1, head.spec.hidden_size])
    placeholder = ir.node(layers.HEAD, [hidden], domain=contract.DOMAIN)
    logits = placeholder.outputs[0]
    logits.name, logits.dtype, logits.shape = "logits", dtype, ir.Shape(["rows", 1, head.spec.vocab_size])
    graph = ir.Graph(
        [hidden], [logits], nodes=[placeholder], opset_imports={"": opset, contract.DOMAIN: 1}, name="head"
    )
    model = ir.Model(graph, ir_version=10, producer_name="export-vq")
    layers.attach(model, head, kind, output)
    if kind == "vq":
        forms.convert(model, "portable")
    return model


def write_graph(model: ir.Model, folder: Path, artifact: OnnxArtifact) -> OnnxArtifact:
    """Save a graph under `artifact.path`, its weights in one .data file when they are large, and its record.

    Returns:
        the artifact, with sizes and hashes filled in.

    Raises:
        UserError: the folder cannot be written.
    """
    model.metadata_props[METADATA_KEY] = json.dumps(artifact.to_json())
    target = folder / artifact.path
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    hashes = {}
    if weights > artifact.external_data_bytes:
        # Named after all that the weights come from: new ones never overwrite those that an existing graph refers to.
        key = hashlib.sha256(json.dumps(artifact.to_json()).encode()).hexdigest()[:12]
        data = target.with_name(f"{target.stem}.{key}.data")
        with whole(target) as staged:
            ir.save(model, staged, external_data=data.name)
            onnx.checker.check_model(staged, full_check=True)
            staged.with_name(data.name).replace(data)
            hashes[data.name] = sha256(data)
        for old in folder.glob(f"{target.stem}.*.data"):
            if old != data:
                old.unlink()
    else:
        with whole(target) as staged:
            ir.save(model, staged)
            onnx.checker.check_model(staged, full_check=True)
    hashes[target.name] = sha256(target)
    done = OnnxArtifact(
        **{
            **artifact.__dict__,
            "num_bytes": sum((folder / name).stat().st_size for name in hashes),
            "file_sha256": hashes,
        }
    )
    done.save(target.with_name(target.name + ".json"))
    return done


def _check_output(options: ExportOptions, vocab_size: int) -> None:
    """Refuse what no head can give."""
    if options.output not in OPS:
        raise UserError(f"--output is {options.output!r}, expected one of {', '.join(OPS)}")
    most = min(contract.MAX_BEST, vocab_size)
    if options.output == "topk" and not 1 <= options.top_k <= most:
        raise UserError(
            f"--top-k is {options.top_k}, expected 1 to {most}: at most {contract.MAX_BEST}, and the vocabulary has "
            f"{vocab_size} tokens"
        )


def _check_room(loaded: LoadedModel, folder: Path, options: ExportOptions) -> None:
    """Refuse before the long trace what cannot fit on the disk."""
    backbone = sum(p.numel() for n, p in loaded.model.named_parameters() if not n.startswith(contract.HEAD_PREFIX))
    width = TORCH_DTYPES[options.dtype].itemsize
    spec = loaded.spec
    need = (2 * backbone + spec.dense_numbers + spec.float_numbers) * width + 4 * spec.vocab_size * spec.num_codebooks
    if free_bytes(folder) < need:
        raise UserError(
            f"{folder}: {free_bytes(folder) >> 20} MiB free, {need >> 20} MiB needed for both graphs; choose another disk with -o"
        )


# --------------------------------------------------------------------------------------------------------- tracing


class _HeadPlaceholder(nn.Module):
    """Stands where the head stood: one node, hidden states in, logits out, to be built over later."""

    def __init__(self, head: VQHead) -> None:
        super().__init__()
        self.vocab_size = head.spec.vocab_size
        self.weight = head.weight

    def forward(self, hidden: Tensor) -> Tensor:
        shape = (*hidden.shape[:-1], self.vocab_size)
        return torch.onnx.ops.symbolic(
            f"{contract.DOMAIN}::{layers.HEAD}", (hidden,), dtype=hidden.dtype, shape=shape, version=contract.VERSION
        )


class _RowsPlaceholder(VQEmbedding):
    """Stands where a tied embedding stood: one node, token ids in, rows out; the scale is traced behind it."""

    def rows(self, tokens: Tensor) -> Tensor:
        shape = (*tokens.shape, self.head.spec.hidden_size)
        dtype = self.head.codebook.dtype
        return torch.onnx.ops.symbolic(
            f"{contract.DOMAIN}::{layers.ROWS}", (tokens,), dtype=dtype, shape=shape, version=contract.VERSION
        )


class _Backbone(nn.Module):
    """The causal LM with its cache as plain tensors: the signature of the graph."""

    def __init__(self, causal_lm: nn.Module) -> None:
        super().__init__()
        self.causal_lm = causal_lm

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None,
        past_key_values: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        from transformers import DynamicCache

        inputs = {} if position_ids is None else {"position_ids": position_ids}
        # A cache without the config keeps all positions of sliding layers too; their masks hide what is out of reach.
        cache = DynamicCache(ddp_cache_data=past_key_values)
        out = self.causal_lm(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **inputs
        )
        return out.logits, [(layer.keys, layer.values) for layer in out.past_key_values.layers]


def takes_position_ids(model: nn.Module) -> bool:
    """Whether the architecture has a position_ids input; the others derive positions from the attention mask."""
    return "position_ids" in inspect.signature(model.forward).parameters


def _cache_shapes(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """(KV heads, head_dim) of each layer, seen by running one token."""
    with torch.no_grad():
        cache = model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=True).past_key_values
    return tuple((layer.keys.shape[1], layer.keys.shape[3]) for layer in cache.layers)


def _trace(
    model: nn.Module, head: VQHead, cache_shapes: tuple[tuple[int, int], ...], dtype: torch.dtype, opset: int
) -> ir.Model:
    """The backbone between its placeholders, optimised, with the names of the module docstring."""
    batch, sequence, past = 2, 3, 5  # any sizes above 1 that differ: sizes 0 and 1 are special to the tracer
    positions = torch.arange(past, past + sequence).repeat(batch, 1) if takes_position_ids(model) else None
    inputs = (
        torch.zeros(batch, sequence, dtype=torch.long),
        torch.ones(batch, past + sequence, dtype=torch.long),
        positions,
        [
            (torch.zeros(batch, h, past, d, dtype=dtype), torch.zeros(batch, h, past, d, dtype=dtype))
            for h, d in cache_shapes
        ],
    )
    free = torch.export.Dim.DYNAMIC
    both = {0: free, 1: free}
    layer = {0: free, 2: free}
    shapes = (both, both, None if positions is None else both, [(layer, layer)] * len(cache_shapes))
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    try:
        model.set_output_embeddings(_HeadPlaceholder(head))  # type: ignore[operator]
        if isinstance(embedding, VQEmbedding):
            model.set_input_embeddings(_RowsPlaceholder(head, embedding.scale))  # type: ignore[operator]
        with torch.no_grad(), _quiet():
            program = torch.export.export(_Backbone(model), inputs, dynamic_shapes=shapes, strict=False)
            exported = torch.onnx.export(
                program, inputs, dynamo=True, opset_version=opset, optimize=False, verify=False
            )
    finally:
        model.set_output_embeddings(head)  # type: ignore[operator]
        model.set_input_embeddings(embedding)  # type: ignore[operator]
    assert exported is not None
    graph = exported.model
    _name_products(graph)
    _simplify(graph)
    _rename(graph, positions is not None)
    graph.producer_name, graph.producer_version = "export-vq", version("export-vq")
    return graph


def _name_products(model: ir.Model) -> None:
    """Products with weights are called after their modules, as `model.layers.0.mlp.down_proj`: the names by which
    quantisation reports them and is told to spare them."""
    taken = set()
    for node in model.graph:
        *_, module, call = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "['', '']"))
        name = module.removeprefix("causal_lm.")
        if node.op_type in ("MatMul", "Gemm") and call.startswith(("linear", "addmm")) and name not in taken:
            node.name = name
            taken.add(name)


def _simplify(model: ir.Model) -> None:
    """Fold what is constant, merge what is computed twice.

    The exporter's own optimiser also tries some forty rewrite rules on every node: 53 s instead of 2 s for a six-layer
    Llama, to remove no-op slices and casts that every runtime removes by itself.
    """
    fold_constants(model)
    ir.passes.Sequential(
        RemoveUnusedNodesPass(),
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        DeduplicateInitializersPass(),
        CommonSubexpressionEliminationPass(),
        RemoveUnusedNodesPass(),
        ClearMetadataAndDocStringPass(),
    )(model)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints progress and warns about its own registries; neither is the user's business."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _rename(model: ir.Model, has_positions: bool) -> None:
    """Tensors and dimensions get their conventional names; weights lose the wrapper's prefix."""
    names = ["input_ids", "attention_mask"] + ["position_ids"] * has_positions
    layers = (len(model.graph.inputs) - len(names)) // 2
    pairs = [f"{i}.{part}" for i in range(layers) for part in ("key", "value")]
    for value, name in zip(model.graph.inputs, names + [f"past_key_values.{p}" for p in pairs], strict=True):
        value.name = name
    for value, name in zip(model.graph.outputs, ["logits"] + [f"present.{p}" for p in pairs], strict=True):
        value.name = name
    inputs = {str(v.name): v for v in model.graph.inputs}
    past = inputs["past_key_values.0.key"]
    batch, sequence = (_dim(inputs["input_ids"], i) for i in (0, 1))
    renamed = {
        batch: "batch_size",
        sequence: "sequence_length",
        _dim(past, 2): "past_sequence_length",
        _dim(inputs["attention_mask"], 0): "batch_size",
        _dim(inputs["attention_mask"], 1): "total_sequence_length",
        f"{_dim(past, 2)} + {sequence}": "total_sequence_length",
        f"{sequence} + {_dim(past, 2)}": "total_sequence_length",
    }
    values = [*model.graph.inputs, *(o for node in model.graph for o in node.outputs)]  # the graph's outputs among them
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([_new_dim(d, renamed) for d in value.shape])
    for name, weight in list(model.graph.initializers.items()):
        if name.startswith("causal_lm."):
            weight.name = name.removeprefix("causal_lm.")


def _dim(value: ir.Value, axis: int) -> str:
    assert value.shape is not None
    dim = value.shape[axis]
    return str(dim.value) if isinstance(dim, ir.SymbolicDim) else str(dim)


def _new_dim(dim: int | ir.SymbolicDim, renamed: dict[str, str]) -> int | str | None:
    if isinstance(dim, int):
        return dim
    # Other expressions of the tracer's symbols are scratch sizes nobody needs a name for.
    return renamed.get(str(dim.value))
