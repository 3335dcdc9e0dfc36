"""The next token from one position's scores: sparse corrections, filters, one draw. Exact, and the same for every source.

Tokens are laid out by falling corrected logit, equal ones by rising id. top_k, top_p and min_p each keep a beginning of
that layout, and the draw inverts its cumulative distribution, so the first entries of a ranking mostly decide; where
they do not, a longer one is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from export_vq.decoding import DecodingOptions
from export_vq.errors import UserError
from export_vq.scores import Floats, Ids, Ranking, Scores

_GROWTH = 8
"""How much longer a ranking gets when it could not decide."""


@dataclass(frozen=True)
class Corrected:
    """Scores with the logits of a few tokens replaced: `ids` int64 [c] distinct, `logits` float64 [c]."""

    scores: Scores
    ids: Ids
    logits: Floats

    def best(self, least: int) -> Ranking:
        """The best tokens after correction, at least `least` or all."""
        rest = self.scores.best(least, self.ids)
        values, ids = np.concatenate([rest.values, self.logits]), np.concatenate([rest.ids, self.ids])
        order = np.lexsort((ids, -values))
        if not rest.complete:
            # Tokens that the ranking does not hold follow its last one: what lies behind that is not known.
            order = order[: int(np.flatnonzero(order == len(rest.ids) - 1)[0]) + 1]
        return Ranking(values[order], ids[order], rest.complete)

    def log_total(self, temperature: float) -> float:
        """logsumexp of the corrected logits / temperature over all V."""
        terms = np.append(self.logits / temperature, self.scores.log_total(temperature, self.ids))
        return float(np.logaddexp.reduce(terms))


def correct(scores: Scores, options: DecodingOptions, seen: Set[int]) -> Corrected:
    """Apply logit_bias, then repetition_penalty; `seen` are the tokens of prompt and output."""
    penalised = seen if options.repetition_penalty != 1 else frozenset[int]()
    biased = {token for token, addition in options.logit_bias.items() if addition}
    ids = np.array(sorted(biased | penalised), np.int64)
    logits = scores.logits(ids) + np.array([options.logit_bias.get(token, 0.0) for token in ids.tolist()])
    penalty = options.repetition_penalty
    repeated = np.array([token in penalised for token in ids.tolist()], bool)
    fewer = np.where(logits < 0, logits * penalty, logits / penalty)
    return Corrected(scores, ids, np.where(repeated, fewer, logits))


def next_token(scores: Scores, options: DecodingOptions, seen: Set[int], uniform: float) -> int:
    """The token that the options choose.

    Args:
        scores: the model's, at the last position.
        options: corrections, temperature and filters.
        seen: token ids of prompt and output so far.
        uniform: in [0, 1); unused at temperature 0.

    Raises:
        UserError: logit_bias forbids every token.
    """
    draw = _Draw(correct(scores, options, seen), options, uniform)
    least = 1  # whatever the source has at no cost mostly decides
    while True:
        ranking = draw.corrected.best(least)
        index = draw.decide(ranking)
        if index is not None:
            return int(ranking.ids[index])
        least = options.top_k or _GROWTH * len(ranking.ids)


@dataclass(frozen=True)
class _Draw:
    """One draw, decided by rankings that grow until one is long enough."""

    corrected: Corrected
    options: DecodingOptions
    uniform: float

    @cached_property
    def _log_total(self) -> float:
        return self.corrected.log_total(self.options.temperature)

    def decide(self, ranking: Ranking) -> int | None:
        """Index of the drawn token in the ranking; None: a longer one is needed."""
        options, values = self.options, ranking.values
        if values[0] == -math.inf:
            raise UserError("logit_bias forbids every token of the model; allow at least one")
        if options.temperature == 0:
            return 0
        known = ranking.complete
        if options.top_k and (known or len(values) >= options.top_k):
            values, known = values[: options.top_k], True  # what follows has no part in what is drawn
        elif options.top_k:
            return None
        weights = np.exp((values - values[0]) / options.temperature)
        cumulative = weights.cumsum()
        stay = self._kept(weights, cumulative, known, values[0])
        if stay is not None:
            return _invert(cumulative[:stay], self.uniform * cumulative[stay - 1])
        if options.top_p < 1 or options.min_p > 0:
            return None  # the filters keep more than is known
        target = self.uniform * self._total(values[0])
        return _invert(cumulative, target) if target < cumulative[-1] else None

    def _kept(self, weights: Floats, cumulative: Floats, known: bool, best: float) -> int | None:
        """How many of the first tokens the filters keep; None: more than these."""
        stay = [len(weights)] if known else []
        if self.options.min_p > 0:
            stay += np.flatnonzero(weights < self.options.min_p)[:1].tolist()
        if self.options.top_p < 1:
            target = self.options.top_p * (cumulative[-1] if known else self._total(best))
            stay += (np.flatnonzero(cumulative >= target)[:1] + 1).tolist()
        return min(stay, default=None)

    def _total(self, best: float) -> float:
        """The sum of all weights, of which the best token's is 1."""
        return math.exp(self._log_total - best / self.options.temperature)


def _invert(cumulative: Floats, target: float) -> int:
    """First index whose cumulative weight passes the target; weight 0 is never drawn, also where rounding falls short."""
    last = int(np.searchsorted(cumulative, cumulative[-1]))  # the last that added anything
    return min(int(np.searchsorted(cumulative, target, side="right")), last)
