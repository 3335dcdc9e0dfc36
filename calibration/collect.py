"""Run a graph over blocks of tokens and count how large chosen tensors get.

Each block is a prefill and then decode steps through the KV cache, so that both ways of running are seen. What is
counted after every block is on disk: an interrupted run goes on from there, and gives the same counts as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from export_vq import feeds as fd
from export_vq.calibration.histogram import Histogram, Largest
from export_vq.errors import UserError
from export_vq.files import write_text
from export_vq.runners import OrtRunner

S = TypeVar("S", Histogram, Largest)
STEPS = 8
"""Decode steps at the end of each block."""


@contextmanager
def saved(model: ir.Model, folder: Path) -> Iterator[Path]:
    """The graph as a file with its weights, in a scratch folder beside the output, as long as the context lasts."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".calibrate.", dir=folder) as scratch:
        path = Path(scratch, "graph.onnx")
        ir.save(model, path, external_data="graph.data")
        yield path


def through_cache(runner: fd.Runner, block: NDArray[np.int64]) -> Iterator[fd.Feeds]:
    """What a runner gives for a block of tokens int64 [B, S]: of the prefill, then of each decode step."""
    width = block.shape[1]
    start = max(1, width - STEPS)
    mask = np.ones_like(block)
    outputs = runner.infer(fd.prefill(runner.signature, block[:, :start], mask[:, :start]))
    yield outputs
    for i in range(start, width):
        outputs = runner.infer(fd.step(runner.signature, block[:, i : i + 1], mask[:, : i + 1], outputs))
        yield outputs


def collect(
    model: ir.Model,
    taps: dict[str, str],
    signature: fd.Signature,
    blocks: NDArray[np.int64],
    cache: Path,
    made_from: dict[str, Any],
    *,
    threads: int = 0,
    tell: Callable[[float], None] = lambda _: None,
    kind: type[S],
) -> dict[str, S]:
    """Count the magnitudes of tensors.

    Args:
        model: standard ops only; gains outputs for the taps and loses its `logits`.
        taps: name of each tensor -> the layer that an error is to name, in the graph's order.
        signature: of the graph.
        blocks: token ids int64 [n, S].
        cache: folder of the JSON files that keep what was counted, each named after what it was counted from.
        made_from: what the counts depend on besides taps and blocks.
        threads: of ONNX Runtime.
        tell: called with the fraction done.
        kind: Histogram or Largest.

    Raises:
        UserError: NaN or infinity in a tensor; the sentence names its layer.
    """
    key = {**made_from, "taps": list(taps), "blocks": hashlib.sha256(blocks.tobytes()).hexdigest(), "steps": STEPS}
    file = cache / f"ranges.{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]}.json"
    done, counted = _read(file, kind)
    if done == len(blocks):
        return counted
    with (
        saved(with_outputs(model, list(taps)), cache.parent) as path,
        OrtRunner(path, signature, threads=threads, native=False) as runner,
    ):
        for i in range(done, len(blocks)):
            for outputs in through_cache(runner, blocks[i : i + 1]):
                _count(counted, {name: outputs[name] for name in taps}, taps, kind)
            data = {"made_from": key, "done": i + 1, "tensors": {n: h.to_json() for n, h in counted.items()}}
            write_text(file, json.dumps(data) + "\n")
            tell((i + 1) / len(blocks))
    return counted


def _count(counted: dict[str, S], arrays: fd.Feeds, taps: dict[str, str], kind: type[S]) -> None:
    for name, array in arrays.items():
        seen = kind.of(array)
        if not np.isfinite(seen.largest):
            raise UserError(
                f"the activations of {taps[name]} hold NaN or infinity ({name}); the checkpoint is damaged, or its type is too "
                "small: export it with --dtype fp32"
            )
        counted[name] = counted[name] + seen if name in counted else seen


def _read(file: Path, kind: type[S]) -> tuple[int, dict[str, S]]:
    """Blocks done and what they counted; (0, {}) where nothing readable is there."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        return int(data["done"]), {name: kind.from_json(h) for name, h in data["tensors"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return 0, {}


def with_outputs(model: ir.Model, names: Sequence[str] = ()) -> ir.Model:
    """The graph, changed to give its cache and these tensors only, without what nobody reads then: its head."""
    values = {str(v.name): v for v in ir.convenience.create_value_mapping(model.graph).values()}
    outputs = model.graph.outputs
    kept = [v for v in outputs if str(v.name).startswith("present.")]
    outputs.clear()
    outputs.extend([*kept, *(values[name] for name in names if values[name] not in kept)])
    RemoveUnusedNodesPass()(model)
    return model
