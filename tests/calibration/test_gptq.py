"""Weights in 4 bits by what they cost on inputs: better than to nearest, and the same numbers in every layout."""

import numpy as np
import onnx_ir as ir
import pytest

from export_vq import feeds
from export_vq.calibration import CalibrationOptions, calibrate
from export_vq.calibration.gptq import MIDDLE, gptq
from export_vq.calibration.moments import second_moments
from export_vq.calibration.products import chosen, products
from export_vq.calibration.quantise import quantise
from export_vq.calibration.rounding import by_block, on_grid
from export_vq.calibration.source import in_plain_form
from export_vq.errors import UserError
from export_vq.forms import read_graph
from export_vq.records import OnnxArtifact
from export_vq.runners import OrtRunner, signature_of
from export_vq.terminal import Steps

K, N = 80, 11
"""Rows that are no multiple of a block, an odd number of columns and of groups."""


def weight():
    return np.random.default_rng(0).standard_normal((K, N)).astype(np.float32) + 0.5


def inputs():
    """Some directions matter much more than others, as in a language model."""
    random = np.random.default_rng(1)
    mixing = np.linalg.qr(random.standard_normal((K, K)))[0] * np.geomspace(10, 0.1, K)
    return (random.standard_normal((500, K)) @ mixing.T).astype(np.float32)


def values(grid, block=32):
    return on_grid(grid, block).dequantised()


@pytest.mark.parametrize("symmetric", [True, False])
def test_results_change_less_than_to_nearest(symmetric):
    x, w = inputs(), weight()
    grid = gptq(w, x.T @ x, 32, symmetric=symmetric)
    nearest = gptq(w, np.eye(K, dtype=np.float32), 32, symmetric=symmetric)  # nothing to make up for
    off, off_nearest, off_library = (
        ((x @ (found - w)) ** 2).mean() for found in (values(grid), values(nearest), by_block(w, 4, 32).dequantised())
    )
    assert off < 0.5 * off_nearest
    assert off < 0.5 * off_library
    assert (grid.zeros == MIDDLE).all() == symmetric
    assert (grid.scales > 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_alike_inputs_leave_each_number_at_its_nearest(symmetric):
    w = weight()
    grid = gptq(w, np.eye(K, dtype=np.float32), 32, symmetric=symmetric)
    scales, zeros = (np.repeat(a.astype(np.float32), 32, axis=0)[:K] for a in (grid.scales, grid.zeros))
    exact = np.clip(w / scales + zeros, 0, 15)
    assert (np.abs(grid.integers - exact) <= 0.5 + 1e-5).all()


def test_inputs_that_never_occur_do_no_harm():
    x = inputs()
    x[:, 5] = 0
    assert np.isfinite(values(gptq(weight(), x.T @ x, 32, symmetric=False))).all()
    assert np.isfinite(values(gptq(np.zeros((K, N), np.float32), x.T @ x, 32, symmetric=True))).all()


def options(text, **chosen_):
    small = {"samples": 3, "width": 24, "test_tokens": 48, "limit": 100.0, "threads": 1}
    return CalibrationOptions("int4", text=text, **{**small, **chosen_})


@pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt"])
def test_the_graph_multiplies_with_these_numbers(folder, runtime):
    """Against a float32 graph with the weights that the grids stand for; MatMulNBits rounds its inputs to int8 besides."""
    signature = signature_of(OnnxArtifact.load(folder / "model.onnx.json"))
    random = np.random.default_rng(0)
    grids = {}

    def grid(layer):
        if layer.name not in grids:
            k = layer.numbers().shape[0]
            x = random.standard_normal((200, k)).astype(np.float32)
            grids[layer.name] = gptq(layer.numbers(), x.T @ x, 32, symmetric=runtime == "tensorrt")
        return grids[layer.name]

    asked = CalibrationOptions("int4", feeds="unused", runtime=runtime)
    four, meant = read_graph(folder / "model.onnx"), read_graph(folder / "model.onnx")
    left = quantise(four, chosen(products(four), [], head=False), asked, {}, grid=grid)
    for layer in products(meant):
        if layer.name in grids and layer.name not in left:
            layer.weight.const_value = ir.tensor(values(grids[layer.name]), name=layer.weight.name)
    ids = random.integers(0, 97, (2, 20))
    found = []
    for name, model in (("four.onnx", four), ("meant.onnx", meant)):
        ir.save(model, folder / name)
        with OrtRunner(folder / name, signature, fuse_quantised=False) as runner:
            found.append(runner.infer(feeds.prefill(signature, ids, np.ones_like(ids)))["logits"])
    bound = 0.05 if runtime == "onnxruntime" else 1e-5
    assert np.abs(found[0] - found[1]).max() < bound * np.ptp(found[1])


def test_moments_are_of_the_inputs_and_come_back_from_disk(folder, text, monkeypatch):  # noqa: ARG001
    model = in_plain_form(read_graph(folder / "model.onnx"))
    layer = products(model)[0]
    taps = {str(layer.activation.name): layer.name}
    signature = signature_of(OnnxArtifact.load(folder / "model.onnx.json"))
    blocks = np.random.default_rng(0).integers(0, 97, (10, 12))

    def run(part):
        return second_moments(
            in_plain_form(read_graph(folder / "model.onnx")), taps, signature, blocks[:part], folder / "x", {}
        )

    whole = run(10)
    (found,) = whole.values()
    assert np.allclose(found, found.T)
    assert np.linalg.eigvalsh(found.astype(np.float64)).min() > -1e-3
    # What enters the first product is normed: each row's squares have a mean of about 1 times the norm's weights'.
    rows = np.trace(found)
    first, second = (
        run(4)[taps and next(iter(taps))],
        second_moments(in_plain_form(read_graph(folder / "model.onnx")), taps, signature, blocks[4:], folder / "x", {})[
            next(iter(taps))
        ],
    )
    assert rows == pytest.approx(np.trace(first) + np.trace(second), rel=1e-4)
    monkeypatch.setattr("export_vq.calibration.moments.OrtRunner", None)  # nothing runs again
    assert (run(10)[next(iter(taps))] == found).all()


def test_some_layers_in_8_bits_cost_less(folder, text):
    four = calibrate(folder, options(text), Steps())
    mixed = calibrate(folder, options(text, eight="auto:6"), Steps())
    assert four.method == mixed.method == "gptq"
    assert mixed.total.kl_mean < four.total.kl_mean
    model = read_graph(folder / "int4" / "model.onnx")
    assert sorted(n.attributes.get_int("bits") for n in model.graph if n.op_type == "MatMulNBits") == [4] * 8 + [8] * 6
    named = calibrate(folder, options(text, eight="model.layers.0.mlp"), Steps())
    in_8_bits = "model.layers.0.mlp.down_proj, model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj"
    assert named.notes[0] == f"in 8 bits: {in_8_bits}"
    assert "worse than guessing among its 97 tokens" in named.notes[1]  # weights are random
    calibrate(folder, options(text, eight="model.layers.0.mlp", runtime="tensorrt"), Steps())
    pairs = [n for n in read_graph(folder / "int4" / "model.onnx").graph if n.op_type == "DequantizeLinear"]
    assert sorted({str(n.inputs[0].const_value.dtype) for n in pairs}) == ["INT4", "INT8"]


def test_8_bits_are_for_int4_alone(text):
    with pytest.raises(UserError, match="--keep-in-int8 is for int4"):
        CalibrationOptions("w8", text=text, eight="auto:3")
    with pytest.raises(UserError, match="--keep-in-int8 is 'auto:x'"):
        CalibrationOptions("int4", text=text, eight="auto:x")
