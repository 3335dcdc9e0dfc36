"""The table of variants: what was measured, what was not, what failed; and a page that no name can break out of."""

import dataclasses
import html
import math

import pytest

from export_vq.matrix_report import HEADER, LEGEND, MatrixReport, VariantResult, render_matrix, summarise, table
from export_vq.records import BenchReport, CalibrationReport, ErrorStats, ParityReport, Timing


def stats(error):
    return ErrorStats(100, error, error / 9, 40.0, 1.0, 0.0, 0.0, 0.75, 0.9, 8.0, 8.2)


def parity(error, *failures):
    return ParityReport("PyTorch", "model.onnx", "fp32", stats(error), (), {}, failures)


def timing(subject, runner, cache, ms, batch=1):
    return Timing(subject, runner, batch, cache, 9, ms, ms, ms, ms, ms, ms)


BENCH = BenchReport(
    "a processor",
    1,
    "fp32",
    "ONNX Runtime",
    (
        timing("head", "vq", "warm", 1.0),
        timing("head", "vq", "cold", 2.0),
        timing("head", "vq", "cold", 16.0, batch=8),
        timing("decode step", "vq", "cold", 4.0),
        timing("decode step", "dense", "cold", 6.0),
    ),
)
CALIBRATION = CalibrationReport(
    "model.onnx", "int8", "onnxruntime", "mse", 0, 0.5, "as exported", 3, (7, 1), ("a", "b"), 14, (), stats(0.5), {}, (), 10, 40, "c", {}
)  # fmt: skip
EXPORTED = VariantResult(
    "fp32-topk", "fp32", "topk", "portable", False, "", 3 << 20, 9 << 20, (parity(1e-5), parity(4e-4)), None, BENCH
)
QUANTISED = VariantResult("int8-logits", "int8", "logits", "portable", False, "", 1 << 20, 2 << 20, (), CALIBRATION)
FAILED = VariantResult("w8-topk", "w8", "topk", "portable", False, error="no room | on <disk>")
REPORT = MatrixReport("model.pt", "a processor", (EXPORTED, QUANTISED, FAILED), {"export-vq": "1"})


def test_a_row_holds_the_worst_check_and_the_times_of_one_row_with_cold_caches():
    header, exported, quantised, failed = table(REPORT)
    assert header == list(HEADER)
    assert exported == ["fp32-topk", "PASS", "3 MiB", "9 MiB", "1e-5", "75 %", "–", "2", "4", "6", "1.5×"]
    assert quantised == ["int8-logits", "PASS", "1 MiB", "2 MiB", "–", "75 %", "+2.5 %", "–", "–", "–", "–"]
    assert failed == ["w8-topk", "FAIL", *["–"] * 9]


def test_no_number_is_the_worst_error():
    broken = dataclasses.replace(EXPORTED, parity=(parity(math.nan, "logits are NaN"), parity(4e-4)))
    assert table(MatrixReport("m", "d", (broken,)))[1][1:5] == ["FAIL", "3 MiB", "9 MiB", "nan"]
    assert broken.failures == ("logits are NaN",)


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "PASS"),
        ({"parity": ()}, "NOT CHECKED"),
        ({"parity": (parity(1e-5), parity(1.0, "too far"))}, "FAIL"),
        ({"parity": (), "calibration": CALIBRATION}, "PASS"),
        ({"calibration": dataclasses.replace(CALIBRATION, failures=("perplexity",))}, "FAIL"),
        ({"error": "no room"}, "FAIL"),
    ],
)
def test_a_variant_passes_when_all_that_was_judged_does(changed, verdict):
    variant = dataclasses.replace(EXPORTED, **changed)
    assert variant.verdict == verdict
    assert bool(variant) == bool(MatrixReport("m", "d", (variant,))) == (verdict != "FAIL")


def test_the_report_comes_back_from_its_file(tmp_path):
    REPORT.save(tmp_path / "matrix.json")
    assert MatrixReport.load(tmp_path / "matrix.json") == REPORT


def test_names_and_messages_stay_text():
    page = render_matrix(dataclasses.replace(REPORT, model="<script>.pt"))
    assert "<script" not in page
    assert "no room | on &lt;disk&gt;" in page
    assert "http" not in page
    assert LEGEND in html.unescape(page)
    lines = summarise(REPORT).splitlines()
    assert [line.count(" | ") for line in lines[:1] + lines[2:5]] == [len(HEADER) - 1] * 4
    assert lines[-1] == "- w8-topk: failed: no room | on <disk>"
