"""Training losses of an output layer from hidden states: exact, and never with all V logits of a batch in memory.

With one codebook everything stays in code space, O(K) a position. With `mass[k] = logsumexp of bias over the tokens of
code k` (codespace.py has the same identity),

    logsumexp_v y[v] = logsumexp_k (s[k] + mass[k])
    -ln p(y)         = logsumexp_k (s[k] + mass[k]) - s[code(y)] - bias[y]
    KL(q || p)       = sum_v q ln q - sum_k Q[k] s[k] - sum_v q bias + logsumexp_k (s[k] + mass[k])

where Q[k] is the teacher's probability of all tokens of code k.

With more codebooks the rows of the dense twin are gathered once a call ([V, D], differentiable with respect to the
codebooks) and the layer is an ordinary linear one, whose loss chunked.py computes some rows at a time: sums over M * V
table entries a position cost more than V * D products, forward and back. An `nn.Linear` goes the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export_vq.codespace import code_mass
from export_vq.compress.soft import SoftMapping
from export_vq.compress.statistics import OutputLayer, capped
from export_vq.head import VQHead
from export_vq.tuning.chunked import accumulator, loss_by_rows, parts

IGNORED = -100
"""The label of positions that do not count, as in torch and transformers."""


def cross_entropy(
    output: VQHead | SoftMapping | nn.Linear,
    hidden: Tensor,
    labels: Tensor,
    *,
    softcap: float | None = None,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """Mean of -ln p(label | hidden).

    Args:
        output: the layer whose logits are meant.
        hidden: [.., D].
        labels: int64 [..]; -100 does not count.
        softcap: logits are c * tanh(logits / c), as Gemma's configs may ask for.
        num_items: divide the sum by this instead of by the number of labels, where a batch comes in parts.

    Returns:
        float32 scalar (float64 for float64 hidden states); 0 where no label counts.
    """
    keep = labels.flatten() != IGNORED
    target = _Target(labels=labels.flatten()[keep])
    total = _total(output, hidden.flatten(0, -2)[keep], target, softcap)
    return total / (keep.sum().clamp(min=1) if num_items is None else num_items)


def distillation_loss(
    output: VQHead | SoftMapping | nn.Linear,
    hidden: Tensor,
    teacher: OutputLayer,
    teacher_hidden: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Mean of T^2 KL(softmax(teacher / T) || softmax(student / T)) (Hinton et al. 2015, arXiv:1503.02531).

    Args:
        output: the student's layer.
        hidden: [.., D], what enters it.
        teacher: the teacher's layer, which gets no gradient.
        teacher_hidden: [.., D'] of the same positions.
        temperature: T, above 0.
        softcap: the student's; the teacher's layer knows its own.
    """
    target = _Target(None, teacher, teacher_hidden.flatten(0, -2), 1.0, temperature)
    rows = hidden.flatten(0, -2)
    return _total(output, rows, target, softcap) / max(len(rows), 1)


def mixed_loss(
    output: VQHead | SoftMapping | nn.Linear,
    hidden: Tensor,
    labels: Tensor,
    teacher: OutputLayer,
    teacher_hidden: Tensor,
    *,
    alpha: float,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """alpha * distillation_loss + (1 - alpha) * cross_entropy over the positions whose label counts, logits made once."""
    keep = labels.flatten() != IGNORED
    target = _Target(labels.flatten()[keep], teacher, teacher_hidden.flatten(0, -2)[keep], alpha, temperature)
    return _total(output, hidden.flatten(0, -2)[keep], target, softcap) / keep.sum().clamp(min=1)


class VQCausalLMLoss(nn.Module):
    """A causal LM as a module that returns its loss, without V logits where its head has one codebook.

    Drop-in for transformers' `Trainer`, which calls it with a batch's `input_ids` and `labels` (they may be the same
    tensor: labels are shifted here). The model is trained in place.

    Attributes:
        model: the transformers causal LM; its output layer is a `VQHead` or an `nn.Linear`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Token ids [B, S], labels int64 [B, S] (-100 does not count) -> {'loss': scalar}; `num_items_in_batch` as in cross_entropy."""
        loss = cross_entropy(
            self.model.get_output_embeddings(),  # type: ignore[operator]
            last_hidden(self.model, input_ids, attention_mask)[:, :-1],
            labels[:, 1:],
            softcap=softcap_of(self.model),
            num_items=num_items_in_batch,
        )
        return {"loss": loss}


def last_hidden(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """What enters the output layer of a transformers causal LM: token ids [B, S] -> [B, S, D]."""
    backbone: Any = model.base_model
    hidden: Tensor = backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    return hidden


def softcap_of(model: nn.Module) -> float | None:
    """The softcap that a model puts on its logits, where there is one."""
    cap: float | None = getattr(model.config, "final_logit_softcapping", None)
    return cap


# ------------------------------------------------------------------------------------------------------------ targets


@dataclass(frozen=True)
class _Target:
    """What n rows should predict: labels int64 [n], a teacher's distribution (its layer and hidden states [n, D']), or both."""

    labels: Tensor | None = None
    teacher: OutputLayer | None = None
    teacher_rows: Tensor | None = None
    alpha: float = 0.0
    temperature: float = 1.0

    def log_q(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """The teacher's log-probabilities at the temperature, [rows, V]."""
        assert self.teacher is not None
        assert self.teacher_rows is not None
        with torch.no_grad():
            logits = F.linear(self.teacher_rows[rows], self.teacher.weight, self.teacher.bias).to(dtype)
            return (capped(logits, self.teacher.softcap) / self.temperature).log_softmax(-1)


def _total(output: VQHead | SoftMapping | nn.Linear, rows: Tensor, target: _Target, softcap: float | None) -> Tensor:
    """The sum of the loss over rows [n, D]."""
    weight: Tensor = output.weight
    if isinstance(output, VQHead):
        if output.spec.num_codebooks == 1 and softcap is None:
            return _code_space(output, rows, target)
        weight = _twin_weight(output)
        if output.rotation is not None:
            rows = rows @ output.rotation

    def loss(logits: Tensor, part: slice) -> Tensor:
        return _row_losses(capped(logits, softcap), target, part)

    return loss_by_rows(rows, weight, output.bias, loss)


# ------------------------------------------------------------------------------------------------------- one codebook


def _code_space(head: VQHead, rows: Tensor, target: _Target) -> Tensor:
    scores = head.code_logits(rows)
    scores = scores.to(accumulator(scores.dtype))  # [n, K]
    code = head.codes[:, 0].long()
    bias = scores.new_zeros(len(code)) if head.bias is None else head.bias.to(scores.dtype)
    total = scores.new_zeros(())
    if target.labels is not None:
        picked = scores.gather(1, code[target.labels][:, None])[:, 0] + bias[target.labels]
        normaliser = (scores + code_mass(code, bias, scores.shape[1])).logsumexp(-1)
        total = total + (1 - target.alpha) * (normaliser - picked).sum()
    if target.teacher is not None:
        by_code, by_token, negative_entropy = _teacher_sums(target, code, scores)
        heat = target.temperature
        normaliser = (scores / heat + code_mass(code, bias / heat, scores.shape[1])).logsumexp(-1)
        expected = ((by_code * scores).sum() + by_token @ bias) / heat
        total = total + target.alpha * heat**2 * (negative_entropy - expected + normaliser.sum())
    return total


def _teacher_sums(target: _Target, code: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of q = the teacher's probabilities: per row and code [n, K], per token [V] (summed over rows), and sum q ln q."""
    by_code, by_token = torch.zeros_like(like), like.new_zeros(len(code))
    negative_entropy = like.new_zeros(())
    for part in parts(len(like), len(code)):
        log_q = target.log_q(part, like.dtype)
        q = log_q.exp()
        by_code[part] = by_code[part].index_add(1, code, q)
        by_token += q.sum(0)
        negative_entropy += (q * log_q).sum()
    return by_code, by_token, negative_entropy


# --------------------------------------------------------------------------------------------------------- any layer


def _twin_weight(head: VQHead) -> Tensor:
    """The dense twin's weight [V, D] in the coordinates of the codebooks (not turned back), differentiable."""
    m, k, width = head.spec.codebook_shape
    table = head.codebook.reshape(m * k, width)
    # index_select, not embedding: its backward pass is four times as fast for such short rows.
    if head.spec.kind == "product":
        entries = head.codes.long() + k * torch.arange(m, device=table.device)  # [V, M]
        return table.index_select(0, entries.flatten()).reshape(len(head.codes), m * width)
    rows = [table.index_select(0, head.codes[:, i].long() + k * i) for i in range(m)]
    return torch.stack(rows).sum(0)


def _row_losses(logits: Tensor, target: _Target, part: slice) -> Tensor:
    """The sum of the loss over some rows' logits [rows, V]."""
    total = logits.new_zeros(())
    log_p = logits.log_softmax(-1)
    if target.labels is not None:
        total = total + (1 - target.alpha) * F.nll_loss(log_p, target.labels[part], reduction="sum")
    if target.teacher is not None:
        heat = target.temperature
        cooled = log_p if heat == 1 else (logits / heat).log_softmax(-1)
        divergence = F.kl_div(cooled, target.log_q(part, logits.dtype), reduction="sum", log_target=True)
        total = total + target.alpha * heat**2 * divergence
    return total
