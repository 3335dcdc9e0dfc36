"""The tie rule on V logits: the best tokens, equal values by rising id."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def top_ids(row: NDArray[np.floating[Any]], k: int) -> NDArray[np.int64]:
    """The k best token ids of logits [V], falling by value; equal values by rising id."""
    k = min(k, row.size)
    bound = np.partition(row, -k)[-k]
    ids = np.flatnonzero(row >= bound)  # all that tie at the boundary
    return ids[np.lexsort((ids, -row[ids]))][:k]
