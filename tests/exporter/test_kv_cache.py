"""The KV cache in memory taken once: the same numbers as arrays handed over, from the same two places all along."""

import numpy as np
import pytest
import torch
from checkpoints import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from export_vq import feeds as fd
from export_vq.errors import UserError
from export_vq.graph import ExportOptions, export_onnx
from export_vq.kv_cache import BoundCache, CacheRunner, HandedCache, open_cache
from export_vq.records import OnnxArtifact
from export_vq.runners import OrtRunner, TorchRunner, signature_of


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def runner(request, tmp_path_factory):
    """A tiny Qwen 3, whose heads are wider than D / heads."""
    folder = tmp_path_factory.mktemp(request.param)
    export_onnx(tiny_model("qwen3", "product"), folder, ExportOptions(dtype=request.param))
    artifact = OnnxArtifact.load(folder / "model.onnx.json")
    with OrtRunner(folder / "model.onnx", signature_of(artifact)) as opened:
        yield opened


class Recording:
    """A runner that writes down where its cache was read and written."""

    def __init__(self, runner):
        self._runner = runner
        self.cache_dtype, self.cache_device = runner.cache_dtype, runner.cache_device
        self.calls = []

    def infer_with(self, feeds, past, present):
        self.calls.append(
            [{name.split(".", 1)[1]: t.data_ptr() for name, t in side.items()} for side in (past, present)]
        )
        return self._runner.infer_with(feeds, past, present)


def calls_of(runner, cache, prompts, stays):
    """Outputs of a prefill, and of a step after each choice of rows that stay."""
    random = np.random.default_rng(0)
    ids, mask = fd.left_pad(prompts)
    outputs = [cache.infer(fd.token_feeds(runner.signature, ids, mask))]
    for rows in stays:
        if rows is not None:
            cache.keep(rows)
            mask = mask[rows]
        mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        outputs.append(cache.infer(fd.token_feeds(runner.signature, random.integers(2, 200, (len(mask), 1)), mask)))
    return outputs


@st.composite
def batches(draw):
    """(prompts, for each step the rows that stay, in any order, or None for all)."""
    prompts = draw(st.lists(st.lists(st.integers(2, 200), min_size=1, max_size=5), min_size=1, max_size=4))
    left, stays = len(prompts), []
    for _ in range(draw(st.integers(0, 5))):
        rows = draw(st.none() | st.lists(st.integers(0, left - 1), min_size=1, max_size=left, unique=True))
        left = left if rows is None else len(rows)
        stays.append(rows)
    return prompts, stays


@given(batches())
@settings(max_examples=25, deadline=None)
def test_both_caches_give_the_same_numbers(runner, batch):
    prompts, stays = batch
    longest = max(map(len, prompts)) + len(stays)
    bound = calls_of(runner, open_cache(runner, len(prompts), longest), prompts, stays)
    handed = calls_of(runner, HandedCache(runner, len(prompts)), prompts, stays)
    for a, b in zip(bound, handed, strict=True):
        assert list(a) == list(b) == ["logits"]
        np.testing.assert_array_equal(a["logits"], b["logits"])


def test_what_was_written_is_read_where_it_is_and_nothing_moves(runner):
    """Eight steps: each reads where the one before wrote, in two places in all; a row that leaves changes nothing of that."""
    recording = Recording(runner)
    cache = BoundCache(recording, runner.signature.cache_shapes, 3, 12)
    calls_of(runner, cache, [[5, 9, 40], [17], [3, 8]], [None, None, None, [2, 0], None, None, [1], None])
    reads, writes = zip(*recording.calls[1:], strict=True)  # an empty past has no address
    assert len(reads) == 8
    for name in reads[0]:
        places = {side[name] for side in (*reads, *writes)}
        assert len(places) == 2
        for read, written in zip(reads, writes, strict=True):
            assert {read[name], written[name]} == places
    for before, after in ((0, 1), (1, 2), (4, 5), (7, 7)):
        assert after == before or reads[after] == writes[before]


def test_runners_of_arrays_get_arrays(runner):
    loaded = tiny_model("qwen3", "product")
    assert isinstance(runner, CacheRunner)
    assert isinstance(open_cache(runner, 1, 4), BoundCache)
    assert isinstance(open_cache(TorchRunner(loaded, runner.signature, torch.float32), 1, 4), HandedCache)


def test_a_cache_that_fits_nowhere_is_refused(runner):
    with pytest.raises(
        UserError, match=r"the cache of 1 x 1000000000000 positions needs \d+ MiB, more than cpu has free"
    ):
        open_cache(runner, 1, 10**12)
