"""A frozen teacher beside its student; the layers that both have in common run once."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from export_vq.compress.statistics import OutputLayer
from export_vq.load import LoadedModel
from export_vq.tuning.loss import last_hidden
from export_vq.tuning.parts import TrainedParts, decoder_layers


class Teacher:
    """Hidden states and output layer of a dense model, for batches that the student has just seen.

    Where the student's lower layers are frozen and equal the teacher's bit by bit, their result is taken over from the
    student: masks, rotary angles and everything else that a layer is given are still made by the teacher's own network.

    Attributes:
        layer: the output layer, in `dtype`.
        shared_layers: how many layers are taken over.
    """

    def __init__(
        self, dense: LoadedModel, student: TrainedParts, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.model: Any = dense.model.to(device)
        # Rounded here once to the type of the products: autocast would do it for every few rows of logits.
        output = OutputLayer.of(dense)
        bias = None if output.bias is None else output.bias.to(dtype)
        self.layer = OutputLayer(output.weight.to(dtype), bias, output.softcap)
        self.shared_layers = student.first_layer if _same_below(student, dense.model) else 0
        self._passed: Any = None
        self._upper: Any = None
        self._hook: Any = None
        if self.shared_layers:
            self._hook = decoder_layers(student.model)[self.shared_layers - 1].register_forward_hook(self._keep)
            # Another network around the same tensors, whose lower layers hand on what the student's found.
            tensors = [*self.model.parameters(), *self.model.buffers()]
            self._upper = copy.deepcopy(self.model, {id(t): t for t in tensors})
            for layer in decoder_layers(self._upper)[: self.shared_layers]:
                layer.forward = self._hand_on

    def hidden(self, input_ids: Tensor) -> Tensor:
        """Token ids [B, S], the batch that the student saw last -> what enters the teacher's output layer, [B, S, D]."""
        with torch.no_grad():
            return last_hidden(self._upper or self.model, input_ids)

    def close(self) -> None:
        """Leave the student, and bring the teacher back to the CPU."""
        if self._hook is not None:
            self._hook.remove()
        self.model.to("cpu")

    def _keep(self, _layer: object, _inputs: object, result: Any) -> None:
        self._passed = result

    def _hand_on(self, *_: object, **__: object) -> Any:
        return self._passed


def _same_below(student: TrainedParts, teacher: Any) -> bool:
    """Both networks are equal bit by bit, except for what the student trains and the output layer."""
    mine: Mapping[str, Tensor] = dict(student.model.base_model.named_parameters())
    theirs: Mapping[str, Tensor] = dict(teacher.base_model.named_parameters())
    return mine.keys() == theirs.keys() and all(
        value.requires_grad or torch.equal(value.cpu(), theirs[name].cpu()) for name, value in mine.items()
    )
