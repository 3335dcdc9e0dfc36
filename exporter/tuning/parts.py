"""What of a model a tuning run trains: the head and its last layers, low-rank additions to all linear layers, or all of it."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from export_vq.compress.statistics import replace_output
from export_vq.errors import UserError
from export_vq.head import VQHead
from export_vq.load import LoadedModel
from export_vq.require import require

PARTS = ("last-layers", "lora", "all")


def working_copy(loaded: LoadedModel) -> LoadedModel:
    """The model again, to be trained while the given one stays.

    A dense output layer that shared its weight with the input embedding gets one of its own, as a VQ head has: else
    training it would move the embedding below every layer.
    """
    if loaded.head is not None:
        model = copy.deepcopy(loaded.model)
        return dataclasses.replace(loaded, model=model, head=model.get_output_embeddings())  # type: ignore[operator]
    old: Any = loaded.model.get_output_embeddings()  # type: ignore[operator]
    v, d = old.weight.shape
    layer = nn.Linear(d, v, bias=old.bias is not None, dtype=old.weight.dtype)
    layer.load_state_dict(old.state_dict())
    model = replace_output(loaded.model, layer, share=False)
    return dataclasses.replace(loaded, model=model, config={**loaded.config, "tie_word_embeddings": False})


class TrainedParts:
    """A model in which only some parameters require gradients.

    Attributes:
        model: the transformers causal LM, changed in place.
        head: parameters of the output layer that are trained. A rotation is not: its columns differ in scale by orders of
            magnitude, so that no one step size suits them, and the codebooks behind it learn.
        backbone: the other trained parameters.
        first_layer: the decoder layers below this one, and the embeddings, stay as they are; 0 where none does.
    """

    def __init__(self, model: Any, parts: str, last_layers: int, lora_rank: int, seed: int) -> None:
        layers = decoder_layers(model)
        if parts == "last-layers" and last_layers > len(layers):
            raise UserError(
                f"last_layers is {last_layers}, expected 0 to {len(layers)}, the layers of this model; give a smaller number"
            )
        model.requires_grad_(parts == "all")
        self.model, self._peft = model, None
        self.first_layer = 0
        if parts == "last-layers":
            self.first_layer = len(layers) - last_layers
            for module in _upper_modules(model, layers, self.first_layer):
                module.requires_grad_(True)
        elif parts == "lora":
            self._peft = _with_adapters(model, lora_rank, seed)
        output: nn.Module = model.get_output_embeddings()
        output.requires_grad_(True)
        if isinstance(output, VQHead) and output.rotation is not None:
            output.rotation.requires_grad_(False)
        self.head = [p for p in output.parameters() if p.requires_grad]
        ours = {id(p) for p in output.parameters()}
        self.backbone = [p for p in model.parameters() if p.requires_grad and id(p) not in ours]

    def named(self) -> dict[str, Tensor]:
        """The trained parameters by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def merge(self) -> None:
        """Fold low-rank additions into the weights, so that the model is an ordinary one again; all parameters thaw."""
        if self._peft is not None:
            self._peft.merge_and_unload()
        self.model.requires_grad_(True)


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of a transformers causal LM, in their order."""
    n = model.config.num_hidden_layers
    found = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == n]
    if not found:
        raise UserError(
            f"{type(model).__name__}: no list of {n} decoder layers found, one was expected for last_layers; train with parts 'lora' or 'all'"
        )
    return found[0]


def _upper_modules(model: Any, layers: nn.ModuleList, first: int) -> list[nn.Module]:
    """Layers from `first` on, and the norms that stand beside the list of layers; nothing where no layer is meant."""
    if first == len(layers):
        return []
    (parent,) = (m for m in model.base_model.modules() if any(child is layers for child in m.children()))
    norms = [child for child in parent.children() if "norm" in type(child).__name__.lower()]
    return [*layers[first:], *norms]


def _with_adapters(model: Any, rank: int, seed: int) -> Any:
    """LoRA (Hu et al. 2021, arXiv:2106.09685) on every linear layer but the output layer; changes the model in place."""
    peft = require("peft", extra="tune")
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config)
