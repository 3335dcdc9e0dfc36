"""What the clustering has to know about the text: hidden states that enter the output layer, and how probable tokens are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from export_vq.load import LoadedModel

ROWS = 256
"""Positions whose V logits are held together: 50 MB at V = 49152."""


@dataclass(frozen=True)
class Statistics:
    """Over the calibration positions; D is the width of the output layer's input.

    `mean` float64 [D] and `covariance` float64 [D, D] (centred) are those of the hidden states. `probability` float64 [V]
    is the model's own mean probability of each token: the expected frequency, which unlike a count is above 0 and smooth
    for tokens that the text does not hold. `sample` float32 [n, D] are some of the hidden states, spread over the text.
    """

    mean: Tensor
    covariance: Tensor
    probability: Tensor
    sample: Tensor


class OutputLayer:
    """The dense output layer as a function: hidden states [n, D] -> probabilities float32 [n, V]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, softcap: float | None = None) -> None:
        self.weight, self.bias, self.softcap = weight, bias, softcap

    @classmethod
    def of(cls, dense: LoadedModel) -> OutputLayer:
        """The output layer of an ordinary model, with the softcap that Gemma's configs may ask for."""
        layer = dense.model.get_output_embeddings()  # type: ignore[operator]
        bias = getattr(layer, "bias", None)
        return cls(
            layer.weight.detach(),
            None if bias is None else bias.detach(),
            dense.config.get("final_logit_softcapping"),
        )

    def probabilities(self, hidden: Tensor) -> Tensor:
        return self.softmax(nn.functional.linear(hidden, self.weight, self.bias))

    def softmax(self, logits: Tensor) -> Tensor:
        """Raw logits [n, V] -> probabilities [n, V], through the softcap where there is one."""
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits.softmax(-1)


def collect(
    dense: LoadedModel, blocks: Tensor, sample_size: int, tell: Callable[[float], None] = lambda _: None
) -> Statistics:
    """Run the backbone over token blocks, streaming; V logits are built for the sample only.

    Args:
        dense: an ordinary model.
        blocks: int64 [N, S].
        sample_size: positions of the sample.
        tell: called with the fraction done.
    """
    record = _Recorder()
    model = replace_output(dense.model, record, share=True)
    positions = blocks.numel()
    keep = torch.zeros(positions, dtype=torch.bool)
    keep[torch.linspace(0, positions - 1, min(sample_size, positions)).long()] = True
    total: Tensor = torch.zeros(())
    square: Tensor = torch.zeros(())
    sample: list[Tensor] = []
    done = 0
    for batch in blocks.split(max(1, 1024 // blocks.shape[1])):
        with torch.no_grad():
            model(input_ids=batch, use_cache=False)
        assert record.hidden is not None, "the model did not call its output layer"
        hidden = record.hidden.flatten(0, -2)  # [rows, D]
        sample.append(hidden[keep[done : done + len(hidden)]])
        exact = hidden.double()
        total = total + exact.sum(0)
        square = square + exact.T @ exact
        done += len(hidden)
        tell(done / positions)
    mean = total / positions
    # float64 leaves room for this one-pass form: the mean is within a few standard deviations of 0.
    covariance = square / positions - torch.outer(mean, mean)
    rows = torch.cat(sample)
    return Statistics(mean, covariance, mean_probability(OutputLayer.of(dense), rows), rows)


def mean_probability(layer: OutputLayer, hidden: Tensor) -> Tensor:
    """Mean of softmax(logits) over positions: [n, D] -> float64 [V]."""
    total = torch.zeros(len(layer.weight), dtype=torch.float64)
    for rows in hidden.split(ROWS):
        total += layer.probabilities(rows).sum(0)
    return total / len(hidden)


class _Recorder(nn.Module):
    """Stands where the output layer stood, keeps what enters it and computes nothing."""

    hidden: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        self.hidden = hidden
        return hidden[..., :1]


def replace_output(model: nn.Module, layer: nn.Module, *, share: bool) -> Any:
    """A copy of a transformers causal LM with another output layer; the given model stays as it is.

    With `share` the copy is a new top module over the same backbone; else the backbone is copied too (the old output
    layer is not), so that training the copy leaves the original alone.
    """
    old = model.get_output_embeddings()  # type: ignore[operator]
    if not share:
        return copy.deepcopy(model, {id(old): layer})
    other = copy.copy(model)
    other._modules = dict(model._modules)
    other.set_output_embeddings(layer)  # type: ignore[operator]
    return other
