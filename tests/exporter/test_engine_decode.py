"""VQTopK and VQSample through NVIDIA's own parser and builder, with no GPU: with and without bias, types, and refusals."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tensorrt_fixture import install_tensorrt

from export_vq import contract, proof
from export_vq.errors import CheckFailed, UserError
from export_vq.forms import pack_codes
from export_vq.plugins.library import require_library
from export_vq.trt import find_tensorrt, load_plugin

M, K, V, BEST = 2, 10, 97, 5
TYPES = {
    "fp32": (TensorProto.FLOAT, np.float32),
    "fp16": (TensorProto.FLOAT16, np.float16),
}
OUTPUTS = {
    contract.TOP_K: {
        "values": (TensorProto.FLOAT, BEST),
        "ids": (TensorProto.INT64, BEST),
        "logsumexp": (TensorProto.FLOAT, 0),
    },
    contract.SAMPLE: {"ids": (TensorProto.INT64, 0), "logprob": (TensorProto.FLOAT, 0)},
}


@pytest.fixture(scope="module")
def trt(tmp_path_factory):
    module = install_tensorrt(tmp_path_factory.mktemp("tensorrt"))
    try:
        library = require_library("vq_trt").path
    except UserError as missing:
        pytest.skip(str(missing))
    load_plugin(find_tensorrt("tensorrt_rtx"), library)
    return module


def graph(op, dtype="fp16", *, bias=True, empty=False, **attributes):
    """One node in the plugin form over [batch, sequence, M*K]; `empty`: a bias that is the empty string, not left out."""
    element, numpy_type = TYPES[dtype]
    codes = np.random.default_rng(0).integers(0, K, (V, M))
    inputs = {"code_logits": (element, ["batch", "sequence", M * K])}
    if op == contract.SAMPLE:
        inputs |= {"temperature": (TensorProto.FLOAT, [1]), "uniform": (TensorProto.FLOAT, ["batch", "sequence"])}
    else:
        attributes = {contract.NUM_BEST: BEST, **attributes}
    constants = [numpy_helper.from_array(pack_codes(codes, 8), "codes")]
    if bias:
        constants.append(numpy_helper.from_array(np.zeros(V, numpy_type), "bias"))
    names = ["code_logits", "codes", *["bias" if bias else ""] * (bias or empty), *list(inputs)[1:]]
    node = helper.make_node(
        op,
        names,
        list(OUTPUTS[op]),
        name="head",
        domain=contract.DOMAIN,
        **{
            contract.NUM_CODEBOOKS: M,
            contract.CODE_BITS: 8,
            contract.VOCAB_SIZE: V,
            contract.PLUGIN_NAMESPACE: contract.DOMAIN,
            contract.PLUGIN_VERSION: str(contract.VERSION),
            **attributes,
        },
    )
    outputs = [
        helper.make_tensor_value_info(name, kind, ["batch", "sequence", *[last] * (last > 0)])
        for name, (kind, last) in OUTPUTS[op].items()
    ]
    given = [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()]
    body = helper.make_graph([node], "head", given, outputs, constants)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(contract.DOMAIN, 1)]
    return helper.make_model(body, opset_imports=opsets, ir_version=9)


def parse(trt, model):
    """(whether it parsed, what was said, the network, its builder)"""
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    parsed = parser.parse(model.SerializeToString())
    said = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
    return parsed, said, network, builder


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("op", OUTPUTS)
def test_a_node_becomes_one_plugin_layer_of_an_engine(trt, op, bias, dtype):
    parsed, said, network, builder = parse(trt, graph(op, dtype, bias=bias))
    assert parsed, said
    found = proof.network_layers(trt, network)
    proof.check_layers(found, "vq-plugin", dtype, ["head"])
    (layer,) = found.plugins
    real = {"fp32": "float", "fp16": "half"}[dtype]
    assert (layer.plugin, layer.version, layer.namespace) == (op, "1", contract.DOMAIN)
    assert layer.input_dtypes == (real, "int32", *[real] * bias, *["float"] * 2 * (op == contract.SAMPLE))
    assert layer.output_dtypes == tuple(
        {TensorProto.INT64: "int64", TensorProto.FLOAT: "float"}[kind] for kind, _ in OUTPUTS[op].values()
    )
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape("code_logits", (1, 1, M * K), (1, 1, M * K), (8, 16, M * K))
    if op == contract.SAMPLE:
        profile.set_shape("uniform", (1, 1), (1, 1), (8, 16))
    config.add_optimization_profile(profile)
    plan = bytes(builder.build_serialized_network(network, config))
    # The fields as TensorRT serialised them: name, type INT32, one value.
    fields = {contract.NUM_CODEBOOKS: M, contract.CODE_BITS: 8, contract.VOCAB_SIZE: V}
    for name, value in (fields | ({contract.NUM_BEST: BEST} if op == contract.TOP_K else {})).items():
        assert name.encode() + b"\0" + np.array([5, 1, value], "<i4").tobytes() in plan


@pytest.mark.parametrize("op", OUTPUTS)
def test_another_type_than_was_meant_fails(trt, op):
    _, _, network, _ = parse(trt, graph(op, "fp32"))
    with pytest.raises(CheckFailed, match="meant to compute in fp16"):
        proof.check_layers(proof.network_layers(trt, network), "vq-plugin", "fp16", ["head"])


@pytest.mark.parametrize("op", OUTPUTS)
def test_a_bias_of_the_empty_string_is_no_plugin_input(trt, op):
    """TensorRT hands the plugin a null tensor and refuses it: the plugin form must leave a missing bias out altogether."""
    parsed, said, _, _ = parse(trt, graph(op, bias=False, empty=True))
    assert not parsed
    assert "head" in said


def _bias_in_float(model):
    (bias,) = [t for t in model.graph.initializer if t.name == "bias"]
    bias.CopyFrom(numpy_helper.from_array(np.zeros(V, np.float32), "bias"))


def _uniform_of_another_shape(model):
    (uniform,) = [t for t in model.graph.input if t.name == "uniform"]
    uniform.CopyFrom(helper.make_tensor_value_info("uniform", TensorProto.FLOAT, ["batch", 7, 3]))


@pytest.mark.parametrize(
    ("op", "attributes", "change", "says"),
    [
        (contract.TOP_K, {"k": 98}, None, "VQTopK createPlugin: node head: field k is 98, expected 1 to 97"),
        (contract.TOP_K, {"k": 0}, None, "field k is 0"),
        (contract.SAMPLE, {"code_bits": 12}, None, "VQSample createPlugin: node head: field code_bits is 12"),
        (contract.TOP_K, {}, _bias_in_float, "VQTopK getOutputDataTypes: bias has the data type"),
        (contract.SAMPLE, {}, _uniform_of_another_shape, "VQSample getOutputShapes: uniform has the shape"),
    ],
    ids=["k above V", "k of 0", "bits", "bias", "uniform"],
)
def test_what_is_wrong_is_named(trt, capfd, op, attributes, change, says):
    model = graph(op, **attributes)
    if change is not None:
        change(model)
    parsed, said, network, _ = parse(trt, model)
    if parsed:  # TensorRT works shapes out when someone asks for one
        assert network.get_output(0).shape is not None
    captured = capfd.readouterr()
    assert says in said + captured.out + captured.err


def test_the_graph_is_a_valid_one():
    for op in OUTPUTS:
        onnx.checker.check_model(graph(op))
