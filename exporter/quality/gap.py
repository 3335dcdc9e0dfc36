"""The model gap: what a VQ head costs against the dense model, and the least it can cost with its mapping."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from export_vq.codespace import code_mass
from export_vq.errors import UserError
from export_vq.head import VQHead
from export_vq.load import LoadedModel
from export_vq.parity import ErrorAccumulator
from export_vq.records import ModelGap

POSITIONS = 512
"""Positions at which V logits of both models are held together: 200 MB at V = 49152."""


def measure_gap(
    dense: LoadedModel,
    vq: LoadedModel,
    blocks: Tensor,
    *,
    baseline: str,
    text: str,
    progress: Callable[[float], None] = lambda _: None,
) -> ModelGap:
    """Run both models over the same token blocks and compare their logits.

    Args:
        dense: the reference, an ordinary model (any backbone) over the same vocabulary.
        vq: the candidate.
        blocks: int64 [N, S] of text that neither was calibrated on; every position but a block's last has a next token.
        baseline: the reference's name in the record.
        text: the text's name in the record.
        progress: called with the fraction done.

    Raises:
        UserError: the vocabularies have different sizes, or the blocks hold ids outside them.
    """
    v = vq.spec.vocab_size
    found = int(dense.config["vocab_size"])
    if found != v:
        raise UserError(
            f"{dense.source}: the baseline's vocab_size is {found}, expected {v} as in {vq.source}; "
            "give the dense model that the VQ model was made from"
        )
    if blocks.numel() and not 0 <= int(blocks.min()) <= int(blocks.max()) < v:
        raise UserError(
            f"{text}: found a token id of {int(blocks.max())}, expected ids from 0 to {v - 1}; use the model's own tokenizer"
        )
    assert vq.head is not None  # vq.spec has refused otherwise
    total = ErrorAccumulator()
    targets = torch.cat([blocks[:, 1:], torch.full_like(blocks[:, :1], -1)], dim=1)  # -1: unknown
    done = 0
    rows = max(1, POSITIONS // blocks.shape[1])
    for ids, following in zip(blocks.split(rows), targets.split(rows), strict=True):
        reference, candidate = (_logits(model, ids) for model in (dense.model, vq.model))
        total.add(reference.numpy(), candidate.numpy(), following.flatten().numpy())
        done += len(ids)
        progress(done / len(blocks))
    floor = mapping_floor(vq.head, blocks[:, 1:].flatten())
    return ModelGap(baseline=baseline, text=text, stats=total.stats(), floor=floor)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """float32 [B * S, V]."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.flatten(0, 1).float()


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
