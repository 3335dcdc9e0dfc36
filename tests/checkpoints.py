"""Tiny checkpoints for tests, sound ones and damaged ones.

The sound ones have random weights, scaled so that logits differ visibly: every architecture of TESTED_MODEL_TYPES, every
kind of head. The damaged ones are a table, `DAMAGES`: each entry writes one broken input and says which words the
refusal must hold.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from export_vq import contract
from export_vq.head import VQHead
from export_vq.load import LoadedModel, save_model, tie_embedding
from export_vq.records import HeadSpec

# ------------------------------------------------------------------------------------------------------ architectures

_GQA = {"num_attention_heads": 4, "num_key_value_heads": 2}
_LLAMA_LIKE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, **_GQA}
_CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        **_LLAMA_LIKE,
        "vocab_size": 113,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt2": {"vocab_size": 101, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {
        "vocab_size": 127,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "llama": {**_LLAMA_LIKE, "vocab_size": 97},
    "mistral": {**_LLAMA_LIKE, "vocab_size": 131, "sliding_window": 4},
    # The output layer is narrower than the network: D is word_embed_proj_dim.
    "opt": {
        "vocab_size": 149,
        "hidden_size": 32,
        "word_embed_proj_dim": 24,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "phi3": {**_LLAMA_LIKE, "vocab_size": 163, "original_max_position_embeddings": 64},
    "qwen2": {**_LLAMA_LIKE, "vocab_size": 179},
    "qwen3": {**_LLAMA_LIKE, "vocab_size": 211, "head_dim": 16},
}
_SIZES = {"single": (1, 24), "product": (4, 16), "additive": (2, 16)}
"""(M, K) of the tiny heads."""


def tiny_config(model_type: str) -> dict[str, Any]:
    """The Hugging Face config of a two-layer model, 64 positions, vocabulary 97 to 211, as a dict."""
    config = {"model_type": model_type, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1, **_CONFIGS[model_type]}
    if model_type != "gpt2":
        config["max_position_embeddings"] = 64
    return config


def _network(config: dict[str, Any], seed: int, *, tied: bool) -> nn.Module:
    """The transformers module with random weights: matrices of std 0.2, norms near their neutral value."""
    from transformers import AutoConfig, AutoModelForCausalLM

    hf_config = AutoConfig.for_model(**config, tie_word_embeddings=tied)
    model: nn.Module = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32, attn_implementation="eager")
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=random)
            if value.dim() >= 2:
                value.copy_(0.2 * noise)
            elif name.endswith("bias") or config["model_type"].startswith("gemma"):
                value.copy_(0.1 * noise)  # Gemma's norms multiply by 1 + weight
            else:
                value.copy_(1 + 0.1 * noise)
    return model.eval()


def tiny_head(
    kind: str, hidden_size: int, vocab_size: int, seed: int = 0, bias: bool = True, rotation: bool = False
) -> VQHead:
    """A random float32 head whose logits spread over a few units; the rotation is orthogonal."""
    m, k = _SIZES[kind]
    spec = HeadSpec(kind, hidden_size, vocab_size, m, k)
    random = torch.Generator().manual_seed(seed + 1)
    scale = 1 / math.sqrt(m if kind == "additive" else 1)
    return VQHead.from_tensors(
        kind,
        scale * 0.4 * torch.randn(spec.codebook_shape, generator=random),
        torch.randint(0, k, (vocab_size, m), generator=random, dtype=torch.int32),
        0.5 * torch.randn(vocab_size, generator=random) if bias else None,
        torch.linalg.qr(torch.randn(hidden_size, hidden_size, generator=random)).Q if rotation else None,
    )


def tiny_model(
    model_type: str = "llama",
    kind: str = "product",
    seed: int = 0,
    bias: bool = True,
    rotation: bool = False,
    tied: bool = False,
) -> LoadedModel:
    """A VQ-Logits model in memory, float32, with a tokenizer. `rotation` is for kind 'product' only, `tied` its embedding."""
    config = tiny_config(model_type)
    model = _network(config, seed, tied=False)
    d = config.get("word_embed_proj_dim") or config.get("hidden_size") or config["n_embd"]
    head = tiny_head(kind, d, config["vocab_size"], seed, bias, rotation)
    model.set_output_embeddings(head)  # type: ignore[operator]
    loaded = LoadedModel(model.eval(), head, config, tiny_tokenizer_files(config["vocab_size"]), "tiny", "")
    return tie_embedding(loaded) if tied else loaded


def save_tiny(path: Path, model_type: str = "llama", kind: str = "product", **options: Any) -> LoadedModel:
    """Write `tiny_model(model_type, kind, **options)` as model.pt or folder, by the ending of `path`; return it."""
    loaded = tiny_model(model_type, kind, **options)
    save_model(loaded, path)
    return loaded


def save_dense(path: Path, model_type: str = "llama", seed: int = 0, tied: bool = False) -> nn.Module:
    """Write an ordinary causal LM of the same size as a Hugging Face folder with a tokenizer; return the module."""
    config = tiny_config(model_type)
    model = _network(config, seed, tied=tied)
    model.save_pretrained(path)  # type: ignore[operator]
    for name, text in tiny_tokenizer_files(config["vocab_size"]).items():
        (path / name).write_text(text, encoding="utf-8")
    return model


_PAIR_LIST = (
    "th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le ve co me de hi ri"
)


def tiny_tokenizer_files(vocab_size: int) -> dict[str, str]:
    """A character-level BPE tokenizer with at most `vocab_size` ids (97 or more): any printable ASCII comes back as it was."""
    from tokenizers import Tokenizer, decoders, models

    letters = [chr(c) for c in range(32, 127)]
    pairs = _PAIR_LIST.split()[: vocab_size - 97]
    vocab = {token: i for i, token in enumerate(["<unk>", "</s>", *letters, *pairs])}
    tokenizer = Tokenizer(models.BPE(vocab, [(pair[0], pair[1]) for pair in pairs], unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    tokenizer.decoder = decoders.Fuse()
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "eos_token": "</s>",
        "model_max_length": 64,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(settings)}


# ------------------------------------------------------------------------------------------------------------ damages


@dataclass(frozen=True)
class Damage:
    """One kind of broken input.

    `make(folder)` writes it into an empty folder and returns the path to load. The refusal must hold every word of
    `says`: the field or tensor at fault, what was expected, and the mend.
    """

    name: str
    make: Callable[[Path], Path]
    says: tuple[str, ...]


@functools.cache
def _sound(kind: str) -> dict[str, Any]:
    """The dict inside a sound model.pt: llama, hidden_size 32, vocab_size 97, with bias, rotated where product."""
    loaded = tiny_model("llama", kind, rotation=kind == "product")
    return {
        "format": "vq-logits",
        "version": 1,
        "config": {**loaded.config, "vq_logits": loaded.spec.section},
        "state_dict": loaded.model.state_dict(),
        "tokenizer": loaded.tokenizer_files,
    }


def sound_data(kind: str = "product") -> dict[str, Any]:
    """A fresh copy of the dict inside a sound model.pt, to change at will."""
    return copy.deepcopy(_sound(kind))


def write_pt(folder: Path, data: Any) -> Path:
    """`torch.save` to model.pt, unchecked."""
    torch.save(data, folder / "model.pt")
    return folder / "model.pt"


def write_folder(folder: Path, data: dict[str, Any], shards: int = 1) -> Path:
    """The same content as a Hugging Face folder, unchecked; more than one shard adds an index."""
    path = folder / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(data["config"]), encoding="utf-8")
    for name, text in data["tokenizer"].items():
        (path / name).write_text(text, encoding="utf-8")
    tensors = {name: value.contiguous() for name, value in data["state_dict"].items()}
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
        return path
    weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return path


def _changed(change: Callable[[dict[str, Any]], Any], kind: str = "product") -> Callable[[Path], Path]:
    """A model.pt whose dict `change` has edited."""

    def make(folder: Path) -> Path:
        data = sound_data(kind)
        change(data)
        return write_pt(folder, data)

    return make


def _section(kind: str = "product", **fields: Any) -> Callable[[Path], Path]:
    return _changed(lambda data: data["config"]["vq_logits"].update(fields), kind)


def _config(**fields: Any) -> Callable[[Path], Path]:
    return _changed(lambda data: data["config"].update(fields))


def _tensor(name: str, change: Callable[[Tensor], Any], kind: str = "product") -> Callable[[Path], Path]:
    """A model.pt in which one tensor is replaced."""
    return _changed(lambda data: data["state_dict"].update({name: change(data["state_dict"][name])}), kind)


def _with(value: float) -> Callable[[Tensor], Tensor]:
    """Put a value at the second place of the last row."""

    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[(-1,) * (tensor.dim() - 1) + (1,)] = value
        return tensor

    return change


def _in_folder(change: Callable[[Path], Any], shards: int = 1) -> Callable[[Path], Path]:
    """A Hugging Face folder whose files `change` has edited."""

    def make(folder: Path) -> Path:
        path = write_folder(folder, sound_data(), shards)
        change(path)
        return path

    return make


def _cut(keep: float) -> Callable[[Path], Path]:
    """A model.pt cut short."""

    def make(folder: Path) -> Path:
        path = write_pt(folder, sound_data())
        content = path.read_bytes()
        path.write_bytes(content[: int(keep * len(content))])
        return path

    return make


def _bytes(content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "model.pt").write_bytes(content)
        return folder / "model.pt"

    return make


class Intruder:
    """Pickles into a call that makes a file `ran` in the folder, if whoever reads it runs it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder / "ran"),)


def _with_code(folder: Path) -> Path:
    return write_pt(folder, {**sound_data(), "config": Intruder(folder)})


def _other_zip(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "model.pt", "w") as archive:
        archive.writestr("readme.txt", "not a model")
    return folder / "model.pt"


def _damaged_pickle(folder: Path) -> Path:
    """A sound zip structure around a pickle stream whose middle is overwritten."""
    source = write_pt(folder, sound_data())
    with zipfile.ZipFile(source) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    source.unlink()
    with zipfile.ZipFile(folder / "model.pt", "w") as archive:
        for name, content in members.items():
            if name.endswith("data.pkl"):
                middle = len(content) // 2
                content = content[:middle] + b"\xff" * 64 + content[middle + 64 :]
            archive.writestr(name, content)
    return folder / "model.pt"


def _index(path: Path, weight_map: Any) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def _same_tensor_twice(path: Path) -> None:
    first, second = sorted(path.glob("model-*.safetensors"))
    first.write_bytes(second.read_bytes())


def _overwrite(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes(content) and None


def _beyond(data: dict[str, Any]) -> None:
    data["tokenizer"] = tiny_tokenizer_files(120)


def _scores_of(shape: tuple[int, ...], fill: float = 0.0) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        del data["state_dict"]["lm_head.codes"]
        data["state_dict"]["lm_head.code_scores"] = torch.full(shape, fill)

    return change


_C, _CODES, _BIAS, _ROTATION = (f"{contract.HEAD_PREFIX}{n}" for n in ("codebook", "codes", "bias", "rotation"))
_NORM, _EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
_SECTION = f"config.{contract.CONFIG_SECTION}"
_MEND_CONFIG = "correct the config"
_MEND_SAVE = "copy or save it again"

DAMAGES = (
    # the file itself
    Damage("missing path", lambda folder: folder / "model.pt", ("no such file", "expected", "correct the path")),
    Damage("empty file", _bytes(b""), ("the file is empty", "expected a torch.save archive", _MEND_SAVE)),
    Damage("text file", _bytes(b"hello " * 100), ("no zip structure", "expected a torch.save archive", _MEND_SAVE)),
    Damage("cut to half", _cut(0.5), ("no zip structure", "expected a torch.save archive", _MEND_SAVE)),
    Damage("cut by a few bytes", _cut(0.9999), ("expected", _MEND_SAVE)),
    Damage("another zip file", _other_zip, ("damaged archive", "expected one from torch.save", _MEND_SAVE)),
    Damage("damaged pickle", _damaged_pickle, ("damaged archive", "expected one from torch.save", _MEND_SAVE)),
    Damage(
        "code in the pickle", _with_code, ("refused", "mkdir", "expected only tensors and plain data", "no classes")
    ),
    # the dict inside
    Damage("a list", lambda folder: write_pt(folder, [1, 2]), ("a list", "expected a dict", "save_model")),
    Damage("a bare tensor", lambda folder: write_pt(folder, torch.ones(3)), ("a Tensor", "expected a dict")),
    Damage(
        "format missing", _changed(lambda data: data.pop("format")), ("format is None", "'vq-logits'", "save_model")
    ),
    Damage("format wrong", _changed(lambda data: data.update(format="pt")), ("format is 'pt'", "'vq-logits'")),
    Damage(
        "format a tensor", _changed(lambda data: data.update(format=torch.ones(9, 9))), ("format is", "'vq-logits'")
    ),
    Damage("version missing", _changed(lambda data: data.pop("version")), ("version is None", "expected 1")),
    Damage("version 2", _changed(lambda data: data.update(version=2)), ("version is 2", "expected 1", "export-vq")),
    Damage("version true", _changed(lambda data: data.update(version=True)), ("version is True", "expected 1")),
    Damage("version a tensor", _changed(lambda data: data.update(version=torch.ones(2))), ("version is", "expected 1")),
    Damage("unknown field", _changed(lambda data: data.update(extra=1)), ("field 'extra'", "expected", "remove it")),
    Damage("config missing", _changed(lambda data: data.pop("config")), ("config is missing", "expected a dict")),
    Damage("config a string", _changed(lambda data: data.update(config="llama")), ("config is a str", "a dict")),
    Damage("state_dict missing", _changed(lambda data: data.pop("state_dict")), ("state_dict is missing", "a dict")),
    Damage(
        "a list in state_dict",
        _changed(lambda data: data["state_dict"].update({_BIAS: [1.0]})),
        (f"state_dict['{_BIAS}'] is a list", "expected tensors by name"),
    ),
    Damage(
        "a number as tensor name",
        _changed(lambda data: data["state_dict"].update({7: torch.ones(1)})),
        ("state_dict[7]", "expected tensors by name"),
    ),
    Damage("sparse tensor", _tensor(_NORM, Tensor.to_sparse), (_NORM, "sparse", "expected a dense tensor", "convert")),
    Damage(
        "tensor without data", _tensor(_BIAS, lambda t: t.to("meta")), (_BIAS, "expected a dense tensor", "convert")
    ),
    # the config
    Damage(
        "model_type missing", _changed(lambda data: data["config"].pop("model_type")), ("model_type is None", "llama")
    ),
    Damage("model_type unknown", _config(model_type="mamba"), ("config.model_type is 'mamba'", "expected a tested")),
    Damage("model_type a list", _config(model_type=["llama"]), ("config.model_type is ['llama']", "expected a tested")),
    Damage(
        "quantization_config", _config(quantization_config={"bits": 4}), ("config.quantization_config", "plain weights")
    ),
    Damage("no vq_logits section", _changed(lambda data: data["config"].pop("vq_logits")), ("vq_logits", "compress")),
    Damage("vq_logits a list", _config(vq_logits=[1]), (f"{_SECTION} is a list", "expected a dict")),
    Damage("unknown head field", _section(groups=2), (f"{_SECTION}.'groups' is unknown", "num_codes", "remove it")),
    Damage(
        "unknown kind",
        _changed(lambda data: data["config"]["vq_logits"].update(kind="residual")),
        (f"{_SECTION}.kind is 'residual'", "additive", _MEND_CONFIG),
    ),
    Damage(
        "num_codes a string", _section(num_codes="16"), (f"{_SECTION}.num_codes is '16'", "whole number", _MEND_CONFIG)
    ),
    Damage("num_codes 0", _section(num_codes=0), (f"{_SECTION}.num_codes is 0", "above 0", _MEND_CONFIG)),
    Damage("num_codes negative", _section(num_codes=-5), (f"{_SECTION}.num_codes is -5", "above 0", _MEND_CONFIG)),
    Damage("num_codes true", _section(num_codes=True), (f"{_SECTION}.num_codes is True", "whole number", _MEND_CONFIG)),
    Damage("num_codebooks missing", _section(num_codebooks=None), (f"{_SECTION}.num_codebooks is missing", "above 0")),
    Damage("has_bias a number", _section(has_bias=1), (f"{_SECTION}.has_bias is 1", "true or false", _MEND_CONFIG)),
    Damage(
        "tie_embedding a word",
        _section(tie_embedding="yes"),
        (f"{_SECTION}.tie_embedding is 'yes'", "true or false", _MEND_CONFIG),
    ),
    Damage("single with two codebooks", _section("single", num_codebooks=2), ("num_codebooks is 2", "expected 1")),
    Damage(
        "M not dividing D", _section(num_codebooks=5), ("num_codebooks is 5", "divisor of hidden_size 32", _MEND_CONFIG)
    ),
    Damage("rotation for single", _section("single", has_rotation=True), ("has_rotation is true", "expected false")),
    Damage(
        "hidden_size missing", _changed(lambda data: data["config"].pop("hidden_size")), ("hidden_size is missing",)
    ),
    Damage(
        "vocab_size a string", _config(vocab_size="97"), ("config.vocab_size is '97'", "whole number", _MEND_CONFIG)
    ),
    Damage("vocab_size disagrees", _config(vocab_size=98), (_CODES, "[97, 4]", "expected [98, 4]", "correct")),
    Damage(
        "a config of nonsense", _config(num_hidden_layers="two"), ("no llama can be built", "expected", _MEND_CONFIG)
    ),
    Damage("heads not dividing", _config(num_attention_heads=0), ("no llama can be built", "expected", _MEND_CONFIG)),
    # the head's tensors
    Damage("K disagrees", _section(num_codes=17), (_C, "[4, 16, 8]", "expected [4, 17, 8]", "correct")),
    Damage("M disagrees", _section(num_codebooks=8), (_C, "[4, 16, 8]", "expected [8, 16, 4]", "correct")),
    Damage("codebook of rank 2", _tensor(_C, lambda t: t[0]), (_C, "[16, 8]", "expected [4, 16, 8]", "correct")),
    Damage("codebook transposed", _tensor(_C, lambda t: t.mT), (_C, "[4, 8, 16]", "expected [4, 16, 8]", "correct")),
    Damage("integer codebook", _tensor(_C, Tensor.int), (_C, "int32", "expected float64, float32", "convert")),
    Damage(
        "complex codebook", _tensor(_C, lambda t: t + 1j), (_C, "complex64", "expected float64, float32", "convert")
    ),
    Damage("NaN in the codebook", _tensor(_C, _with(math.nan)), (_C, "nan at [3, 15, 1]", "expected numbers", "save")),
    Damage("infinity in the codebook", _tensor(_C, _with(-math.inf)), (_C, "-inf at [3, 15, 1]", "expected numbers")),
    Damage(
        "a double that float32 cannot hold",
        _tensor(_C, lambda t: _with(1e300)(t.double())),
        (_C, "1e+300 at [3, 15, 1]", "finite in float32"),
    ),
    Damage("NaN in the bias", _tensor(_BIAS, _with(math.nan)), (_BIAS, "nan at [1]", "expected numbers", "save")),
    Damage(
        "NaN in the rotation", _tensor(_ROTATION, _with(math.nan)), (_ROTATION, "nan at [31, 1]", "expected numbers")
    ),
    Damage(
        "a code out of range",
        _tensor(_CODES, _with(16)),
        (_CODES, "holds 16 at [96, 1]", "expected 0 to 15", "correct"),
    ),
    Damage(
        "a negative code", _tensor(_CODES, _with(-1)), (_CODES, "holds -1 at [96, 1]", "expected 0 to 15", "correct")
    ),
    Damage("float codes", _tensor(_CODES, Tensor.float), (_CODES, "float32", "expected an integer type", "convert")),
    Damage("boolean codes", _tensor(_CODES, Tensor.bool), (_CODES, "bool", "expected an integer type", "convert")),
    Damage("codes of rank 1", _tensor(_CODES, lambda t: t[:, 0]), (_CODES, "[97]", "expected [97, 4]", "correct")),
    Damage(
        "no codebook", _changed(lambda data: data["state_dict"].pop(_C)), (_C, "missing", "expected [4, 16, 8]", "save")
    ),
    Damage("no codes", _changed(lambda data: data["state_dict"].pop(_CODES)), (_CODES, "missing", "expected [97, 4]")),
    Damage(
        "no bias", _changed(lambda data: data["state_dict"].pop(_BIAS)), (_BIAS, "missing", "expected [97]", "save")
    ),
    Damage("unexpected bias", _section(has_bias=False), (_BIAS, "not part of this head", "expected", "remove it")),
    Damage("unexpected rotation", _section(has_rotation=False), (_ROTATION, "not part of this head", "remove it")),
    Damage(
        "a dense head besides",
        _changed(lambda data: data["state_dict"].update({"lm_head.weight": torch.ones(97, 32)})),
        ("lm_head.weight", "not part of this head", "expected", "remove it"),
    ),
    Damage(
        "the codebook twice",
        _changed(lambda data: data["state_dict"].update({"vq.codebook_C": torch.ones(4, 16, 8)})),
        (_C, "twice", "vq.codebook_C", "expected one", "remove"),
    ),
    Damage(
        "two third-party codebooks",
        _changed(
            lambda data: (
                data["state_dict"].update({f"{n}.codebook_C": data["state_dict"].get(_C) for n in "ab"})
                or data["state_dict"].pop(_C)
            )
        ),
        (_C, "twice", "b.codebook_C", "expected one", "remove"),
    ),
    Damage(
        "code scores of another K",
        _changed(_scores_of((97, 30)), "single"),
        ("lm_head.code_scores", "[97, 30]", "expected finite floats [97, 24]", "correct"),
    ),
    Damage(
        "NaN in code scores",
        _changed(_scores_of((97, 24), math.nan), "single"),
        ("lm_head.code_scores", "expected finite floats [97, 24]", "correct"),
    ),
    # the backbone
    Damage("NaN in the backbone", _tensor(_NORM, _with(math.nan)), (_NORM, "nan at [1]", "expected numbers", "save")),
    Damage(
        "no norm", _changed(lambda data: data["state_dict"].pop(_NORM)), (_NORM, "missing (1 such)", "expected [32]")
    ),
    Damage(
        "a tensor too many",
        _changed(lambda data: data["state_dict"].update({"model.extra": torch.ones(1)})),
        ("model.extra", "not expected in a llama", "remove it"),
    ),
    Damage(
        "an embedding beside a tied head",
        _section(tie_embedding=True),
        (_EMBEDDING, f"{_SECTION}.tie_embedding is true", "expected none", "remove it"),
    ),
    Damage(
        "no embedding",
        _changed(lambda data: data["state_dict"].pop(_EMBEDDING)),
        (_EMBEDDING, "missing", "expected [97, 32]", f"{_SECTION}.tie_embedding is false", "save it"),
    ),
    Damage("a shape of another model", _tensor(_NORM, lambda t: t[:7]), (_NORM, "[7]", "expected [32]", "correct")),
    Damage("integers in the backbone", _tensor(_NORM, Tensor.int), (_NORM, "int32", "expected float64", "convert")),
    Damage("a layer too few", _config(num_hidden_layers=1), ("model.layers.1.", "not expected", "correct the config")),
    Damage("a layer too many", _config(num_hidden_layers=3), ("model.layers.2.", "missing", "expected", "correct")),
    # the tokenizer
    Damage(
        "token ids beyond the vocabulary", _changed(_beyond), ("tokenizer.json", "id 119", "below config.vocab_size 97")
    ),
    Damage(
        "broken tokenizer.json",
        _changed(lambda data: data["tokenizer"].update({"tokenizer.json": "{"})),
        ("tokenizer.json cannot be read", "expected a Hugging Face tokenizer", "save"),
    ),
    Damage(
        "a tokenizer file that leaves the folder",
        _changed(lambda data: data["tokenizer"].update({"../tokenizer.json": "{}"})),
        ("tokenizer['../tokenizer.json']", "expected some of tokenizer.json", "remove it"),
    ),
    Damage(
        "a tokenizer file that is code",
        _changed(lambda data: data["tokenizer"].update({"tokenization_x.py": "import os"})),
        ("tokenizer['tokenization_x.py']", "expected some of tokenizer.json", "remove it"),
    ),
    Damage(
        "a tokenizer file that is no text",
        _changed(lambda data: data["tokenizer"].update({"tokenizer.json": 7})),
        ("tokenizer['tokenizer.json']", "expected some of tokenizer.json", "remove it"),
    ),
    # Hugging Face folders
    Damage("an empty folder", lambda folder: folder, ("no config.json", "expected", "correct the path")),
    Damage(
        "config.json cut short", _in_folder(_overwrite("config.json", b'{"model_type":')), ("config.json", "valid JSON")
    ),
    Damage(
        "config.json in another encoding",
        _in_folder(_overwrite("config.json", b'{"a": "\xff"}')),
        ("config.json", "JSON"),
    ),
    Damage(
        "config.json a list", _in_folder(_overwrite("config.json", b"[]")), ("config.json", "a list", "expected a dict")
    ),
    Damage(
        "no weights",
        _in_folder(lambda path: (path / "model.safetensors").unlink()),
        ("model.safetensors is missing", "expected the model's weights", "copy it again"),
    ),
    Damage(
        "a damaged safetensors header",
        _in_folder(_overwrite("model.safetensors", b"\xff" * 64)),
        ("model.safetensors", "damaged", "expected safetensors", "copy it again"),
    ),
    Damage(
        "safetensors cut short",
        _in_folder(lambda path: os.truncate(path / "model.safetensors", 9000)),
        ("model.safetensors", "damaged", "expected safetensors", "copy it again"),
    ),
    Damage(
        "a missing shard",
        _in_folder(lambda path: (path / "model-00002-of-00002.safetensors").unlink(), shards=2),
        ("model-00002-of-00002.safetensors is missing", "expected", "copy it again"),
    ),
    Damage(
        "a shard outside the folder",
        _in_folder(lambda path: _index(path, {_C: "../model.safetensors"})),
        ("index.json", "weight_map names '../model.safetensors'", "expected plain names", "save"),
    ),
    Damage(
        "a shard by absolute path",
        _in_folder(lambda path: _index(path, {_C: "/model.safetensors"})),
        ("index.json", "weight_map names '/model.safetensors'", "expected plain names", "save"),
    ),
    Damage("an index without a map", _in_folder(lambda path: _index(path, None)), ("weight_map is missing", "a dict")),
    Damage(
        "a tensor in two shards",
        _in_folder(_same_tensor_twice, shards=2),
        ("is also in another shard", "expected it once", "save"),
    ),
    Damage(
        "a tokenizer file in another encoding",
        _in_folder(_overwrite("vocab.txt", b"\xff\xfe\xfd")),
        ("vocab.txt", "expected UTF-8 text", "copy it again"),
    ),
)


def write_gguf(path: Path) -> dict[str, Any]:
    """Write a two-layer Llama with tied embeddings as a GGUF file; return its tensors by their GGUF names, numpy float32."""
    import gguf
    import numpy as np

    vocab, d, ff, heads, kv = 97, 32, 48, 4, 2
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(d)
    writer.add_block_count(2)
    writer.add_feed_forward_length(ff)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(d // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocab)
    tokens = ["<unk>", "</s>", "th", *(chr(c) for c in range(33, 126)), "Ġ"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (vocab - 2))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(1)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, d), "output_norm.weight": (d,)}
    for i in range(2):
        layer = {
            "attn_norm": (d,),
            "ffn_norm": (d,),
            "attn_q": (d, d),
            "attn_k": (d * kv // heads, d),
            "attn_v": (d * kv // heads, d),
            "attn_output": (d, d),
            "ffn_gate": (ff, d),
            "ffn_up": (ff, d),
            "ffn_down": (d, ff),
        }
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    random = np.random.default_rng(0)
    tensors = {
        name: (0.2 * random.standard_normal(shape) if len(shape) > 1 else np.ones(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors
