"""`--matrix` from checkpoint to report: whole folders, one table, nothing made twice, one failure that stops no other."""

import functools
import json
import random

import pytest
from checkpoints import save_tiny
from commands import run

from export_vq import matrix
from export_vq.calibration import CalibrationOptions
from export_vq.decoding import DecodingOptions
from export_vq.manifest import verify
from export_vq.matrix_report import MatrixReport, render_matrix
from export_vq.textmodel import TextModel

WORDS = ["the", "cat", "dog", "bird", "sat", "ran", "on", "over", "mat", "roof", "and", "then", "it", "was", "gone"]


def paragraphs(count):
    draw = random.Random(0)
    return "\n\n".join(" ".join(draw.choices(WORDS, k=90)) + "." for _ in range(count))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.pt"
    save_tiny(path)
    return path


@pytest.fixture(scope="module")
def text(model):
    path = model.with_name("text.txt")
    path.write_text(paragraphs(60))
    return path


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Random weights feel every rounding, so within wide limits."""
    small = functools.partial(CalibrationOptions, samples=3, width=24, test_tokens=48, limit=100.0)
    monkeypatch.setattr(matrix, "CalibrationOptions", small)


def test_every_variant_is_a_folder_that_runs_and_a_row_of_one_report(model, text, tmp_path):
    out = tmp_path / "out"
    args = (model, "-o", out, "--text", text, "--top-k", 9, "--positions", 256, "--threads", 1)
    args += ("--matrix", "dtype=fp32,int8", "output=topk,logits")
    code, stdout, stderr = run(*args)
    assert code == 0, stderr
    names = ["fp32-topk", "fp32-logits", "int8-topk", "int8-logits"]
    report = MatrixReport.load(out / "matrix.json")
    assert [variant.name for variant in report.variants] == names
    assert {variant.verdict for variant in report.variants} == {"PASS"}
    rows = [line.strip("| ").split(" | ") for line in stdout.splitlines() if line.startswith("| ")]
    assert [row[:2] for row in rows[1:]] == [[name, "PASS"] for name in names]
    assert all("–" not in row[7:] for row in rows[1:])
    page = (out / "matrix.html").read_text()
    assert page == render_matrix(report)
    assert all(name in page for name in names)
    greedy = DecodingOptions(max_new_tokens=12)
    written = {}
    for variant in report.variants:
        folder = out / variant.name
        assert verify(folder) == ()
        files = [folder / "model.onnx", *folder.glob("model.*.data")]
        assert variant.num_bytes == sum(file.stat().st_size for file in files)
        with TextModel(folder, threads=1) as opened:
            written[variant.name] = [event.token_id for event in opened.write("the cat", greedy)]
    assert written["fp32-topk"] == written["fp32-logits"]
    assert written["int8-topk"] == written["int8-logits"]
    int8 = {variant.name: variant for variant in report.variants}
    assert int8["int8-topk"].calibration == int8["int8-logits"].calibration
    assert (len(int8["int8-topk"].parity), int8["int8-topk"].parity[0].output) == (1, "topk")
    # Nothing is made twice.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix in (".onnx", ".data")}
    code, again, stderr = run(*args)
    assert (code, again) == (0, stdout)
    steps = [line for line in stderr.splitlines() if line.startswith("✓")]
    assert len(steps) >= 16
    assert all("unchanged, skipped" in line for line in steps)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix in (".onnx", ".data")}


def test_one_that_fails_stops_no_other(model, tmp_path):
    """A text of one document has nothing to test on once it was calibrated on, which only fewer bits need."""
    text = tmp_path / "text.txt"
    text.write_text(paragraphs(3))
    args = (model, "-o", tmp_path / "out", "--text", text, "--positions", 256, "--threads", 1)
    code, stdout, stderr = run(*args, "--matrix", "dtype=w8,fp16", "--json")
    assert code == 1
    report = MatrixReport.from_json(json.loads(stdout))
    assert [(variant.name, variant.verdict) for variant in report.variants] == [
        ("w8-logits", "FAIL"),
        ("fp16-logits", "PASS"),
    ]
    assert "none is left to calibrate on" in report.variants[0].failures[0]
    assert "FAILED: 1 of 2 variants: w8-logits:" in " ".join(stderr.split())
    assert "Traceback" not in stderr


def test_a_bug_in_one_is_told_and_stops_no_other(model, tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "quantise_folder", lambda *_: 1 / 0)
    text = tmp_path / "text.txt"
    text.write_text(paragraphs(3))
    args = (model, "-o", tmp_path / "out", "--text", text, "--matrix", "dtype=int8,int4", "--json")
    code, stdout, _ = run(*args)
    assert code == 1
    errors = [variant.error for variant in MatrixReport.from_json(json.loads(stdout)).variants]
    assert len(errors) == 2
    assert all(error.startswith("internal error: ZeroDivisionError: division by zero") for error in errors)


def test_what_this_machine_cannot_run_is_not_called_a_pass(model, tmp_path):
    code, stdout, _ = run(model, "-o", tmp_path / "out", "--matrix", "dtype=bf16")
    assert code == 0
    assert "| bf16-logits | NOT CHECKED |" in stdout
    assert "- bf16-logits: not done: check and bench:" in stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--matrix", "dtype=int8"), "has dtype=int8, which is calibrated on a text; give one with --text FILE"),
        (("--matrix", "dtype=int3"), "has dtype=int3, expected one of"),
        (("--matrix", "colour=red"), "has 'colour=red', expected KEY=VALUE"),
        (("--dtype", "fp16", "--matrix", "dtype=fp32"), "--dtype is given, and dtype= in --matrix too"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_made(model, tmp_path, args, words):
    code, stdout, stderr = run(model, "-o", tmp_path / "out", *args)
    assert (code, stdout) == (2, "")
    assert words in " ".join(stderr.split())
    assert not (tmp_path / "out").exists()


def test_a_missing_model_and_a_baseline_are_refused(model, tmp_path):
    code, _, stderr = run(tmp_path / "none.pt", "--matrix", "dtype=fp16")
    assert code == 2
    assert "none.pt: no such file" in stderr
    code, _, stderr = run(model, "--baseline", tmp_path, "--matrix", "dtype=fp16")
    assert code == 2
    assert "run export-vq with it once, without --matrix" in " ".join(stderr.split())
