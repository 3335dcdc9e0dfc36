import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

from export_vq import contract, feeds, forms
from export_vq.calibration.options import CalibrationOptions
from export_vq.calibration.products import chosen, products
from export_vq.calibration.quantise import needed_opset, quantise
from export_vq.calibration.rounding import by_block, by_channel, packed
from export_vq.calibration.smooth import smooth
from export_vq.engine_source import EngineSource
from export_vq.errors import UserError
from export_vq.forms import read_graph
from export_vq.quality.rivals import quantised as rival
from export_vq.records import OnnxArtifact
from export_vq.runners import OrtRunner, signature_of

IDS = np.random.default_rng(0).integers(0, 97, (2, 20))


def options(precision, **chosen_):
    return CalibrationOptions(precision, feeds="unused", **chosen_)


def quantised(folder, asked, magnitude=6.0):
    model = read_graph(folder / "model.onnx")
    layers = chosen(products(model), [], head=asked.quantise_head)
    quantise(model, layers, asked, {str(layer.activation.name): magnitude for layer in layers})
    return model


def logits(folder, model=None, **how):
    path = folder / "model.onnx"
    if model is not None:
        path = folder / "other.onnx"
        ir.save(model, path)
        onnx.checker.check_model(path, full_check=True)
    with OrtRunner(path, signature_of(OnnxArtifact.load(folder / "model.onnx.json")), **how) as runner:
        return runner.infer(feeds.prefill(runner.signature, IDS, np.ones_like(IDS)))["logits"]


def test_products_are_named_after_their_modules(exported):
    names = [p.name for p in products(read_graph(exported / "model.onnx"))]
    layer = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
    expected = [
        f"model.layers.{i}.{block}.{n}"
        for i in range(2)
        for block, part in zip(("self_attn", "mlp"), layer, strict=True)
        for n in part
    ]
    assert names == [*expected, "lm_head.codebook"]


def test_onnx_runtime_multiplies_in_int8_whatever_products_share_an_input(exported, tmp_path):
    """Where it does not, it brings the weights back at every step, and says nothing."""
    path = tmp_path / "model.onnx"
    ir.save(quantised(exported, options("int8")), path)
    signature = signature_of(OnnxArtifact.load(exported / "model.onnx.json"))
    with OrtRunner(path, signature, profiled=True) as runner:
        runner.infer(feeds.prefill(signature, IDS, np.ones_like(IDS)))
        ran = runner.node_times()
    assert "model.layers.0.self_attn.q_proj" in ran
    assert not [name for name in ran if "dequantise" in name]


@pytest.mark.parametrize(
    ("precision", "what"), [("int8", "uint8 inputs"), ("w8", "MatMulNBits"), ("int4", "MatMulNBits")]
)
def test_engines_are_not_built_of_what_is_for_onnx_runtime(exported, tmp_path, precision, what):
    path = tmp_path / "model.onnx"
    ir.save(quantised(exported, options(precision)), path)
    with pytest.raises(UserError, match=f"was quantised for ONNX Runtime .its .*{what}.* with --runtime tensorrt"):
        EngineSource(path, "vq-plain")


def test_names_and_beginnings_of_names_are_kept(exported):
    found = products(read_graph(exported / "model.onnx"))
    left = [p.name for p in chosen(found, ["model.layers.0", "model.layers.1.mlp.up_proj"], head=False)]
    assert len(left) == 6
    assert all(name.startswith("model.layers.1.") for name in left)
    assert len(chosen(found, ["down_proj", "self_attn.v_proj"], head=False)) == 10
    for nothing in ("model.layers.1.mlp.up", "proj", "layers.1"):
        with pytest.raises(UserError, match="no layer is called"):
            chosen(found, [nothing], head=False)


class _Once(CalibrationDataReader):
    def __init__(self, given):
        self._left = [given]

    def get_next(self):
        return self._left.pop() if self._left else None


def test_int8_is_what_onnx_runtime_s_own_quantiser_makes(tmp_path):
    """One product, calibrated there by the largest magnitude: the same integers, the same scales."""
    random = np.random.default_rng(0)
    weight, x = (random.standard_normal(shape).astype(np.float32) for shape in ((24, 7), (3, 24)))
    value = ir.val("x", ir.DataType.FLOAT, [3, 24])
    constant = ir.val("w", const_value=ir.tensor(weight, name="w"))
    node = ir.node("MatMul", [value, constant], name="product")
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "y", ir.DataType.FLOAT, ir.Shape([3, 7])
    graph = ir.Graph([value], node.outputs, nodes=[node], initializers=[constant], opset_imports={"": 20}, name="g")
    model = ir.Model(graph, ir_version=10)
    ir.save(model, tmp_path / "float.onnx")
    symmetric = {"ActivationSymmetric": True, "WeightSymmetric": True, "OpTypesToExcludeOutputQuantization": ["MatMul"]}
    quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "theirs.onnx",
        _Once({"x": x}),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        extra_options={**symmetric, "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1}},
    )
    quantise(model, products(model), options("int8"), {"x": float(np.abs(x).max())})
    ir.save(model, tmp_path / "ours.onnx")

    def read(name):
        proto = onnx.load(tmp_path / name)
        constants = {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer}
        ops = {n.op_type + str(n.input[0] in constants): n for n in proto.graph.node}
        weights, activations = ops["DequantizeLinearTrue"], ops["QuantizeLinearFalse"]
        assert sorted(n.op_type for n in proto.graph.node) == sorted(
            ["MatMul", "QuantizeLinear", *["DequantizeLinear"] * 2]
        )
        return [constants[weights.input[0]], constants[weights.input[1]], constants[activations.input[1]]]

    ours, theirs = read("ours.onnx"), read("theirs.onnx")
    assert (ours[0] == theirs[0]).mean() > 0.99  # a half may go either way
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=1e-6, atol=1)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-6)
    np.testing.assert_allclose(ours[2], theirs[2], rtol=0.01)  # theirs spreads the range over 255 steps, not 254


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 64])
def test_blocks_are_onnx_runtime_s_in_both_layouts(bits, block):
    import torch

    weight = np.random.default_rng(0).standard_normal((80, 11)).astype(np.float32)
    found = by_block(weight, bits, block)
    expected = rival(torch.from_numpy(weight.T.copy()), bits, block).weight.numpy().T
    assert (found.dequantised() == expected).all()
    assert packed(weight, bits, block).numbers.nbytes == 11 * -(-80 // block) * block * bits // 8


def test_scales_above_zero_cost_half_a_step_at_most():
    weight = np.random.default_rng(0).standard_normal((96, 31)).astype(np.float32)
    found = by_block(weight, 4, 32, positive=True)
    assert found.scales.min() > 0
    steps = np.repeat(found.scales, 32, axis=0)
    assert (np.abs(found.dequantised() - weight) <= 0.5 * steps * (1 + 2.0**-10)).mean() > 0.99
    assert (np.abs(found.dequantised() - weight) <= steps).all()  # the lowest integer has no mirror image


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("shape", [(24, 7), (3, 8, 5)])
def test_weights_by_channel_are_off_by_half_a_step(precision, shape):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    weight[..., 0] = 0
    largest = np.abs(weight).max(axis=-2, keepdims=True)
    error = np.abs(by_channel(weight, precision).dequantised() - weight)
    # Half a step of int8; of FP8 half a unit of three bits, or half the smallest step near zero.
    bound = largest / 254 if precision == "int8" else np.maximum(np.abs(weight) / 16, largest / 448 * 2.0**-10)
    assert (error <= bound * (1 + 1e-5)).all()
    assert (error[..., 0] == 0).all()


@pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("precision", ["int8", "fp8", "w8", "int4"])
def test_the_head_s_node_and_function_stay_as_they_are(exported, folder, precision, runtime):
    before, after = read_graph(exported / "model.onnx"), quantised(folder, options(precision, runtime=runtime))
    (old,), (new,) = forms.head_nodes(before), forms.head_nodes(after)
    assert [v.name for v in new.inputs] == [v.name for v in old.inputs]
    assert new.inputs[0].producer().op_type == old.inputs[0].producer().op_type
    assert list(after.functions) == list(before.functions)
    body = [[n.op_type for n in m.functions[new.op_identifier()]] for m in (before, after)]
    assert body[0] == body[1]
    heads = {n: v for n, v in before.graph.initializers.items() if n.startswith(contract.HEAD_PREFIX)}
    for name, value in heads.items():
        assert (after.graph.initializers[name].const_value.numpy() == value.const_value.numpy()).all()
    assert np.isfinite(logits(folder, after, fuse_quantised=precision != "fp8")).all()


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_quantised_codebook_is_read_before_the_node(folder, precision):
    model = quantised(folder, options(precision, quantise_head=True))
    assert "lm_head.codebook" not in model.graph.initializers
    assert model.graph.initializers["lm_head.codes"].const_value.dtype == ir.DataType.INT32
    assert model.graph.initializers["lm_head.bias"].const_value.dtype == ir.DataType.FLOAT
    only_body = quantised(folder, options(precision))
    how = {"fuse_quantised": False}
    exact = logits(folder)
    both, body = (np.abs(logits(folder, m, **how) - exact).mean() for m in (model, only_body))
    assert body < both + exact.std() / 10


def test_the_two_forms_of_int4_are_the_same_numbers(folder):
    """MatMulNBits rounds its input to int8 besides, which is the difference; TensorRT's form may round 1 in 2 blocks anew."""
    exact = logits(folder)
    for runtime in ("onnxruntime", "tensorrt"):
        asked = options("int4", runtime=runtime)
        model = quantised(folder, asked)
        ops = {n.op_type for n in model.graph}
        assert ("MatMulNBits" in ops) == (runtime == "onnxruntime")
        assert ("DequantizeLinear" in ops) == (runtime == "tensorrt")
        assert "QuantizeLinear" not in ops
        off = logits(folder, model) - exact
        assert 0 < np.abs(off).mean() < exact.std()


def test_smoothing_changes_nothing_but_rounding(folder):
    model = read_graph(folder / "model.onnx")
    layers = chosen(products(model), [], head=False)
    random = np.random.default_rng(0)
    largest = {str(p.activation.name): random.uniform(0.1, 50, p.numbers().shape[0]) for p in layers}
    assert (
        smooth(model, layers, {n: v.astype(np.float32) for n, v in largest.items()}, 0.5) == 6
    )  # two norms and a gate a layer
    exact = logits(folder)
    assert np.abs(logits(folder, model) - exact).max() < 1e-5 * np.ptp(exact)


def test_an_opset_too_old_is_told(folder):
    for precision, opset, needed in (("fp8", 18, 19), ("int4", 20, 21)):
        model = read_graph(folder / "model.onnx")
        model.graph.opset_imports[""] = opset
        with pytest.raises(UserError, match=f"opset {opset}, {precision} needs {needed}"):
            quantise(model, [], options(precision, runtime="tensorrt"), {})


def test_scales_in_float16_need_an_opset_that_knows_them():
    for precision, runtime in (("int8", "onnxruntime"), ("w8", "tensorrt")):
        asked = options(precision, runtime=runtime)
        assert (needed_opset(asked, narrow=False), needed_opset(asked, narrow=True)) == (0, 19)
    assert needed_opset(options("w8"), narrow=True) == 0  # MatMulNBits is of another domain
