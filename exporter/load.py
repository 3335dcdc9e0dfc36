"""The only reader and writer of checkpoints: `model.pt`, Hugging Face folders, and dense causal LMs to start from.

A VQ-Logits checkpoint is data, never code: tensors come from safetensors or `torch.load(weights_only=True)`, the
network from the transformers class that the config's `model_type` names. Everything is validated here, so that no
later step has to.

`model.pt` is a dict: `format` "vq-logits", `version` 1, `config` (the Hugging Face config as a dict with a `vq_logits`
section), `state_dict` (backbone under its Hugging Face names, head as `lm_head.codebook [M, K, D or D/M]`,
`lm_head.codes [V, M]`, `lm_head.bias [V]`, `lm_head.rotation [D, D]`), optional `tokenizer` (file name -> text).
A folder holds the same as `config.json`, `*.safetensors` and the tokenizer's files.
"""

from __future__ import annotations

import json
import pickle
import re
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from export_vq import contract
from export_vq.errors import UserError
from export_vq.files import sha256, whole
from export_vq.head import VQHead
from export_vq.records import HeadSpec

TESTED_MODEL_TYPES = ("gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3")
"""Architectures whose export is proven by test; others are refused by name."""

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

_HEAD_TENSORS = ("codebook", "codes", "bias", "rotation")
_CODE_DTYPES = (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64)
_FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM ready to run: validated, on the CPU, in eval mode.

    `model` is the transformers module; its output layer is a `VQHead` (`head`), or the dense layer of an ordinary model
    when `head` is None. `config` is the Hugging Face config as a dict, `tokenizer_files` maps file names to text.
    """

    model: nn.Module
    head: VQHead | None
    config: dict[str, Any]
    tokenizer_files: dict[str, str]
    source: str
    sha256: str
    notes: tuple[str, ...] = field(default=())

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])

    @property
    def tied_embedding(self) -> bool:
        """The dense original shared its output layer with the input embedding, which stays dense."""
        return bool(self.config.get("tie_word_embeddings", True))

    @property
    def spec(self) -> HeadSpec:
        """The head's shape.

        Raises:
            UserError: this is an ordinary model.
        """
        if self.head is None:
            raise UserError(
                f"{self.source}: this model has an ordinary output layer, a VQ-Logits head was expected; "
                f"make one with: export-vq compress {self.source} --text FILE -o model.pt"
            )
        return self.head.spec

    def tokenizer(self) -> Any:
        """The model's own tokenizer, a transformers object.

        Raises:
            UserError: the checkpoint carries none, or it cannot be read.
        """
        if not any(name in self.tokenizer_files for name in ("tokenizer.json", "vocab.json", "vocab.txt")):
            raise UserError(
                f"{self.source}: no tokenizer in the checkpoint, one was needed for text; "
                "save the model again with its tokenizer.json"
            )
        from transformers import AutoTokenizer

        with tempfile.TemporaryDirectory() as folder:
            for name, text in self.tokenizer_files.items():
                Path(folder, name).write_text(text, encoding="utf-8")
            # Without a config.json the tokenizer's own class decides, and no code is ever fetched.
            try:
                return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            except Exception as error:  # the library raises anything on damaged files
                raise UserError(
                    f"{self.source}: the tokenizer cannot be read ({_first_line(error)}); "
                    "save the model again with a working tokenizer"
                ) from error


# --------------------------------------------------------------------------------------------------------- reading


def load_model(path: Path, *, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Read and validate a VQ-Logits checkpoint.

    Args:
        path: `model.pt` or a Hugging Face folder.
        dtype: floating type to hold the model in.

    Raises:
        UserError: anything about the input is wrong; the sentence names file, field, found, expected and mend.
    """
    config, tensors, files = _read_folder(path) if path.is_dir() else _read_pt(path)
    spec = _check_config(path, config)
    tensors, notes = _recognise(path, tensors)
    head = _check_head(path, spec, tensors)
    _check_tokenizer(path, spec.vocab_size, files)
    backbone = {name: value for name, value in tensors.items() if not name.startswith(contract.HEAD_PREFIX)}
    model = _build(path, config, head, backbone)
    return LoadedModel(model.to(dtype).eval(), head.to(dtype), config, files, str(path), sha256(path), notes)


def load_dense(path: Path) -> LoadedModel:
    """Read an ordinary causal LM in float32: a Hugging Face folder with safetensors, or a GGUF file.

    Raises:
        UserError: the path is neither, or the model cannot be read, or its architecture is not a tested one.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = path.suffix == ".gguf"
    if not (gguf and path.is_file()) and not (path / "config.json").is_file():
        raise UserError(
            f"{path}: found neither a .gguf file nor a folder with config.json; give a causal language model as one of them"
        )
    folder = path.parent if gguf else path
    options: dict[str, Any] = {"gguf_file": path.name} if gguf else {"use_safetensors": True}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, **options
        )
    except Exception as error:  # the library raises anything on damaged files
        raise UserError(
            f"{path}: not readable as a causal language model ({_first_line(error)}); give a folder that transformers can load"
        ) from error
    # A GGUF file arrives de-quantised; what remains of its quantiser only keeps it from being saved.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    config = _plain(model.config.to_dict())
    _check_model_type(path, config)
    files: dict[str, str] = {}
    if gguf:
        with tempfile.TemporaryDirectory() as scratch:
            AutoTokenizer.from_pretrained(folder, gguf_file=path.name, local_files_only=True).save_pretrained(scratch)
            files = _tokenizer_files(Path(scratch))
    else:
        files = _tokenizer_files(path)
    return LoadedModel(model.eval(), None, config, files, str(path), sha256(path))


def _read_pt(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give a VQ-Logits model.pt or a Hugging Face folder")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty, a torch.save archive was expected; copy or save it again")
    try:
        if not zipfile.is_zipfile(path):
            raise UserError(
                f"{path}: not a torch.save archive (no zip structure: cut short, or another format); copy or save it again"
            )
        data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: refused, it holds objects other than tensors and plain data ({_first_line(error)}); "
            "save a dict of tensors, numbers and strings, no classes"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged archive ({_first_line(error)}); copy or save it again") from error
    if not isinstance(data, dict):
        raise UserError(
            f"{path}: found a {type(data).__name__}, expected a dict with format, version, config and state_dict; "
            "save it with export-vq's save_model"
        )
    _expect(path, "format", data.get("format"), contract.CHECKPOINT_FORMAT, "save it with export-vq's save_model")
    _expect(path, "version", data.get("version"), contract.CHECKPOINT_VERSION, "use an export-vq that matches the file")
    unknown = sorted(set(map(str, data)) - {"format", "version", "config", "state_dict", "tokenizer"})
    if unknown:
        raise UserError(
            f"{path}: unknown field {unknown[0]}; expected format, version, config, state_dict, tokenizer; remove it"
        )
    config = _mapping(path, "config", data.get("config"))
    tensors = _mapping(path, "state_dict", data.get("state_dict"))
    files = _mapping(path, "tokenizer", data.get("tokenizer", {}))
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"{path}: state_dict[{name}] is a {type(value).__name__}, expected a tensor; save only tensors there"
            )
    for name, text in files.items():
        if name not in TOKENIZER_FILES or not isinstance(text, str):
            raise UserError(
                f"{path}: tokenizer[{name}] is not a known tokenizer file with text; expected some of {', '.join(TOKENIZER_FILES)}"
            )
    return dict(config), dict(tensors), dict(files)


def _read_folder(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config_file = path / "config.json"
    if not config_file.is_file():
        raise UserError(f"{path}: no config.json in this folder; give a Hugging Face model folder or a model.pt")
    config = _mapping(config_file, "(top level)", _read_json(config_file))
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _mapping(index, "weight_map", _mapping(index, "(top level)", _read_json(index)).get("weight_map"))
        names = sorted({str(name) for name in weight_map.values()})
        if any("/" in name or "\\" in name or name.startswith(".") for name in names):
            raise UserError(
                f"{index}: weight_map names a file outside the folder; expected plain file names; save it again"
            )
    else:
        names = ["model.safetensors"]
    tensors: dict[str, Tensor] = {}
    for name in names:
        file = path / name
        if not file.is_file():
            raise UserError(
                f"{path}: {name} is missing; expected the model's weights as safetensors; save or copy it again"
            )
        try:
            tensors.update(load_file(file))
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(
                f"{file}: not a readable safetensors file ({_first_line(error)}); save or copy it again"
            ) from error
    return dict(config), tensors, _tokenizer_files(path)


def _tokenizer_files(folder: Path) -> dict[str, str]:
    found = {}
    for name in TOKENIZER_FILES:
        file = folder / name
        if file.is_file():
            try:
                found[name] = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{file}: not readable as UTF-8 text ({_first_line(error)}); copy it again") from error
    return found


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not valid JSON ({_first_line(error)}); save or copy it again") from error


# ------------------------------------------------------------------------------------------------------ validation


def _check_config(path: Path, config: dict[str, Any]) -> HeadSpec:
    """The head's shape from the config's `vq_logits` section, every field checked."""
    _check_model_type(path, config)
    if "quantization_config" in config:
        raise UserError(
            f"{path}: config.quantization_config is set, plain weights were expected; save the model de-quantised"
        )
    section = config.get(contract.CONFIG_SECTION)
    if section is None:
        raise UserError(
            f"{path}: config has no {contract.CONFIG_SECTION} section, so this is an ordinary model; "
            f"make a VQ-Logits one with: export-vq compress {path} --text FILE -o model.pt"
        )
    section = _mapping(path, f"config.{contract.CONFIG_SECTION}", section)
    where = f"config.{contract.CONFIG_SECTION}"
    known = {"kind", "num_codebooks", "num_codes", "has_bias", "has_rotation"}
    for name in sorted(set(section) - known):
        raise UserError(f"{path}: {where}.{name} is unknown; expected {', '.join(sorted(known))}; remove it")
    kind = section.get("kind")
    if kind not in contract.KINDS:
        raise UserError(
            f"{path}: {where}.kind is {kind!r}, expected one of {', '.join(contract.KINDS)}; correct the config"
        )
    numbers: dict[str, Any] = {name: section.get(name) for name in ("num_codebooks", "num_codes")}
    numbers["vocab_size"] = config.get("vocab_size")
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            field_name = name if name == "vocab_size" else f"{contract.CONFIG_SECTION}.{name}"
            raise UserError(
                f"{path}: config.{field_name} is {value!r}, expected a whole number above 0; correct the config"
            )
    flags: dict[str, Any] = {name: section.get(name, False) for name in ("has_bias", "has_rotation")}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise UserError(f"{path}: {where}.{name} is {value!r}, expected true or false; correct the config")
    spec = HeadSpec(kind=kind, hidden_size=_head_width(path, config), **numbers, **flags)
    if kind == "single" and spec.num_codebooks != 1:
        raise UserError(
            f"{path}: {where}.num_codebooks is {spec.num_codebooks}, expected 1 for kind single; correct the config"
        )
    if kind == "product" and spec.hidden_size % spec.num_codebooks:
        raise UserError(
            f"{path}: {where}.num_codebooks is {spec.num_codebooks}, expected a divisor of hidden_size {spec.hidden_size} "
            "for kind product; correct the config"
        )
    if spec.has_rotation and kind != "product":
        raise UserError(
            f"{path}: {where}.has_rotation is true, expected false for kind {kind}; only product heads are rotated"
        )
    return spec


def _check_model_type(path: Path, config: dict[str, Any]) -> None:
    model_type = config.get("model_type")
    if model_type not in TESTED_MODEL_TYPES:
        raise UserError(
            f"{path}: config.model_type is {model_type!r}, which is not supported; tested architectures are "
            f"{', '.join(TESTED_MODEL_TYPES)}"
        )


def _head_width(path: Path, config: dict[str, Any]) -> int:
    """D: what the output layer multiplies. OPT projects the hidden state down to `word_embed_proj_dim` first."""
    names = (
        ("word_embed_proj_dim",)
        if config["model_type"] == "opt" and "word_embed_proj_dim" in config
        else ("hidden_size", "n_embd")
    )
    for name in names:
        if name in config:
            value = config[name]
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
            raise UserError(f"{path}: config.{name} is {value!r}, expected a whole number above 0; correct the config")
    raise UserError(f"{path}: config.hidden_size is missing, expected a whole number; correct the config")


def _recognise(path: Path, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Bring third-party names and learned soft mappings to the canonical head tensors."""
    notes: list[str] = []
    result: dict[str, Tensor] = {}
    for name, value in tensors.items():
        last = name.rsplit(".", 1)[-1]
        if last == "codebook_C":
            target, value = "codebook", value[None] if value.dim() == 2 else value
        elif last == "mapping_M":
            target, value = "codes", value[:, None] if value.dim() == 1 else value
        elif last == "code_scores" and name.startswith(contract.HEAD_PREFIX):
            if value.dim() != 2 or not value.is_floating_point() or not bool(value.isfinite().all()):
                raise UserError(
                    f"{path}: {name} is {value.dtype} {list(value.shape)}, expected finite floats [V, K]; save it again or save codes"
                )
            target, value = "codes", value.argmax(dim=-1, keepdim=True)
            notes.append(f"{name} is a soft mapping: each token was given its best-scoring code (argmax)")
        else:
            if name in result:
                raise UserError(f"{path}: tensor {name} is given twice under different names; keep one")
            result[name] = value
            continue
        if last != "code_scores":
            notes.append(f"{name} was read as {contract.HEAD_PREFIX}{target}")
        if contract.HEAD_PREFIX + target in result or contract.HEAD_PREFIX + target in tensors:
            raise UserError(f"{path}: tensor {contract.HEAD_PREFIX}{target} is given twice, also as {name}; keep one")
        result[contract.HEAD_PREFIX + target] = value
    return result, tuple(notes)


def _check_head(path: Path, spec: HeadSpec, tensors: Mapping[str, Tensor]) -> VQHead:
    """Every head tensor against the spec: presence, dtype, shape, range, finiteness."""
    expected: dict[str, tuple[int, ...]] = {
        "codebook": spec.codebook_shape,
        "codes": (spec.vocab_size, spec.num_codebooks),
    }
    if spec.has_bias:
        expected["bias"] = (spec.vocab_size,)
    if spec.has_rotation:
        expected["rotation"] = (spec.hidden_size, spec.hidden_size)
    for short, shape in expected.items():
        name = contract.HEAD_PREFIX + short
        value = tensors.get(name)
        if value is None:
            raise UserError(
                f"{path}: tensor {name} is missing, expected {list(shape)}; save it, or correct config.vq_logits"
            )
        if tuple(value.shape) != shape:
            raise UserError(
                f"{path}: tensor {name} has shape {list(value.shape)}, expected {list(shape)} from the config; "
                "correct the tensor or config.vq_logits"
            )
        allowed = _CODE_DTYPES if short == "codes" else _FLOAT_DTYPES
        if value.dtype not in allowed:
            wanted = "an integer type" if short == "codes" else "float32, float16 or bfloat16"
            raise UserError(f"{path}: tensor {name} is {_dtype(value)}, expected {wanted}; convert it before saving")
    for name in sorted(tensors):
        if name.startswith(contract.HEAD_PREFIX) and name.removeprefix(contract.HEAD_PREFIX) not in expected:
            raise UserError(
                f"{path}: tensor {name} is not part of this head, expected {', '.join(contract.HEAD_PREFIX + n for n in expected)}; "
                "remove it or correct config.vq_logits"
            )
    codes = tensors[contract.HEAD_PREFIX + "codes"].long()
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= spec.num_codes:
        bad = ((codes < 0) | (codes >= spec.num_codes)).nonzero()[0].tolist()
        raise UserError(
            f"{path}: tensor {contract.HEAD_PREFIX}codes holds {int(codes[tuple(bad)])} at {bad}, expected 0 to {spec.num_codes - 1}; "
            "correct the mapping or num_codes"
        )
    _check_finite(
        path, {name: tensors[contract.HEAD_PREFIX + name] for name in expected if name != "codes"}, contract.HEAD_PREFIX
    )
    return VQHead.from_tensors(
        spec.kind,
        tensors[contract.HEAD_PREFIX + "codebook"].float(),
        codes,
        tensors[contract.HEAD_PREFIX + "bias"].float() if spec.has_bias else None,
        tensors[contract.HEAD_PREFIX + "rotation"].float() if spec.has_rotation else None,
    )


def _check_finite(path: Path, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            bad = (~value.isfinite()).nonzero()[0].tolist()
            raise UserError(
                f"{path}: tensor {prefix}{name} holds {value[tuple(bad)].item()} at {bad}, expected finite numbers; save a sound model"
            )


def _check_tokenizer(path: Path, vocab_size: int, files: Mapping[str, str]) -> None:
    """A tokenizer that can emit ids the head does not have would index past the embedding."""
    if "tokenizer.json" not in files:
        return
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(files["tokenizer.json"])
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(
            f"{path}: tokenizer.json cannot be read ({_first_line(error)}); save the model with a working tokenizer"
        ) from error
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if highest >= vocab_size:
        raise UserError(
            f"{path}: the tokenizer has token id {highest}, expected ids below config.vocab_size {vocab_size}; "
            "use the tokenizer that the model was trained with"
        )


def _build(path: Path, config: dict[str, Any], head: VQHead, backbone: Mapping[str, Tensor]) -> nn.Module:
    """The transformers network with the head in place; every parameter accounted for."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    options = {
        name: value
        for name, value in config.items()
        if name
        not in (contract.CONFIG_SECTION, "model_type", "auto_map", "tie_word_embeddings", "dtype", "torch_dtype")
    }
    try:
        # The head is untied by nature: the input embedding, tied in the original, stays a parameter of its own.
        hf_config = AutoConfig.for_model(config["model_type"], **options, tie_word_embeddings=False)
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32, attn_implementation="eager")
    except Exception as error:  # the library raises anything on a config that makes no sense
        raise UserError(
            f"{path}: no {config['model_type']} can be built from the config ({_first_line(error)}); correct the config"
        ) from error
    model.set_output_embeddings(head)
    wanted = {name: value for name, value in model.state_dict().items() if not name.startswith(contract.HEAD_PREFIX)}
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    extra = sorted(name for name in set(backbone) - set(wanted) if not any(p.search(name) for p in ignored))
    if extra:
        raise UserError(
            f"{path}: tensor {extra[0]} does not belong to a {config['model_type']} of this config ({len(extra)} such); remove it"
        )
    missing = sorted(set(wanted) - set(backbone))
    if missing:
        raise UserError(
            f"{path}: tensor {missing[0]} is missing ({len(missing)} such), expected {list(wanted[missing[0]].shape)}; save the whole model"
        )
    for name, value in wanted.items():
        given = backbone[name]
        if given.shape != value.shape:
            raise UserError(
                f"{path}: tensor {name} has shape {list(given.shape)}, expected {list(value.shape)} from the config; correct one of them"
            )
        if value.is_floating_point() and given.dtype not in _FLOAT_DTYPES:
            raise UserError(
                f"{path}: tensor {name} is {_dtype(given)}, expected float32, float16 or bfloat16; convert it before saving"
            )
    _check_finite(path, {name: backbone[name] for name in wanted})
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(backbone[name])
    return model  # type: ignore[no-any-return]


# --------------------------------------------------------------------------------------------------------- writing


def save_model(loaded: LoadedModel, path: Path) -> None:
    """Write a VQ-Logits checkpoint: `model.pt` where the name ends in .pt, else a Hugging Face folder.

    Raises:
        UserError: the model has no VQ head, or the place cannot be written.
    """
    spec = loaded.spec
    section = {name: getattr(spec, name) for name in ("kind", "num_codebooks", "num_codes", "has_bias", "has_rotation")}
    config = {**_plain(loaded.config), contract.CONFIG_SECTION: section}
    tensors = {name: value.detach().contiguous() for name, value in loaded.model.state_dict().items()}
    # The same storage must not be written twice, nor a row of a larger one.
    tensors = {
        name: value.clone() if value.untyped_storage().nbytes() != value.nbytes else value
        for name, value in tensors.items()
    }
    with whole(path) as staged:
        if path.suffix == ".pt":
            torch.save(
                {
                    "format": contract.CHECKPOINT_FORMAT,
                    "version": contract.CHECKPOINT_VERSION,
                    "config": config,
                    "state_dict": tensors,
                    "tokenizer": dict(loaded.tokenizer_files),
                },
                staged,
            )
        else:
            from safetensors.torch import save_file

            staged.mkdir()
            (staged / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            save_file(tensors, staged / "model.safetensors", metadata={"format": "pt"})
            for name, text in loaded.tokenizer_files.items():
                (staged / name).write_text(text, encoding="utf-8")


# --------------------------------------------------------------------------------------------------------- helpers


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """The config as JSON data, without what only this process knows."""
    dropped = ("_name_or_path", "transformers_version", "quantization_config", "auto_map")
    data: dict[str, Any] = json.loads(json.dumps({k: v for k, v in config.items() if k not in dropped}, default=str))
    return data


def _mapping(path: Path, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{path}: {name} is {_kind(value)}, expected a dict; save the checkpoint again")
    return dict(value)


def _expect(path: Path, name: str, found: Any, expected: Any, mend: str) -> None:
    if found != expected or isinstance(found, Tensor):
        raise UserError(f"{path}: {name} is {found!r}, expected {expected!r}; {mend}")


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0]
    return text[:200] if text else type(error).__name__
