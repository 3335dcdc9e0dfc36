"""What a file is, in a screenful: checkpoints, ONNX graphs and engines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from export_vq import contract
from export_vq.errors import UserError
from export_vq.files import sha256, size
from export_vq.records import EngineArtifact, HeadSpec, OnnxArtifact, Record

_WIDTH = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Inspection(Record):
    """`numbers` counts the floating-point parameters of the file's model; sizes are bytes in `dtype`, codes packed."""

    path: str
    what: str
    model_type: str
    dtype: str
    spec: HeadSpec
    file_bytes: int
    numbers: int
    tied_embedding: bool
    floor: float | None = None
    """Lowest perplexity any training could reach with this mapping on the given text."""
    dead_codes: int | None = None
    """Codes of a checkpoint's head that no token uses, of M * K."""
    notes: tuple[str, ...] = ()

    @property
    def head_bytes(self) -> int:
        return self.spec.head_bytes(_WIDTH[self.dtype])

    @property
    def dense_head_bytes(self) -> int:
        return self.spec.dense_bytes(_WIDTH[self.dtype])

    @property
    def model_bytes(self) -> int:
        """The whole model with its VQ head."""
        return self.numbers * _WIDTH[self.dtype] + self.spec.code_bytes

    @property
    def dense_model_bytes(self) -> int:
        """The whole model with dense layers at both ends; where the original tied them, its head costs nothing."""
        backbone = self.model_bytes - self.head_bytes
        if self.spec.tie_embedding:  # this model has no embedding of its own, a dense one has
            backbone += self.spec.vocab_size * self.spec.hidden_size * _WIDTH[self.dtype]
        return backbone + (0 if self.tied_embedding else self.dense_head_bytes)


def inspect_path(path: Path, text: Path | None = None) -> Inspection:
    """Look at a VQ-Logits checkpoint or at an ONNX file that export-vq wrote.

    Args:
        path: model.pt, Hugging Face folder or .onnx file.
        text: UTF-8 text for the perplexity floor; checkpoints with a tokenizer only.

    Raises:
        UserError: the path is none of these, or is damaged.
    """
    if path.suffix == ".onnx":
        if text is not None:
            raise UserError(f"{path}: the floor needs the tokenizer of a checkpoint; give --text with the model.pt")
        return _inspect_onnx(path)
    return _inspect_checkpoint(path, text)


def inspect_engine(plan: Path) -> EngineArtifact:
    """What the sidecar of a TensorRT plan says; the plan itself can only be opened by the TensorRT that it is for.

    Args:
        plan: <kind>.plan.

    Raises:
        UserError: there is no such plan, it has no sidecar, or the two do not belong together.
    """
    if not plan.is_file():
        raise UserError(f"{plan}: no such file; give a plan that export-vq build wrote")
    artifact = EngineArtifact.load(plan.with_suffix(".json"))
    if sha256(plan) != artifact.sha256:
        raise UserError(f"{plan}: not the file that {plan.stem}.json describes; build it again with: export-vq build")
    return artifact


def _inspect_checkpoint(path: Path, text: Path | None) -> Inspection:
    from export_vq.load import load_model
    from export_vq.quality.floor import mapping_floor
    from export_vq.text import read_text, token_blocks

    loaded = load_model(path)
    floor = None
    if text is not None and loaded.head is not None:
        floor = mapping_floor(
            loaded.head,
            token_blocks(loaded.tokenizer(), read_text(text), 1, vocab_size=loaded.spec.vocab_size).flatten(),
        )
    return Inspection(
        path=str(path),
        what="checkpoint",
        model_type=loaded.model_type,
        dtype="fp32",
        spec=loaded.spec,
        file_bytes=size(path),
        numbers=sum(p.numel() for p in loaded.model.parameters()),
        tied_embedding=loaded.tied_embedding,
        floor=floor,
        dead_codes=None if loaded.head is None else loaded.head.dead_codes,
        notes=loaded.notes,
    )


def _inspect_onnx(path: Path) -> Inspection:
    import onnx_ir as ir

    from export_vq.forms import head_nodes
    from export_vq.graph import METADATA_KEY

    try:
        model = ir.load(path)
    except Exception as error:  # protobuf's and onnx_ir's errors share no base
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path}: not a readable ONNX file ({reason}); export it again") from error
    metadata = model.metadata_props.get(METADATA_KEY)
    if metadata is None:
        raise UserError(f"{path}: not written by export-vq (no {METADATA_KEY} metadata); give one of its files")
    try:
        artifact = OnnxArtifact.from_json(json.loads(metadata))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: its {METADATA_KEY} metadata is damaged ({error}); export it again") from error
    nodes = head_nodes(model)
    ops = ", ".join(dict.fromkeys(f"{node.domain}::{node.op_type}" for node in nodes)) or contract.DOMAIN
    weights = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    data = [path.with_name(name) for name in {str(w.location) for w in weights if isinstance(w, ir.ExternalTensor)}]
    missing = [file.name for file in data if not file.is_file()]
    if missing:
        raise UserError(f"{path}: its weights file {missing[0]} is missing; keep both files in one folder")
    functions = ", ".join(sorted(f.name for f in model.functions.values())) or "none"
    return Inspection(
        path=str(path),
        what=f"ONNX, {artifact.form} form, opset {artifact.opset}",
        model_type=artifact.model_type,
        dtype=artifact.dtype,
        spec=artifact.spec,
        file_bytes=path.stat().st_size + sum(file.stat().st_size for file in data),
        numbers=sum(w.size for w in weights if w.dtype.is_floating_point()),
        tied_embedding=artifact.tied_embedding,
        notes=(
            f"{len(nodes)} {ops} node{'' if len(nodes) == 1 else 's'}, functions: {functions}",
            f"inputs: {', '.join(_named(artifact.input_names))}",
            f"outputs: {', '.join(_named(artifact.output_names))}",
            *artifact.notes,
        ),
    )


def _named(names: tuple[str, ...]) -> list[str]:
    """Names for a screen: the cache's many tensors as one pattern."""
    plain = [n for n in names if ".key" not in n and ".value" not in n]
    cache = [n for n in names if n not in plain]
    return plain + ([f"{cache[0]} .. {cache[-1]}"] if cache else [])
