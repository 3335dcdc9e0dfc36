"""What a decoder asks of one row of a model's output, answered alike by V logits and by code space.

A row from `--output topk` is answered from its list of the k best tokens and its normaliser wherever those decide. Where
they do not, its V logits are summed from its code logits: here, once, for this row alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from export_vq.feeds import Array, Feeds, HeadTables
from export_vq.head import gather_scatter
from export_vq.plugins.host import HostKernel
from export_vq.plugins.library import find_current
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

    def __init__(self, head: HeadTables, *, native: bool = True) -> None:
        """Args: the head; whether to use the native kernel where it is built."""
        self._head = head
        self._codes = torch.from_numpy(head.codes)
        self._bias = None if head.bias is None else torch.from_numpy(head.bias)
        self._native = native
        self.vocab_size = len(head.codes)

    def logits(self, code_logits: NDArray[np.float32], ids: Ids) -> Floats:
        """Float32 sums of M table entries and the bias, for tokens [n]."""
        if not len(ids):
            return np.zeros(0)
        some = torch.from_numpy(ids)
        bias = None if self._bias is None else self._bias[some]
        return gather_scatter(torch.from_numpy(code_logits), self._codes[some], bias).double().numpy()

    def everything(self, code_logits: NDArray[np.float32]) -> Array:
        """The same of all tokens: float32 [V]."""
        if self._kernel is not None:
            return self._kernel.logits(code_logits)
        return gather_scatter(torch.from_numpy(code_logits), self._codes, self._bias).numpy()

    @cached_property
    def _kernel(self) -> HostKernel | None:
        library = find_current("vq") if self._native else None
        return None if library is None else HostKernel(library, self._head.codes, self._head.bias)


class CodeScores:
    """A row of `values, ids, logsumexp` over its `code_logits`."""

    def __init__(self, space: CodeSpace, values: Array, ids: Ids, logsumexp: float, code_logits: Array) -> None:
        """Args: values [k] and ids [k] as `VQTopK` gives them; logsumexp over all V; code_logits [M*K]."""
        self._space = space
        self._values: Floats = values.astype(np.float64)
        self._ids = ids
        self._logsumexp = logsumexp
        self._code_logits = code_logits.astype(np.float32)
        self.vocab_size = space.vocab_size

    @property
    def sound(self) -> bool:
        told = np.isfinite(self._values[0]) and np.isfinite(self._logsumexp)
        return bool(told and not np.isnan(self._code_logits).any())

    def logits(self, ids: Ids) -> Floats:
        return self._space.logits(self._code_logits, ids)

    def best(self, least: int, without: Ids) -> Ranking:
        stay = ~np.isin(self._ids, without)
        values, ids = self._values[stay], self._ids[stay]
        everything = self.vocab_size - len(without)
        if len(ids) < min(least, everything):
            return self._everything.best(least, without)
        return Ranking(values, ids, len(ids) == everything)

    def log_total(self, temperature: float, without: Ids) -> float:
        if temperature == 1:
            taken = float(np.exp(self.logits(without) - self._logsumexp).sum())
            if taken <= 0.5:  # what is left is at least as large as what goes: the relative error at most doubles
                return self._logsumexp + float(np.log1p(-taken))
        return self._everything.log_total(temperature, without)

    @cached_property
    def _everything(self) -> DenseScores:
        return DenseScores(self._space.everything(self._code_logits))


class ScoreReader:
    """Rows of a runner's outputs as Scores: from `logits`, or from `values, ids, logsumexp, code_logits` and the head."""

    def __init__(self, head: HeadTables | None, *, native: bool = True) -> None:
        """Args: the constants, where the rows have code logits; whether to use the native kernel where it is built."""
        self._head = head
        self._native = native

    def read(self, outputs: Feeds, row: int) -> Scores:
        """The last position of one row of the batch."""
        if "logits" in outputs:
            return DenseScores(outputs["logits"][row, -1])
        values, ids, total, code_logits = (outputs[n][row, -1] for n in ("values", "ids", "logsumexp", "code_logits"))
        return CodeScores(self._space, values, ids, float(total), code_logits)

    @cached_property
    def _space(self) -> CodeSpace:
        assert self._head is not None, "a graph with code_logits has a VQ head"
        return CodeSpace(self._head, native=self._native)
