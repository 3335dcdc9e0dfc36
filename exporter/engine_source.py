"""What an engine is built from: a graph in the form for its kind, and what is known of it before TensorRT sees it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx_ir as ir

from export_vq import contract, forms
from export_vq.errors import UserError
from export_vq.files import sha256
from export_vq.graph import METADATA_KEY
from export_vq.outputs import output_of
from export_vq.profiles import Shape
from export_vq.quantised_products import quantised_products, rounding_nodes

KINDS = ("vq-plugin", "vq-plain", "dense")
_DTYPES = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
_ALWAYS_FLOAT = {*contract.TOP_K_OUTPUTS, *contract.SAMPLE_OUTPUTS}


class EngineSource:
    """A graph of type `dtype` with VQ nodes named `nodes`; `inputs` maps each input to its dimensions, dynamic ones by name,
    `output_dtypes` each floating-point output to the type it is meant to have. `quantised` counts the nodes that quantise
    or dequantise, by type: 'int8', 'fp8' or 'int4', and `products` are what they quantise."""

    def __init__(self, path: Path, kind: str) -> None:
        """Args: model.onnx in portable or plugin form, dense.onnx, or a head alone; one of KINDS.

        Raises:
            UserError: the file is not readable, or no engine of that kind can be built from it.
        """
        if kind not in KINDS:
            raise UserError(f"the kind of engine is {kind!r}, expected one of {', '.join(KINDS)}")
        self.path, self.kind = path, kind
        self.model = forms.read_graph(path)
        nodes = forms.head_nodes(self.model)
        self.nodes = tuple(str(node.name) for node in nodes)
        if kind == "dense" and nodes:
            raise UserError(f"{path}: holds a {nodes[0].op_type} node, so it is no dense graph; give dense.onnx")
        foreign = _for_onnx_runtime(self.model)
        if foreign:
            raise UserError(
                f"{path}: was quantised for ONNX Runtime (its {foreign}); run export-vq calibrate with --runtime tensorrt"
            )
        if kind != "dense":
            self._convert()
        self.quantised = rounding_nodes(self.model)
        self.products = quantised_products(self.model)
        self.inputs = {str(v.name): _dims(v) for v in self.model.graph.inputs}
        self.outputs = tuple(str(v.name) for v in self.model.graph.outputs)
        self.dtype = _dtype(path, self.model)
        self.output_dtypes = {
            str(v.name): "fp32" if v.name in _ALWAYS_FLOAT else self.dtype
            for v in self.model.graph.outputs
            if v.dtype in _DTYPES
        }

    def _convert(self) -> None:
        in_plugin_form = any(contract.CODE_BITS in n.attributes for n in forms.head_nodes(self.model))
        if in_plugin_form and self.kind == "vq-plain":
            raise UserError(
                f"{self.path}: is in the plugin form, which only vq-plugin is built from; give the portable one"
            )
        if not in_plugin_form:
            try:
                forms.convert(self.model, self.kind.removeprefix("vq-"))
            except UserError as error:
                raise UserError(f"{self.path}: {error}") from error

    @property
    def head_output(self) -> dict[str, Any]:
        """`output`, `top_k` and `last_token`, as an artifact has them, read from the graph's outputs."""
        shapes = {str(v.name): _dims(v) for v in self.model.graph.outputs}
        first = shapes[self.outputs[0]]
        return {
            "output": output_of(self.outputs),
            "top_k": int(shapes["values"][-1]) if "values" in shapes else 0,
            "last_token": "input_ids" in self.inputs and first[1] == 1,
        }

    @property
    def data_files(self) -> tuple[str, ...]:
        """Weights files beside the source that the graph refers to."""
        weights = (v.const_value for v in self.model.graph.initializers.values())
        return tuple(sorted({str(w.location) for w in weights if isinstance(w, ir.ExternalTensor)}))

    def source_sha256(self) -> dict[str, str]:
        return {name: sha256(self.path.with_name(name)) for name in (self.path.name, *self.data_files)}

    def write_onnx(self, path: Path) -> tuple[str, ...]:
        """Write the graph; returns the names of the links to weights beside it."""
        for name in self.data_files:
            origin = self.path.with_name(name)
            if not origin.is_file():
                raise UserError(f"{self.path}: its weights file {name} is missing; keep both files in one folder")
            try:
                (path.parent / name).symlink_to(origin.resolve())
            except OSError:  # a file system without links
                shutil.copyfile(origin, path.parent / name)
        ir.save(self.model, path)
        return self.data_files

    def cache_shapes(self) -> tuple[tuple[int, int], ...]:
        """(KV heads, head_dim) of each layer's cache; empty for a head alone."""
        keys = [shape for name, shape in self.inputs.items() if name.startswith("past_key_values.") and ".key" in name]
        return tuple((int(shape[1]), int(shape[3])) for shape in keys)


def _dims(value: ir.Value) -> Shape:
    return tuple(d if isinstance(d, int) else str(d.value) for d in value.shape or ())


def _dtype(source: Path, model: ir.Model) -> str:
    """The type that the graph was exported in, by its own record; without one, that of its logits or hidden states."""
    record = model.metadata_props.get(METADATA_KEY)
    if record is not None:
        return str(json.loads(record)["dtype"])
    told = next((v for v in model.graph.outputs if v.name == "logits"), model.graph.inputs[0])
    if told.dtype not in _DTYPES:
        raise UserError(
            f"{source}: {told.name} is {told.dtype}, expected float32, float16 or bfloat16; export it again"
        )
    return _DTYPES[told.dtype]


def _for_onnx_runtime(model: ir.Model) -> str | None:
    """What TensorRT has no equal of in a quantised graph."""
    if any(node.op_type == "MatMulNBits" for node in model.graph):
        return "node MatMulNBits"
    moved = any(n.op_type == "QuantizeLinear" and n.outputs[0].dtype == ir.DataType.UINT8 for n in model.graph)
    return "uint8 inputs of products" if moved else None
