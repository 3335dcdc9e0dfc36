"""What TensorRT made of a graph: its layers, read from the parsed network or back from the engine, and held to what was meant."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from export_vq import contract
from export_vq.errors import CheckFailed
from export_vq.layer_info import EngineLayer, formats, nodes_of, profiles_of, read_log, unquantised
from export_vq.outputs import OPS
from export_vq.quantised_products import QuantisedProduct
from export_vq.records import PluginLayer
from export_vq.trt import DTYPES

_WRITTEN = {
    "bf16": ("bf16", "bfloat16"),
    "half": ("fp16", "half", "float16"),
    "float": ("fp32", "float"),
    "int32": ("int32",),
    "int64": ("int64",),
}
"""How the engine inspector writes a type, by version; in this order, as some words hold others."""


_PLUGINS = re.compile("plugin|custom_layer")


@dataclass(frozen=True)
class Layers:
    """Layers by type, and those that a plugin computes. `source` is 'network' or 'engine'.

    `quantised` counts a network's quantising and dequantising layers by type, 'int8', 'fp8' or 'int4'. An engine has fused
    these into others; `computed` says what each layer computes, of all `profiles`.
    """

    source: str
    counts: dict[str, int]
    plugins: tuple[PluginLayer, ...]
    quantised: dict[str, int] = field(default_factory=dict)
    computed: tuple[EngineLayer, ...] = ()
    profiles: int = 1


def network_layers(trt: Any, network: Any) -> Layers:
    """The layers of a parsed network."""
    counts: Counter[str] = Counter()
    quantised: Counter[str] = Counter()
    plugins = []
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        counts[layer.type.name.lower()] += 1
        if layer.type == trt.LayerType.QUANTIZE:
            quantised[layer.get_output(0).dtype.name.lower()] += 1
        elif layer.type == trt.LayerType.DEQUANTIZE:
            quantised[layer.get_input(0).dtype.name.lower()] += 1
        if layer.type == trt.LayerType.PLUGIN_V3:
            layer.__class__ = trt.IPluginV3Layer  # the bindings hand out the base class
            core = layer.plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
            # Up to TensorRT 10.6 the bindings give None for a plugin in C++.
            names = ("", "", "") if core is None else (core.plugin_name, core.plugin_version, core.plugin_namespace)
            inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
            plugins.append(
                PluginLayer(
                    name=layer.name,
                    plugin=names[0],
                    version=names[1],
                    namespace=names[2],
                    input_dtypes=tuple(t.dtype.name.lower() for t in inputs if t is not None),
                    output_dtypes=tuple(layer.get_output(i).dtype.name.lower() for i in range(layer.num_outputs)),
                )
            )
    return Layers("network", dict(sorted(counts.items())), tuple(plugins), dict(quantised))


def engine_layers(trt: Any, engine: Any) -> Layers:
    """The layers of an engine, by its inspector; the engine must have been built with detailed profiling verbosity."""
    inspector = engine.create_engine_inspector()
    return read_layers(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def read_layers(text: str) -> Layers:
    """The layers in an inspector's JSON: of each 'LayerType', and where that is a plugin's, what its entry tells."""
    entries = json.loads(text)["Layers"]
    named = [entry if isinstance(entry, dict) else {"LayerType": "unknown"} for entry in entries]
    return _layers(named)


def logged_layers(message: str) -> Layers | None:
    """The layers of the engine that the builder's log tells, where no inspector can; None where it tells none."""
    entries = read_log(message)
    return _layers(entries) if entries else None


def _layers(entries: Sequence[dict[str, Any]]) -> Layers:
    kinds = [str(entry.get("LayerType", "")).lower() for entry in entries]
    plugins = [_plugin(entry) for entry, kind in zip(entries, kinds, strict=True) if _PLUGINS.search(kind)]
    return Layers(
        "engine",
        dict(sorted(Counter(kinds).items())),
        tuple(dict.fromkeys(plugins)),  # every profile has the same
        computed=tuple(map(EngineLayer.of, entries)),
        profiles=profiles_of(entries),
    )


def _plugin(entry: dict[str, Any]) -> PluginLayer:
    # Versions differ in where they put the name: PluginType, the layer's name, or its metadata.
    told, nodes = json.dumps(entry), nodes_of(entry)
    return PluginLayer(
        name=nodes[0] if len(nodes) == 1 else str(entry.get("Name", "")),
        plugin=next((op for op in OPS.values() if op in told), str(entry.get("PluginType", ""))),
        version=str(entry.get("PluginVersion", "")),
        namespace=str(entry.get("PluginNamespace", "")),
        input_dtypes=_dtypes([*entry.get("Inputs", []), *entry.get("Constants", [])]),
        output_dtypes=_dtypes(entry.get("Outputs", [])),
    )


def check_quantised(found: Layers, kind: str, meant: Mapping[str, int], products: Sequence[QuantisedProduct]) -> None:
    """Hold the layers to what the graph quantises.

    Args:
        found: of the network or the engine.
        kind: of the engine, for the message.
        meant: QuantizeLinear and DequantizeLinear nodes of the graph by type; a network has as many.
        products: of the graph; an engine computes each of them in its type.

    Raises:
        CheckFailed: the types are not there, or others are.
    """
    if found.source == "network" and found.quantised != dict(meant):
        raise CheckFailed(
            f"{kind}: {_said(meant)} quantised were meant, the network has {_said(found.quantised)}; it would compute in "
            "another precision than was measured"
        )
    missing = unquantised(found.computed, products, found.profiles) if found.source == "engine" else []
    if missing:
        raise CheckFailed(
            f"{kind}: {_said(Counter(p.dtype for p in products))} products were meant, the engine computes {len(missing)} of "
            f"them in another type: {', '.join(missing)}; it would compute in another precision than was measured"
        )


def _said(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"


def check_layers(found: Layers, kind: str, dtype: str, nodes: Sequence[str]) -> None:
    """Hold the layers to the kind of engine.

    Args:
        found: of the network or the engine.
        kind: 'vq-plugin', 'vq-plain' or 'dense'.
        dtype: 'fp32', 'fp16' or 'bf16', as exported.
        nodes: names of the graph's VQ nodes.

    Raises:
        CheckFailed: the plugin is missing, computes in another type, or is where none was meant.
    """
    said = "; ".join(
        f"{p.name}: {p.namespace or '?'}::{p.plugin or '?'} version {p.version or '?'}, {' '.join(p.input_dtypes) or '?'} -> "
        f"{' '.join(p.output_dtypes) or '?'}"
        for p in found.plugins
    )
    said = f"{sum(found.counts.values())} layers of which {len(found.plugins)} by plugins{f' ({said})' if said else ''}"
    if kind != "vq-plugin":
        if found.plugins:
            raise CheckFailed(f"{kind}: no plugin was meant, the {found.source} has {said}")
        return
    # A plugin that has no name here is known by its layer's, which is the node's.
    ours = [
        p
        for p in found.plugins
        if (p.plugin in OPS.values() or (not p.plugin and p.name in nodes)) and p.namespace in (contract.DOMAIN, "")
    ]
    if len(ours) != len(nodes):
        raise CheckFailed(f"{kind}: {len(nodes)} {contract.DOMAIN} layer(s) were meant, the {found.source} has {said}")
    for layer in ours:
        # Without a type told there is nothing to hold it to here; the network's told all. Logits, the one output of their
        # op, come out in the type; values and ids do not.
        outputs = layer.output_dtypes if len(layer.output_dtypes) == 1 else ()
        types = {*layer.input_dtypes[:1], *outputs} - {""}
        if any(DTYPES.get(name) != dtype for name in types):
            raise CheckFailed(f"{kind}: the plugin was meant to compute in {dtype}, the {found.source} has {said}")


def _dtypes(tensors: list[dict[str, Any]]) -> tuple[str, ...]:
    """TensorRT's short type names out of the inspector's 'Format/Datatype' texts; empty when it tells none."""
    found = []
    for tensor in tensors:
        text = formats(tensor)
        found.append(next((name for name, words in _WRITTEN.items() if any(w in text for w in words)), ""))
    return tuple(found) if any(found) else ()
