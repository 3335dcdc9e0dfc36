"""A Triton model repository: configurations that NVIDIA's own schema takes, of tensors that the graphs have."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import bundles
import numpy as np
import onnx
import pytest

from export_vq.errors import UserError
from export_vq.feeds import prefill
from export_vq.plugins.library import Library
from export_vq.records import EngineArtifact, EngineProfile, OnnxArtifact
from export_vq.runners import OrtRunner, signature_of
from export_vq.triton import write_repository

MODELS = "/models"


@pytest.fixture(scope="module")
def schema():
    """NVIDIA's generated module; the rest of the client, and gRPC, is not needed."""
    client = importlib.util.find_spec("tritonclient")
    if client is None:
        pytest.skip("tritonclient is in the extra 'dev'")
    file = Path(next(iter(client.submodule_search_locations))) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def read(schema):
    from google.protobuf import text_format

    return lambda path: text_format.Parse((path / "config.pbtxt").read_text(), schema.ModelConfig())


@pytest.fixture
def library(tmp_path):
    path = tmp_path / "libvq_ort.so"
    path.write_bytes(b"\x7fELF")
    return Library("vq_ort", path, "", False, "", True)


def _tensors(schema, values):
    return [(v.name, schema.DataType.Name(v.data_type), tuple(v.dims)) for v in values]


def _graph_tensors(values):
    types = {onnx.TensorProto.FLOAT: "TYPE_FP32", onnx.TensorProto.INT64: "TYPE_INT64"}
    return [
        (
            v.name,
            types[v.type.tensor_type.elem_type],
            tuple(d.dim_value if d.HasField("dim_value") else -1 for d in v.type.tensor_type.shape.dim),
        )
        for v in values
    ]


@pytest.mark.parametrize(("output", "last_token"), [("logits", False), ("topk", True), ("sample", False)])
def test_the_onnx_model_is_what_the_graph_is(schema, read, library, tmp_path, output, last_token):
    out = bundles.exported(output, last_token=last_token)
    models, left_out = write_repository(out, tmp_path / "repository", "lm-1.0", MODELS, library)
    assert (models, left_out) == (["lm-1.0"], [])
    folder = tmp_path / "repository" / "lm-1.0"
    config = read(folder)
    assert (config.name, config.backend, config.max_batch_size) == ("lm-1.0", "onnxruntime", 0)
    assert list(config.model_operations.op_library_filename) == ["/models/lm-1.0/libvq_ort.so"]
    assert (folder / "libvq_ort.so").read_bytes() == library.path.read_bytes()
    # The server opens this file: it must load on its own, weights and all.
    graph = onnx.load(folder / "1" / config.default_model_filename)
    onnx.checker.check_model(graph)
    assert _tensors(schema, config.input) == _graph_tensors(graph.graph.input)
    assert _tensors(schema, config.output) == _graph_tensors(graph.graph.output)


def test_without_a_library_the_file_still_serves_and_the_mend_is_said(read, tmp_path):
    models, left_out = write_repository(bundles.exported(), tmp_path, "lm", MODELS, None)
    assert models == ["lm"]
    assert "export-vq plugins build" in left_out[0]
    assert not read(tmp_path / "lm").HasField("model_operations")


@pytest.fixture
def with_engines(tmp_path):
    """An output folder with plans as builds on several machines leave them."""
    out = tmp_path / "out"
    shutil.copytree(bundles.exported(), out)
    engine = EngineArtifact(
        *("vq-plugin.plan", "vq-plugin.onnx", "vq-plugin", "fp32", "tensorrt", "10.3.0", "Orin", "8.7", "0" * 64),
        source_sha256={}, profiles=(EngineProfile("prefill", ()), EngineProfile("decode", ())),
        options={"embed_plugin": True}, input_names=(), output_names=(), cache_shapes=(), plugin_layers=(), layers={},
        layers_from="engine", num_bytes=4, sha256="", versions={},
    )  # fmt: skip

    def put(folder, kind, **fields):
        place = out / "engines" / folder
        place.mkdir(parents=True, exist_ok=True)
        made = dataclasses.replace(engine, path=f"{kind}.plan", onnx=f"{kind}.onnx", kind=kind, **fields)
        made.save(place / f"{kind}.json")
        (place / f"{kind}.plan").write_bytes(f"{folder} {kind}".encode())
        shutil.copy(out / "model.onnx", place / f"{kind}.onnx")

    put("orin", "vq-plugin")
    put("orin", "vq-plain", options={"embed_plugin": False})
    put("ada", "vq-plugin", compute_capability="8.9", options={"embed_plugin": False})
    put("ada", "vq-plain", compute_capability="8.9", options={"embed_plugin": False})
    put("rtx", "vq-plain", flavour="tensorrt_rtx", compute_capability=None)
    return out


def test_plans_that_the_server_can_load_are_taken_one_for_each_gpu(schema, read, with_engines, library, tmp_path):
    models, left_out = write_repository(with_engines, tmp_path / "repository", "lm", MODELS, library)
    assert models == ["lm", "lm_tensorrt"]
    folder = tmp_path / "repository" / "lm_tensorrt"
    config = read(folder)
    assert (config.backend, dict(config.cc_model_filenames)) == ("tensorrt", {"8.7": "8.7.plan", "8.9": "8.9.plan"})
    assert (folder / "1" / "8.7.plan").read_text() == "orin vq-plugin"  # carries its plugin
    assert (folder / "1" / "8.9.plan").read_text() == "ada vq-plain"
    (group,) = config.instance_group
    assert (schema.ModelInstanceGroup.Kind.Name(group.kind), list(group.profile)) == ("KIND_GPU", ["0", "1"])
    graph = onnx.load(with_engines / "model.onnx", load_external_data=False).graph
    assert _tensors(schema, config.input) == _graph_tensors(graph.input)
    said = " ".join(left_out)
    assert "engines/ada/vq-plugin.json: the plugin is not in the plan" in said
    assert "tensorrt_rtx, which Triton does not run" in said


def test_ours_is_replaced_and_a_strangers_model_is_not(tmp_path, library):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.pbtxt").write_text('name: "other"')
    with pytest.raises(UserError, match=r"other: holds a model that export-vq did not write"):
        write_repository(bundles.exported(), tmp_path, "other", MODELS, library)
    assert (tmp_path / "other" / "config.pbtxt").read_text() == 'name: "other"'
    for given in (library, None):
        write_repository(bundles.exported(), tmp_path, "lm", MODELS, given)
        assert (tmp_path / "lm" / "libvq_ort.so").exists() == (given is not None)
    assert {p.name for p in tmp_path.iterdir()} == {"libvq_ort.so", "lm", "other"}


@pytest.mark.parametrize("name", ["", "../up", "a/b", "a b", ".hidden"])
def test_a_name_that_is_no_folder_name_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="--name is"):
        write_repository(bundles.exported(), tmp_path / "repository", name, MODELS, None)
    assert not (tmp_path / "repository").exists()


def test_a_folder_without_a_graph_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no model\.onnx\.json"):
        write_repository(tmp_path, tmp_path / "repository", "lm", MODELS, None)


def test_a_record_that_names_other_folders_is_refused(tmp_path):
    out = tmp_path / "out"
    shutil.copytree(bundles.exported(), out)
    record = json.loads((out / "model.onnx.json").read_text())
    record["file_sha256"]["../secret"] = "0" * 64
    (out / "model.onnx.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="expected files of the same folder"):
        write_repository(out, tmp_path / "repository", "lm", MODELS, None)


def test_one_masked_position_stands_for_an_empty_cache():
    """docs/serving.md: for clients and servers that cannot send tensors of no elements."""
    out = bundles.exported()
    ids = np.array([[5, 9, 40, 17]])
    with OrtRunner(out / "model.onnx", signature_of(OnnxArtifact.load(out / "model.onnx.json"))) as runner:
        empty = prefill(runner.signature, ids, np.ones_like(ids))
        masked = {
            name: np.zeros((1, a.shape[1], 1, a.shape[3]), a.dtype) if name.startswith("past_key_values.") else a
            for name, a in empty.items()
        }
        masked["attention_mask"] = np.array([[0, 1, 1, 1, 1]])
        expected, found = (runner.infer(feeds)["logits"] for feeds in (empty, masked))
    spread = expected.max() - expected.min()
    assert np.abs(found - expected).max() <= 1e-5 * spread  # the project's limit for fp32
