"""Heads whose mapping or codebook is still free to move while they are trained; `harden` and `settle` make VQ heads of them.

`SoftMapping` learns which token has which code. Every token has a score for every code; the best one is used going
forward, and gradients go back through a softmax of the scores at a temperature (straight-through, Bengio et al. 2013,
arXiv:1308.3432; with a falling temperature as in Jang et al. 2017, arXiv:1611.01144).

`reparametrise` moves all codes together: codebook = fixed codes times a trained matrix (SimVQ, arXiv:2411.02038). A code
that few tokens use goes along with the others, where a vector of its own would be left behind and die.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from export_vq.head import VQHead


class SoftMapping(nn.Module):
    """A single head in training, in the place of the output layer; `weight` and `bias` are those of a linear layer.

    Attributes:
        codebook: parameter [K, D].
        code_scores: parameter [V, K], as checkpoints store a soft mapping.
        bias: parameter [V].
        temperature: of the softmax that gradients go through; above 0, lower it in training.
    """

    def __init__(self, codebook: Tensor, code_scores: Tensor, bias: Tensor, temperature: float = 1.0) -> None:
        super().__init__()
        self.codebook = nn.Parameter(codebook.detach().clone())
        self.code_scores = nn.Parameter(code_scores.detach().clone())
        self.bias = nn.Parameter(bias.detach().clone())
        self.temperature = temperature

    @classmethod
    def of(cls, head: VQHead, confidence: float = 1.0) -> SoftMapping:
        """A single head set free: its own codes lead the scores of the others by `confidence`.

        Raises:
            ValueError: the head has more than one codebook, or no bias.
        """
        if head.spec.kind != "single" or head.bias is None:
            raise ValueError("SoftMapping starts from a head of kind single with a bias")
        scores = torch.zeros(head.spec.vocab_size, head.spec.num_codes, dtype=head.codebook.dtype)
        scores.scatter_(1, head.codes.long(), confidence)
        return cls(head.codebook[0], scores, head.bias)

    @property
    def assignment(self) -> Tensor:
        """One-hot rows [V, K] of the best-scoring codes, with the gradient of softmax(scores / temperature)."""
        soft = (self.code_scores / self.temperature).softmax(-1)
        hard = torch.zeros_like(soft).scatter_(1, soft.argmax(-1, keepdim=True), 1.0)
        return hard + soft - soft.detach()

    @property
    def weight(self) -> Tensor:
        """Token rows [V, D]."""
        return self.assignment @ self.codebook

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [.., D] -> logits [.., V]."""
        return nn.functional.linear(hidden, self.weight, self.bias)

    def harden(self) -> VQHead:
        """The head that this one computes now: every token has its best-scoring code."""
        codes = self.code_scores.detach().argmax(-1, keepdim=True)
        return VQHead.from_tensors("single", self.codebook.detach()[None], codes, self.bias.detach())


class _FixedCodes(nn.Module):
    """codebook [M, K, W] = fixed codes [M, K, W] times a trained matrix [M, W, W], the identity at first."""

    def __init__(self, codebook: Tensor) -> None:
        super().__init__()
        width = codebook.shape[-1]
        self.transform = nn.Parameter(torch.eye(width, dtype=codebook.dtype).repeat(codebook.shape[0], 1, 1))

    def forward(self, fixed: Tensor) -> Tensor:
        return fixed @ self.transform


def reparametrise(head: VQHead) -> None:
    """From now on training moves the head's codes together, in place; `settle` ends it."""
    parametrize.register_parametrization(head, "codebook", _FixedCodes(head.codebook))
    dict(head.named_parameters())["parametrizations.codebook.original"].requires_grad_(False)


def settle(head: VQHead) -> None:
    """Make the codebook of a reparametrised head an ordinary parameter again, with the values it has now."""
    parametrize.remove_parametrizations(head, "codebook", leave_parametrized=True)
    head.codebook.requires_grad_(True)
