"""What each layer costs when it alone is quantised, measured in one session.

The graph gets a switch for every layer: off, it computes what it did; on, its weight and, where the precision rounds
activations, its input are what the quantised layer's are. Weights are fed in over the graph's own, which ONNX Runtime
allows for initializers that are inputs as well; an input is x + switch * (rounded x - x).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir import tape

from export_vq import feeds as fd
from export_vq.calibration.collect import saved
from export_vq.calibration.gptq import Grid
from export_vq.calibration.options import CalibrationOptions
from export_vq.calibration.products import Product, products
from export_vq.calibration.quantise import round_trip, rounded
from export_vq.calibration.ranges import TOP
from export_vq.logit_errors import log_softmax
from export_vq.runners import OrtRunner

SWITCHES = "calibrate.switches"


def sensitivity(
    model: ir.Model,
    names: Sequence[str],
    options: CalibrationOptions,
    magnitudes: Mapping[str, float],
    signature: fd.Signature,
    blocks: NDArray[np.int64],
    folder: Path,
    tell: Callable[[float], None] = lambda _: None,
    *,
    grid: Callable[[Product], Grid] | None = None,
) -> dict[str, float]:
    """Mean KL in nats of the unquantised distribution from that with one layer quantised, for each layer.

    Args:
        model: standard ops only, with `logits`; gains switches.
        names: of the products to try.
        options: `precision`, `block`, `runtime`, `threads` count.
        magnitudes: of each input by name, where the precision rounds inputs.
        signature: of the graph.
        blocks: token ids int64 [n, S], not those that the result is tested on.
        folder: an existing one for scratch.
        tell: called with the fraction done.
        grid: a product's weight in 4 bits; None: rounded to nearest.
    """
    tried = [p for p in products(model) if p.name in names]
    _add_switches(model, tried, options.precision, magnitudes)
    totals = dict.fromkeys((layer.name for layer in tried), 0.0)
    with (
        saved(model, folder) as path,
        OrtRunner(path, signature, threads=options.threads, native=False, fuse_quantised=False) as runner,
    ):
        for i, block in enumerate(blocks):
            given = fd.prefill(signature, block[None], np.ones_like(block)[None])
            off = np.zeros(len(tried), np.float32)
            truth = _logs(runner.infer(given | {SWITCHES: off}))
            for j, layer in enumerate(tried):
                on = off.copy()
                on[j] = 1
                logs = _logs(runner.infer(given | {SWITCHES: on} | _weight(layer, options, grid)))
                totals[layer.name] += float((np.exp(truth) * (truth - logs)).sum(axis=1).mean()) / len(blocks)
                tell((i + (j + 1) / len(tried)) / len(blocks))
    return totals


def _add_switches(model: ir.Model, layers: Sequence[Product], precision: str, magnitudes: Mapping[str, float]) -> None:
    graph = model.graph
    switches = ir.val(SWITCHES, ir.DataType.FLOAT, [len(layers)])
    graph.inputs.append(switches)
    for i, layer in enumerate(layers):
        if layer.weight not in graph.inputs:
            graph.inputs.append(layer.weight)
        if precision not in TOP:
            continue
        value = layer.activation
        turned = round_trip(model, layer, magnitudes[str(value.name)], precision, unique=f".{i}")
        at = ir.val(f"{SWITCHES}.{i}", const_value=ir.tensor(np.array(i, np.int64), name=f"{SWITCHES}.{i}"))
        graph.register_initializer(at)
        op = tape.Tape()
        switch = op.op("CastLike", [op.op("Gather", [switches, at]), value])
        switched = op.op("Add", [value, op.op("Mul", [switch, op.op("Sub", [turned, value])])])
        graph.insert_before(layer.node, op.nodes)
        layer.node.replace_input_with(0, switched)


def _weight(layer: Product, options: CalibrationOptions, grid: Callable[[Product], Grid] | None) -> fd.Feeds:
    """The layer's weight as its quantised numbers stand for it."""
    numbers = rounded(layer, options, grid).dequantised()
    return {str(layer.weight.name): numbers.astype(layer.dtype.numpy())}


def _logs(outputs: fd.Feeds) -> NDArray[np.floating[Any]]:
    return log_softmax(outputs["logits"][0].astype(np.float64))
