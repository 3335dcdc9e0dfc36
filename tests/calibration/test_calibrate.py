"""The command and its verb, on a tiny model: what is kept, what is judged, what is refused."""

import dataclasses
import json

import numpy as np
import onnx_ir as ir
import pytest
from commands import run

from export_vq import manifest
from export_vq.calibration import CalibrationOptions, calibrate
from export_vq.calibration.counts import RANGES
from export_vq.calibration.documents import read_material
from export_vq.calibration.judge import compare, failures
from export_vq.calibration.source import open_source
from export_vq.decoding import DecodingOptions
from export_vq.errors import UserError
from export_vq.feeds import Signature
from export_vq.forms import read_graph
from export_vq.records import CalibrationReport, ErrorStats
from export_vq.runners import OrtRunner, signature_of
from export_vq.terminal import Steps
from export_vq.textmodel import TextModel

LOOSE = 100.0
"""A limit that random weights, which feel every rounding, stay below."""


def options(precision, text, **chosen):
    small = {"samples": 3, "width": 24, "test_tokens": 48, "limit": LOOSE, "threads": 1}
    return CalibrationOptions(precision, text=text, **{**small, **chosen})


def test_every_precision_is_written_judged_and_runs(folder, text):
    sizes = {}
    for precision in ("int8", "fp8", "w8", "int4"):
        report = calibrate(folder, options(precision, text), Steps())
        assert report, report.failures
        assert report.total.positions == 48
        assert CalibrationReport.load(folder / precision / "calibration.json") == report
        assert 0 < report.total.kl_mean < 1
        sizes[precision] = report.num_bytes
        assert report.kept == ("lm_head.codebook",)
        dense = read_graph(folder / precision / "dense.onnx").graph.initializers  # its head too: the rival of a VQ head
        assert not any(
            v.const_value.dtype == ir.DataType.FLOAT and v.const_value.size > 1000
            for v in dense.values()
            if "embed" not in v.name
        )
    assert sizes["int4"] < sizes["w8"] < json.loads((folder / "model.onnx.json").read_text())["num_bytes"]
    # int8 and fp8 read the same ranges, but for the outliers that int8 moves first; w8 has looked for NaN only.
    assert len(list((folder / RANGES).glob("*.json"))) == 3
    with TextModel(folder / "int8", threads=1) as model:
        assert len(list(model.write("the cat", DecodingOptions(max_new_tokens=3, temperature=0)))) >= 1


def test_the_most_sensitive_layers_are_kept_and_that_helps(folder, text):
    whole = calibrate(folder, options("int8", text, sensitivity=True), Steps())
    costs = [cost.kl for cost in whole.sensitivity]
    assert len(costs) == whole.quantised == 14
    assert costs == sorted(costs, reverse=True)
    part = calibrate(folder, options("int8", text, keep="auto:10"), Steps())
    assert [c.name for c in part.sensitivity if c.kept] == [c.name for c in whole.sensitivity[:10]]
    assert part.quantised == 4
    assert part.total.kl_mean < whole.total.kl_mean


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_quantised_codebook_tells_what_it_costs(folder, text, precision):
    keep = "model.layers"  # nothing but the head is quantised, so its cost is the whole
    found = calibrate(folder, options(precision, text, quantise_head=True, keep=keep, samples=1), Steps())
    assert found.quantised == 1
    (cost,) = found.sensitivity
    assert cost.name == "lm_head.codebook"
    source = open_source(folder, options(precision, text))
    block = read_material(options(precision, text, samples=1), source.tokenizer, 97, 24).calibration[:1]
    signature = signature_of(source.artifact)
    with (
        OrtRunner(source.path, signature) as a,
        OrtRunner(folder / precision / "model.onnx", signature, fuse_quantised=False) as b,
    ):
        assert compare(a, b, block).kl_mean == pytest.approx(cost.kl, rel=0.01, abs=1e-7)


def test_one_layer_s_sensitivity_is_what_it_costs_quantised_alone(folder, text):
    """The switches against a graph in which that layer alone is quantised, on the very block that they were measured on."""
    asked = options("w8", text, runtime="tensorrt", sensitivity=True, samples=1)
    cost = calibrate(folder, asked, Steps()).sensitivity[0]
    others = [c.name for c in calibrate(folder, asked, Steps()).sensitivity[1:]]
    calibrate(folder, dataclasses.replace(asked, sensitivity=False, keep=",".join(others)), Steps())
    source = open_source(folder, asked)
    block = read_material(asked, source.tokenizer, 97, 24).calibration[:1]
    signature = signature_of(source.artifact)
    with (
        OrtRunner(source.path, signature) as a,
        OrtRunner(folder / "w8" / "model.onnx", signature, fuse_quantised=False) as b,
    ):
        assert compare(a, b, block).kl_mean == pytest.approx(cost.kl, rel=0.01, abs=1e-7)


def test_counts_serve_whatever_is_kept(folder, text):
    calibrate(folder, options("fp8", text), Steps())
    calibrate(folder, options("fp8", text, method="max", keep="model.layers.0"), Steps())
    calibrate(folder, options("int8", text, smooth=0.0, quantise_head=True), Steps())
    assert len(list((folder / RANGES).glob("*.json"))) == 1


class _Stops(Steps):
    """Ends the run in the middle of counting."""

    def step(self, name):
        outer = super().step(name)

        class Step:
            def __enter__(self):
                tell = outer.__enter__()

                def stop(what, fraction):
                    tell(what, fraction)
                    if name == "ranges" and fraction > 0.5:
                        raise KeyboardInterrupt

                return stop

            def __exit__(self, *how):
                return outer.__exit__(*how)

        return Step()


def test_an_interrupted_run_goes_on_and_gives_the_same(folder, text):
    whole = calibrate(folder, options("fp8", text), Steps())
    (kept,) = (folder / RANGES).glob("*.json")
    counted = kept.read_text()
    kept.unlink()
    with pytest.raises(KeyboardInterrupt):
        calibrate(folder, options("fp8", text), _Stops())
    assert json.loads(kept.read_text())["done"] == 2
    assert calibrate(folder, options("fp8", text), Steps()) == whole
    assert kept.read_text() == counted


def _poison(folder, name):
    model = read_graph(folder / "model.onnx")
    node = next(n for n in model.graph if n.name == name)
    weight = node.inputs[1]
    numbers = weight.const_value.numpy().copy()
    numbers[0, 0] = np.nan
    weight.const_value = ir.tensor(numbers, name=weight.name)
    ir.save(model, folder / "model.onnx")


@pytest.mark.parametrize(
    ("precision", "rounding"), [("fp8", "gptq"), ("w8", "gptq"), ("int4", "gptq"), ("int4", "nearest")]
)
def test_nan_is_named_by_its_layer(folder, text, precision, rounding):
    """Also where nothing of activations is needed: NaN against NaN would be no difference at all."""
    _poison(folder, "model.layers.1.mlp.up_proj")
    with pytest.raises(UserError, match=r"activations of model\.layers\.1\.mlp\.down_proj hold NaN"):
        calibrate(folder, options(precision, text, rounding=rounding), Steps())


class _Gives:
    """A runner without a cache that gives these logits [S, V]."""

    signature = Signature((), has_position_ids=False)

    def __init__(self, logits):
        self._logits = logits

    def infer(self, given):
        return {"logits": self._logits[None, : given["input_ids"].shape[1]]}


def test_nan_in_logits_never_passes(text):
    block = np.zeros((1, 2), np.int64)
    good, bad = np.zeros((2, 5), np.float32), np.full((2, 5), np.nan, np.float32)
    assert failures(compare(_Gives(good), _Gives(good), block), CalibrationOptions("w8", text=text).limits) == ()
    assert (
        "logits hold NaN"
        in failures(compare(_Gives(good), _Gives(bad), block), CalibrationOptions("w8", text=text).limits)[0]
    )
    with pytest.raises(UserError, match="unquantised graph's logits hold NaN"):
        compare(_Gives(bad), _Gives(bad), block)


def test_a_layer_that_is_not_there_is_told_with_the_option_that_names_it(folder, text):
    for option, chosen in (("--keep-in-fp16", {"keep": "nothing"}), ("--keep-in-int8", {"eight": "nothing"})):
        with pytest.raises(UserError, match=f"{option} names 'nothing', which no layer is called"):
            calibrate(folder, options("int4", text, **chosen), Steps())
    with pytest.raises(UserError, match="nothing is left to quantise"):
        calibrate(folder, options("w8", text, keep="model.layers"), Steps())


def test_what_cannot_be_quantised_is_refused(folder, text, tmp_path):
    calibrate(folder, options("w8", text), Steps())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    cases = [(folder / "w8", "is quantised already"), (other, "holds no model.onnx")]
    for where, says in cases:
        with pytest.raises(UserError, match=says):
            calibrate(where, options("w8", text), Steps())
    tokenizer["model"]["vocab"].update({f"word{i}": 97 + i for i in range(50)})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="token"):
        calibrate(folder, options("w8", text), Steps())


def test_another_model_s_tokenizer_is_told_even_where_its_ids_are_known(folder, text):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[5:7]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    manifest.seal(folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="not the tokenizer that was exported"):
        calibrate(folder, options("w8", text), Steps())


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ({"method": "median"}, "--method is 'median'"),
        ({"block": 48}, "--block is 48"),
        ({"keep": "auto:some"}, "expected auto:N"),
        ({"smooth": 1.5}, "--smooth is 1.5"),
        ({"limit": float("nan")}, "--limit is nan"),
        ({"precision": "fp16", "keep": "auto:3"}, "fp16 is a type for everything"),
        ({"precision": "int4", "rounding": "up"}, "--rounding is 'up'"),
        ({"precision": "int4", "quantise_head": True}, "--head quantise is for int8 and fp8"),
    ],
)
def test_options_that_make_no_sense_are_refused(chosen, says, text):
    with pytest.raises(UserError, match=says):
        _ = CalibrationOptions(**{"precision": "int8", "text": text, **chosen}).kept_most_sensitive


def stats(**changed):
    numbers = dict.fromkeys((f.name for f in dataclasses.fields(ErrorStats)), 0.0)
    same = {"top1_agreement": 1.0, "perplexity_reference": 10.0, "perplexity_candidate": 10.0, "error_histogram": ()}
    return ErrorStats(**{**numbers, **same, **changed})


def test_limits_hold_or_fail_one_by_one(text):
    limits = CalibrationOptions("w8", text=text).limits
    assert failures(stats(), limits) == ()
    assert failures(stats(perplexity_candidate=10.099, kl_mean=0.0099, top1_agreement=0.93), limits) == ()
    for bad in ({"perplexity_candidate": 10.101}, {"kl_mean": 0.01}, {"top1_agreement": 0.92}):
        assert len(failures(stats(**bad), limits)) == 1
    for name in ("perplexity_candidate", "kl_mean", "top1_agreement"):
        assert len(failures(stats(**{name: float("nan")}), limits)) == 1


def test_a_sealed_folder_verifies_with_what_was_quantised_in_it(folder, text):
    manifest.seal(folder)
    small = ("--samples", 2, "--width", 24, "--test-tokens", 48, "--threads", 1, "--limit", 100)
    code, _, stderr = run("calibrate", folder, "--text", text, "--precision", "fp8", *small)
    assert code == 0, stderr
    assert run("inspect", folder, "--verify")[0] == 0
    assert run("inspect", folder / "fp8", "--verify")[0] == 0
    listed = manifest.read(folder / "fp8").files
    assert {"model.onnx", "dense.onnx", "calibration.json", "genai_config.json", "tokenizer.json"} <= set(listed)
    (folder / "fp8" / "config.json").write_text("{}")
    assert manifest.verify(folder) == ("fp8/config.json: changed: not the content that the manifest lists",)
    (folder / "fp8" / "manifest.json").unlink()
    assert len([line for line in manifest.verify(folder) if "extra" in line]) == len(listed)


def test_the_command_s_exit_codes(folder, text):
    def quantised(*args):
        return run("calibrate", folder, "--text", text, *args)

    small = ("--samples", "2", "--width", "24", "--test-tokens", "48", "--threads", "1")
    code, stdout, stderr = quantised("--precision", "w8", "--limit", "100", *small)
    assert code == 0, stderr
    assert "PASS" in stdout
    code, stdout, stderr = quantised("--precision", "int4", "--limit", "0", *small)
    assert code == 1
    assert "FAIL" in stdout
    assert "mean KL is" in stderr
    assert (folder / "int4" / "calibration.json").is_file()
    assert manifest.verify(folder / "int4") == ()
    code, _, stderr = quantised("--precision", "w8", "--width", "60000000", "--keep-in-fp16", "nothing", *small[:2])
    assert code == 2
    assert "no layer is called" in " ".join(stderr.split())
