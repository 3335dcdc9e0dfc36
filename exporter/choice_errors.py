"""How far chosen tokens are from a reference's: the k best with their values, or one drawn token with its log-probability.

What a graph says of a token is held to the reference's logit of that same token, so tokens that tie within the error may
change places and nothing else may. With all logits within e of the reference's, sorted values and logsumexp are too.

A draw is held to the exact distribution of the reference's logits: token v is right for every `uniform` between the shares
of the tokens before it and that sum with its own. Rounding moves such a boundary by at most

    e / (2 T)                       logits within e, at temperature T: a share c moves by c (1 - c) times the spread 2 e / T
    (256 + V / 256 + 8) 2^-24       float32 sums of V shares in blocks of 256, and eight roundings besides
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from export_vq.feeds import Feeds
from export_vq.logit_errors import EDGES, Floats, divergence, largest, log_softmax, lowest_cosine
from export_vq.ranking import top_ids
from export_vq.records import ErrorStats

TEMPERATURE = 0.8
"""Of the draws that are judged: not 1, which a graph might forget."""
_BLOCK = 256


def boundary_bound(logit_error: float, vocab_size: int) -> float:
    """How far rounding may move a boundary of the cumulative distribution, as a share of the whole."""
    return logit_error / (2 * TEMPERATURE) + (_BLOCK + vocab_size / _BLOCK + 8) * 2.0**-24


@dataclass
class ChoiceErrors:
    """Streaming statistics of a 'topk' or 'sample' graph against a reference that gives its `logits` too.

    `order` int64 [V] is that of the tokens in the cumulative distribution.
    """

    order: NDArray[np.int64]
    positions: int = 0
    disordered: int = 0
    """Positions with an id out of range or twice, a value that rises, or equal values without rising ids."""
    margins: list[Floats] = field(default_factory=list)
    """How far each draw's `uniform` is outside of its token's share; 0 inside."""
    errors: list[Floats] = field(default_factory=list)
    logit_error: float = 0.0
    """Of a candidate that gives `logits`, as PyTorch does."""
    code_error: float = 0.0
    code_scale: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    cosine: float = 1.0
    kl: list[Floats] = field(default_factory=list)
    nll: list[Floats] = field(default_factory=list)
    top1: int = 0
    top5: float = 0.0

    def add(
        self, reference: Feeds, candidate: Feeds, targets: NDArray[np.int64], uniform: Floats | None = None
    ) -> None:
        """Take in rows: outputs by name, each [rows, ..]; `targets` [rows] the next token, -1 where unknown; `uniform`
        [rows] of a 'sample' graph."""
        for start in range(0, len(targets), 64):  # bounded scratch: 64 x V in float64
            part = slice(start, start + 64)
            a, b = ({name: array[part] for name, array in given.items()} for given in (reference, candidate))
            self._add(a, b, targets[part], None if uniform is None else uniform[part].astype(np.float64))

    def _add(self, a: Feeds, b: Feeds, targets: NDArray[np.int64], uniform: Floats | None) -> None:
        logits = a["logits"].astype(np.float64)
        self.positions += len(logits)
        self.low, self.high = min(self.low, float(logits.min())), max(self.high, float(logits.max()))
        if "logits" in b:
            self.logit_error = float(np.maximum(self.logit_error, largest(np.abs(b["logits"] - logits))))
        if "code_logits" in a and "code_logits" in b:
            scores = a["code_logits"].astype(np.float64)
            self.code_error = float(np.maximum(self.code_error, largest(np.abs(b["code_logits"] - scores))))
            self.code_scale = max(self.code_scale, float(np.ptp(scores)))
        v = logits.shape[1]
        rows = np.arange(len(logits))[:, None]
        ids = b["ids"].reshape(len(logits), -1)
        self.disordered += int(((ids < 0) | (ids >= v)).any(1).sum())
        ids = np.clip(ids, 0, v - 1)
        if uniform is None:
            shares = log_softmax(logits)
            norm = logits[:, :1] - shares[:, :1]
            told, lse = b["values"].astype(np.float64), b["logsumexp"].astype(np.float64)[:, None]
            self._add_order(told, ids)
            best = np.partition(logits, v - ids.shape[1])[:, v - ids.shape[1] :]
            self.errors += [np.abs(told - logits[rows, ids]), np.abs(told - np.sort(best)[:, ::-1]), np.abs(lse - norm)]
            told_shares = told - lse
            self.cosine = min(self.cosine, lowest_cosine(told, logits[rows, ids]))
            self._add_agreement(logits, ids)
        else:
            shares = log_softmax(logits / TEMPERATURE)
            told_shares = b["logprob"].astype(np.float64)[:, None]
            self.errors.append(np.abs(told_shares - shares[rows, ids]))
            self._add_draws(shares, ids[:, 0], uniform)
        known = (ids == targets[:, None]) & (targets >= 0)[:, None]
        self.nll.append(np.stack([-shares[rows, ids][known], -told_shares[known]]))
        self.kl.append(_coarse_kl(shares[rows, ids], told_shares))

    def _add_order(self, told: Floats, ids: NDArray[np.int64]) -> None:
        step, ahead = np.diff(told), np.diff(ids)
        twice = (np.diff(np.sort(ids)) == 0).any(1)
        self.disordered += int((twice | ((step > 0) | ((step == 0) & (ahead <= 0))).any(1)).sum())

    def _add_agreement(self, logits: Floats, ids: NDArray[np.int64]) -> None:
        for row, chosen in zip(logits, ids, strict=True):
            best = top_ids(row, min(5, len(chosen)))
            self.top1 += int(chosen[0] == best[0])
            self.top5 += len(np.intersect1d(best, chosen[: len(best)])) / len(best)

    def _add_draws(self, shares: Floats, ids: NDArray[np.int64], uniform: Floats) -> None:
        place = np.empty_like(self.order)
        place[self.order] = np.arange(len(place))
        ends = np.exp(shares[:, self.order]).cumsum(1)
        ends[:, -1] = 1.0
        rows, at = np.arange(len(ids)), place[ids]
        starts = np.where(at > 0, ends[rows, at - 1], 0.0)
        margin = np.maximum(np.maximum(starts - uniform, uniform - ends[rows, at]), 0.0)
        right = int(((starts <= uniform) & (uniform < ends[rows, at])).sum())
        self.margins.append(margin)
        self.top1 += right
        self.top5 += right

    def stats(self) -> ErrorStats:
        """The numbers so far; KL is over what the graph tells: its tokens, and all others together."""
        errors = np.concatenate([e.ravel() for e in self.errors]) if self.errors else np.zeros(1)
        histogram = np.histogram(np.log10(np.clip(errors, 10.0 ** EDGES[0], 10.0 ** EDGES[-1])), EDGES)[0]
        count = max(self.positions, 1)
        return ErrorStats(
            positions=self.positions,
            max_abs=largest(errors),
            mean_abs=float(errors.mean()),
            logit_range=self.high - self.low,
            cosine_min=self.cosine,
            top1_agreement=self.top1 / count,
            top5_agreement=self.top5 / count,
            **divergence(self.kl, self.nll),
            error_histogram=tuple((float(edge), int(n)) for edge, n in zip(EDGES[1:], histogram, strict=True)),
        )

    def judge(self, logit_error: float, code_error: float) -> tuple[list[str], dict[str, float], int | None]:
        """What is wrong besides the size of the errors.

        Args:
            logit_error, code_error: what logits and code logits may be off by.

        Returns:
            the failures; the limit that the draws were held to, and how many of them a moved boundary decided: {} and None
            where nothing is drawn.
        """
        failures = []
        if self.disordered:
            failures.append(
                f"tokens are out of order at {self.disordered} of {self.positions} positions: values fall, equal ones by "
                "rising id, each id once"
            )
        if not self.code_error <= code_error:
            failures.append(f"largest code_logits error is {self.code_error:.2e}, allowed {code_error:.2e}")
        if not self.margins:
            return failures, {}, None
        bound = boundary_bound(logit_error, len(self.order))
        near, wrong, margin = self.draws_outside(bound)
        if wrong:
            failures.append(
                f"{wrong} of {self.positions} draws are not the token that their number asks for, by up to {margin:.2e} of the "
                f"distribution, rounding allows {bound:.2e}"
            )
        return failures, {"boundary": bound}, near

    def draws_outside(self, bound: float) -> tuple[int, int, float]:
        """Of the draws outside of their token's share: those within `bound` of it, those beyond, and the largest margin."""
        margins = np.concatenate(self.margins) if self.margins else np.zeros(0)
        beyond = ~(margins <= bound)  # written so that NaN is beyond
        return int(((margins > 0) & ~beyond).sum()), int(beyond.sum()), largest(margins)


def _coarse_kl(shares: Floats, told: Floats) -> Floats:
    """KL of two distributions over a few tokens [rows, k], as log-probabilities, and one outcome for all the others."""
    rest, told_rest = (np.clip(1 - np.exp(logs).sum(1), 1e-12, 1.0) for logs in (shares, told))
    kl: Floats = (np.exp(shares) * (shares - told)).sum(1) + rest * np.log(rest / told_rest)
    return kl
