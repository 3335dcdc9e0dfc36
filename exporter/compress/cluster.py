"""Weighted k-means with faiss: deterministic, nothing subsampled, and exact where there are codes enough."""

from __future__ import annotations

import faiss
import numpy as np
from numpy.typing import NDArray

POOL = 16
"""k-means++ looks at this many points a code, drawn by weight: as good as looking at all, and many times faster."""

Floats = NDArray[np.float32]


def weighted_kmeans(
    points: Floats,
    weights: NDArray[np.float64],
    num_codes: int,
    iterations: int,
    seed: int,
    start: Floats | None = None,
) -> tuple[Floats, NDArray[np.int64]]:
    """Lloyd's algorithm on sum_i weights[i] |points[i] - centroid|^2, from a weighted k-means++ start.

    Args:
        points: float32 [n, d].
        weights: float64 [n], above 0.
        num_codes: K, at most n.
        iterations: Lloyd steps.
        seed: the same seed and input give the same answer.
        start: centroids [K, d] to go on from.

    Returns:
        Centroids float32 [K, d] and the nearest centroid of every point, int64 [n]. With at most K different points the
        centroids are these points (spare codes repeat the last one and are used by none).

    Raises:
        ValueError: there are fewer points than codes.
    """
    if not 1 <= num_codes <= len(points):
        raise ValueError(f"num_codes is {num_codes}; expected 1 to the number of points ({len(points)})")
    points = np.ascontiguousarray(points)
    exact = _few_distinct(points, num_codes)
    if exact is not None:
        return exact
    if start is None:
        start = _start(points, weights, num_codes, np.random.default_rng(seed))
    width = points.shape[1]
    # faiss has slow code for one and two dimensions (fifteen times slower than for three); a dimension of zeros is none.
    spare = ((0, 0), (0, max(0, 3 - width)))
    points, start = (np.ascontiguousarray(np.pad(x, spare)) for x in (points, start))
    kmeans = faiss.Kmeans(
        points.shape[1],
        num_codes,
        niter=iterations,
        seed=seed,
        max_points_per_centroid=len(points),  # never subsample
        min_points_per_centroid=1,  # never warn
    )
    scaled = weights * (len(weights) / weights.sum())  # float32 holds them well around 1
    kmeans.train(points, weights=scaled.astype(np.float32), init_centroids=start)
    assert kmeans.centroids is not None
    return kmeans.centroids[:, :width], kmeans.assign(points)[1].astype(np.int64)


def _few_distinct(points: Floats, num_codes: int) -> tuple[Floats, NDArray[np.int64]] | None:
    """The different points as centroids, or None where there are more of them than codes."""
    # A few more points than codes are enough to see that they differ, in nearly all cases.
    if len(np.unique(points[: 2 * num_codes], axis=0)) > num_codes:
        return None
    distinct, index = np.unique(points, axis=0, return_inverse=True)
    if len(distinct) > num_codes:
        return None
    spare = np.repeat(distinct[-1:], num_codes - len(distinct), axis=0)
    return np.concatenate([distinct, spare]), index.reshape(-1).astype(np.int64)


def _start(points: Floats, weights: NDArray[np.float64], num_codes: int, random: np.random.Generator) -> Floats:
    """k-means++ (Arthur and Vassilvitskii 2007) on a pool of points drawn by weight, so that the pool itself is unweighted."""
    size = min(len(points), POOL * num_codes)
    pool = points[random.choice(len(points), size, replace=False, p=weights / weights.sum())]
    columns = np.ascontiguousarray(pool.T)
    chosen = np.empty((num_codes, points.shape[1]), np.float32)
    distance = np.full(size, np.inf, np.float32)
    pick = int(random.integers(size))
    for code in range(num_codes):
        chosen[code] = pool[pick]
        distance = np.minimum(distance, np.square(columns - chosen[code][:, None]).sum(0))
        mass = np.cumsum(distance, dtype=np.float64)
        pick = min(int(np.searchsorted(mass, random.random() * mass[-1], side="right")), size - 1)
    return chosen
