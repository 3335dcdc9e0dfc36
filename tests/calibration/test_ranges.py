import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export_vq.calibration.histogram import Histogram
from export_vq.calibration.options import METHODS
from export_vq.calibration.ranges import PERCENTILE, TOP, magnitude

ARRAYS = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=3, max_size=60).map(
    lambda values: np.array(values[: len(values) // 3 * 3], np.float32).reshape(-1, 3)
)


def outliers(seed=0):
    """What language models have: most numbers near 1, a few hundred times as large."""
    random = np.random.default_rng(seed)
    values = random.standard_normal((4000, 5)).astype(np.float32)
    values[::50, 2] *= 200
    return values


@given(ARRAYS, ARRAYS)
@settings(deadline=None)
def test_counts_add_up_in_any_order(a, b):
    one, other, both = Histogram.of(a) + Histogram.of(b), Histogram.of(b) + Histogram.of(a), np.concatenate([a, b])
    for found in (one, other, Histogram.of(both)):
        assert (found.counts == one.counts).all()
        assert (found.channels == np.abs(both).max(axis=0)).all()
    assert one.counts.sum() == both.size


@given(ARRAYS)
@settings(deadline=None)
def test_a_histogram_comes_back_from_json(array):
    seen = Histogram.of(array)
    back = Histogram.from_json(json.loads(json.dumps(seen.to_json())))
    assert (back.counts == seen.counts).all()
    assert (back.channels == seen.channels).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_nan_and_infinity_show(dtype):
    for bad in (np.nan, np.inf):
        array = np.ones((3, 2), dtype)
        array[1, 1] = bad
        assert not np.isfinite(Histogram.of(array).largest)


@pytest.mark.parametrize("precision", TOP)
@pytest.mark.parametrize("method", METHODS)
def test_a_range_is_above_zero_and_no_larger_than_what_was_seen(method, precision):
    seen = Histogram.of(outliers())
    assert 0 < magnitude(seen, method, precision) <= seen.largest
    assert magnitude(Histogram.of(np.zeros((4, 2), np.float32)), method, precision) == 1


def test_max_clips_nothing_and_percentile_the_largest_share():
    values = outliers()
    seen = Histogram.of(values)
    assert magnitude(seen, "max", "int8") == np.abs(values).max()
    exact = np.quantile(np.abs(values), PERCENTILE, method="inverted_cdf")
    assert exact <= magnitude(seen, "percentile", "int8") <= exact * (1 + 1 / 64)  # the upper edge of its bin


def rounded(values, limit, precision):
    scale = limit / TOP[precision]
    scaled = np.clip(values / scale, -TOP[precision], TOP[precision])
    whole = scaled.astype(ml_dtypes.float8_e4m3fn).astype(float) if precision == "fp8" else np.rint(scaled)
    return whole * scale


@pytest.mark.parametrize("precision", TOP)
def test_mse_is_near_the_best_of_all_ranges(precision):
    values = outliers()
    largest = float(np.abs(values).max())

    def error(limit):
        return float(((rounded(values, limit, precision) - values) ** 2).mean())

    best = min(error(limit) for limit in largest * np.exp2(-np.arange(0, 7, 1 / 16)))
    # Its histogram knows each number to 1/64, its error model only what is expected: a tenth is no more than that.
    assert error(magnitude(Histogram.of(values), "mse", precision)) <= 1.1 * best


def test_entropy_clips_rare_outliers():
    values = outliers()
    found = magnitude(Histogram.of(values), "entropy", "int8")
    assert np.quantile(np.abs(values), 0.99) < found < np.abs(values).max()
