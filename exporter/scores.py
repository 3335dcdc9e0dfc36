"""What a decoder asks of one row of a model's output, answered alike by V logits and by code space.

A row from `--output topk` is answered from its list of the k best tokens and its normaliser wherever those decide, else
exactly from its code logits; V logits are never its input.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export_vq import codespace
from export_vq.feeds import Array, Feeds, HeadTables
from export_vq.head import gather_scatter
from export_vq.ranking import top_ids

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]

FEWEST = 256
"""Entries of a ranking of V logits: one partition of V finds one or so many."""


@dataclass(frozen=True)
class Ranking:
    """The best tokens: values float64 [n] falling, ids int64 [n], equal values by rising id; whether it is all of them."""

    values: Floats
    ids: Ids
    complete: bool


class Scores(Protocol):
    """The logits of one position, float64, however they are held. Token ids are trusted to be in range and distinct."""

    vocab_size: int

    @property
    def sound(self) -> bool:
        """No NaN, and a largest logit that is finite."""
        ...

    def logits(self, ids: Ids) -> Floats:
        """The logits [n] of some tokens."""
        ...

    def best(self, least: int, without: Ids) -> Ranking:
        """The best of all tokens but `without`: at least `least`, or all; more where they cost nothing."""
        ...

    def log_total(self, temperature: float, without: Ids) -> float:
        """logsumexp of logits / temperature over all tokens but `without`; -inf over none."""
        ...


class DenseScores:
    """Logits [V] of any floating type."""

    def __init__(self, logits: Array) -> None:
        self._row: Floats = logits.astype(np.float64)
        self.vocab_size = len(logits)

    @property
    def sound(self) -> bool:
        return bool(np.isfinite(self._row.max()))  # the maximum is NaN if any is

    def logits(self, ids: Ids) -> Floats:
        return self._row[ids]

    def best(self, least: int, without: Ids) -> Ranking:
        ids = np.delete(np.arange(self.vocab_size), without)
        row = self._row[ids]
        n = min(max(least, FEWEST), len(row))
        if n == 0:
            return Ranking(row, ids, True)
        at = top_ids(row, n)
        return Ranking(row[at], ids[at], n == len(row))

    def log_total(self, temperature: float, without: Ids) -> float:
        row = np.delete(self._row, without)
        peak = row.max(initial=-np.inf)
        if peak == -np.inf:
            return -np.inf
        return float(peak / temperature + np.log(np.exp((row - peak) / temperature).sum()))


class CodeSpace:
    """A VQ head's constants as code space takes them; one for all rows and steps."""

    def __init__(self, head: HeadTables) -> None:
        self._codes = torch.from_numpy(head.codes)
        self._bias = None if head.bias is None else torch.from_numpy(head.bias)
        self.vocab_size = len(head.codes)
        self._everything = torch.arange(self.vocab_size)

    def logits(self, code_logits: Tensor, ids: Ids) -> Floats:
        """Float32 sums of M table entries and the bias, for tokens [n]."""
        if not len(ids):
            return np.zeros(0)
        codes, bias, _ = self._part(torch.from_numpy(ids))
        return gather_scatter(code_logits, codes, bias).double().numpy()

    def best(self, code_logits: Tensor, n: int, without: Ids) -> tuple[Floats, Ids]:
        """The n best of all tokens but `without`; n at most so many."""
        codes, bias, ids = self._part(self._but(without))
        found = codespace.top_k(code_logits, codes, bias, n)
        return found.values.double().numpy(), ids[found.ids].numpy()

    def log_total(self, code_logits: Tensor, temperature: float, without: Ids) -> float:
        """In float64: at low temperatures float32 has no digits left for the differences that count."""
        codes, bias, _ = self._part(self._but(without))
        tempered = None if bias is None else bias.double() / temperature
        return float(codespace.logsumexp(code_logits.double() / temperature, codes, tempered))

    def _but(self, without: Ids) -> Tensor | None:
        """All ids but some, rising; None for all. Leaving tokens out keeps every sum one of positive terms."""
        if not len(without):
            return None
        keep = torch.ones(self.vocab_size, dtype=torch.bool)
        keep[torch.from_numpy(without)] = False
        return self._everything[keep]

    def _part(self, ids: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """(codes, bias, ids) of some tokens, or of all."""
        if ids is None:
            return self._codes, self._bias, self._everything
        return self._codes[ids], None if self._bias is None else self._bias[ids], ids


class CodeScores:
    """A row of `values, ids, logsumexp` over its `code_logits`."""

    def __init__(self, space: CodeSpace, values: Array, ids: Ids, logsumexp: float, code_logits: Array) -> None:
        """Args: values [k] and ids [k] as `VQTopK` gives them; logsumexp over all V; code_logits [M*K]."""
        self._space = space
        self._values: Floats = values.astype(np.float64)
        self._ids = ids
        self._logsumexp = logsumexp
        self._code_logits = torch.from_numpy(code_logits.astype(np.float32))
        self.vocab_size = space.vocab_size

    @property
    def sound(self) -> bool:
        return bool(
            np.isfinite(self._values[0]) and np.isfinite(self._logsumexp) and not self._code_logits.isnan().any()
        )

    def logits(self, ids: Ids) -> Floats:
        return self._space.logits(self._code_logits, ids)

    def best(self, least: int, without: Ids) -> Ranking:
        stay = ~np.isin(self._ids, without)
        values, ids = self._values[stay], self._ids[stay]
        everything = self.vocab_size - len(without)
        if len(ids) < min(least, everything):
            values, ids = self._space.best(self._code_logits, min(least, everything), without)
        return Ranking(values, ids, len(ids) == everything)

    def log_total(self, temperature: float, without: Ids) -> float:
        if len(without) == self.vocab_size:
            return -np.inf
        if temperature == 1:
            taken = float(np.exp(self.logits(without) - self._logsumexp).sum())
            if taken <= 0.5:  # what is left is at least as large as what goes: the relative error at most doubles
                return self._logsumexp + float(np.log1p(-taken))
        return self._space.log_total(self._code_logits, temperature, without)


class ScoreReader:
    """Rows of a runner's outputs as Scores: from `logits`, or from `values, ids, logsumexp, code_logits` and the head."""

    def __init__(self, head: HeadTables | None) -> None:
        self._head = head

    def read(self, outputs: Feeds, row: int) -> Scores:
        """The last position of one row of the batch."""
        if "logits" in outputs:
            return DenseScores(outputs["logits"][row, -1])
        values, ids, total, code_logits = (outputs[n][row, -1] for n in ("values", "ids", "logsumexp", "code_logits"))
        return CodeScores(self._space, values, ids, float(total), code_logits)

    @cached_property
    def _space(self) -> CodeSpace:
        assert self._head is not None, "a graph with code_logits has a VQ head"
        return CodeSpace(self._head)
