"""Quantised graphs as TensorRT's parser and builder take them, and what is read back of them."""

import json

import pytest
from tensorrt_fixture import install_tensorrt

from export_vq import proof
from export_vq.calibration.options import CalibrationOptions
from export_vq.calibration.products import chosen, products
from export_vq.calibration.quantise import quantise
from export_vq.engine import EngineOptions, build_engine
from export_vq.engine_source import EngineSource
from export_vq.errors import CheckFailed, UserError
from export_vq.forms import read_graph
from export_vq.plugins.library import require_library

PAIRS = {"int8": {"int8": 30}, "fp8": {"fp8": 30}, "w8": {"int8": 14}, "int4": {"int4": 12}}
"""Fourteen products with a weight each; eight inputs, rounded there and back, where the precision rounds inputs. Two weights
of 48 rows are no multiple of a block."""


@pytest.fixture(scope="module")
def trt(tmp_path_factory):
    return install_tensorrt(tmp_path_factory.mktemp("tensorrt"))


def write(folder, precision, **how):
    import onnx_ir as ir

    options = CalibrationOptions(precision, feeds="unused", **{"runtime": "tensorrt", **how})
    model = read_graph(folder / "model.onnx")
    layers = chosen(products(model), [], head=options.quantise_head)
    quantise(model, layers, options, {str(layer.activation.name): 6.0 for layer in layers})
    path = folder / f"{precision}.onnx"
    ir.save(model, path)
    return path


@pytest.mark.parametrize("precision", PAIRS)
def test_each_precision_is_built_in_its_own_types(trt, folder, precision):  # noqa: ARG001
    artifact = build_engine(write(folder, precision), "vq-plain", folder / "engines", EngineOptions(context=64))
    (meant,) = PAIRS[precision].values()
    assert artifact.layers.get("quantize", 0) + artifact.layers["dequantize"] == meant


def test_a_quantised_codebook_is_built_too(trt, folder):  # noqa: ARG001
    source = write(folder, "int8", quantise_head=True)
    assert EngineSource(source, "vq-plain").quantised == {"int8": 33}
    build_engine(source, "vq-plain", folder / "engines", EngineOptions(context=64))


def test_a_quantised_body_with_the_plugin(trt, folder):  # noqa: ARG001
    try:
        library = require_library("vq_trt").path
    except UserError as missing:
        pytest.skip(str(missing))
    artifact = build_engine(
        write(folder, "int8"), "vq-plugin", folder / "engines", EngineOptions(context=64, plugin=library)
    )
    assert [p.plugin for p in artifact.plugin_layers] == ["VQGatherScatter"]
    assert artifact.plugin_layers[0].input_dtypes[0] == "float"


@pytest.mark.parametrize("precision", PAIRS)
def test_the_graph_says_what_is_meant(folder, precision):
    assert EngineSource(write(folder, precision), "vq-plain").quantised == PAIRS[precision]


def test_an_engine_that_is_not_quantised_fails(folder):
    meant = EngineSource(write(folder, "int8"), "vq-plain").quantised
    for found in (
        proof.Layers("network", {"matrix_multiply": 19}, ()),
        proof.Layers("network", {}, (), {"int8": 29}),
        proof.Layers("network", {}, (), {"fp8": 30}),
        proof.Layers("engine", {}, (), {"int4": 9}),
    ):
        with pytest.raises(CheckFailed, match="30 int8 quantised were meant"):
            proof.check_quantised(found, "vq-plain", meant)
    proof.check_quantised(proof.Layers("network", {}, (), {"int8": 30}), "vq-plain", meant)
    proof.check_quantised(proof.Layers("engine", {}, (), {"int8": 3}), "vq-plain", meant)


def test_the_inspector_s_low_types_are_read():
    def layer(*types):
        return {"LayerType": "gemm", "Inputs": [{"Name": "int4", "Format/Datatype": t} for t in types], "Outputs": []}

    layers = [layer("Row major Int8 format"), layer("Row major linear FP16 format", "FP8"), layer("Float"), "fused"]
    weights = {**layer("Row major linear FP16 format"), "Weights": {"Type": "Int4", "Count": 4096}}
    found = proof.read_layers(json.dumps({"Layers": [*layers, weights]}))
    assert found.quantised == {"int8": 1, "fp8": 1, "int4": 1}


def test_a_graph_for_onnx_runtime_is_refused_with_the_mend(folder):
    with pytest.raises(UserError, match="--runtime tensorrt"):
        EngineSource(write(folder, "w8", runtime="onnxruntime"), "vq-plain")
