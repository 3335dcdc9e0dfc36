"""What the clustering has to know about the text: hidden states that enter the output layer, and how probable tokens are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from export_vq.load import LoadedModel

ROWS = 1024
"""Positions whose V logits are held together: 200 MB at V = 49152."""


@dataclass(frozen=True)
class Statistics:
    """Over n calibration positions; D is the width of the output layer's input.

    `mean` float64 [D] and `covariance` float64 [D, D] (centred) are those of the hidden states, `hidden` float32 [n, D], in
    the order of the text. `probability` float64 [V] is the model's own mean probability of each token: the expected
    frequency, which unlike a count is above 0 and smooth for tokens that the text does not hold. `normaliser` float32 [n]
    is the logsumexp of the dense layer's logits at each position.
    """

    mean: Tensor
    covariance: Tensor
    probability: Tensor
    hidden: Tensor
    normaliser: Tensor

    @classmethod
    def of(cls, layer: OutputLayer, hidden: Tensor, tell: Callable[[float], None] = lambda _: None) -> Statistics:
        """Of hidden states float32 [n, D]; V logits are held for `ROWS` positions at a time."""
        total = torch.zeros(hidden.shape[1], dtype=torch.float64)
        square = torch.zeros(hidden.shape[1], hidden.shape[1], dtype=torch.float64)
        probability = torch.zeros(len(layer.weight), dtype=torch.float64)
        normaliser = torch.empty(len(hidden))
        logits = torch.empty(ROWS, len(layer.weight))
        for start in range(0, len(hidden), ROWS):
            rows = hidden[start : start + ROWS]
            exact = rows.double()
            total += exact.sum(0)
            square += exact.T @ exact
            chances, normaliser[start : start + ROWS] = layer.chances(rows, logits)
            probability += chances.sum(0)
            tell((start + len(rows)) / len(hidden))
        mean = total / len(hidden)
        # float64 leaves room for this one-pass form: the mean is within a few standard deviations of 0.
        covariance = square / len(hidden) - torch.outer(mean, mean)
        return cls(mean, covariance, probability / len(hidden), hidden, normaliser)

    def sample(self, size: int) -> Tensor:
        """At most `size` positions, spread over the text: indices int64."""
        return torch.linspace(0, len(self.hidden) - 1, min(size, len(self.hidden))).long()


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """c * tanh(logits / c), as Gemma's configs may ask for; the logits themselves without a softcap."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


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

    def capped(self, logits: Tensor) -> Tensor:
        """What the model makes of the layer's logits, through the softcap where there is one."""
        return capped(logits, self.softcap)

    def softmax(self, logits: Tensor) -> Tensor:
        """Raw logits [n, V] -> probabilities [n, V]."""
        return self.capped(logits).softmax(-1)

    def chances(self, hidden: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [n, D] -> probabilities [n, V] and logsumexp of the logits [n].

        Args:
            room: float32 [n or more, V] to compute in: fresh memory of that size costs more than the numbers.
        """
        logits = torch.mm(hidden, self.weight.T, out=room[: len(hidden)])
        if self.bias is not None:
            logits += self.bias
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        peak = logits.amax(1, keepdim=True)
        total = logits.sub_(peak).exp_().sum(1, keepdim=True)
        return logits.div_(total), (peak + total.log())[:, 0]


def hidden_states(dense: LoadedModel, blocks: Tensor, tell: Callable[[float], None] = lambda _: None) -> Tensor:
    """What enters the output layer: token blocks int64 [N, S] -> float32 [N * S, D]."""
    record = _Recorder()
    model = replace_output(dense.model, record, share=True)
    batches = blocks.split(max(1, 2048 // blocks.shape[1]))
    rows = []
    for i, batch in enumerate(batches):
        with torch.no_grad():
            model(input_ids=batch, use_cache=False)
        assert record.hidden is not None, "the model did not call its output layer"
        rows.append(record.hidden.flatten(0, -2))  # [rows, D]
        tell((i + 1) / len(batches))
    return torch.cat(rows).float()


@contextmanager
def quick_matmul() -> Iterator[None]:
    """Let float32 products round their inputs to bfloat16 where the CPU has units for that; sums stay float32.

    For statistics and gradients, whose own noise is far larger; never for what is measured.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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
        other: Any = copy.deepcopy(model, {id(old): layer})
        # The embedding that the original tied to its output layer is a matrix of its own in the copy.
        other.config.tie_word_embeddings = False
        other.all_tied_weights_keys = {}
        return other
    other = copy.copy(model)
    other._modules = dict(model._modules)
    other.set_output_embeddings(layer)
    return other
