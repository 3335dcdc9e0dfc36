"""VQTopK and VQSample of libvq.so through ctypes, as a foreign caller has them."""

import ctypes

import numpy as np
import pytest
import torch

from export_vq import codespace

V, K = 700, 60
FLOAT32, PORTABLE, BEST = 0, 0, -1


@pytest.fixture(scope="module")
def library(native_library):
    functions = ctypes.CDLL(str(native_library("vq")))
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    functions.vq_top_k_cpu.argtypes = [*[pointer] * 6, *[size] * 5, number, number, size]
    functions.vq_sample_cpu.argtypes = [
        *[pointer] * 3,
        ctypes.c_float,
        *[pointer] * 3,
        *[size] * 4,
        number,
        number,
        size,
    ]
    functions.vq_top_k_cpu.restype = functions.vq_sample_cpu.restype = ctypes.c_char_p
    return functions


def _head(m):
    """scores [3, M*K] of whole numbers, so that sums are exact and tokens tie; codes [V, M]; bias [V]."""
    rng = np.random.default_rng(m)
    scores, bias = (rng.integers(-3, 4, shape).astype(np.float32) for shape in ((3, m * K), V))
    return scores, rng.integers(0, K, (V, m)).astype(np.int32), bias


def _top_k(library, scores, codes, bias, k, isa=BEST, dtype=FLOAT32):
    rows = len(scores)
    values, ids, lse = np.zeros((rows, k), np.float32), np.zeros((rows, k), np.int64), np.zeros(rows, np.float32)
    arrays = [array.ctypes.data for array in (scores, codes, bias, values, ids, lse)]
    error = library.vq_top_k_cpu(*arrays, rows, codes.shape[1], K, V, k, dtype, isa, 2)
    return error, values, ids, lse


def _sample(library, scores, codes, bias, uniform, temperature, isa=BEST):
    rows = len(scores)
    ids, logprob = np.zeros(rows, np.int64), np.zeros(rows, np.float32)
    before = [array.ctypes.data for array in (scores, codes, bias)]
    after = [array.ctypes.data for array in (uniform, ids, logprob)]
    error = library.vq_sample_cpu(*before, temperature, *after, rows, codes.shape[1], K, V, FLOAT32, isa, 2)
    return error, ids, logprob


@pytest.mark.parametrize("isa", [PORTABLE, BEST])
@pytest.mark.parametrize("m", [1, 3])
def test_calls_agree_with_the_reference(library, m, isa):
    head = _head(m)
    tensors = [torch.from_numpy(array) for array in head]
    error, values, ids, lse = _top_k(library, *head, 50, isa)
    wanted = codespace.top_k(*tensors, 50)
    assert error is None
    np.testing.assert_array_equal(values, wanted.values)
    np.testing.assert_array_equal(ids, wanted.ids)
    # Two stages of exponentials (plugins/kernels/cpu/mass.h) and roundings of numbers below 32, on either side.
    bound = 2 * 2.0**-24 * (2 * (2 * 88 + 64) + 8 * 32)
    assert np.abs(lse - wanted.logsumexp.numpy()).max() <= bound

    uniform = np.array([0.1, 0.5, 0.9], np.float32)
    error, ids, logprob = _sample(library, *head, uniform, 0.8, isa)
    drawn, log_chance = codespace.sample(*tensors, torch.from_numpy(uniform), 0.8)
    assert error is None
    np.testing.assert_array_equal(ids, drawn)
    assert np.abs(logprob - log_chance.numpy()).max() <= bound / 0.8


def test_what_cannot_be_is_said(library):
    scores, codes, bias = _head(2)
    uniform = np.zeros(3, np.float32)
    assert _top_k(library, scores, codes, bias, 0)[0] == b"k is 0, expected 1 to 700"
    assert _top_k(library, scores, codes, bias, 701)[0] == b"k is 701, expected 1 to 700"
    assert _top_k(library, scores, codes + K, bias, 1)[0].endswith(b"expected 0 to 59")
    assert _top_k(library, scores, codes, bias, 1, dtype=3)[0] == b"type is 3, expected 0 to 2"
    assert b"temperature is 0.0" in _sample(library, scores, codes, bias, uniform, 0.0)[0]
