"""The engines' part of the main job, with a real TensorRT and no GPU, and with no TensorRT at all."""

import contextlib
import sys

import onnx_ir as ir
import pytest
from checkpoints import tiny_head
from tensorrt_fixture import install_tensorrt

from export_vq.engine_steps import make_engines, sidecar
from export_vq.graph import head_graph
from export_vq.plugins.library import find
from export_vq.records import EngineArtifact


class Steps:
    """Remembers what was done and what was skipped."""

    def __init__(self):
        self.done, self.kept = [], []

    @contextlib.contextmanager
    def step(self, name):
        yield lambda *_: None
        self.done.append(name)

    def skipped(self, name):
        self.kept.append(name)


@pytest.fixture
def folder(tmp_path):
    """An output folder that holds a head's graphs."""
    head = tiny_head("product", 32, 97).half()
    ir.save(head_graph(head, "vq"), tmp_path / "model.onnx")
    ir.save(head_graph(head, "dense"), tmp_path / "dense.onnx")
    return tmp_path


def test_every_engine_is_built_once_and_why_none_ran_is_said(folder, tmp_path_factory):
    install_tensorrt(tmp_path_factory.mktemp("tensorrt"))
    library = find("vq_trt")
    built = library is not None and library.current
    steps = Steps()
    engines, here, not_done = make_engines(folder, steps)
    kinds = ["vq-plugin", "vq-plain", "dense"] if built else ["vq-plain", "dense"]
    assert list(engines) == kinds
    assert steps.done == [f"build {kind}" for kind in kinds]
    for kind, engine in engines.items():
        assert EngineArtifact.load(sidecar(folder, here, kind)) == engine
        assert len(engine.plugin_layers) == (kind == "vq-plugin")
    if here.gpu is None:
        assert "built, not run, as there is no NVIDIA GPU here" in not_done[-1]
    again = Steps()
    assert make_engines(folder, again)[0] == engines
    assert (again.done, again.kept) == ([], steps.done)


def test_without_tensorrt_the_mend_is_named(folder, monkeypatch):
    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, None)
    engines, here, not_done = make_engines(folder, Steps())
    assert (engines, here) == ({}, None)
    (line,) = not_done
    assert line.startswith("TensorRT engines: tensorrt cannot be imported")
    assert "export-vq[tensorrt]" in line
