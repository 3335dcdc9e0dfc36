"""Checkpoint files as they are stored, read and written raw: config, tensors, tokenizer files.

`model.pt` is a dict: `format` "vq-logits", `version` 1, `config` (the Hugging Face config as a dict with a `vq_logits`
section), `state_dict` (backbone under its Hugging Face names, head as `lm_head.codebook [M, K, D or D/M]`,
`lm_head.codes [V, M]`, `lm_head.bias [V]`, `lm_head.rotation [D, D]`), optional `tokenizer` (file name -> text).
Codes may have any integer type of 8 to 64 bits. Where the section says `tie_embedding: true` (default false), the input
embedding is no tensor of its own: its rows are those of the head's dense twin.
A folder holds the same as `config.json`, `*.safetensors` and the tokenizer's files.

Data, never code: tensors come from safetensors or `torch.load(weights_only=True)`. What a file says is checked here as
far as its format goes; whether it makes a model is for validate.py and load.py.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export_vq import contract
from export_vq.errors import UserError
from export_vq.files import whole
from export_vq.validate import first_line, mapping, shown

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
"""Text files that travel with a checkpoint; any other name is refused, so no path can leave the folder."""


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Config, tensors by name, and tokenizer files by name, of a `model.pt` or a Hugging Face folder.

    Raises:
        UserError: the path holds neither, or something of another format.
    """
    _check_not_exported(path)
    return _read_folder(path) if path.is_dir() else _read_pt(path)


def _check_not_exported(path: Path) -> None:
    """What export-vq writes is not what it reads, and easily given in its place."""
    made = path if path.suffix == ".onnx" else path / "model.onnx"
    if made.is_file() and not any(path.glob("*.safetensors*")):
        raise UserError(
            f"{path}: {'an ONNX file' if made == path else 'a folder of exported graphs'}, expected a checkpoint, which is "
            "a model.pt or a Hugging Face folder; give the one that it was made from, or take another command "
            "(generate, inspect, calibrate, build)"
        )


def write_checkpoint(path: Path, config: dict[str, Any], tensors: dict[str, Tensor], files: Mapping[str, str]) -> None:
    """Write a `model.pt` where the name ends in .pt, else a Hugging Face folder; whole or not at all.

    Raises:
        UserError: the place cannot be written, or is a folder that holds other things, which would be lost.
    """
    as_folder = path.suffix != ".pt"
    if path.exists():
        foreign = _foreign(path) if path.is_dir() and as_folder else None
        if path.is_dir() != as_folder or foreign:
            found = f"a folder that also holds {foreign}" if foreign else "a file" if as_folder else "a folder"
            expected = "a folder of its own" if as_folder else "a file name"
            raise UserError(f"{path}: this is {found}, expected {expected} to write to; choose another output with -o")
    try:
        with whole(path) as staged:
            if as_folder:
                from safetensors.torch import save_file

                staged.mkdir()
                (staged / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
                save_file(tensors, staged / "model.safetensors", metadata={"format": "pt"})
                for name, text in files.items():
                    (staged / name).write_text(text, encoding="utf-8")
            else:
                data = {
                    "format": contract.CHECKPOINT_FORMAT,
                    "version": contract.CHECKPOINT_VERSION,
                    "config": config,
                    "state_dict": tensors,
                    "tokenizer": dict(files),
                }
                torch.save(data, staged)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({first_line(error)}); choose another output with -o") from error


def _foreign(folder: Path) -> str | None:
    """The first thing in a folder that is no part of a checkpoint of ours."""
    ours = {"config.json", "model.safetensors", *TOKENIZER_FILES}
    return next((child.name for child in sorted(folder.iterdir()) if child.name not in ours), None)


def _read_pt(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    data = _unpickle(path)
    if not isinstance(data, dict):
        raise UserError(
            f"{path}: found a {type(data).__name__}, expected a dict with format, version, config and state_dict; "
            "save it with export-vq's save_model"
        )
    for name, expected, mend in (
        ("format", contract.CHECKPOINT_FORMAT, "save it with export-vq's save_model"),
        ("version", contract.CHECKPOINT_VERSION, "use an export-vq that matches the file"),
    ):
        found = data.get(name)
        if type(found) is not type(expected) or found != expected:  # True == 1, and a tensor compares to a tensor
            raise UserError(f"{path}: {name} is {shown(found)}, expected {expected!r}; {mend}")
    for name in data:
        if name not in ("format", "version", "config", "state_dict", "tokenizer"):
            raise UserError(
                f"{path}: unknown field {shown(name)}; expected format, version, config, state_dict, tokenizer; remove it"
            )
    config = mapping(path, "config", data.get("config"))
    tensors = mapping(path, "state_dict", data.get("state_dict"))
    files = mapping(path, "tokenizer", data.get("tokenizer", {}))
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(
                f"{path}: state_dict[{shown(name)}] is a {type(value).__name__}, expected tensors by name; save only those there"
            )
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise UserError(
                f"{path}: tensor {name} is sparse, quantised or without data, expected a dense tensor; convert it before saving"
            )
    for name, text in files.items():
        if name not in TOKENIZER_FILES or not isinstance(text, str):
            raise UserError(
                f"{path}: tokenizer[{shown(name)}] is not a known tokenizer file with text, expected some of "
                f"{', '.join(TOKENIZER_FILES)}; remove it"
            )
    return config, tensors, files


def _unpickle(path: Path) -> Any:
    """What `torch.save` put into a file; tensors and plain data only, no code is ever run."""
    try:
        if not path.exists():
            raise UserError(
                f"{path}: no such file or folder, expected a VQ-Logits model.pt or a Hugging Face folder; correct the path"
            )
        if path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty, expected a torch.save archive; copy or save it again")
        _check_readable(path)
        if not zipfile.is_zipfile(path):
            raise UserError(
                f"{path}: no zip structure (cut short, or another format), expected a torch.save archive; copy or save it again"
            )
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        # torch's own advice, to load it with code execution allowed, must not reach the user.
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        if blocked:
            raise UserError(
                f"{path}: refused, it holds {blocked[1]}, expected only tensors and plain data; "
                "save a dict of tensors, numbers and strings, no classes"
            ) from error
        found = "damaged pickle" if "eights only load failed" in str(error) else first_line(error)
        raise UserError(
            f"{path}: damaged archive ({found}), expected one from torch.save; copy or save it again"
        ) from error


def _read_folder(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    from safetensors.torch import load_file

    config_file = path / "config.json"
    if not config_file.is_file():
        raise UserError(
            f"{path}: no config.json in this folder, expected a Hugging Face model folder or a model.pt; correct the path"
        )
    config = mapping(config_file, "(top level)", read_json(config_file))
    tensors: dict[str, Tensor] = {}
    for name in _shards(path):
        file = path / name
        if not file.is_file():
            raise UserError(f"{path}: {name} is missing, expected the model's weights in it; save or copy it again")
        _check_readable(file)
        try:
            shard = load_file(file)
        except Exception as error:  # damaged headers raise several kinds
            raise UserError(
                f"{file}: damaged file ({first_line(error)}), expected safetensors; save or copy it again"
            ) from error
        twice = sorted(set(shard) & set(tensors))
        if twice:
            raise UserError(
                f"{file}: tensor {twice[0]} is also in another shard, expected it once; save the model again"
            )
        tensors.update(shard)
    return config, tensors, tokenizer_files(path)


def _check_readable(file: Path) -> None:
    """Who may not read a file is told that, not that it is damaged."""
    try:
        file.open("rb").close()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); see to its permissions") from error


def _shards(path: Path) -> list[str]:
    """Names of the weight files in a folder."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    weight_map = mapping(index, "weight_map", mapping(index, "(top level)", read_json(index)).get("weight_map"))
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if not re.fullmatch(r"\w[\w.-]*\.safetensors", name):  # no path can leave the folder
            raise UserError(
                f"{index}: weight_map names {shown(name)}, expected plain names of safetensors files in the same folder; "
                "save the model again"
            )
    return names


def tokenizer_files(folder: Path) -> dict[str, str]:
    """The tokenizer files in a folder, by name.

    Raises:
        UserError: one is not readable as text.
    """
    found = {}
    for name in TOKENIZER_FILES:
        file = folder / name
        if file.is_file():
            try:
                found[name] = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(
                    f"{file}: not readable ({first_line(error)}), expected UTF-8 text; copy it again"
                ) from error
    return found


def positions_of(config: dict[str, Any]) -> Any:
    """How many positions a Hugging Face config gives its model, unchecked; None where it is silent."""
    return config.get("max_position_embeddings") or config.get("n_positions")


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it is not valid JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: damaged ({first_line(error)}), expected valid JSON; save or copy it again") from error
