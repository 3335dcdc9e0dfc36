"""Checkpoints become models and back: VQ-Logits ones, and dense causal LMs to start from.

A VQ-Logits checkpoint is data, never code: tensors come from safetensors or `torch.load(weights_only=True)`, the
network from the transformers class that the config's `model_type` names. Everything is validated here, so that no
later step has to.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from export_vq import contract
from export_vq.checkpoint import (
    TOKENIZER_FILES,
    positions_of,
    read_checkpoint,
    read_json,
    tokenizer_files,
    write_checkpoint,
)
from export_vq.embedding import VQEmbedding
from export_vq.errors import UserError
from export_vq.files import sha256
from export_vq.head import VQHead
from export_vq.records import HeadSpec
from export_vq.validate import (
    TESTED_MODEL_TYPES,
    check_backbone,
    check_config,
    check_embedding,
    check_finite,
    check_head,
    check_model_type,
    check_not_quantised,
    check_tokenizer,
    first_line,
    mapping,
    recognise,
)

__all__ = [
    "TESTED_MODEL_TYPES",
    "TOKENIZER_FILES",
    "LoadedModel",
    "convert",
    "load_dense",
    "load_model",
    "save_model",
    "tie_embedding",
]

_CODE_DTYPES = {8: torch.uint8, 16: torch.uint16, 32: torch.int32}
"""Type of the code ids in a file, by their width in bits."""


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM ready to run: validated, on the CPU, in eval mode.

    `model` is the transformers module; its output layer is a `VQHead` (`head`), or the dense layer of an ordinary model
    when `head` is None; its input embedding is a `VQEmbedding` of that head where `spec.tie_embedding`. `config` is the Hugging Face config as a dict, `tokenizer_files` maps file names to text.
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
        """The dense original shared its output layer with the input embedding; `spec` says what this model's is."""
        if "tie_word_embeddings" in self.config:
            return bool(self.config["tie_word_embeddings"])
        from transformers import AutoConfig

        return bool(AutoConfig.for_model(self.model_type).tie_word_embeddings)  # what the architecture does unasked

    @property
    def max_positions(self) -> int:
        """How many positions the model has; 2048 where its config is silent."""
        return int(positions_of(self.config) or 2048)

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
            # Without a config.json the tokenizer's own class decides, and no code is ever fetched.
            try:
                for name, text in self.tokenizer_files.items():
                    Path(folder, name).write_text(text, encoding="utf-8")
                return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            except Exception as error:  # the library raises anything on damaged files
                found = first_line(error).replace(folder, self.source)
                raise UserError(
                    f"{self.source}: the tokenizer cannot be read ({found}); save the model again with a working tokenizer"
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
    config, tensors, files = read_checkpoint(path)
    spec = check_config(path, config)
    tensors, notes = recognise(path, spec, tensors)
    head = check_head(path, spec, tensors, dtype)
    check_tokenizer(path, spec.vocab_size, files)
    backbone = {name: value for name, value in tensors.items() if not name.startswith(contract.HEAD_PREFIX)}
    del tensors
    model = _build(path, config, head, backbone, dtype)
    return LoadedModel(model, head, config, files, str(path), sha256(path), notes)


def load_dense(path: Path) -> LoadedModel:
    """Read an ordinary causal LM in float32: a Hugging Face folder with safetensors, or a GGUF file.

    Raises:
        UserError: the path is neither, or the model cannot be read, or its architecture is not a tested one.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = path.suffix == ".gguf"
    if not (gguf and path.is_file()) and not (path / "config.json").is_file():
        raise UserError(
            f"{path}: no model here, expected a .gguf file or a folder with config.json; give a causal language model as one of them"
        )
    if not gguf:  # refused before gigabytes are read
        config = mapping(path / "config.json", "(top level)", read_json(path / "config.json"))
        check_model_type(path, config)
        check_not_quantised(path, config)
    folder = path.parent if gguf else path
    options: dict[str, Any] = {"gguf_file": path.name} if gguf else {"use_safetensors": True}
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # the library raises anything on damaged files
        raise UserError(
            f"{path}: not readable ({first_line(error)}), expected a causal language model; give a folder that transformers can load"
        ) from error
    # transformers fills what is missing with random numbers and only warns.
    missing = sorted(found["missing_keys"])
    if missing:
        raise UserError(
            f"{path}: tensor {missing[0]} is missing ({len(missing)} such), expected the whole model; save or copy it again"
        )
    # A GGUF file arrives de-quantised; what remains of its quantiser only keeps it from being saved.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    config = _plain(model.config.to_dict())
    check_model_type(path, config)
    check_finite(path, dict(model.named_parameters()), torch.float32)
    if gguf:
        with tempfile.TemporaryDirectory() as scratch:
            AutoTokenizer.from_pretrained(folder, gguf_file=path.name, local_files_only=True).save_pretrained(scratch)
            files = tokenizer_files(Path(scratch))
    else:
        files = tokenizer_files(path)
    return LoadedModel(model.eval(), None, config, files, str(path), sha256(path))


# -------------------------------------------------------------------------------------------------------- building


def _build(
    path: Path, config: dict[str, Any], head: VQHead, backbone: dict[str, Tensor], dtype: torch.dtype
) -> nn.Module:
    """The transformers network with the head in place, in eval mode; every tensor accounted for.

    The tensors of `backbone` become the network's: a large model is never in memory twice.
    """
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
            f"{path}: no {config['model_type']} can be built from the config ({first_line(error)}), expected one that transformers "
            "accepts; correct the config"
        ) from error
    model.set_output_embeddings(head)
    embedding = model.get_input_embeddings()
    name = next(n for n, module in model.named_modules() if module is embedding)
    check_embedding(path, head.spec, f"{name}.weight", embedding.weight.shape, backbone)
    if head.spec.tie_embedding:
        _tie(str(path), model, head)
    wanted = {name: value for name, value in model.state_dict().items() if not name.startswith(contract.HEAD_PREFIX)}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    check_backbone(path, config["model_type"], wanted, backbone, ignored, dtype)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    given: set[int] = set()
    for name in wanted:
        _give(own[name], backbone[name], given)
    convert(model, dtype)
    return model.eval()  # type: ignore[no-any-return]


def _give(target: Tensor, source: Tensor, given: set[int]) -> None:
    """Make `target` hold what `source` does, in its own type: in the same memory where that is all of it and not `given`
    to another, else in a copy."""
    memory = source.untyped_storage()
    alone = source.is_contiguous() and memory.nbytes() == source.nbytes and memory.data_ptr() not in given
    given.add(memory.data_ptr())
    target.data = source.to(target.dtype) if alone else source.to(target.dtype, copy=True).contiguous()


def tie_embedding(loaded: LoadedModel) -> LoadedModel:
    """The same VQ-Logits model with its input rows read from the head's codes and codebooks, untuned.

    Everything but the old embedding is copied: training the result leaves `loaded` alone.

    Raises:
        UserError: this is an ordinary model, or its embedding does not have the head's sizes.
    """
    if loaded.spec.tie_embedding:
        return loaded
    weight = loaded.model.get_input_embeddings().weight  # type: ignore[operator]
    model = copy.deepcopy(loaded.model, {id(weight): weight})
    head = model.get_output_embeddings()  # type: ignore[operator]
    head.spec = dataclasses.replace(head.spec, tie_embedding=True)
    _tie(loaded.source, model, head)
    config = {**loaded.config, contract.CONFIG_SECTION: head.spec.section}
    return dataclasses.replace(loaded, model=model, head=head, config=config)


def _tie(source: str, model: Any, head: VQHead) -> None:
    """Replace a model's input embedding, in place."""
    old = model.get_input_embeddings()
    found, expected = list(old.weight.shape), [head.spec.vocab_size, head.spec.hidden_size]
    if found != expected:
        raise UserError(
            f"{source}: the input embedding is {found}, expected {expected} like the head, whose rows it is to share; "
            "leave the embedding of this model untied"
        )
    # Only Gemma's embedding has a scale: its rows come out multiplied by the square root of D.
    model.set_input_embeddings(VQEmbedding(head, getattr(old, "embed_scale", None)))


def convert(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Round a model's parameters to `dtype`, in place; use it where `model.to(dtype)` comes to mind.

    Buffers stay: transformers keeps those such as the rotary frequencies in float32 for half-precision models too.
    Rounded to bfloat16, they would turn far positions by a wrong angle.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


# --------------------------------------------------------------------------------------------------------- writing


def save_model(loaded: LoadedModel, path: Path) -> None:
    """Write a VQ-Logits checkpoint: `model.pt` where the name ends in .pt, else a Hugging Face folder.

    Code ids take 8, 16 or 32 bits each, as K needs.

    Raises:
        UserError: the model has no VQ head, or the place cannot be written.
    """
    spec = loaded.spec
    config = {**_plain(loaded.config), contract.CONFIG_SECTION: spec.section}
    tensors = {name: value.detach().contiguous() for name, value in loaded.model.state_dict().items()}
    codes = f"{contract.HEAD_PREFIX}codes"
    tensors[codes] = tensors[codes].to(_CODE_DTYPES[contract.code_bits(spec.num_codes)])
    # The same storage must not be written twice, nor a row of a larger one.
    tensors = {
        name: value.clone() if value.untyped_storage().nbytes() != value.nbytes else value
        for name, value in tensors.items()
    }
    write_checkpoint(path, config, tensors, loaded.tokenizer_files)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """The config as JSON data, without what only this process knows."""
    dropped = ("_name_or_path", "transformers_version", "quantization_config", "auto_map")
    data: dict[str, Any] = json.loads(json.dumps({k: v for k, v in config.items() if k not in dropped}, default=str))
    return data
