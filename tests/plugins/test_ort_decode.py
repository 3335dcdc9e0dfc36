"""The custom ops VQTopK and VQSample in ONNX Runtime sessions, against codespace.py and the definition in float64."""

import math

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from export_vq import codespace, contract
from export_vq.head import gather_scatter

TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
LAST = 1 - 2**-24
"""The largest uniform number below 1 that float32 can hold."""


def _session(library, op, codes, bias=None, *, dtype="float32", rank=2, threads=1, **attributes):
    """One node of `op` around constants; its scores go in as float32 and are cast to `dtype`."""
    lead = [f"n{i}" for i in range(rank - 1)]
    inputs = [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [*lead, "width"])]
    constants = [numpy_helper.from_array(codes, "codes")]
    names = ["scores_t", "codes", "" if bias is None else "bias"]
    if bias is not None:
        constants.append(helper.make_tensor("bias", TYPES[dtype], bias.shape, bias.ravel()))
    if op == contract.TOP_K:
        outputs = contract.TOP_K_OUTPUTS
        shapes = {"values": [*lead, None], "ids": [*lead, None], "logsumexp": lead}
    else:
        outputs, shapes = contract.SAMPLE_OUTPUTS, {"ids": lead, "logprob": lead}
        names += ["temperature", "uniform"]
        inputs.append(helper.make_tensor_value_info("temperature", TensorProto.FLOAT, None))
        inputs.append(helper.make_tensor_value_info("uniform", TensorProto.FLOAT, None))
    nodes = [
        helper.make_node("Cast", ["scores"], ["scores_t"], to=TYPES[dtype]),
        helper.make_node(op, names, outputs, domain=contract.DOMAIN, num_codebooks=codes.shape[1], **attributes),
    ]
    results = [
        helper.make_tensor_value_info(name, TensorProto.INT64 if name == "ids" else TensorProto.FLOAT, shapes[name])
        for name in outputs
    ]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(contract.DOMAIN, contract.VERSION)]
    graph = helper.make_graph(nodes, "op", inputs, results, constants)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _sample(session, scores, uniform, temperature=1.0):
    """ids and logprob."""
    uniform = np.asarray(uniform, np.float32)
    return session.run(None, {"scores": scores, "uniform": uniform, "temperature": np.array([temperature], np.float32)})


@st.composite
def problems(draw, values=("whole", "normal")):
    """scores [.., M*K], codes [V, M], bias [V] or None, the type, and whether sums are exact ("whole" numbers, many ties)."""
    m, k = draw(st.sampled_from([1, 1, 2, 3])), draw(st.sampled_from([1, 5, 40, 300]))
    v = draw(st.sampled_from([1, 2, 31, 512, 1031]))
    lead = draw(st.sampled_from([[], [1], [3], [0], [2, 5]]))
    dtype, kind = draw(st.sampled_from(sorted(TYPES))), draw(st.sampled_from(values))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def numbers(*shape):
        if kind == "whole":
            return torch.randint(-2, 3, shape, generator=random).float().numpy()
        return (3 * torch.randn(shape, generator=random)).to(getattr(torch, dtype)).float().numpy()

    used = draw(st.integers(1, k))
    codes = torch.randint(k - used, k, (v, m), generator=random, dtype=torch.int32).numpy()
    bias = numbers(v) if draw(st.booleans()) else None
    return numbers(*lead, m * k), codes, bias, dtype, kind == "whole"


def _torch(scores, codes, bias):
    return torch.from_numpy(scores), torch.from_numpy(codes), None if bias is None else torch.from_numpy(bias)


def _logits(scores, codes, bias):
    """All V logits, float64 [.., V]."""
    scores, codes, bias = _torch(scores, codes, bias)
    return gather_scatter(scores.double(), codes, None if bias is None else bias.double())


def _sum_bound(scores, codes, bias):
    """M float32 roundings of the largest that can be summed; the cases here have M < 8, so none is in fixed point."""
    m = codes.shape[1]
    most = m * float(np.abs(scores).max(initial=0)) + (0 if bias is None else float(np.abs(bias).max()))
    return m * 2.0**-24 * most


def _logsumexp_bound(scores, codes, bias, temperature=1.0):
    """The sums; the mass of a bucket and its sum with the score; two stages of exponentials (plugins/kernels/cpu/mass.h)."""
    sums = _sum_bound(scores, codes, bias)
    most = sums * 2.0**24 + math.log(codes.shape[0])
    return (sums + 2.0**-24 * (2 * (2 * 88 + 64) + 8 * most)) / min(temperature, 1)


@settings(max_examples=60, deadline=None)
@given(problem=problems(), data=st.data(), threads=st.sampled_from([1, 2]))
def test_top_k_agrees_with_the_reference(native_library, problem, data, threads):
    scores, codes, bias, dtype, exact = problem
    v = codes.shape[0]
    k = data.draw(st.sampled_from([1, 2, 50, min(v, 256)]).filter(lambda k: k <= v), label="k")
    session = _session(
        native_library("vq_ort"), contract.TOP_K, codes, bias, dtype=dtype, rank=scores.ndim, threads=threads, k=k
    )
    values, ids, logsumexp = session.run(None, {"scores": scores})
    assert (values.dtype, ids.dtype, logsumexp.dtype) == (np.float32, np.int64, np.float32)
    wanted = codespace.top_k(*_torch(scores, codes, bias), k)
    assert (values.shape, logsumexp.shape) == (wanted.values.shape, wanted.logsumexp.shape)
    logits = _logits(scores, codes, bias)
    if exact or codes.shape[1] == 1:  # one sum of float32 at most, or no rounding at all
        np.testing.assert_array_equal(ids, wanted.ids)
        np.testing.assert_array_equal(values, wanted.values)
    else:
        bound = _sum_bound(scores, codes, bias)
        assert (np.abs(values - logits.sort(-1, descending=True)[0][..., :k].numpy()) <= bound).all()
        assert (np.abs(values - logits.gather(-1, torch.from_numpy(ids)).numpy()) <= bound).all()
        assert all(len(set(row)) == k for row in ids.reshape(-1, k).tolist())
    off = np.abs(logsumexp - logits.logsumexp(-1).numpy())
    assert (off <= _logsumexp_bound(scores, codes, bias)).all()


@settings(max_examples=60, deadline=None)
@given(
    problem=problems(),
    temperature=st.sampled_from([0.5, 1.0, 2.5]),
    u=st.one_of(st.sampled_from([0.0, LAST]), st.floats(0, LAST)),
)
def test_the_token_drawn_is_the_one_whose_stretch_holds_u(native_library, problem, temperature, u):
    scores, codes, bias, dtype, _ = problem
    session = _session(native_library("vq_ort"), contract.SAMPLE, codes, bias, dtype=dtype, rank=scores.ndim)
    ids, logprob = _sample(session, scores, np.full(scores.shape[:-1], u), temperature)
    assert ids.shape == logprob.shape == scores.shape[:-1]
    assert (ids.dtype, logprob.dtype) == (np.int64, np.float32)
    order = np.argsort(codes[:, 0], kind="stable") if codes.shape[1] == 1 else np.arange(codes.shape[0])
    log_chances = (_logits(scores, codes, bias) / temperature).log_softmax(-1)
    chances = log_chances.exp()[..., torch.from_numpy(order)]
    end = chances.cumsum(-1)[..., torch.from_numpy(order.argsort())]
    drawn = torch.from_numpy(ids)[..., None]
    end = end.gather(-1, drawn)[..., 0].numpy()
    wanted = log_chances.gather(-1, drawn)[..., 0].numpy()
    # Every chance is off by its logit's and the normaliser's share of it, in two stages; so are sums of chances.
    bound = 4 * _logsumexp_bound(scores, codes, bias, temperature)
    assert ((end - np.exp(wanted) - bound <= u) & (u <= end + bound)).all()
    assert (np.abs(logprob - wanted) <= bound + 2.0**-24 * np.abs(wanted)).all()


@pytest.mark.parametrize("m", [1, 2, 16])
@pytest.mark.parametrize("op", [contract.TOP_K, contract.SAMPLE])
def test_threads_do_not_show(native_library, op, m):
    rng = np.random.default_rng(m)
    codes = rng.integers(0, 256, (20011, m)).astype(np.int32)
    scores = rng.standard_normal((9, m * 256)).astype(np.float32)
    feeds = {"scores": scores}
    if op == contract.SAMPLE:
        feeds |= {"uniform": rng.random(9, np.float32), "temperature": np.array([0.8], np.float32)}
    attributes = {"k": 50} if op == contract.TOP_K else {}
    one, two = (_session(native_library("vq_ort"), op, codes, threads=n, **attributes).run(None, feeds) for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_draws_follow_the_softmax(native_library, m, temperature):
    """Pearson's chi-square over 50,000 draws. With n - 1 degrees of freedom it passes n - 1 + 2 sqrt((n - 1) t) + 2 t
    with chance at most exp(-t) (Laurent and Massart 2000, lemma 1): t = 14 is a false alarm in a million. Fixed seed.
    """
    draws, v, k, t = 50_000, 40, 8, 14
    rng = np.random.default_rng(m)
    codes = rng.integers(0, k, (v, m)).astype(np.int32)
    # Logits span at most 0.8 (m + 1) / 0.7 < 4.6, so at least 50000 exp(-4.6) / 40 > 5 of each token are expected.
    row, bias = (0.8 * rng.random(n, np.float32) for n in (m * k, v))
    session = _session(native_library("vq_ort"), contract.SAMPLE, codes, bias)
    scores = np.broadcast_to(row, (draws, m * k))
    ids, _ = _sample(session, np.ascontiguousarray(scores), rng.random(draws, np.float32), temperature)
    wanted = draws * (_logits(row, codes, bias) / temperature).softmax(-1).numpy()
    assert wanted.min() > 5
    statistic = ((np.bincount(ids, minlength=v) - wanted) ** 2 / wanted).sum()
    assert statistic < (v - 1) + 2 * math.sqrt((v - 1) * t) + 2 * t


CODES = np.array([[0, 1], [2, 0], [1, 2]], np.int32)


@pytest.mark.parametrize(
    ("attributes", "said"),
    [({"k": 0}, "k is 0, expected 1 to 3"), ({"k": 4}, "k is 4, expected 1 to 3"), ({}, "No attribute with name")],
)
def test_a_k_that_cannot_be_is_refused_at_load(native_library, attributes, said):
    with pytest.raises(Exception, match=said):
        _session(native_library("vq_ort"), contract.TOP_K, CODES, **attributes)


def test_k_above_the_most_is_refused(native_library):
    codes = np.zeros((1000, 1), np.int32)
    with pytest.raises(Exception, match=r"VQTopK: k is 257, expected 1 to 256"):
        _session(native_library("vq_ort"), contract.TOP_K, codes, k=257)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_cannot_be_is_refused_at_run(native_library, temperature):
    """And the session goes on after."""
    session = _session(native_library("vq_ort"), contract.SAMPLE, CODES)
    scores = np.zeros((1, 6), np.float32)
    with pytest.raises(Exception, match=r"VQSample: temperature is .*, expected above 0"):
        _sample(session, scores, [0.5], temperature)
    assert _sample(session, scores, [0.5])[0].tolist() == [1]


def test_uniform_must_have_a_number_for_each_row(native_library):
    session = _session(native_library("vq_ort"), contract.SAMPLE, CODES)
    with pytest.raises(Exception, match=r"uniform has shape \[3\], expected \[2\]"):
        _sample(session, np.zeros((2, 6), np.float32), [0.1, 0.2, 0.3])
