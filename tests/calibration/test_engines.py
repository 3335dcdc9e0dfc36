"""Quantised graphs as TensorRT's parser and builder take them, and what is read back of them."""

import onnx_ir as ir
import pytest
import torch
from tensorrt_fixture import install_tensorrt

from export_vq import engine_source, proof
from export_vq.calibration.options import CalibrationOptions
from export_vq.calibration.products import chosen, products
from export_vq.calibration.quantise import quantise
from export_vq.engine import EngineOptions, build_engine
from export_vq.engine_source import EngineSource
from export_vq.errors import CheckFailed, UserError
from export_vq.forms import read_graph
from export_vq.plan import load_engine
from export_vq.plugins.library import require_library
from export_vq.quantised_products import QuantisedProduct
from export_vq.trt import find_tensorrt, log

PAIRS = {"int8": {"int8": 30}, "fp8": {"fp8": 30}, "w8": {"int8": 14}, "int4": {"int4": 12}}
"""Fourteen products with a weight each; eight inputs, rounded there and back, where the precision rounds inputs. Two weights
of 48 rows are no multiple of a block."""
SMALL = EngineOptions(context=64)


@pytest.fixture(scope="module")
def trt(tmp_path_factory):
    return install_tensorrt(tmp_path_factory.mktemp("tensorrt"))


def write(folder, precision, left=(), eight=(), **how):
    options = CalibrationOptions(precision, feeds="unused", **{"runtime": "tensorrt", **how})
    model = read_graph(folder / "model.onnx")
    layers = chosen(products(model), left, head=options.quantise_head)
    quantise(model, layers, options, {str(layer.activation.name): 6.0 for layer in layers}, in_8_bits=eight)
    path = folder / f"{precision}.onnx"
    ir.save(model, path)
    return path


def built_layers():
    """Of the engine that this process built last, as the builder told them: a real engine's, without a GPU."""
    return proof.logged_layers(log(find_tensorrt()).layers)


def check(found, source):
    proof.check_quantised(found, source.kind, source.quantised, source.products)


@pytest.mark.parametrize("precision", PAIRS)
def test_each_precision_is_built_in_its_own_types(trt, folder, precision):  # noqa: ARG001
    path = write(folder, precision)
    artifact = build_engine(path, "vq-plain", folder / "engines", SMALL)
    (meant,) = PAIRS[precision].values()
    assert artifact.layers.get("quantize", 0) + artifact.layers["dequantize"] == meant
    source, found = EngineSource(path, "vq-plain"), built_layers()
    check(found, source)
    assert found.profiles == len(artifact.profiles) == 2
    assert len(source.products) == (12 if precision == "int4" else 14)
    held = sum((layer.held or {}).get(source.products[0].dtype, 0) for layer in found.computed)
    assert held == 2 * sum(product.numbers for product in source.products)


@pytest.mark.parametrize(
    ("precision", "left"),
    [
        *((precision, "model.layers.0.self_attn.q_proj") for precision in PAIRS),  # its neighbours are in its kernel
        *(("int8", f"model.layers.1.{name}") for name in ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")),
    ],
)
def test_an_engine_with_one_layer_unquantised_fails(trt, folder, precision, left):  # noqa: ARG001
    meant = EngineSource(write(folder, precision), "vq-plain")
    build_engine(write(folder, precision, left=[left]), "vq-plain", folder / "engines", SMALL)
    with pytest.raises(CheckFailed, match=rf"the engine computes 1 of them in another type: {left};"):
        check(built_layers(), meant)


def test_what_tensorrt_did_not_quantise_is_not_kept(trt, folder, monkeypatch):  # noqa: ARG001
    path = write(folder, "int8")
    more = (*EngineSource(path, "vq-plain").products, QuantisedProduct("node_matmul", "no weight", "int8", 64, True))
    monkeypatch.setattr(engine_source, "quantised_products", lambda _: more)
    with pytest.raises(CheckFailed, match=r"15 int8 products were meant, .* in another type: node_matmul;"):
        build_engine(path, "vq-plain", folder / "engines", SMALL)
    assert not list((folder / "engines").rglob("*.plan"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_on_a_gpu_the_inspector_tells_the_same(trt, folder, precision):  # noqa: ARG001
    meant = EngineSource(write(folder, precision), "vq-plain")
    built = build_engine(meant.path, "vq-plain", folder / "engines", SMALL)
    assert built.layers_from == "engine"  # the inspector's; what the builder's log told was checked before
    build_engine(write(folder, precision, left=["model.layers.0.mlp.up_proj"]), "vq-plain", folder / "other", SMALL)
    (sidecar,) = (folder / "other").rglob("vq-plain.json")
    plan = load_engine(sidecar)
    found = proof.engine_layers(plan.here.module, plan.engine)
    with pytest.raises(
        CheckFailed, match=r"the engine computes 1 of them in another type: model.layers.0.mlp.up_proj;"
    ):
        check(found, meant)


def test_some_layers_in_8_bits_among_those_in_4(trt, folder):  # noqa: ARG001
    path = write(folder, "int4", eight=["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.v_proj"])
    assert EngineSource(path, "vq-plain").quantised == {"int4": 10, "int8": 2}
    build_engine(path, "vq-plain", folder / "engines", SMALL)
    check(built_layers(), EngineSource(path, "vq-plain"))
    with pytest.raises(CheckFailed, match=r"2 of them .* model.layers.0.mlp.up_proj, model.layers.1.self_attn.v_proj;"):
        check(built_layers(), EngineSource(write(folder, "int4"), "vq-plain"))


def test_a_quantised_codebook_is_built_too(trt, folder):  # noqa: ARG001
    path = write(folder, "int8", quantise_head=True)
    source = EngineSource(path, "vq-plain")
    assert source.quantised == {"int8": 33}
    assert len(source.products) == 15
    build_engine(path, "vq-plain", folder / "engines", SMALL)
    check(built_layers(), source)


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
    (layer,) = built_layers().plugins  # a 'custom_layer', in both profiles
    assert (layer.name, layer.input_dtypes[0]) == ("lm_head", "float")


@pytest.mark.parametrize("precision", PAIRS)
def test_the_graph_says_what_is_meant(folder, precision):
    source = EngineSource(write(folder, precision), "vq-plain")
    assert source.quantised == PAIRS[precision]
    assert all(product.input_too == (precision in ("int8", "fp8")) for product in source.products)


def test_a_network_that_is_not_quantised_fails(folder):
    source = EngineSource(write(folder, "int8"), "vq-plain")
    for found in (
        proof.Layers("network", {"matrix_multiply": 19}, ()),
        proof.Layers("network", {}, (), {"int8": 29}),
        proof.Layers("network", {}, (), {"fp8": 30}),
    ):
        with pytest.raises(CheckFailed, match="30 int8 quantised were meant"):
            check(found, source)
    check(proof.Layers("network", {}, (), {"int8": 30}), source)


def test_a_graph_for_onnx_runtime_is_refused_with_the_mend(folder):
    with pytest.raises(UserError, match="--runtime tensorrt"):
        EngineSource(write(folder, "w8", runtime="onnxruntime"), "vq-plain")
