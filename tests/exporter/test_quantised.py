"""Quantised folders with other ends: chosen tokens are those of the quantised logits, on both heads, in every form."""

import random

import numpy as np
import pytest
from checkpoints import tiny_model

from export_vq.bundle import Bundle
from export_vq.calibration import CalibrationOptions
from export_vq.errors import UserError
from export_vq.feeds import draws, prefill
from export_vq.graph import ExportOptions
from export_vq.head_output import HeadOutput
from export_vq.quantised import check_ended, end_folder, open_graph, quantise_folder
from export_vq.records import OnnxArtifact
from export_vq.steps import export_step
from export_vq.terminal import Steps

HEADS = {"product": {}, "single": {"bias": False}, "additive": {}}
ENDS = [
    (HeadOutput("topk", 7), "portable"),
    (HeadOutput("topk", 3, last_token=True), "plain"),
    (HeadOutput("sample"), "plain"),
    (HeadOutput("sample", last_token=True), "portable"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    draw = random.Random(0)
    words = ["the", "cat", "dog", "bird", "sat", "ran", "on", "over", "mat", "roof", "and", "then", "it", "was", "gone"]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(" ".join(draw.choices(words, k=90)) + "." for _ in range(60)))
    return path


@pytest.fixture(scope="module", params=[("product", "int8"), ("single", "w8"), ("additive", "int4")], ids="-".join)
def quantised(request, tmp_path_factory, text):
    """A tiny Llama in fewer bits, with logits."""
    kind, precision = request.param
    out = tmp_path_factory.mktemp("out")
    source, target = Bundle(out / "fp32-logits"), Bundle(out / f"{precision}-logits")
    exported = ExportOptions(
        external_data_bytes=0 if kind == "single" else 1 << 20
    )  # as large models have it, and small ones
    export_step(lambda: tiny_model("llama", kind, **HEADS[kind]), "hash", source, exported, Steps())
    options = CalibrationOptions(precision, text=text, samples=3, width=24, test_tokens=48, threads=1, limit=100.0)
    report = quantise_folder(source, target, options, Steps())
    assert report.precision == precision
    assert not (source.folder / precision).exists()
    return target, options


def blocks(width, count):
    return np.random.default_rng(0).integers(2, 97, (count, width))


@pytest.mark.parametrize(("output", "form"), ENDS)
def test_another_end_chooses_what_the_logits_say(quantised, tmp_path, output, form):
    source, target = quantised[0], Bundle(tmp_path / "ended")
    end_folder(source, target, output, form, Steps())
    artifact = OnnxArtifact.load(target.folder / "model.onnx.json")
    assert (artifact.output, artifact.top_k, artifact.last_token, artifact.form) == (
        output.word,
        output.top_k,
        output.last_token,
        form,
    )
    report = check_ended(source, target, blocks, "a hash", 256, Steps())
    assert report, report.failures
    assert report.total.positions > 0
    # The dense twin chooses from its own quantised logits.
    ids = blocks(9, 2)
    with open_graph(source, "dense.onnx") as logits, open_graph(target, "dense.onnx") as ended:
        feeds = prefill(logits.signature, ids, np.ones_like(ids))
        expected = logits.infer(feeds)["logits"][:, -1:] if output.last_token else logits.infer(feeds)["logits"]
        found = ended.infer(feeds | draws(ended.signature, ids, np.random.default_rng(1)))
    if output.word == "topk":
        np.testing.assert_array_equal(found["values"], -np.sort(-expected)[..., : output.top_k])
        np.testing.assert_array_equal(np.take_along_axis(expected, found["ids"], -1), found["values"])
    else:
        shares = expected - np.logaddexp.reduce(expected.astype(np.float64), -1, keepdims=True)
        told = np.take_along_axis(shares, found["ids"][..., None], -1)[..., 0]
        np.testing.assert_allclose(found["logprob"], told, rtol=0, atol=2**-23 * (np.abs(expected).max() + 97))


def test_a_check_finds_another_graphs_tokens(quantised, tmp_path):
    """The same end on the dense twin of nothing: a head whose codes are turned by one token."""
    import onnx_ir as ir

    from export_vq.forms import read_graph
    from export_vq.graph import write_graph

    source, target = quantised[0], Bundle(tmp_path / "ended")
    end_folder(source, target, HeadOutput("topk", 5), "portable", Steps())
    graph = read_graph(target.folder / "model.onnx")
    codes = graph.graph.initializers["lm_head.codes"]
    codes.const_value = ir.tensor(np.roll(codes.const_value.numpy(), 1, axis=0), name=codes.name)
    write_graph(graph, target.folder, OnnxArtifact.load(target.folder / "model.onnx.json"))
    report = check_ended(source, target, blocks, "a hash", 256, Steps())
    assert not report


def test_what_is_current_is_kept_and_what_is_damaged_is_made_again(quantised, tmp_path, capsys):
    (source, options), target = quantised, Bundle(tmp_path / "ended")
    exported = Bundle(source.folder.parent / "fp32-logits")
    output = HeadOutput("topk", 5)

    def make():
        quantise_folder(exported, source, options, Steps())
        end_folder(source, target, output, "portable", Steps())
        check_ended(source, target, blocks, "a hash", 256, Steps())
        return capsys.readouterr().err.count("skipped")

    make()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.onnx*")}
    assert make() == 3
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.onnx*")}
    whole = (target.folder / "model.onnx").read_bytes()
    (target.folder / "model.onnx").write_bytes(whole[:-1])
    assert make() == 2  # the same graph comes out, so its check is the same
    assert (target.folder / "model.onnx").read_bytes() == whole


def test_a_model_that_changes_its_logits_afterwards_has_no_other_end(tmp_path):
    loaded = tiny_model("gemma3_text", "product")
    loaded.model.config.final_logit_softcapping = 5.0
    source = Bundle(tmp_path / "logits")
    export_step(lambda: loaded, "hash", source, ExportOptions(), Steps())
    with pytest.raises(UserError, match=r"changes its logits after the output layer.* use output=logits"):
        end_folder(source, Bundle(tmp_path / "ended"), HeadOutput("topk", 5), "portable", Steps())
