"""The engines of an output folder: those that can be built here are built, those that are current are kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from export_vq import forms
from export_vq.checkpoint import positions_of
from export_vq.engine import EngineOptions, build_engine, builder_versions, engine_folder
from export_vq.engine_source import KINDS
from export_vq.errors import UserError
from export_vq.files import sha256
from export_vq.plugins.library import find, require_library
from export_vq.progress import Progress
from export_vq.records import EngineArtifact
from export_vq.trt import find_tensorrt

FOLDER = "engines"
_SOURCES = {"vq-plugin": "model.onnx", "vq-plain": "model.onnx", "dense": "dense.onnx"}


def build_engines(
    source: Path, out: Path, kinds: Sequence[str], options: EngineOptions, progress: Progress
) -> tuple[dict[str, EngineArtifact], list[str]]:
    """Build the engines of what `export` wrote, each one unless its plan on disk was made from the same things.

    Args:
        source: an output folder with model.onnx and dense.onnx, or one .onnx file.
        out: output folder; the plans go to engines/<gpu>-<tensorrt> in it.
        kinds: which to build, all of engine.KINDS; empty builds what this machine can.
        options: see EngineOptions.
        progress: told of every step.

    Returns:
        {kind: artifact}, and what could not be built, each with the mend.

    Raises:
        UserError: as `build_engine`; or a kind was asked for that cannot be built from this source.
        CheckFailed: as `build_engine`.
    """
    files, not_done = _files(source, kinds, options)
    built = {}
    for kind, file in files.items():
        # What only one kind has is no mistake when others are built beside it.
        own = options if kind == "vq-plugin" or "vq-plugin" not in files else replace(options, embed_plugin=False)
        kept = _current(file, kind, out / FOLDER, own)
        if kept is not None:
            progress.skipped(f"build {kind}")
            built[kind] = kept
            continue
        with progress.step(f"build {kind}") as tell:
            built[kind] = build_engine(file, kind, out / FOLDER, own, tell)
    return built, not_done


def options_for(source: Path, options: EngineOptions) -> EngineOptions:
    """The options with the default profiles held to the model's own context, where a config.json beside it tells that."""
    config = (source if source.is_dir() else source.parent) / "config.json"
    try:
        longest = positions_of(json.loads(config.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError):
        return options
    known = isinstance(longest, int) and longest > 0
    return replace(options, context=min(options.context, longest)) if known else options


def _files(source: Path, kinds: Sequence[str], options: EngineOptions) -> tuple[dict[str, Path], list[str]]:
    """{kind: the file that it is built from}, and what was left out."""
    if not source.exists():
        raise UserError(
            f"{source}: no such file or folder; give the folder that export-vq export wrote, or an .onnx file"
        )
    wanted = list(kinds or KINDS)
    if source.is_dir():
        files = {kind: source / _SOURCES[kind] for kind in wanted}
        missing = {kind: file for kind, file in files.items() if not file.is_file()}
        if missing and (kinds or len(missing) == len(files)):
            file = next(iter(missing.values()))
            raise UserError(f"{file}: no such file; write it with: export-vq export MODEL -o {source}")
        files = {kind: file for kind, file in files.items() if kind not in missing}
    else:
        is_dense = not forms.head_nodes(forms.read_graph(source))
        files = {kind: source for kind in wanted if kinds or (kind == "dense") == is_dense}
    not_done = []
    if not kinds and "vq-plugin" in files and options.plugin is None:
        try:
            require_library("vq_trt")
        except UserError as error:
            del files["vq-plugin"]
            not_done.append(f"vq-plugin engine: {error}")
    return files, not_done


def _current(source: Path, kind: str, folder: Path, options: EngineOptions) -> EngineArtifact | None:
    """The artifact on disk, when it was built from the same files with the same options on the same TensorRT and GPU."""
    here = find_tensorrt(options.flavour)
    target = engine_folder(folder, here)
    try:
        kept = EngineArtifact.load(target / f"{kind}.json")
    except UserError:
        return None
    library = options.plugin or getattr(find("vq_trt"), "path", None)
    plugin = sha256(library) if kind == "vq-plugin" and library is not None else None
    made_from = (kept.tensorrt_version, kept.plugin_sha256, kept.options, kept.versions)
    if made_from != (here.version, plugin, json.loads(json.dumps(options.to_record())), builder_versions()):
        return None
    hashes = {source.with_name(name): digest for name, digest in kept.source_sha256.items()}
    hashes[target / kept.path] = kept.sha256
    sound = (target / kept.onnx).is_file() and source in hashes
    return kept if sound and all(p.is_file() and sha256(p) == digest for p, digest in hashes.items()) else None
