"""Many output layers on the same held-out text: with a frozen backbone they all see the same hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from export_vq.compress.statistics import OutputLayer, capped
from export_vq.head import VQHead
from export_vq.quality.floor import token_costs, token_groups
from export_vq.quality.rivals import quantised
from export_vq.quality.scores import Scores, Truth
from export_vq.records import HeadQuality, HeadSpec, TextQuality

ROWS = 256
"""Positions whose V logits are held together, of the dense layer and one more: 150 MB at V = 49152."""
TOGETHER = 2**30
"""Bytes of float32 weights held together. The dense logits are computed once for each lot of layers."""


@dataclass(frozen=True)
class HeldOut:
    """Text to judge on: token ids int64 [N, S], and hidden states [N, S, D] that enter the dense output layer there."""

    ids: Tensor
    hidden: Tensor


class Rival(NamedTuple):
    """The dense layer rounded to integers, as `rivals.quantised` does it; `group` None is one scale a row."""

    bits: int
    group: int | None = None


def measure_heads(
    dense: OutputLayer,
    texts: Mapping[str, HeldOut],
    heads: Mapping[str, VQHead | Rival | OutputLayer],
    *,
    own_hidden: Mapping[str, Mapping[str, Tensor]] | None = None,
    tell: Callable[[float], None] = lambda _: None,
) -> tuple[HeadQuality, ...]:
    """Judge output layers against the dense one at every position that has a next token, in float32.

    Args:
        dense: the reference; its softcap, where it has one, holds for all.
        texts: text name -> what to judge on, with at least one block of two tokens.
        heads: name -> a VQ head, the dense layer in integers, or another dense layer; all over the same vocabulary.
            `dense` itself comes into the table only where it stands here.
        own_hidden: for heads that were trained together with their backbone: head name -> text name -> the hidden states
            [N, S, D] of that backbone.
        tell: called with the fraction done.

    Returns:
        One record a head, in their order.
    """
    rows = {name: text.hidden[:, :-1].flatten(0, 1) for name, text in texts.items()}  # [n, D]
    targets = {name: text.ids[:, 1:].flatten() for name, text in texts.items()}
    own = {
        head: {name: hidden[:, :-1].flatten(0, 1) for name, hidden in mine.items()}
        for head, mine in (own_hidden or {}).items()
    }
    names = list(heads)
    lot = max(1, TOGETHER // (4 * dense.weight.numel()))
    work, done = len(names) * sum(map(len, targets.values())), 0
    reference = _Layer.dense(dense)
    found: list[HeadQuality] = []
    for start in range(0, len(names), lot):
        layers = {name: _Layer.of(heads[name], dense) for name in names[start : start + lot]}
        scores: dict[str, dict[str, Scores]] = {name: {text: Scores() for text in texts} for name in layers}
        own_scores = {text: Scores() for text in texts}
        for text, following in targets.items():
            for first in range(0, len(following), ROWS):
                part = slice(first, first + ROWS)
                truth = Truth.of(reference.logits(rows[text][part], dense.softcap), following[part])
                own_scores[text].add(truth, truth.logs)
                for name, layer in layers.items():
                    hidden = own[name][text] if name in own else rows[text]
                    logits = layer.logits(hidden[part], dense.softcap)
                    scores[name][text].add(truth, logits.sub_(logits.logsumexp(-1, keepdim=True)))
                done += len(layers) * len(following[part])
                tell(done / work)
        found += [
            layer.record(name, scores[name], own_scores, targets, reference.num_bytes) for name, layer in layers.items()
        ]
    return tuple(found)


@dataclass(frozen=True)
class _Layer:
    """An output layer in the form in which all are judged: dense rows, one for each group of tokens with the same codes.

    One row a group and not one a token, because only then do the logits of such tokens tie exactly, as they do in the
    head itself.
    """

    kind: str
    weight: Tensor  # float32 [V, D], or [groups, D]
    bias: Tensor | None  # float32 [V]
    float_numbers: int
    num_bytes: int
    group: Tensor | None = None  # int64 [V]
    costs: Tensor | None = None  # float64 [V], see token_costs
    spec: HeadSpec | None = None
    dead_codes: int | None = None

    @classmethod
    def of(cls, head: VQHead | Rival | OutputLayer, dense: OutputLayer) -> _Layer:
        if isinstance(head, VQHead):
            return cls.vq(head)
        return cls.rival(dense, head) if isinstance(head, Rival) else cls.dense(head)

    @classmethod
    def dense(cls, layer: OutputLayer) -> _Layer:
        numbers = layer.weight.numel() + _count(layer.bias)
        return cls("dense", layer.weight.detach().float(), _float(layer.bias), numbers, 2 * numbers)

    @classmethod
    def rival(cls, layer: OutputLayer, rival: Rival) -> _Layer:
        rounded = quantised(layer.weight, rival.bits, rival.group)
        bias = _count(layer.bias)
        numbers, num_bytes = rounded.scales + bias, rounded.num_bytes + 2 * bias
        return cls(f"int{rival.bits}", rounded.weight, _float(layer.bias), numbers, num_bytes)

    @classmethod
    def vq(cls, head: VQHead) -> _Layer:
        spec = head.spec
        group, members = token_groups(head)
        alone = len(members) == spec.vocab_size
        weight = head.token_vectors(slice(None) if alone else members, dtype=torch.float32)
        return cls(
            kind=spec.kind,
            weight=weight,
            bias=_float(head.bias),
            float_numbers=spec.float_numbers,
            num_bytes=spec.head_bytes(),
            group=None if alone else group,
            costs=token_costs(head, group),
            spec=spec,
            dead_codes=head.dead_codes,
        )

    def logits(self, hidden: Tensor, softcap: float | None) -> Tensor:
        """[n, D] -> float32 [n, V]."""
        logits = nn.functional.linear(hidden.float(), self.weight)
        if self.group is not None:
            logits = logits.index_select(1, self.group)
        if self.bias is not None:
            logits += self.bias
        return capped(logits, softcap)

    def record(
        self,
        name: str,
        scores: dict[str, Scores],
        dense: dict[str, Scores],
        targets: dict[str, Tensor],
        dense_bytes: int,
    ) -> HeadQuality:
        def text(label: str, parts: list[str]) -> TextQuality:
            own, reference = Scores.pooled(scores[part] for part in parts), Scores.pooled(dense[part] for part in parts)
            wanted = torch.cat([targets[part] for part in parts])
            return TextQuality(
                text=label,
                positions=len(wanted),
                perplexity=float(own.nll.mean().exp()),
                perplexity_dense=float(reference.nll.mean().exp()),
                kl_mean=float(own.kl.mean()),
                kl_p99=float(own.kl.quantile(0.99)),
                top1_agreement=float(own.top1.mean()),
                top5_agreement=float(own.top5.mean()),
                floor=1.0 if self.costs is None else float(self.costs[wanted].mean().exp()),
            )

        return HeadQuality(
            name=name,
            kind=self.kind,
            float_numbers=self.float_numbers,
            num_bytes=self.num_bytes,
            dense_bytes=dense_bytes,
            total=text("all", list(scores)),
            texts=tuple(text(part, [part]) for part in scores),
            spec=self.spec,
            dead_codes=self.dead_codes,
        )


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().float()


def _count(bias: Tensor | None) -> int:
    return 0 if bias is None else bias.numel()
