"""The ONNX Runtime custom op against the definition, through ONNX Runtime itself."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from export_vq import contract
from export_vq.head import gather_scatter

TYPES = {
    "float32": (TensorProto.FLOAT, 24),
    "float16": (TensorProto.FLOAT16, 11),
    "bfloat16": (TensorProto.BFLOAT16, 8),
}
"""ONNX type and bits of precision."""


def _graph(codes, bias=None, *, dtype="float32", num_codebooks=None, last_dim=None, codes_as_input=False, rank=2):
    """One node around constants. bfloat16 goes in and out as float32, cast on either side."""
    element = TYPES[dtype][0]
    outer = TensorProto.FLOAT if dtype == "bfloat16" else element
    lead = [f"n{i}" for i in range(rank - 1)]
    inputs = [helper.make_tensor_value_info("scores", outer, [*lead, last_dim or "width"])]
    constants = []
    if codes_as_input:
        inputs.append(helper.make_tensor_value_info("codes", TensorProto.INT32, list(codes.shape)))
    else:
        constants.append(numpy_helper.from_array(codes, "codes"))
    names = ["scores_t", "codes"]
    if bias is not None:
        constants.append(helper.make_tensor("bias", element, bias.shape, bias.astype(np.float32).ravel()))
        names.append("bias")
    m = codes.shape[1] if num_codebooks is None else num_codebooks
    nodes = [
        helper.make_node("Cast", ["scores"], ["scores_t"], to=element),
        helper.make_node(contract.GATHER_SCATTER, names, ["logits_t"], domain=contract.DOMAIN, num_codebooks=m),
        helper.make_node("Cast", ["logits_t"], ["logits"], to=outer),
    ]
    graph = helper.make_graph(
        nodes, "op", inputs, [helper.make_tensor_value_info("logits", outer, [*lead, codes.shape[0]])], constants
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(contract.DOMAIN, contract.VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _session(model, library, *, threads=1, profile=None):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library))
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _expected(scores, codes, bias):
    """float64 answer and the sum of absolute values, which the rounding errors are relative to."""
    ids, wide = torch.from_numpy(codes), torch.from_numpy(scores.astype(np.float64))
    extra = None if bias is None else torch.from_numpy(bias.astype(np.float64))
    answer = gather_scatter(wide, ids, extra)
    weight = gather_scatter(wide.abs(), ids, None if extra is None else extra.abs())
    return answer.numpy(), weight.numpy()


@settings(max_examples=150, deadline=None)
@given(
    m=st.sampled_from([1, 2, 3, 5, 16]),
    k=st.sampled_from([1, 2, 13, 256, 257, 700]),
    v=st.sampled_from([1, 2, 31, 511, 512, 513, 1531]),
    rows=st.one_of(st.sampled_from([0, 1, 257]), st.integers(2, 20)),
    bias=st.booleans(),
    dtype=st.sampled_from(sorted(TYPES)),
    threads=st.sampled_from([1, 2]),
    rank=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 2**16),
)
def test_op_computes_the_definition(native_library, m, k, v, rows, bias, dtype, threads, rank, seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, k, (v, m)).astype(np.int32)
    lead = {1: [], 2: [rows], 3: [rows, 1]}[rank]

    def numbers(*shape):
        """Random float32 that are exact in the op's type."""
        values = torch.from_numpy(rng.standard_normal(shape) * 3)
        return values.to(getattr(torch, dtype)).float().numpy()

    scores, extra = numbers(*lead, m * k), numbers(v) if bias else None
    session = _session(_graph(codes, extra, dtype=dtype, rank=rank), native_library("vq_ort"), threads=threads)
    logits = session.run(None, {"scores": scores.astype(np.float16 if dtype == "float16" else np.float32)})[0]
    answer, weight = _expected(scores, codes, extra)
    assert logits.shape == answer.shape
    summed = m * weight  # M roundings of float32, in units of 2^-24
    if m >= 8 and k <= 256:
        # Fixed point (plugins/kernels/cpu/isa.h): 1.25 steps of the widest span a codebook, three roundings at the end.
        books = scores.astype(np.float64).reshape(*lead, m, k)
        span, peak = np.ptp(books, axis=-1).max(-1), np.abs(books).max(-1).sum(-1)
        summed = np.maximum(summed, (1.25 * m * span + 3 * peak)[..., None] + 3 * weight)
    # Then one rounding to T, of a value that may have moved up by the first error.
    bound = 2.0**-24 * summed + 2.0 ** -TYPES[dtype][1] * np.abs(answer) * (1 + 2.0**-20) + 2.0**-25
    assert (np.abs(logits.astype(np.float64) - answer) <= bound).all()


def test_runtime_uses_the_kernel(native_library, tmp_path):
    """The profile names the op: the runtime did not fall back to anything."""
    codes = np.array([[2], [0], [1]], np.int32)
    session = _session(_graph(codes), native_library("vq_ort"), profile=tmp_path / "profile")
    scores = np.array([[1.0, 2.0, 3.0]], np.float32)
    np.testing.assert_array_equal(session.run(None, {"scores": scores})[0], [[3.0, 1.0, 2.0]])
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = {e["args"]["op_name"]: e["args"]["provider"] for e in events if "op_name" in e.get("args", {})}
    assert ran[contract.GATHER_SCATTER] == "CPUExecutionProvider"


def test_sessions_share_the_library(native_library):
    """Several sessions with different constants at once."""
    codes = [np.random.default_rng(i).integers(0, 7, (50 + i, 2)).astype(np.int32) for i in range(4)]
    sessions = [_session(_graph(c), native_library("vq_ort")) for c in codes]
    scores = np.arange(14, dtype=np.float32)[None]
    for c, session in zip(codes, sessions, strict=True):
        np.testing.assert_array_equal(session.run(None, {"scores": scores})[0][0], (c + np.array([0, 7])).sum(1))


@pytest.mark.parametrize(("m", "rows"), [(1, 40), (16, 1), (16, 9)])
def test_a_large_head_is_shared_out_to_the_sessions_threads(native_library, m, rows):
    """Enough look-ups for several parts; how they are cut must not show."""
    rng = np.random.default_rng(m + rows)
    codes = rng.integers(0, 256, (20011, m)).astype(np.int32)
    scores = rng.standard_normal((rows, m * 256)).astype(np.float32)
    one, two = (_session(_graph(codes), native_library("vq_ort"), threads=n) for n in (1, 2))
    logits = one.run(None, {"scores": scores})[0]
    np.testing.assert_array_equal(two.run(None, {"scores": scores})[0], logits)
    answer, _ = _expected(scores, codes, None)
    # Each of m terms, at most the largest score, rounds once in float32 or takes 1.25 steps of its span in fixed point.
    assert (np.abs(logits - answer) <= 4 * m * 2.0**-24 * np.abs(scores).max()).all()


CODES = np.array([[0, 1], [2, 0], [1, 2]], np.int32)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        pytest.param(
            lambda: _graph(CODES, num_codebooks=3), "codes has shape [3, 2], expected [vocab_size, 3]", id="M"
        ),
        pytest.param(lambda: _graph(CODES, num_codebooks=0), "expected [vocab_size, 0]", id="no codebooks"),
        pytest.param(lambda: _graph(CODES - 1), "codes[0, 0] is -1, expected 0 to", id="negative id"),
        pytest.param(lambda: _graph(CODES * 40000), "codes[1, 0] is 80000, expected 0 to 65535", id="huge id"),
        pytest.param(lambda: _graph(CODES, last_dim=7), "a multiple of num_codebooks = 2", id="width not a multiple"),
        pytest.param(lambda: _graph(CODES, last_dim=4), "codes go up to 2", id="id beyond K"),
        pytest.param(lambda: _graph(CODES, np.zeros(4)), "bias has shape [4], expected [3]", id="bias length"),
        pytest.param(lambda: _graph(CODES, np.zeros((3, 1))), "bias has shape [3, 1], expected [3]", id="bias rank"),
        pytest.param(lambda: _graph(CODES[0], num_codebooks=2), "codes has shape [2], expected", id="codes rank"),
        pytest.param(lambda: _graph(CODES[:0]), "vocab_size is 0", id="no tokens"),
        pytest.param(lambda: _graph(CODES, codes_as_input=True), "expected a constant", id="codes not constant"),
    ],
)
def test_bad_constants_are_refused_at_load(native_library, build, said):
    with pytest.raises(Exception) as refusal:
        _session(build(), native_library("vq_ort"))
    assert said in str(refusal.value)


def test_wrong_width_is_refused_at_run(native_library):
    """Where the graph leaves the last dimension open, the first run finds it out, and the session goes on after."""
    session = _session(_graph(CODES), native_library("vq_ort"))
    for width, said in ((5, "a multiple of"), (4, "codes go up to 2")):
        with pytest.raises(Exception) as refusal:
            session.run(None, {"scores": np.zeros((1, width), np.float32)})
        assert said in str(refusal.value)
    assert session.run(None, {"scores": np.zeros((1, 6), np.float32)})[0].shape == (1, 3)


def test_stock_runtime_needs_no_library():
    """Without the library the same node, alone, is unknown: what makes files run everywhere is their function body."""
    with pytest.raises(Exception, match=contract.GATHER_SCATTER):
        ort.InferenceSession(_graph(CODES).SerializeToString(), providers=["CPUExecutionProvider"])
    onnx.checker.check_model(_graph(CODES))
