"""What a checkpoint must be: pure checks of its config, head tensors, backbone tensors and tokenizer.

Every check raises `UserError` with one line: the file, the field or tensor, what was found, what was expected, and how
to mend it. Nothing here reads or writes files; `path` only names the input in messages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export_vq import contract
from export_vq.errors import UserError
from export_vq.head import VQHead
from export_vq.records import HeadSpec

TESTED_MODEL_TYPES = ("gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3")
"""Architectures whose export is proven by test; others are refused by name."""

_CODE_DTYPES = (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64)
_FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_FLOATS = "float64, float32, float16 or bfloat16"


# ---------------------------------------------------------------------------------------------------------- config


def check_config(path: Path, config: dict[str, Any]) -> HeadSpec:
    """The head's shape from the config's `vq_logits` section, every field checked.

    Raises:
        UserError: a field is missing, unknown, of the wrong type, or disagrees with another.
    """
    check_model_type(path, config)
    check_not_quantised(path, config)
    where = f"config.{contract.CONFIG_SECTION}"
    section = config.get(contract.CONFIG_SECTION)
    if section is None:
        raise UserError(
            f"{path}: config has no {contract.CONFIG_SECTION} section, so this is an ordinary model, expected a "
            f"VQ-Logits one; make it with: export-vq compress {path} --text FILE -o model.pt"
        )
    section = mapping(path, where, section)
    known = {"kind", "num_codebooks", "num_codes", "has_bias", "has_rotation", "tie_embedding"}
    for name in sorted(set(map(str, section)) - known):
        raise UserError(f"{path}: {where}.{shown(name)} is unknown; expected {', '.join(sorted(known))}; remove it")
    kind = section.get("kind")
    if not isinstance(kind, str) or kind not in contract.KINDS:
        raise UserError(
            f"{path}: {where}.kind is {shown(kind)}, expected one of {', '.join(contract.KINDS)}; correct the config"
        )
    flags: dict[str, bool] = {}
    for name in ("has_bias", "has_rotation", "tie_embedding"):
        value = section.get(name, False)
        if not isinstance(value, bool):
            raise UserError(f"{path}: {where}.{name} is {shown(value)}, expected true or false; correct the config")
        flags[name] = value
    spec = HeadSpec(
        kind=kind,
        hidden_size=_hidden_size(path, config),
        vocab_size=_positive(path, "config.vocab_size", config.get("vocab_size")),
        num_codebooks=_positive(path, f"{where}.num_codebooks", section.get("num_codebooks")),
        num_codes=_positive(path, f"{where}.num_codes", section.get("num_codes")),
        **flags,
    )
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
            f"{path}: {where}.has_rotation is true, expected false for kind {kind}, as only product heads are rotated; "
            "correct the config"
        )
    return spec


def check_model_type(path: Path, config: Mapping[str, Any]) -> None:
    """The architecture is one of TESTED_MODEL_TYPES.

    Raises:
        UserError: it is not.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in TESTED_MODEL_TYPES:
        raise UserError(
            f"{path}: config.model_type is {shown(model_type)}, which is not supported; expected a tested architecture, "
            f"use one of {', '.join(TESTED_MODEL_TYPES)}"
        )


def check_not_quantised(path: Path, config: Mapping[str, Any]) -> None:
    """The weights are plain numbers.

    Raises:
        UserError: the config says that they are packed by some quantiser.
    """
    if config.get("quantization_config") is not None:
        raise UserError(
            f"{path}: config.quantization_config is set, plain weights were expected; save the model de-quantised"
        )


def _hidden_size(path: Path, config: Mapping[str, Any]) -> int:
    """D: what the output layer multiplies. OPT projects the hidden state down to `word_embed_proj_dim` first."""
    names = ["hidden_size", "n_embd"]
    if config["model_type"] == "opt":
        names.insert(0, "word_embed_proj_dim")
    found = next((name for name in names if name in config), "hidden_size")
    return _positive(path, f"config.{found}", config.get(found))


def _positive(path: Path, name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        found = "missing" if value is None else shown(value)
        raise UserError(f"{path}: {name} is {found}, expected a whole number above 0; correct the config")
    return value


# ------------------------------------------------------------------------------------------------------------ head


def recognise(path: Path, spec: HeadSpec, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Bring third-party names and learned soft mappings to the canonical head tensors.

    `codebook_C [K, D]` or `[M, K, ..]` becomes `lm_head.codebook`, `mapping_M [V]` or `[V, M]` becomes `lm_head.codes`,
    and of `lm_head.code_scores [V, K]` each row's best-scoring code is taken.

    Returns:
        The tensors under canonical names, and a note for each thing that was renamed or hardened.

    Raises:
        UserError: a tensor is given twice under different names, or scores are no finite floats [V, K].
    """
    notes: list[str] = []
    result: dict[str, Tensor] = {}
    for name, value in tensors.items():
        last = name.rsplit(".", 1)[-1]
        if last == "codebook_C":
            target, value = "codebook", value[None] if value.dim() == 2 else value
            notes.append(f"{name} was read as {contract.HEAD_PREFIX}codebook")
        elif last == "mapping_M":
            target, value = "codes", value[:, None] if value.dim() == 1 else value
            notes.append(f"{name} was read as {contract.HEAD_PREFIX}codes")
        elif name == f"{contract.HEAD_PREFIX}code_scores":
            # A K that disagrees must be seen here: after the argmax, the codes no longer show it.
            wanted = [spec.vocab_size, spec.num_codes]
            if list(value.shape) != wanted or not value.is_floating_point() or not bool(value.isfinite().all()):
                raise UserError(
                    f"{path}: tensor {name} is {dtype_name(value)} {list(value.shape)}, expected finite floats {wanted}; "
                    "correct it, or save codes instead"
                )
            target, value = "codes", value.argmax(dim=-1, keepdim=True)
            notes.append(f"{name} is a soft mapping: each token was given its best-scoring code (argmax)")
        else:
            result[name] = value
            continue
        if contract.HEAD_PREFIX + target in result or contract.HEAD_PREFIX + target in tensors:
            raise UserError(
                f"{path}: tensor {contract.HEAD_PREFIX}{target} is given twice, also as {name}, expected one; remove the other"
            )
        result[contract.HEAD_PREFIX + target] = value
    return result, tuple(notes)


def check_head(path: Path, spec: HeadSpec, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> VQHead:
    """The head, in `dtype`, after every tensor of it held against the spec: presence, shape, dtype, range, finiteness.

    Raises:
        UserError: a tensor is missing, does not belong, or does not hold what it should.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "codebook": spec.codebook_shape,
        "codes": (spec.vocab_size, spec.num_codebooks),
        "bias": (spec.vocab_size,),
        "rotation": (spec.hidden_size, spec.hidden_size),
    }
    given = {"bias": spec.has_bias, "rotation": spec.has_rotation}
    expected = {contract.HEAD_PREFIX + short: shape for short, shape in shapes.items() if given.get(short, True)}
    for name, shape in expected.items():
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
        is_codes = name == contract.HEAD_PREFIX + "codes"
        if value.dtype not in (_CODE_DTYPES if is_codes else _FLOAT_DTYPES):
            wanted = "an integer type of 8 to 64 bits" if is_codes else _FLOATS
            raise UserError(
                f"{path}: tensor {name} is {dtype_name(value)}, expected {wanted}; convert it before saving"
            )
    for name in sorted(tensors):
        if name.startswith(contract.HEAD_PREFIX) and name not in expected:
            raise UserError(
                f"{path}: tensor {name} is not part of this head, expected {', '.join(expected)}; "
                "remove it or correct config.vq_logits"
            )
    codes = tensors[contract.HEAD_PREFIX + "codes"].long()
    bad = ((codes < 0) | (codes >= spec.num_codes)).nonzero()
    if len(bad):
        at = bad[0].tolist()
        raise UserError(
            f"{path}: tensor {contract.HEAD_PREFIX}codes holds {int(codes[tuple(at)])} at {at}, expected 0 to {spec.num_codes - 1}; "
            "correct the mapping or num_codes"
        )
    floats = {name: tensors[name] for name in expected if name != contract.HEAD_PREFIX + "codes"}
    check_finite(path, floats, dtype)
    parts = {name.removeprefix(contract.HEAD_PREFIX): value.to(dtype) for name, value in floats.items()}
    head = VQHead.from_tensors(spec.kind, parts["codebook"], codes, parts.get("bias"), parts.get("rotation"))
    head.spec = spec  # the tensors do not show whether the embedding is tied
    return head


# -------------------------------------------------------------------------------------------------------- backbone


def check_embedding(path: Path, spec: HeadSpec, name: str, shape: torch.Size, given: Mapping[str, Tensor]) -> None:
    """The input embedding is a tensor of its own or tied to the head, and the file agrees with its config on which.

    Args:
        name, shape: of the network's input embedding.
        given: the checkpoint's tensors.

    Raises:
        UserError: the tensor is there although the config ties it, or missing although it does not.
    """
    where = f"config.{contract.CONFIG_SECTION}.tie_embedding"
    if spec.tie_embedding and name in given:
        raise UserError(
            f"{path}: tensor {name} is there although {where} is true, expected none, as the rows are read from the head's codes; "
            f"remove it, or set {where} to false"
        )
    if not spec.tie_embedding and name not in given:
        raise UserError(
            f"{path}: tensor {name} is missing, expected {list(shape)} as {where} is false; save it, or set {where} to true "
            "if the model was made so"
        )


def check_backbone(
    path: Path,
    model_type: str,
    wanted: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    ignored: Iterable[str],
    dtype: torch.dtype,
) -> None:
    """The backbone's tensors are those that the network has, no more and no fewer, finite in `dtype`.

    Args:
        wanted: the network's own tensors.
        given: the checkpoint's.
        ignored: patterns of names that checkpoints of this architecture may hold besides.

    Raises:
        UserError: a tensor is missing, does not belong, or has the wrong shape or type.
    """
    patterns = [re.compile(pattern) for pattern in ignored]
    extra = sorted(name for name in set(given) - set(wanted) if not any(p.search(name) for p in patterns))
    if extra:
        raise UserError(
            f"{path}: tensor {shown(extra[0])} is not expected in a {model_type} of this config ({len(extra)} such); "
            "remove it or correct the config"
        )
    missing = sorted(set(wanted) - set(given))
    if missing:
        raise UserError(
            f"{path}: tensor {missing[0]} is missing ({len(missing)} such), expected {list(wanted[missing[0]].shape)}; "
            "save the whole model or correct the config"
        )
    for name, value in wanted.items():
        found = given[name]
        if found.shape != value.shape:
            raise UserError(
                f"{path}: tensor {name} has shape {list(found.shape)}, expected {list(value.shape)} from the config; correct one of them"
            )
        if value.is_floating_point() and found.dtype not in _FLOAT_DTYPES:
            raise UserError(
                f"{path}: tensor {name} is {dtype_name(found)}, expected {_FLOATS}; convert it before saving"
            )
    check_finite(path, {name: given[name] for name in wanted}, dtype)


def check_finite(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """No NaN, no infinity, neither as saved nor once converted to `dtype`, which may hold less.

    Raises:
        UserError: it names the first tensor and place that fails.
    """
    for name, value in tensors.items():
        if not value.is_floating_point():
            continue
        finite = value.to(dtype).isfinite()
        if not bool(finite.all()):
            at = (~finite).nonzero()[0].tolist()
            kind = str(dtype).removeprefix("torch.")
            raise UserError(
                f"{path}: tensor {name} holds {value[tuple(at)].item()} at {at}, expected numbers that are finite in {kind}; "
                "save a sound model"
            )


def check_tokenizer(path: Path, vocab_size: int, files: Mapping[str, str]) -> None:
    """A tokenizer that can emit ids the head does not have would index past the embedding.

    Added tokens may lie beyond: Gemma 3's image token does in its text models, and no ordinary text holds it
    (text.py refuses the one that does).

    Raises:
        UserError: tokenizer.json cannot be read, or its vocabulary has an id of `vocab_size` or above.
    """
    if "tokenizer.json" not in files:
        return
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(files["tokenizer.json"])
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(
            f"{path}: tokenizer.json cannot be read ({first_line(error)}), expected a Hugging Face tokenizer; "
            "save the model with a working one"
        ) from error
    highest = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=-1)
    if highest >= vocab_size:
        raise UserError(
            f"{path}: tokenizer.json has token id {highest}, expected ids below config.vocab_size {vocab_size}; "
            "use the tokenizer that the model was trained with"
        )


# --------------------------------------------------------------------------------------------------------- helpers


def mapping(path: Path, name: str, value: Any) -> dict[str, Any]:
    """`value` as a dict.

    Raises:
        UserError: it is missing or something else.
    """
    if not isinstance(value, Mapping):
        found = "missing" if value is None else f"a {type(value).__name__}"
        raise UserError(f"{path}: {name} is {found}, expected a dict; save the checkpoint again")
    return dict(value)


def shown(value: Any) -> str:
    """A foreign value for a message: its repr in one line, cut where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def dtype_name(value: Tensor) -> str:
    """'float32' rather than 'torch.float32'."""
    return str(value.dtype).removeprefix("torch.")


def first_line(error: BaseException) -> str:
    """What another library said, cut to its first line."""
    lines = str(error).strip().splitlines()
    return lines[0][:200].rstrip() if lines else type(error).__name__
