"""Positions of a text, judged one by one: an output layer's distribution against the dense one, and the next token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

BEST = 5
"""How many of the best tokens are compared as a set."""


class Truth(NamedTuple):
    """What the dense layer says at some positions, and the token that follows them."""

    logs: Tensor  # float32 [n, V]
    chances: Tensor  # float32 [n, V]
    negentropy: Tensor  # float32 [n]
    best: Tensor  # int64 [n, BEST]
    following: Tensor  # int64 [n]

    @classmethod
    def of(cls, logits: Tensor, following: Tensor) -> Truth:
        """From logits float32 [n, V], which are written over."""
        best = best_tokens(logits, BEST)
        logs = logits.sub_(logits.logsumexp(-1, keepdim=True))
        chances = logs.exp()
        return cls(logs, chances, torch.linalg.vecdot(chances, logs), best, following)


@dataclass
class Scores:
    """How one output layer does, position by position, in the order in which they came."""

    parts: list[Tensor] = field(default_factory=list)  # float64 [4, n] each

    def add(self, truth: Truth, logs: Tensor) -> None:
        """Take in log-probabilities float32 [n, V]."""
        best = best_tokens(logs, BEST)
        common = (truth.best[:, :, None] == best[:, None, :]).any(-1)
        nll = -logs.gather(1, truth.following[:, None])[:, 0]
        kl = truth.negentropy - torch.linalg.vecdot(truth.chances, logs)
        top1 = truth.best[:, 0] == best[:, 0]
        self.parts.append(torch.stack([nll.double(), kl.double(), top1.double(), common.double().mean(-1)]))

    @staticmethod
    def pooled(scores: Iterable[Scores]) -> Columns:
        """All positions of several texts."""
        return Columns(*torch.cat([part for one in scores for part in one.parts], dim=1))


class Columns(NamedTuple):
    """Of each position, float64 [n]: -ln of what the next token is given, KL, and the agreements."""

    nll: Tensor
    kl: Tensor
    top1: Tensor
    top5: Tensor


def best_tokens(logits: Tensor, count: int) -> Tensor:
    """The best token ids, int64 [n, count], falling by logit [n, V]; equal logits by rising id."""
    v = logits.shape[1]
    count = min(count, v)
    values, ids = logits.topk(min(count + 1, v))  # one more shows a tie at the boundary
    tied = (values[:, 1:] == values[:, :-1]).any(1)
    ids = ids[:, :count]
    if tied.any():
        rows, bound = logits[tied], values[tied, count - 1, None]
        # All above the bound, then the lowest ids of those that tie there: ids below 2^24 are exact in float32.
        order = -torch.arange(v, dtype=torch.float32, device=logits.device)
        keys = torch.where(rows > bound, 1.0, torch.where(rows == bound, order, -torch.inf))
        chosen = keys.topk(count).indices.sort(-1).values
        by_value = rows.gather(1, chosen).argsort(dim=-1, descending=True, stable=True)
        ids[tied] = chosen.gather(1, by_value)
    return ids
