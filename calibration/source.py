"""The exported folder that calibrate works on, opened and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from export_vq import forms, manifest
from export_vq.calibration.options import HALF, CalibrationOptions
from export_vq.calibration.products import check_unquantised, products
from export_vq.calibration.quantise import needed_opset
from export_vq.checkpoint import TOKENIZER_FILES, positions_of, read_json
from export_vq.errors import UserError
from export_vq.files import sha256
from export_vq.forms import read_graph
from export_vq.records import OnnxArtifact
from export_vq.validate import check_tokenizer

FILES = ("model.onnx", "model.onnx.json", "config.json", "tokenizer.json")
TEXTS = ("config.json", *TOKENIZER_FILES)
"""What a folder holds beside its graphs; the quantised one gets copies."""


@dataclass(frozen=True)
class Source:
    """An exported model: its graph as it is on disk, the dense twin's where it is there, its tokenizer, its Hugging Face
    config, its positions."""

    folder: Path
    artifact: OnnxArtifact
    graph: ir.Model
    dense: ir.Model | None
    tokenizer: Any
    config: dict[str, Any]
    positions: int

    @property
    def path(self) -> Path:
        return self.folder / self.artifact.path


def open_source(folder: Path, options: CalibrationOptions) -> Source:
    """Read what `export-vq export` wrote.

    Raises:
        UserError: a file is missing, damaged or of another model; the graph cannot be quantised as asked.
    """
    from tokenizers import Tokenizer

    for name in FILES:
        if not (folder / name).is_file():
            raise UserError(f"{folder}: holds no {name}; write the folder with: export-vq export MODEL -o {folder}")
    artifact = OnnxArtifact.load(folder / "model.onnx.json")
    path = folder / artifact.path
    graph = read_graph(path)
    check_unquantised(str(path), graph)
    if artifact.form not in ("portable", "plain"):
        raise UserError(
            f"{path}: is in the {artifact.form} form, which TensorRT alone runs; export it with --form portable"
        )
    if artifact.output != "logits" or artifact.last_token:
        raise UserError(
            f"{path}: gives {artifact.output} of {'the last position' if artifact.last_token else 'each position'}, but logits "
            "of every position are needed to measure what quantising costs; export it with --output logits"
        )
    if options.precision in HALF and artifact.dtype != "fp32":
        raise UserError(
            f"{path}: is in {artifact.dtype} already, so what it overflows cannot be seen; export it with --dtype fp32"
        )
    needed = needed_opset(options, narrow=artifact.dtype != "fp32")
    if artifact.opset < needed:
        raise UserError(
            f"{path}: has opset {artifact.opset}, {options.precision} of {artifact.dtype} for {options.runtime} needs {needed}; "
            f"export it again with --opset {needed}"
        )
    if not products(graph):
        raise UserError(f"{path}: has no product with weights to quantise; export it again")
    _check_exported_tokenizer(folder)
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    check_tokenizer(folder, artifact.spec.vocab_size, {"tokenizer.json": text})
    config = read_json(folder / "config.json")
    positions = positions_of(config) or options.width
    dense = read_graph(folder / "dense.onnx") if (folder / "dense.onnx").is_file() else None
    return Source(folder, artifact, graph, dense, Tokenizer.from_str(text), config, int(positions))


def _check_exported_tokenizer(folder: Path) -> None:
    """Ids of another tokenizer may all be known to the model and still mean other words."""
    if not (folder / manifest.FILE).is_file():
        return
    listed = manifest.read(folder).files.get("tokenizer.json")
    if listed is not None and listed != sha256(folder / "tokenizer.json"):
        raise UserError(
            f"{folder / 'tokenizer.json'}: is not the tokenizer that was exported with the model (its hash is not the one in "
            f"{manifest.FILE}); copy the folder again, or export the model again"
        )


def in_plain_form(model: ir.Model) -> ir.Model:
    """A copy in standard ops only, which counting and measuring may add to."""
    copy = model.clone()
    if forms.head_nodes(copy):
        forms.convert(copy, "plain")
    return copy
