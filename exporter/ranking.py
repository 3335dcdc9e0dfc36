"""In which order tokens stand: the best ones of V logits, and all of them in a draw's cumulative distribution."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def top_ids(row: NDArray[np.floating[Any]], k: int) -> NDArray[np.int64]:
    """The tie rule: the k best token ids of logits [V], falling by value; equal values by rising id."""
    k = min(k, row.size)
    bound = np.partition(row, -k)[-k]
    ids = np.flatnonzero(row >= bound)  # all that tie at the boundary
    return ids[np.lexsort((ids, -row[ids]))][:k]


def order_of_draws(codes: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Token ids [V] as `VQSample` lays them out, by codes [V, M]: by (code, id) with one codebook, else by id."""
    order = codes[:, 0].argsort(kind="stable") if codes.shape[1] == 1 else np.arange(len(codes))
    return order.astype(np.int64)
