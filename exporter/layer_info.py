"""What TensorRT tells of an engine's layers, and which products they compute in the types of a quantised graph.

It tells the same in two ways: the engine inspector as JSON, which needs the engine loaded and so a GPU, and the builder in its
log, a line for each layer, which needs none. Seen with TensorRT for RTX 1.7 (strings shortened):

    Name: q_proj+k_proj_myl1_6, LayerType: gemm, Inputs: [ { .., Datatype: Int8, .. }],
        Constants: [ { .., Dimensions: [1,32,64], .., Datatype: Int8, .. }, ..], Outputs: [ { .., Datatype: Float, .. }], ..,
        Metadata: [ONNX Layer: q_proj][ONNX Layer: node_DequantizeLinear_2]..

- Products that share an input become one layer. Its weights are one constant, as large as theirs together; `Metadata`
  names all of them.
- INT8 and FP8: input and constant both have the type. The kernel before it that rounds has an *output* of the type; the one
  after it, which multiplies by the scale, is named after the product too, and has neither input nor constant of it.
- INT8 weights alone: a 'runtime_fusion' with a float input and an Int8 constant.
- INT4: a 'kgen' with Int4 constants and no input, named after the nodes that dequantise, and a float product of what it gives.
- A plugin is a 'custom_layer', and only `Metadata` tells whose.
- Every optimization profile has layers of its own, and some of their names hold '[profile 1]' and so on.

TensorRT 10.10 (NVIDIA/TensorRT issue 4397) writes `Format/Datatype` for the type and leaves the constants out: an input in the
type tells of INT8 and FP8 then, and nothing tells of weights alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from export_vq.quantised_products import QuantisedProduct

LOW = ("int8", "fp8", "int4")
"""Types that only a quantised graph brings."""
_NODE = re.compile(r"\[ONNX Layer: (.*?)\](?=\[ONNX Layer: |[\x1e\x1f]|$)")
_PROFILE = re.compile(r"\[profile (\d+)\]")
_LINE = re.compile(r"Name: (?P<Name>.*?), LayerType: (?P<LayerType>[^,]*)(?P<fields>.*)")
_FIELD = re.compile(r", ([A-Z]\w+): (?![^{]*\})")
"""Of a layer, not of a tensor of it, which stands in braces."""
_LISTS = ("Inputs", "Constants", "Outputs")


@dataclass(frozen=True)
class EngineLayer:
    """Names of the ONNX nodes that a layer computes, whole or in part; low types among its inputs; how many numbers it holds
    in each, None where it does not tell."""

    nodes: frozenset[str]
    inputs: frozenset[str]
    held: dict[str, int] | None

    @classmethod
    def of(cls, entry: dict[str, Any]) -> EngineLayer:
        """Of an inspector's entry."""
        inputs = {low for tensor in entry.get("Inputs", []) for low in LOW if low in formats(tensor)}
        return cls(frozenset(nodes_of(entry)), frozenset(inputs), _held(entry))


def nodes_of(entry: dict[str, Any]) -> list[str]:
    """Names of the ONNX nodes in an inspector's entry."""
    return _NODE.findall(str(entry.get("Metadata", "")))


def profiles_of(entries: Sequence[dict[str, Any]]) -> int:
    """How many optimization profiles the entries are of."""
    tensors = (t for entry in entries for key in ("Inputs", "Outputs") for t in entry.get(key, []))
    names = " ".join(str(named.get("Name", "")) for named in (*entries, *tensors))
    return 1 + max(map(int, _PROFILE.findall(names)), default=0)


def _held(entry: dict[str, Any]) -> dict[str, int] | None:
    weights = entry.get("Weights")  # of layers that are not compiled: {"Type": "Int8", "Count": 165888}
    if "Constants" not in entry and not isinstance(weights, dict):
        return None
    held = dict.fromkeys(LOW, 0)
    for tensor in [*entry.get("Constants", []), *([weights] if isinstance(weights, dict) else [])]:
        for low in LOW:
            if low in formats(tensor):
                held[low] += int(tensor.get("Count", math.prod(tensor.get("Dimensions", ()))))
    return held


def formats(tensor: dict[str, Any]) -> str:
    """What an entry tells of a tensor besides its name and size, lower case."""
    return " ".join(str(value) for key, value in tensor.items() if key not in ("Name", "Dimensions")).lower()


def read_log(message: str) -> list[dict[str, Any]]:
    """The builder's message as the inspector's JSON would have it: an entry a layer."""
    entries = []
    for line in message.splitlines()[1:]:
        if not line:
            break
        if found := _LINE.fullmatch(line):
            entries.append({"Name": found["Name"], "LayerType": found["LayerType"], **_fields(found["fields"])})
    return entries


def _fields(text: str) -> dict[str, Any]:
    """Of ', Inputs: [ {..}, {..}], .., TacticName: .., Metadata: ..'; what is no list of tensors stays text."""
    _, *parts = _FIELD.split(text)
    fields = dict(zip(parts[::2], parts[1::2], strict=True))
    return {key: _tensors(told) if key in _LISTS else told for key, told in fields.items()}


def _tensors(text: str) -> list[dict[str, Any]]:
    found = []
    for part in text.split("{ Name: ")[1:]:
        name, _, told = part.partition(", Dimensions: [")
        sizes, _, rest = told.partition("]")
        found.append({"Name": name, "Dimensions": [int(n) for n in sizes.split(",") if n], "Format/Datatype": rest})
    return found


def unquantised(layers: Sequence[EngineLayer], meant: Sequence[QuantisedProduct], profiles: int = 1) -> list[str]:
    """Names of the products that an engine does not compute in the type that was meant, in every profile.

    Each needs a layer that is named after it, or after the node that brings its weight back; that has its type among its
    inputs, where the input was rounded too; and that holds its weight in that type. One that holds weights of several has
    to hold numbers enough for all of them: a product that was left in another type does not pass for its neighbours.
    """
    tells = any(layer.held is not None for layer in layers)
    room = [dict(layer.held or {}) for layer in layers]

    def fitting(product: QuantisedProduct) -> list[int]:
        return [
            i
            for i, layer in enumerate(layers)
            if layer.nodes & {product.name, product.weight}
            and (product.dtype in layer.inputs or not product.input_too)
            and (not tells or room[i].get(product.dtype, 0) >= product.numbers)
        ]

    missing = set()
    for product in sorted(meant, key=lambda p: (len(fitting(p)), -p.numbers)):
        places = fitting(product)[:profiles]
        if len(places) < profiles and (tells or product.input_too):
            missing.add(product.name)
        for i in places if tells else ():
            room[i][product.dtype] -= product.numbers
    return [product.name for product in meant if product.name in missing]
