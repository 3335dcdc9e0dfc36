"""`export-vq bench FOLDER`: what lies in a folder is timed where it lies, with nothing but the folder."""

import json
import shutil

import pytest
import torch
from checkpoints import save_tiny
from commands import run

from export_vq.folder_bench import bench_folder
from export_vq.graph import ExportOptions, export_onnx
from export_vq.runners import native_library
from export_vq.terminal import Steps
from export_vq.workloads import STOCK

WAYS = {"vq", "dense"} | ({STOCK} if native_library() is not None else set())


def bench(*args):
    """(exit code, stdout, stderr) of `export-vq bench ARGS`."""
    return run("bench", "--seconds", 0.001, *args)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """What export wrote, copied away from its checkpoint."""
    folder = tmp_path_factory.mktemp("exported")
    save_tiny(folder / "model.pt", "llama")
    assert run("export", folder / "model.pt", "-o", folder / "out")[0] == 0
    (folder / "model.pt").unlink()
    return (folder / "out").rename(folder / "moved")


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "out")


def test_a_step_of_every_graph_is_timed_in_every_way(exported):
    code, stdout, _ = bench(exported, "--json", "--context", 40, "--threads", 1)
    assert code == 0
    (report,) = json.loads(stdout)
    assert (report["threads"], report["dtype"]) == (1, "fp32")
    assert {(t["runner"], t["cache"]) for t in report["timings"]} == {(w, c) for w in WAYS for c in ("warm", "cold")}
    assert all(0 < t["min_ms"] <= t["median_ms"] <= t["p99_ms"] for t in report["timings"])


def test_the_table_has_tokens_per_second_and_a_sentence_says_whether_vq_helps(exported):
    code, stdout, _ = bench(exported, "--context", 16)
    assert code == 0
    lines = [line.split("  ") for line in stdout.splitlines()]
    rows = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    timed = [row for row in rows if len(row) == 6 and row[1] in ("warm", "cold")]
    assert {row[0] for row in timed} == WAYS
    for row in timed:
        assert float(row[5]) == pytest.approx(1e3 / float(row[2]), rel=0.1)
    assert "the speed of the same with the full softmax head" in stdout


def test_a_folder_without_the_dense_twin_is_timed_alone(folder):
    for file in folder.glob("dense.*"):
        file.unlink()
    code, stdout, _ = bench(folder, "--json")
    assert code == 0
    assert {t["runner"] for t in json.loads(stdout)[0]["timings"]} == WAYS - {"dense"}


def test_fewer_bits_are_timed_as_they_are(folder, tmp_path):
    from export_vq.calibration import CalibrationOptions, calibrate

    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n".join(f"the cat {i} sat on the mat and the dog ran over the roof again" * 3 for i in range(90))
    )
    calibrate(folder, CalibrationOptions("int8", text=text, samples=2, test_tokens=64), Steps())
    (report,) = bench_folder(folder / "int8", Steps(), context=8, seconds=0.001)
    assert report.dtype == "int8"
    assert {t.runner for t in report.timings} == WAYS


def test_what_cannot_be_timed_is_told(folder, tmp_path):
    code, _, stderr = bench(folder, "--context", 10**6)
    assert code == 2
    assert "--context is 1000000, expected less than the model's" in stderr
    code, _, stderr = bench(tmp_path)
    assert code == 2
    assert "holds no model.onnx" in stderr
    plugin = tmp_path / "plugin"
    plugin.mkdir()
    export_onnx(save_tiny(tmp_path / "model.pt", "llama"), plugin, ExportOptions(form="plugin"))
    shutil.copy(folder / "config.json", plugin)
    code, _, stderr = bench(plugin)
    assert code == 2
    assert "plugin form, which TensorRT alone runs, and there is no engine" in stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_engines_are_timed_too(folder):
    from export_vq.engine import EngineOptions
    from export_vq.engines import build_engines, options_for

    built, _ = build_engines(folder, folder, (), options_for(folder, EngineOptions()), Steps())
    _, engines = bench_folder(folder, Steps(), context=8, seconds=0.001)
    assert len({t.runner for t in engines.timings}) == len(built)
