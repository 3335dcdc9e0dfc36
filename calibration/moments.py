"""Second moments of what enters products: which directions of an input matter, and which hardly occur."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export_vq import feeds as fd
from export_vq.calibration.collect import STEPS, saved, through_cache, with_outputs
from export_vq.errors import UserError
from export_vq.files import whole
from export_vq.runners import OrtRunner

_KEPT = 8
"""Blocks after which the sums are written: they are hundreds of megabytes, as much as all weights."""
_DONE = "blocks done"

Moments = dict[str, NDArray[np.float32]]


def second_moments(
    model: ir.Model,
    taps: dict[str, str],
    signature: fd.Signature,
    blocks: NDArray[np.int64],
    cache: Path,
    made_from: dict[str, Any],
    *,
    threads: int = 0,
    tell: Callable[[float], None] = lambda _: None,
) -> Moments:
    """Sum the outer products of tensors [.., D] over blocks of tokens.

    Args:
        model: standard ops only; gains outputs for the taps and loses its `logits`.
        taps: name of each tensor -> the layer that an error is to name.
        signature: of the graph.
        blocks: token ids int64 [n, S].
        cache: folder of the file that keeps the sums; a run that was stopped goes on from there.
        made_from: what they depend on besides taps and blocks.
        threads: of ONNX Runtime.
        tell: called with the fraction done.

    Returns:
        float32 [D, D] by tensor.

    Raises:
        UserError: NaN or infinity in a tensor; the sentence names its layer.
    """
    key = {**made_from, "taps": list(taps), "blocks": hashlib.sha256(blocks.tobytes()).hexdigest(), "steps": STEPS}
    file = cache / f"moments.{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]}.npz"
    done, sums = _read(file)
    if done == len(blocks):
        return sums
    with (
        saved(with_outputs(model, list(taps)), cache.parent) as path,
        OrtRunner(path, signature, threads=threads, native=False) as runner,
    ):
        for i in range(done, len(blocks)):
            for outputs in through_cache(runner, blocks[i : i + 1]):
                _add(sums, {name: outputs[name] for name in taps}, taps)
            if (i + 1) % _KEPT == 0 or i + 1 == len(blocks):
                kept: dict[str, Any] = {**sums, _DONE: np.array(i + 1)}
                with whole(file) as staged, staged.open("wb") as stream:
                    np.savez(stream, **kept)
            tell((i + 1) / len(blocks))
    return sums


def _add(sums: Moments, arrays: fd.Feeds, taps: dict[str, str]) -> None:
    for name, array in arrays.items():
        rows = array.reshape(-1, array.shape[-1]).astype(np.float32)
        product = rows.T @ rows
        if not np.isfinite(product).all():
            raise UserError(f"the activations of {taps[name]} hold NaN or infinity ({name}); the checkpoint is damaged")
        sums[name] = sums[name] + product if name in sums else product


def _read(file: Path) -> tuple[int, Moments]:
    """Blocks done and their sums; (0, {}) where nothing readable is there."""
    try:
        with np.load(file) as arrays:
            sums = {name: arrays[name] for name in arrays.files}
        return int(sums.pop(_DONE)), sums
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return 0, {}
