"""float32 graphs in 16-bit types: what overflows stays float32, all else does not, and the numbers are those of the type."""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from export_vq import feeds
from export_vq.calibration import CalibrationOptions, calibrate
from export_vq.calibration.extremes import add_extremes, magnitudes, with_types
from export_vq.calibration.half import convert, islands
from export_vq.calibration.products import products
from export_vq.errors import UserError
from export_vq.forms import head_nodes, read_graph
from export_vq.records import OnnxArtifact
from export_vq.runners import OrtRunner, signature_of
from export_vq.terminal import Steps

IDS = np.random.default_rng(0).integers(0, 97, (2, 20))
FLOAT16_STEP = 2.0**-11
"""Half a unit of the last place."""


def options(precision, text, **chosen):
    small = {"samples": 2, "width": 24, "test_tokens": 48, "limit": 100.0, "threads": 1}
    return CalibrationOptions(precision, text=text, **{**small, **chosen})


def signature(folder):
    return signature_of(OnnxArtifact.load(folder / "model.onnx.json"))


def logits(path, its_signature):
    with OrtRunner(path, its_signature, native=False) as runner:
        return runner.infer(feeds.prefill(runner.signature, IDS, np.ones_like(IDS)))["logits"].astype(np.float32)


def enlarge(folder, factor):
    """What the first layer adds to the residual stream gets so many times as large."""
    model = read_graph(folder / "model.onnx")
    node = next(n for n in model.graph if n.name == "model.layers.0.mlp.down_proj")
    weight = node.inputs[1]
    weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(factor), name=weight.name)
    ir.save(model, folder / "model.onnx")


def test_float16_is_float16_but_for_norms_and_positions(folder, text):
    report = calibrate(folder, options("fp16", text), Steps())
    record = OnnxArtifact.load(folder / "fp16" / "model.onnx.json")
    assert (record.dtype, record.precision, report.kept) == ("fp16", "", ())
    model = read_graph(folder / "fp16" / "model.onnx")
    assert all(p.dtype == ir.DataType.FLOAT16 for p in products(model))
    assert all(v.dtype == ir.DataType.FLOAT16 for v in (*model.graph.outputs, *head_nodes(model)[0].inputs[::2]))
    assert all(
        n.inputs[0].dtype == ir.DataType.FLOAT
        for n in model.graph
        if n.op_type in ("Pow", "ReduceMean", "Reciprocal", "Cos")
    )
    exact = logits(folder / "model.onnx", signature(folder))
    off = np.abs(logits(folder / "fp16" / "model.onnx", signature_of(record)) - exact).max()
    # Two layers of some twenty roundings each: far from each other's worst case, so their number is bound enough.
    assert 0 < off < 40 * FLOAT16_STEP * np.ptp(exact)


def test_what_overflows_stays_float32(folder, text):
    enlarge(folder, 1e6)
    seen = with_types(read_graph(folder / "model.onnx"))
    assert magnitudes(
        {"least.a": 3.0, "most.a": 2.0, "least.b.c": float(np.finfo(np.float32).max), "most.b.c": 1.0}
    ) == {
        "a": 3.0,
        "b.c": 1.0,
    }
    blind = seen.clone()
    convert(blind, islands(blind, {}, "fp16")[0], "fp16", simulated=True)
    ir.save(blind, folder / "blind.onnx")
    report = calibrate(folder, options("fp16", text), Steps())
    half = signature_of(OnnxArtifact.load(folder / "fp16" / "model.onnx.json"))
    assert not np.isfinite(logits(folder / "blind.onnx", signature(folder))).all()
    exact, found = logits(folder / "model.onnx", signature(folder)), logits(folder / "fp16" / "model.onnx", half)
    assert np.abs(found - exact).max() < 40 * FLOAT16_STEP * np.ptp(exact)
    assert "model.layers.0.mlp.down_proj" in report.kept
    assert "model.layers.1.mlp.down_proj" not in report.kept
    assert any("come too near to what fp16 holds" in note for note in report.notes)
    # bfloat16 holds it.
    assert calibrate(folder, options("bf16", text), Steps()).kept == ()


def test_bfloat16_is_tested_as_its_numbers_are(folder, text):
    report = calibrate(folder, options("bf16", text), Steps())
    assert report.total.kl_mean > 0
    onnx.checker.check_model(folder / "bf16" / "model.onnx", full_check=True)
    model = with_types(read_graph(folder / "model.onnx"))
    convert(model, islands(model, {}, "bf16")[0], "bf16", simulated=True)
    ir.save(model, folder / "simulated.onnx")
    found, exact = (logits(folder / name, signature(folder)) for name in ("simulated.onnx", "model.onnx"))
    assert (found.astype(ml_dtypes.bfloat16).astype(np.float32) == found).all()
    assert 8 * FLOAT16_STEP * exact.std() < np.abs(found - exact).max() < 40 * 8 * FLOAT16_STEP * np.ptp(exact)


def test_extremes_are_those_of_every_value(folder):
    model = with_types(read_graph(folder / "model.onnx"))
    whole = model.clone()
    taps = add_extremes(model)
    asked = [name.removeprefix("most.") for name in taps if name.startswith("most.")]
    for graph, names in ((model, list(taps)), (whole, asked)):
        values = {v.name: v for v in ir.convenience.create_value_mapping(graph.graph).values()}
        graph.graph.outputs.extend([values[n] for n in names if not values[n].is_graph_output()])
    ir.save(model, folder / "taps.onnx")
    ir.save(whole, folder / "whole.onnx")
    given = feeds.prefill(signature(folder), IDS, np.ones_like(IDS))
    found = []
    for name in ("taps.onnx", "whole.onnx"):
        with OrtRunner(folder / name, signature(folder), native=False) as runner:
            found.append(runner.infer(given))
    sizes = magnitudes({name: abs(float(found[0][name])) for name in taps})
    assert len(sizes) > 100
    for name, size in sizes.items():
        array = found[1][name]
        real = array[array > np.finfo(np.float32).min]
        assert size >= np.abs(real).max(initial=0) * (1 - 1e-5) or array.min() == np.finfo(np.float32).min


def test_what_no_float16_holds_is_refused(folder, text):
    model = read_graph(folder / "model.onnx")
    codebook = model.graph.initializers["lm_head.codebook"]
    codebook.const_value = ir.tensor(codebook.const_value.numpy() * np.float32(1e6), name=codebook.name)
    ir.save(model, folder / "model.onnx")
    with pytest.raises(UserError, match=r"reaches .* which fp16 does not hold"):
        calibrate(folder, options("fp16", text), Steps())


def test_a_graph_in_half_precision_is_refused(folder, text):
    calibrate(folder, options("fp16", text), Steps())
    with pytest.raises(UserError, match="is in fp16 already"):
        calibrate(folder / "fp16", options("bf16", text), Steps())
