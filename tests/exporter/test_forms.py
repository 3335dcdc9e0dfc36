"""The function body against the definition, over shapes; packing; refusals with a reason."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from checkpoints import tiny_head
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes.common import RemoveUnusedNodesPass

from export_vq import contract
from export_vq.errors import UserError
from export_vq.forms import FORMS, convert, head_nodes, pack_codes, unpack_codes
from export_vq.graph import head_graph
from export_vq.head import VQHead, oracle_logits
from export_vq.head_output import HeadOutput

EPS = {"float32": 2.0**-24, "float16": 2.0**-11}


def _run(model, hidden):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString(), options)
    return session.run(None, {"hidden_states": hidden})[0]


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(contract.KINDS),
    m=st.sampled_from([1, 2, 3, 7]),
    k=st.sampled_from([1, 2, 13, 256, 300]),
    v=st.sampled_from([1, 2, 31, 257]),
    rows=st.sampled_from([0, 1, 3, 17]),
    bias=st.booleans(),
    rotation=st.booleans(),
    half=st.booleans(),
    form=st.sampled_from(["portable", "plain", "dense"]),
    seed=st.integers(0, 2**16),
)
def test_stock_runtime_computes_the_head(kind, m, k, v, rows, bias, rotation, half, form, seed):
    random = torch.Generator().manual_seed(seed)
    m = 1 if kind == "single" else m
    d = 5 * m
    head = VQHead.from_tensors(
        kind,
        torch.randn(m, k, 5 if kind == "product" else d, generator=random),
        torch.randint(0, k, (v, m), generator=random),
        torch.randn(v, generator=random) if bias else None,
        torch.randn(d, d, generator=random) if rotation and kind == "product" else None,
    )
    hidden = torch.randn(rows, 1, d, generator=random)
    dtype = "float16" if half else "float32"
    if half:
        head, hidden = head.half(), hidden.half()
    model = head_graph(head, "dense" if form == "dense" else "vq")
    if form == "plain":
        convert(model, "plain")
    logits = _run(model, hidden.numpy())
    assert logits.shape == (rows, 1, v)
    assert logits.dtype == dtype
    # Rounding bound: each product or sum of the chain (rotation D, codebook D, M sums, bias) rounds relative to the
    # absolute values that pass through it, whatever the order of the sums.
    magnitude = hidden.double().abs()
    if head.rotation is not None:
        magnitude = magnitude @ head.rotation.detach().double().abs()
    book = head.codebook.detach().double().abs()
    if kind == "product":
        peak = torch.stack([magnitude[..., i * 5 : i * 5 + 5] @ book[i].T for i in range(m)]).amax(-1).sum(0)
    else:
        peak = torch.stack([magnitude @ book[i].T for i in range(m)]).amax(-1).sum(0)
    if head.bias is not None:
        peak = peak + head.bias.detach().double().abs().max()
    steps = 2 * d + m + 4
    if form == "dense" and head.rotation is not None:
        # The twin's rows are turned back first, so its products pass through |R| |c| instead of |h R| |c|.
        peak = (hidden.double().abs() @ head.rotation.detach().double().abs()).sum(-1) * book.max() * 2 + peak
    bound = steps * EPS[dtype] * peak[..., None].numpy() + 1e-7 * half
    error = np.abs(logits.astype(np.float64) - oracle_logits(head, hidden).detach().numpy())
    assert (error <= bound).all()


@pytest.mark.parametrize("opset", [18, 21, 23])
@pytest.mark.parametrize("kind", contract.KINDS)
def test_other_opsets_compute_the_same(opset, kind):
    head = tiny_head(kind, 24, 31)
    hidden = torch.randn(3, 1, 24, generator=torch.Generator().manual_seed(0))
    outputs = [_run(head_graph(head, "vq", opset=version), hidden.numpy()) for version in (20, opset)]
    np.testing.assert_array_equal(*outputs)


@given(bits=st.sampled_from([8, 16]), v=st.integers(1, 40), m=st.integers(1, 9), seed=st.integers(0, 99))
def test_packed_codes_come_back(bits, v, m, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (v, m), dtype=np.int64)
    words = pack_codes(codes, bits)
    assert words.dtype == np.int32
    assert words.shape == (m, -(-v * bits // 128) * 4)  # rows of whole 16 bytes
    np.testing.assert_array_equal(unpack_codes(words, bits, v), codes)


def test_packing_is_little_endian_codebook_by_codebook():
    codes = np.array([[1, 6], [2, 7], [3, 8], [4, 9], [5, 10]])
    np.testing.assert_array_equal(pack_codes(codes, 8), [[0x04030201, 5, 0, 0], [0x09080706, 10, 0, 0]])
    np.testing.assert_array_equal(pack_codes(np.array([[1], [65535], [3]]), 16), [[-0x10000 + 1, 3, 0, 0]])


@pytest.mark.parametrize(("k", "bits"), [(256, 8), (65536, 16)])
@pytest.mark.parametrize("v", [1, 3, 61])
def test_a_tied_embedding_reads_its_ids_out_of_the_packed_words(v, k, bits):
    """Words hold up to four ids and a sign: every place in a word, ids of all ones and of all zeros among them."""
    random = torch.Generator().manual_seed(v)
    codes = torch.randint(0, k, (v, 3), generator=random)
    codes[:2, :2], codes[-1, 2] = k - 1, 0
    model = head_graph(VQHead.from_tensors("additive", torch.randn(3, k, 2, generator=random), codes), "vq")
    tokens = ir.val("tokens", ir.DataType.INT64, ["batch", "sequence"])
    reader = ir.node("Gather", [model.graph.initializers["lm_head.codes"], tokens])
    model.graph.append(reader)
    model.graph.inputs.append(tokens)
    model.graph.outputs.append(reader.outputs[0])
    reader.outputs[0].name = "ids"

    convert(model, "plugin")
    assert "lm_head.codes" not in model.graph.initializers
    assert [t.const_value.dtype for n, t in model.graph.initializers.items() if n.endswith(f"packed{bits}")] == [
        ir.DataType.INT32
    ]
    model.graph.inputs[:], model.graph.outputs[:] = [tokens], model.graph.outputs[1:]
    RemoveUnusedNodesPass()(model)  # the head: no stock runtime has the plugin
    model.graph.opset_imports.pop(contract.DOMAIN)
    session = ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    asked = torch.randint(0, v, (2, 50), generator=random).numpy()
    (found,) = session.run(None, {"tokens": asked})
    np.testing.assert_array_equal(found, codes.numpy()[asked])


@pytest.mark.parametrize("form", FORMS)
def test_a_graph_without_the_node_is_refused(form):
    model = head_graph(tiny_head("single", 8, 11), "dense")
    with pytest.raises(
        UserError, match=r"no com\.vqlogits node \(VQGatherScatter, VQTopK, VQSample\).* give the portable model\.onnx"
    ):
        convert(model, form)


def test_plugin_form_refuses_codes_that_no_id_width_fits():
    head = VQHead.from_tensors("single", torch.zeros(1, 70000, 2), torch.tensor([[69999], [0]]))
    with pytest.raises(UserError, match=r"node lm_head: its codes go up to 69999 .* below 65536"):
        convert(head_graph(head, "vq"), "plugin")


@pytest.mark.parametrize("kind", contract.KINDS)
def test_plugin_form_refuses_codes_beyond_the_codebook(kind):
    """A plugin sees the ids on the GPU only, where one too large would be read out of bounds."""
    head = tiny_head(kind, 24, 31)
    head.codes[7, 0] = head.spec.num_codes
    k = head.spec.num_codes
    with pytest.raises(
        UserError, match=rf"node lm_head: its codes go up to {k}, but code_logits has {k} codes a codebook"
    ):
        convert(head_graph(head, "vq"), "plugin")


def test_plugin_form_refuses_codes_that_are_not_constant():
    model = head_graph(tiny_head("single", 8, 11), "vq")
    (node,) = [n for n in model.graph if n.op_type == contract.GATHER_SCATTER]
    computed = ir.node("Identity", [node.inputs[1]])
    model.graph.insert_before(node, computed)
    node.replace_input_with(1, computed.outputs[0])
    with pytest.raises(UserError, match=r"node lm_head: its codes are computed in the graph, a constant was expected"):
        convert(model, "plugin")


def test_plugin_form_keeps_the_codes():
    head = tiny_head("product", 24, 31)
    model = head_graph(head, "vq")
    assert convert(model, "plugin").count == 1
    assert not model.functions
    (node,) = [n for n in model.graph if n.op_type == contract.GATHER_SCATTER]
    words = ir.convenience.get_const_tensor(node.inputs[1]).numpy()
    bits, v = (node.attributes.get_int(name) for name in ("code_bits", "vocab_size"))
    np.testing.assert_array_equal(unpack_codes(words, bits, v), head.codes.numpy())


@pytest.mark.parametrize("bias", [False, True])
def test_plugin_form_of_a_draw_has_no_empty_input(bias):
    """TensorRT's parser refuses a plugin with one."""
    head = tiny_head("product", 24, 31, bias=bias)
    model = head_graph(head, "vq", output=HeadOutput("sample"))
    names = [value and value.name for value in head_nodes(model)[0].inputs]
    assert ([None] if not bias else ["lm_head.bias"]) == names[2:3]
    convert(model, "plugin")
    assert [value.name for value in head_nodes(model)[0].inputs] == [
        "code_logits", "lm_head.codes.packed8", *(["lm_head.bias"] if bias else []), "temperature", "uniform"
    ]  # fmt: skip
