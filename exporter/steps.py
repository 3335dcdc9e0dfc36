"""Single steps of the walk that keep their result while what it was made from is unchanged: compress and export."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from export_vq.bundle import Bundle
from export_vq.compress import CompressOptions, compress_model
from export_vq.errors import UserError
from export_vq.files import sha256, write_text
from export_vq.genai import write_genai_config
from export_vq.graph import ExportOptions, export_onnx
from export_vq.load import LoadedModel, load_dense, load_model, save_model
from export_vq.outputs import DEFAULT_TOP_K
from export_vq.progress import Progress
from export_vq.records import Compressed, HeadSpec, OnnxArtifact
from export_vq.text import read_text, token_blocks
from export_vq.tuning.options import FinetuneOptions, FinetuneReport

TUNE_BLOCK = 256
HOLD_OUT_EVERY = 16
MOST_HELD_OUT = 32
"""Blocks that tuning is judged by: each costs a run of both models at every look."""
_EXPORTERS = ("export-vq", "torch", "transformers", "onnx", "onnxscript")
"""Packages whose version shapes an exported graph."""


def compress_step(model: Path, text: Path, output: Path, options: CompressOptions, progress: Progress) -> HeadSpec:
    """Make a VQ-Logits checkpoint of a dense model, or keep the one on disk when it was made from the same things.

    Args:
        model: Hugging Face folder or GGUF file.
        text: UTF-8 text file or folder.
        output: model.pt or a folder; `<output>.json` beside it records what it was made from. A run that is stopped leaves
            what is done in a hidden folder beside it, and the same call goes on from there.
        options: see CompressOptions.
        progress: told of every step.

    Raises:
        UserError: an input cannot be used.
    """
    words = read_text(text)
    if not model.exists():
        raise UserError(
            f"{model}: no such file or folder; give a causal language model as a Hugging Face folder or GGUF file"
        )
    made_from = (sha256(model), hashlib.sha256(words.encode()).hexdigest(), _options(options), version("export-vq"))
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:12]
    unfinished = output.with_name(f".{output.name}.{key}.unfinished")
    record = output.with_name(output.name + ".json")
    if record.is_file() and output.exists():
        kept = Compressed.load(record)
        if (kept.source_sha256, kept.text_sha256, kept.options, kept.version) == made_from and kept.sha256 == sha256(
            output
        ):
            progress.skipped("compress")
            return kept.spec
    for other in output.parent.glob(f".{output.name}.*.unfinished"):
        if other != unfinished:
            shutil.rmtree(other, ignore_errors=True)
    with progress.step("load"):
        dense = load_dense(model)
    with progress.step("compress") as tell:
        vq = compress_model(dense, words, options, tell, unfinished=unfinished)
    with progress.step("save"):
        save_model(vq, output)
    Compressed(*made_from, spec=vq.spec, sha256=sha256(output)).save(record)
    return vq.spec


def _options(options: CompressOptions) -> dict[str, Any]:
    """The options as the record keeps them: a file that they name counts by its content."""
    kept = asdict(options)
    if options.keep_tokens is not None and Path(options.keep_tokens).is_file():
        kept["keep_tokens_sha256"] = sha256(Path(options.keep_tokens))
    return kept


def tune_step(
    model: Path, teacher: Path, text: Path, output: Path, options: FinetuneOptions, progress: Progress
) -> FinetuneReport:
    """Tune a VQ-Logits checkpoint end to end and write it, with `<output>.json` beside it: what was done.

    Args:
        model: VQ-Logits model.pt or folder.
        teacher: the dense original, Hugging Face folder or GGUF file.
        text: UTF-8 text file or folder; every sixteenth block is held out.
        output: model.pt or a folder.
        options: see FinetuneOptions.
        progress: told of every step.

    Raises:
        UserError: an input cannot be used.
    """
    from export_vq.tuning import finetune

    with progress.step("load"):
        student, dense = load_model(model), load_dense(teacher)
    width = min(TUNE_BLOCK, student.max_positions)
    blocks = token_blocks(student.tokenizer(), read_text(text), width, vocab_size=student.spec.vocab_size)
    held = torch.arange(len(blocks)) % HOLD_OUT_EVERY == HOLD_OUT_EVERY // 2
    if not bool(held.any()):
        raise UserError(
            f"{text}: {len(blocks)} blocks of {width} tokens, at least {HOLD_OUT_EVERY // 2 + 1} were expected, as some are "
            "held out; give a longer text"
        )
    state = output.with_name(f".{output.name}.unfinished")
    with progress.step("tune") as tell:
        result = finetune(student, blocks[~held], blocks[held][:MOST_HELD_OUT], options, state, dense, tell)
    with progress.step("save"):
        save_model(result.model, output)
    result.report.save(output.with_name(output.name + ".json"))
    shutil.rmtree(state, ignore_errors=True)
    return result.report


def export_step(
    loaded: Callable[[], LoadedModel], source: str, bundle: Bundle, options: ExportOptions, progress: Progress
) -> dict[str, OnnxArtifact]:
    """Export with config, tokenizer and genai_config.json beside; or the artifacts on disk when they were made from the same
    source with the same options and versions."""
    versions = tuple(version(name) for name in _EXPORTERS)
    output = options.head_output
    wanted = (
        *(source, options.dtype, options.opset, options.external_data_bytes),
        *(output.word, output.top_k, output.last_token, *versions),
    )
    kept = {"vq": bundle.artifact("model.onnx"), "dense": bundle.artifact("dense.onnx")}
    found = {name: a for name, a in kept.items() if a is not None}
    if len(found) == 2 and found["vq"].form == options.form and all(_made_from(a) == wanted for a in found.values()):
        progress.skipped("export")
        return found
    model = loaded()
    with progress.step("export"):
        artifacts = export_onnx(model, bundle.folder, options)
    files = {"config.json": json.dumps(model.config, indent=2) + "\n", **model.tokenizer_files}
    for name, text in files.items():
        write_text(bundle.folder / name, text)
    write_genai_config(bundle.folder, artifacts["vq"], model.config)
    return artifacts


def options_in(bundle: Bundle, dtype: str) -> ExportOptions:
    """How to export into a folder for another step's sake: what its graph gives, in `dtype`; logits where it has none."""
    kept = bundle.artifact("model.onnx")
    if kept is None:
        return ExportOptions(dtype=dtype)
    return ExportOptions(dtype=dtype, output=kept.output, top_k=kept.top_k or DEFAULT_TOP_K, last_token=kept.last_token)


def _made_from(artifact: OnnxArtifact) -> tuple[Any, ...]:
    versions = tuple(artifact.versions.get(name) for name in _EXPORTERS)
    return (
        *(artifact.source_sha256, artifact.dtype, artifact.opset, artifact.external_data_bytes),
        *(artifact.output, artifact.top_k, artifact.last_token, *versions),
    )
