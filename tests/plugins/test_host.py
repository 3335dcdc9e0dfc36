"""The kernel that Python sums V logits of a row with: the definition in float64, over odd sizes and all its paths."""

import gc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export_vq.errors import UserError
from export_vq.head import gather_scatter
from export_vq.plugins.host import HostKernel
from export_vq.plugins.library import Library, find


@pytest.fixture(scope="session")
def library(native_library):
    return find("vq", native_library("vq").parent)


@settings(max_examples=100, deadline=None)
@given(
    m=st.sampled_from([1, 2, 3, 8, 17]),
    k=st.sampled_from([1, 2, 13, 256, 257, 700]),
    v=st.sampled_from([1, 2, 31, 511, 512, 513, 1531]),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_it_is_the_definition(library, m, k, v, bias, seed):
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, k, (v, m), generator=random, dtype=torch.int32)
    scores = 3 * torch.randn(m * k, generator=random)
    extra = torch.randn(v, generator=random) if bias else None
    kernel = HostKernel(library, codes.numpy(), None if extra is None else extra.numpy())
    largest = scores.view(m, k).abs().amax(1).sum() + (0 if extra is None else extra.abs().max())
    # M additions of float32, and fixed point where that is used (tests/plugins/test_ort_op.py): a code logit is off by
    # 1.25 steps of 2^-24 of the widest span, which is twice the largest number at most.
    bound = 2.0**-24 * (m * largest + 2.5 * m * scores.abs().max() + 6 * largest)
    for row in (scores, -scores):  # the constants serve any number of rows
        answer = gather_scatter(row.double(), codes, None if extra is None else extra.double())
        assert (torch.from_numpy(kernel.logits(row.numpy())).double() - answer).abs().max() <= bound


@pytest.mark.parametrize("m", [1, 3, 8])
def test_infinities_stay_with_the_tokens_that_use_them(library, m):
    """-inf forbids a code; an entry that no token has must not show."""
    codes = np.arange(40, dtype=np.int32)[:, None] % 4 * np.ones(m, np.int32)
    scores = np.tile(np.array([1.0, -np.inf, 2.0, 3.0, np.inf], np.float32), m)
    logits = HostKernel(library, codes, None).logits(scores)
    np.testing.assert_array_equal(logits, np.tile(np.array([m, -np.inf, 2 * m, 3 * m], np.float32), 10))


def test_it_keeps_its_own_copy_of_the_constants(library):
    codes, bias = np.array([[1], [0]], np.int32), np.array([0.5, 0.25], np.float32)
    kernel = HostKernel(library, codes[::-1], bias)  # strides of their own too
    codes[:], bias[:] = 7, 9
    gc.collect()
    assert kernel.logits(np.array([1.0, 2.0], np.float32)).tolist() == [1.5, 2.25]


def test_what_cannot_be_is_said(library, tmp_path):
    with pytest.raises(ValueError, match=r"codes\[1, 0\] is -1, expected 0 to 65535"):
        HostKernel(library, np.array([[0], [-1]], np.int32), None)
    kernel = HostKernel(library, np.array([[2, 0], [0, 4]], np.int32), None)
    with pytest.raises(ValueError, match="num_codes is 4, expected more than the largest code id, 4"):
        kernel.logits(np.zeros(8, np.float32))
    with pytest.raises(ValueError, match="9 code logits; expected a multiple of 2"):
        kernel.logits(np.zeros(9, np.float32))
    broken = tmp_path / "libvq.so"
    broken.write_text("no library")
    with pytest.raises(UserError, match=r"libvq\.so: cannot be loaded .* export-vq plugins build"):
        HostKernel(Library("vq", broken, "", False, "", True), np.zeros((1, 1), np.int32), None)
