"""The function bodies in stock runtimes against the definition: code space, and for draws the exact distribution."""

import ml_dtypes
import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from export_vq import codespace, contract
from export_vq.forms import convert
from export_vq.outputs import TENSORS
from export_vq.selection import BLOCK

LAST = np.float32(1 - 2**-24)
"""The largest uniform number that float32 can hold."""
CHOOSING = (contract.TOP_K, contract.SAMPLE)


def op_graph(op, code_logits, codes, bias, *, best=1, form="portable", opset=20):
    """A graph of one node over constant codes and bias; dynamic lead dimensions."""
    lead = [f"lead{i}" for i in range(code_logits.ndim - 1)]
    dtype = ir.DataType.from_numpy(code_logits.dtype)
    scores = ir.val("code_logits", dtype, [*lead, code_logits.shape[-1]])
    weights = {"codes": codes} if bias is None else {"codes": codes, "bias": bias}
    constants = [ir.val(name, const_value=ir.tensor(array, name=name)) for name, array in weights.items()]
    drawn_with = []
    if op == contract.SAMPLE:
        drawn_with = [ir.val("temperature", ir.DataType.FLOAT, [1]), ir.val("uniform", ir.DataType.FLOAT, lead)]
    missing = [None] if bias is None and drawn_with else []
    attributes = {"num_codebooks": codes.shape[1]} | ({"k": best} if op == contract.TOP_K else {})
    names = TENSORS[op][1]
    node = ir.node(
        op,
        [scores, *constants, *missing, *drawn_with],
        attributes,
        domain=contract.DOMAIN,
        version=1,
        num_outputs=len(names),
        name="lm_head",
    )
    widths = {"logits": [len(codes)], "values": [best], "ids": [best] if op == contract.TOP_K else []}
    for value, name in zip(node.outputs, names, strict=True):
        value.name, value.shape = name, ir.Shape([*lead, *widths.get(name, [])])
        value.dtype = {"logits": dtype, "ids": ir.DataType.INT64}.get(name, ir.DataType.FLOAT)
    graph = ir.Graph(
        [scores, *drawn_with],
        node.outputs,
        nodes=[node],
        initializers=constants,
        opset_imports={"": opset, contract.DOMAIN: 1},
        name="op",
    )
    model = ir.Model(graph, ir_version=10)
    convert(model, form)
    return ir.serde.serialize_model(model)


def stock(model, feeds):
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return ort.InferenceSession(model.SerializeToString(), options).run(None, feeds)


def tensors(*arrays):
    return [None if a is None else torch.from_numpy(np.ascontiguousarray(a)) for a in arrays]


@st.composite
def problems(draw, real=False):
    """Code logits, codes, bias. Integers tie often and sum exactly, in float16 too; codes leave some of K unused."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    m, k, v = draw(st.sampled_from([1, 1, 2, 3])), draw(st.sampled_from([1, 2, 5, 40])), draw(st.integers(1, 600))
    lead = draw(st.sampled_from([(), (1,), (3,), (2, 2), (0,), (2, 0)]))
    dtype = draw(st.sampled_from([np.float32, np.float16]))

    def numbers(*shape):
        return (3 * rng.standard_normal(shape) if real else rng.integers(-3, 4, shape)).astype(dtype)

    used = draw(st.integers(1, k))
    codes = rng.integers(k - used, k, (v, m), dtype=np.int32)
    return numbers(*lead, m * k), codes, numbers(v) if draw(st.booleans()) else None, rng


@settings(max_examples=40, deadline=None)
@given(problem=problems(), best=st.sampled_from([1, 2, 50, 256]), form=st.sampled_from(["portable", "plain"]))
def test_top_k_is_that_of_code_space_ties_and_all(problem, best, form):
    code_logits, codes, bias, _ = problem
    k = min(best, len(codes))
    model = op_graph(contract.TOP_K, code_logits, codes, bias, best=k, form=form)
    values, ids, logsumexp = stock(model, {"code_logits": code_logits})
    expected = codespace.top_k(*tensors(code_logits, codes, bias), k)
    assert (values.dtype, ids.dtype, logsumexp.dtype) == (np.float32, np.int64, np.float32)
    np.testing.assert_array_equal(values, expected.values.numpy(), strict=True)
    np.testing.assert_array_equal(ids, expected.ids.numpy(), strict=True)
    # Relative to the terms of the sum: V additions, an exponential, a logarithm and the addition of the peak, all below 32.
    bound = (len(codes) + 4 + 32) * 2.0**-24
    np.testing.assert_allclose(logsumexp, expected.logsumexp.numpy(), rtol=0, atol=bound, strict=True)


def exact_shares(code_logits, codes, bias, temperature):
    """Shares float64 [rows, V] of the distribution, in the order of draws, and that order."""
    scores = code_logits.astype(np.float64).reshape(-1, codes.shape[1], code_logits.shape[-1] // codes.shape[1])
    logits = sum(scores[:, m, codes[:, m]] for m in range(codes.shape[1]))
    if bias is not None:
        logits = logits + bias.astype(np.float64)
    shares = np.exp((logits - logits.max(1, keepdims=True)) / temperature)
    order = np.lexsort((np.arange(len(codes)), codes[:, 0])) if codes.shape[1] == 1 else np.arange(len(codes))
    return shares[:, order] / shares.sum(1, keepdims=True), order


@settings(max_examples=40, deadline=None)
@given(
    problem=problems(real=True),
    temperature=st.sampled_from([0.25, 1.0, 3.0]),
    form=st.sampled_from(["portable", "plain"]),
    edge=st.sampled_from([None, 0.0, LAST]),
)
def test_a_draw_inverts_the_exact_distribution(problem, temperature, form, edge):
    code_logits, codes, bias, rng = problem
    lead = code_logits.shape[:-1]
    uniform = np.asarray(rng.random(lead, np.float32) if edge is None else np.full(lead, edge), np.float32)
    feeds = {"code_logits": code_logits, "temperature": np.array([temperature], np.float32), "uniform": uniform}
    ids, logprob = stock(op_graph(contract.SAMPLE, code_logits, codes, bias, form=form), feeds)
    assert (ids.shape, ids.dtype, logprob.shape, logprob.dtype) == (lead, np.int64, lead, np.float32)
    if not ids.size:
        return
    shares, order = exact_shares(code_logits, codes, bias, temperature)
    ends = shares.cumsum(1)
    ends[:, -1] = 1
    rows, place = np.arange(ids.size), np.argsort(order)[ids.ravel()]
    starts = np.where(place > 0, ends[rows, place - 1], 0)
    # Logits up to 64: four sums, a difference and a quotient round them; then the weights, and the sums of two levels.
    logit_error = 6 * 64 * 2.0**-24 / temperature
    bound = logit_error + (BLOCK + len(codes) / BLOCK + 8) * 2.0**-24
    assert (uniform.ravel() >= starts - bound).all()
    assert (uniform.ravel() <= ends[rows, place] + bound).all()
    chances = shares[rows, place]
    assert (chances > 0).all()
    np.testing.assert_allclose(logprob.ravel(), np.log(chances), rtol=2.0**-22, atol=2 * logit_error + bound)


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("edge", [0.0, 0.5, LAST])
def test_a_token_without_probability_is_never_drawn(m, edge):
    """Also at both ends of the distribution, and where the one below 1 rounds to the whole sum."""
    rng = np.random.default_rng(m)
    codes = rng.integers(0, 7, (700, m), dtype=np.int32)
    bias = np.full(700, -1e9, np.float32)
    living = np.flatnonzero(codes[:, 0] == 3)[1::3]
    bias[living] = rng.standard_normal(len(living))
    code_logits = rng.standard_normal((50, 7 * m)).astype(np.float32)
    uniform = np.full(50, edge, np.float32)
    feeds = {"code_logits": code_logits, "temperature": np.ones(1, np.float32), "uniform": uniform}
    ids, logprob = stock(op_graph(contract.SAMPLE, code_logits, codes, bias), feeds)
    assert np.isin(ids, living).all()
    assert np.isfinite(logprob).all()
    if edge == 0.0:
        assert (ids == living[0]).all()


@pytest.mark.parametrize("op", CHOOSING)
def test_not_a_number_gives_ids_within_the_vocabulary(op):
    codes = np.arange(12, dtype=np.int32).reshape(6, 2) % 3
    code_logits = np.full((2, 6), np.nan, np.float32)
    feeds = {"code_logits": code_logits}
    if op == contract.SAMPLE:
        feeds |= {"temperature": np.ones(1, np.float32), "uniform": np.array([0.1, 0.9], np.float32)}
    ids = dict(zip(TENSORS[op][1], stock(op_graph(op, code_logits, codes, None, best=3), feeds), strict=True))["ids"]
    assert ((ids >= 0) & (ids < 6)).all()


@pytest.mark.parametrize("m", [1, 3])
def test_draws_are_distributed_as_the_softmax(m):
    """Chi-square over 40,000 draws from one distribution: 39 degrees of freedom, a false alarm once in a million seeds."""
    rng = np.random.default_rng(7)
    codes = rng.integers(0, 9, (40, m), dtype=np.int32)
    bias = rng.standard_normal(40).astype(np.float32)
    one, n, temperature = rng.standard_normal((1, 9 * m)).astype(np.float32), 40_000, 1.5
    feeds = {
        "code_logits": np.repeat(one, n, 0),
        "temperature": np.array([temperature], np.float32),
        "uniform": rng.random(n, np.float32),
    }
    ids, _ = stock(op_graph(contract.SAMPLE, one, codes, bias), feeds)
    shares, order = exact_shares(one, codes, bias, temperature)
    expected = n * shares[0]
    assert expected.min() > 5  # where chi-square's own approximation holds
    observed = np.bincount(ids, minlength=40)[order]
    assert ((observed - expected) ** 2 / expected).sum() < chi2.ppf(1 - 1e-6, 39)


@pytest.mark.parametrize("op", CHOOSING)
@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("opset", [18, 23])
def test_checker_evaluator_and_inliner_take_a_missing_bias(op, m, with_bias, opset):
    """`VQSample` misses it in the middle of its inputs."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 5, (300, m), dtype=np.int32)
    bias = rng.standard_normal(300).astype(np.float32) if with_bias else None
    feeds = {"code_logits": rng.standard_normal((2, 3, 5 * m)).astype(np.float32)}
    if op == contract.SAMPLE:
        feeds |= {"temperature": np.full(1, 0.7, np.float32), "uniform": rng.random((2, 3), np.float32)}
    answers = []
    for form in ("portable", "plain"):
        model = op_graph(op, feeds["code_logits"], codes, bias, best=7, form=form, opset=opset)
        onnx.checker.check_model(model, full_check=True)
        answers += [stock(model, feeds), onnx.reference.ReferenceEvaluator(model).run(None, feeds)]
    for answer in answers[1:]:
        for found, expected in zip(answer, answers[0], strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=64 * 2.0**-24, strict=True)


@pytest.mark.parametrize("m", [1, 2])
def test_bfloat16_code_logits_are_summed_in_float32(m):
    """No CPU runtime runs bf16; ONNX's own evaluator does."""
    rng = np.random.default_rng(m)
    codes = rng.integers(0, 16, (130, m), dtype=np.int32)
    code_logits, bias = (
        (8 * rng.standard_normal(shape)).astype(np.float32).astype(ml_dtypes.bfloat16) for shape in ((3, 16 * m), 130)
    )
    wide = tensors(code_logits.astype(np.float32), codes, bias.astype(np.float32))
    model = op_graph(contract.TOP_K, code_logits, codes, bias, best=9)
    values, ids, logsumexp = onnx.reference.ReferenceEvaluator(model).run(None, {"code_logits": code_logits})
    expected = codespace.top_k(*wide, 9)
    np.testing.assert_array_equal(values, expected.values.numpy(), strict=True)
    np.testing.assert_array_equal(ids, expected.ids.numpy())
    np.testing.assert_allclose(logsumexp, expected.logsumexp.numpy(), rtol=2.0**-20)
    uniform = rng.random(3, np.float32)
    feeds = {"code_logits": code_logits, "temperature": np.ones(1, np.float32), "uniform": uniform}
    model = op_graph(contract.SAMPLE, code_logits, codes, bias)
    ids, logprob = onnx.reference.ReferenceEvaluator(model).run(None, feeds)
    drawn, chance = codespace.sample(*wide, torch.from_numpy(uniform))
    np.testing.assert_array_equal(ids, drawn.numpy())
    # A sum of logits below 64 is rounded four times on either way.
    np.testing.assert_allclose(logprob, chance.numpy(), rtol=0, atol=8 * 64 * 2.0**-24)


@pytest.mark.parametrize("op", CHOOSING)
def test_plugin_form_keeps_what_the_node_says(op):
    codes = np.arange(300, dtype=np.int32).reshape(150, 2) % 9
    code_logits = np.zeros((1, 18), np.float32)
    model = op_graph(op, code_logits, codes, None, best=4, form="plugin")
    (node,) = model.graph.node
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert not model.functions
    assert attributes == {
        "num_codebooks": 2,
        **({"k": 4} if op == contract.TOP_K else {}),
        "code_bits": 8,
        "vocab_size": 150,
        "plugin_namespace": b"com.vqlogits",
        "plugin_version": b"1",
    }
    rest = ["temperature", "uniform"] if op == contract.SAMPLE else []
    assert list(node.input) == ["code_logits", "codes.packed8", *rest]  # TensorRT's parser refuses an empty input


def test_plain_form_sorts_the_codes_beforehand():
    """A runtime whose TopK is short, as TensorRT's, cannot: the order by (code, id) is a constant, the codes lie in it."""
    codes = np.random.default_rng(0).integers(0, 9, (5000, 1), dtype=np.int32)
    model = op_graph(contract.SAMPLE, np.zeros((1, 9), np.float32), codes, None, form="plain")
    assert "TopK" not in {node.op_type for node in model.graph.node}
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    assert "codes" not in weights
    np.testing.assert_array_equal(weights["codes.order"], np.lexsort((np.arange(5000), codes[:, 0])))
    np.testing.assert_array_equal(weights["codes.sorted"], np.sort(codes[:, 0]))
