"""The floor: the least that a VQ head's mapping of tokens to codes can cost, whatever the training."""

from __future__ import annotations

import torch
from torch import Tensor

from export_vq.codespace import code_mass
from export_vq.head import VQHead


def mapping_floor(head: VQHead, token_ids: Tensor) -> float:
    """The lowest perplexity that any hidden state could reach on these tokens, given codes and bias.

    Tokens that share all codes have the same logit up to the bias, so within their group the distribution is fixed:
    softmax of the bias, or uniform without one. Even a model that always knows the group pays E[-ln p(y | group)];
    without bias this is E[ln n(y)], n(y) the size of y's group.

    Args:
        head: codes [V, M] and bias.
        token_ids: integer [n], at least one.

    Returns:
        exp of the mean, at least 1.
    """
    return float(token_costs(head)[token_ids.flatten().long()].mean().exp())


def token_groups(head: VQHead) -> tuple[Tensor, Tensor]:
    """Tokens that share all codes: the group of each token, int64 [V], and one token of each group, int64 [groups]."""
    _, group = torch.unique(head.codes, dim=0, return_inverse=True)
    members = torch.empty(int(group.max()) + 1, dtype=torch.long)
    members[group] = torch.arange(len(group))
    return group, members


def token_costs(head: VQHead, group: Tensor | None = None) -> Tensor:
    """What each token costs a model that always knows its group: -ln p(v | group of v), float64 [V].

    `group` is that of `token_groups`, where the caller has it already: sorting V rows of codes takes a while.
    """
    group = token_groups(head)[0] if group is None else group
    bias = torch.zeros(len(group), dtype=torch.float64) if head.bias is None else head.bias.detach().double()
    return code_mass(group, bias, int(group.max()) + 1)[group] - bias
