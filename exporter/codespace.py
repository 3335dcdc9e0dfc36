"""What a decoder needs, exact, without ever building V logits: greedy, top-k, logsumexp and sampling.

With one codebook the work is O(K + k) a row, in code space: tokens are kept in buckets by code, and
`mass[c] = logsumexp of bias over the tokens of code c` stands for a whole bucket. With more codebooks one streaming
pass over blocks of V keeps a running result. This is the reference of the native kernels.

Order: equal values order by token id, lower first. Values accumulate in float32, or float64 for float64 input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from export_vq.head import gather_scatter

BLOCK = 8192
"""Tokens a streaming pass looks at together."""


@dataclass(frozen=True)
class TopK:
    """values [.., k] descending, ids int64 [.., k], logsumexp [..] over all V logits."""

    values: Tensor
    ids: Tensor
    logsumexp: Tensor


def top_k(code_logits: Tensor, codes: Tensor, bias: Tensor | None, k: int) -> TopK:
    """The op `VQTopK`: the k best tokens and the normaliser of the softmax over all V.

    Args:
        code_logits: [.., M*K].
        codes: integer [V, M].
        bias: [V] or None.
        k: 1 <= k <= V; k = 1 is greedy.

    Raises:
        ValueError: k is out of range.
    """
    if not 1 <= k <= codes.shape[0]:
        raise ValueError(f"k is {k}; expected 1 to vocab_size ({codes.shape[0]})")
    lead = code_logits.shape[:-1]
    rows = _rows(code_logits)
    if codes.shape[1] == 1:
        space = _Buckets.build(codes, bias, rows.dtype)
        values, ids = space.top_k(rows, k)
        lse = space.logsumexp(rows)
    else:
        values, ids, lse = _stream_top_k(rows, codes, bias, k)
    return TopK(values.reshape(*lead, k), ids.reshape(*lead, k), lse.reshape(lead))


def sample(
    code_logits: Tensor, codes: Tensor, bias: Tensor | None, uniform: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The op `VQSample`: invert the cumulative distribution of softmax(logits / temperature) at `uniform`.

    Tokens are laid out by (code, token id) with one codebook, by token id with more, so that the same `uniform` gives
    the same token on every backend.

    Args:
        code_logits: [.., M*K].
        codes: integer [V, M].
        bias: [V] or None.
        uniform: [..] in [0, 1).
        temperature: above 0.

    Returns:
        ids int64 [..] and logprob [..], the log-probability of each id under the tempered distribution.

    Raises:
        ValueError: the temperature is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected above 0 (use top_k with k=1 for greedy)")
    lead = code_logits.shape[:-1]
    rows = _rows(code_logits) / temperature
    tempered = None if bias is None else bias.to(rows.dtype) / temperature
    u = uniform.reshape(-1).to(rows.dtype)
    if codes.shape[1] == 1:
        ids, logprob = _Buckets.build(codes, tempered, rows.dtype).sample(rows, u)
    else:
        ids, logprob = _stream_sample(rows, codes, tempered, u)
    return ids.reshape(lead), logprob.reshape(lead)


def logsumexp(code_logits: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    """The normaliser of the softmax over all V alone.

    Args:
        code_logits: [.., M*K].
        codes: integer [V, M].
        bias: [V] or None.

    Returns:
        [..] in the type that sums accumulate in.
    """
    rows = _rows(code_logits)
    if codes.shape[1] == 1:
        b = rows.new_zeros(codes.shape[0]) if bias is None else bias.to(rows.dtype)
        lse = (rows + code_mass(codes[:, 0].long(), b, rows.shape[1])).logsumexp(-1)
    else:
        lse = _stream_logsumexp(rows, codes, bias)
    return lse.reshape(code_logits.shape[:-1])


def code_mass(code: Tensor, bias: Tensor, num_codes: int) -> Tensor:
    """logsumexp of the bias over the tokens of each code, [K], differentiable; -inf where no token has the code.

    Args:
        code: int64 [V], the one code of every token.
        bias: floating [V].
        num_codes: K.
    """
    flat = bias.detach()
    peak = flat.new_full((num_codes,), -torch.inf).scatter_reduce(0, code, flat, "amax")
    total = bias.new_zeros(num_codes).index_add(0, code, (bias - peak[code]).exp())
    return total.log() + peak


def _rows(code_logits: Tensor) -> Tensor:
    """[.., M*K] -> [rows, M*K] in the type that sums accumulate in."""
    dtype = torch.float64 if code_logits.dtype == torch.float64 else torch.float32
    return code_logits.to(dtype).reshape(code_logits.shape[:-1].numel(), code_logits.shape[-1])


@dataclass(frozen=True)
class _Buckets:
    """Tokens grouped by their one code. `by_id` lists tokens by (code, id); `by_rank` by (code, bias falling, id)."""

    code: Tensor  # int64 [V]
    starts: Tensor  # int64 [K+1]
    by_id: Tensor  # int64 [V]
    by_rank: Tensor  # int64 [V]
    bias: Tensor  # [V]
    mass: Tensor  # [K]; -inf where no token has the code
    used: Tensor  # int64 [codes in use]

    @staticmethod
    def build(codes: Tensor, bias: Tensor | None, dtype: torch.dtype) -> _Buckets:
        code = codes[:, 0].long()
        v, k = code.numel(), int(code.max()) + 1
        b = torch.zeros(v, dtype=dtype) if bias is None else bias.to(dtype)
        by_id = torch.argsort(code, stable=True)
        falling = torch.argsort(b, descending=True, stable=True)
        by_rank = falling[torch.argsort(code[falling], stable=True)]
        counts = torch.bincount(code, minlength=k)
        starts = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
        return _Buckets(code, starts, by_id, by_rank, b, code_mass(code, b, k), counts.nonzero()[:, 0])

    def logsumexp(self, rows: Tensor) -> Tensor:
        return (rows[:, : self.mass.numel()] + self.mass).logsumexp(-1)

    def top_k(self, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        heads = self.by_rank[self.starts[self.used]]  # the best token of each code in use
        values, ids = rows.new_empty(len(rows), k), torch.empty(len(rows), k, dtype=torch.long)
        for i, row in enumerate(rows):
            best = row[self.used] + self.bias[heads]
            # A bucket whose head loses to k other heads cannot hold one of the k best tokens. Equal heads all stay: at
            # the boundary the token id decides, and rounding can make tokens of different bias equal.
            bound = best.topk(min(k, best.numel())).values[-1]
            reach = self.used[best >= bound]
            tokens = torch.cat([self._prefix(int(c), row[c], k) for c in reach])
            y = row[self.code[tokens]] + self.bias[tokens]
            order = _tie_order(y, tokens)[:k]
            values[i], ids[i] = y[order], tokens[order]
        return values, ids

    def _prefix(self, code: int, score: Tensor, k: int) -> Tensor:
        """The first k tokens of a bucket, and those that rounding makes equal to the k-th."""
        bucket = self.by_rank[self.starts[code] : self.starts[code + 1]]
        if bucket.numel() <= k:
            return bucket
        y = score + self.bias[bucket]
        equal = bucket[y == y[k - 1]]
        return torch.cat([bucket[y > y[k - 1]], equal.sort().values[:k]])

    def sample(self, rows: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        scores = rows[:, : self.mass.numel()] + self.mass  # [rows, K]: one draw among codes ...
        lse = scores.logsumexp(-1)
        weight = (scores - lse[:, None]).exp()
        code, left = _invert(weight, u)
        ids = torch.empty(len(rows), dtype=torch.long)
        for i, c in enumerate(code.tolist()):  # ... then one among the code's tokens
            bucket = self.by_id[self.starts[c] : self.starts[c + 1]]
            inside = (self.bias[bucket] - self.mass[c]).exp()[None]
            share = left[i : i + 1] / weight[i, c]
            ids[i] = bucket[_invert(inside, share)[0][0]]
        return ids, rows.gather(1, code[:, None])[:, 0] + self.bias[ids] - lse


def _invert(weight: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """First index whose cumulative weight passes u, per row, and how far u reaches into it.

    Weight 0 is never drawn, also when rounding leaves the cumulative sum short of u.
    """
    cumulative = weight.cumsum(-1)
    index = torch.searchsorted(cumulative, u[:, None], right=True)[:, 0]
    last = weight.shape[-1] - 1 - (weight > 0).flip(-1).int().argmax(-1)
    index = torch.minimum(index, last)
    before = cumulative.gather(1, index[:, None])[:, 0] - weight.gather(1, index[:, None])[:, 0]
    return index, (u - before).clamp_min(0)


def _tie_order(values: Tensor, ids: Tensor) -> Tensor:
    """Order by falling value; equal values by rising id."""
    by_id = ids.argsort(dim=-1, stable=True)
    return by_id.gather(-1, values.gather(-1, by_id).argsort(dim=-1, descending=True, stable=True))


def _blocks(rows: Tensor, codes: Tensor, bias: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """(first token id, logits [rows, block]) over the vocabulary."""
    for start in range(0, codes.shape[0], BLOCK):
        part = slice(start, start + BLOCK)
        yield start, gather_scatter(rows, codes[part], None if bias is None else bias[part])


def _stream_top_k(rows: Tensor, codes: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor, Tensor]:
    values = rows.new_empty(len(rows), 0)
    ids = torch.empty(len(rows), 0, dtype=torch.long)
    lse = rows.new_full((len(rows),), -torch.inf)
    for start, logits in _blocks(rows, codes, bias):
        lse = torch.logaddexp(lse, logits.logsumexp(-1))
        # Earlier blocks hold lower ids and stand first, so a stable sort keeps the tie rule.
        values = torch.cat([values, logits], 1)
        ids = torch.cat([ids, torch.arange(start, start + logits.shape[1]).expand_as(logits)], 1)
        values, order = values.sort(dim=-1, descending=True, stable=True)
        values, ids = values[:, :k], ids.gather(1, order[:, :k])
    return values, ids, lse


def _stream_logsumexp(rows: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    lse = rows.new_full((len(rows),), -torch.inf)
    for _, logits in _blocks(rows, codes, bias):
        lse = torch.logaddexp(lse, logits.logsumexp(-1))
    return lse


def _stream_sample(rows: Tensor, codes: Tensor, bias: Tensor | None, u: Tensor) -> tuple[Tensor, Tensor]:
    lse = _stream_logsumexp(rows, codes, bias)
    ids = torch.zeros(len(rows), dtype=torch.long)
    logprob = rows.new_full((len(rows),), -torch.inf)
    left, open_ = u.clone(), torch.ones(len(rows), dtype=torch.bool)
    for start, logits in _blocks(rows, codes, bias):
        chances = (logits - lse[:, None]).exp()
        total = chances.sum(-1)
        index, _ = _invert(chances, left)
        # Rows still open take this block's draw; the last block that has any weight keeps it when rounding runs over.
        take = open_ & (total > 0)
        ids[take] = start + index[take]
        logprob[take] = (logits - lse[:, None]).gather(1, index[:, None])[:, 0][take]
        open_ &= left >= total
        left = left - total
    return ids, logprob
