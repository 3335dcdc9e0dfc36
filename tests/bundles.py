"""Output folders of the tiny Llama, exported once a process: tests copy what they change."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from checkpoints import tiny_model

from export_vq.bundle import Bundle
from export_vq.graph import ExportOptions
from export_vq.load import LoadedModel
from export_vq.steps import export_step
from export_vq.terminal import Steps

_KEPT: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def llama() -> LoadedModel:
    return tiny_model("llama")


@functools.cache
def exported(output: str = "logits", *, last_token: bool = False) -> Path:
    """A folder as `export-vq export` fills it, not sealed: weights in files of their own, five best tokens of a topk graph."""
    _KEPT.append(tempfile.TemporaryDirectory())
    out = Path(_KEPT[-1].name)
    options = ExportOptions(output=output, top_k=5, last_token=last_token, external_data_bytes=0)
    export_step(llama, "hash", Bundle(out), options, Steps())
    return out
