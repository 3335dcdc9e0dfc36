"""What runs an output folder: the best that works, or the one that was asked for with the reason why it does not."""

import onnxruntime
import pytest
import torch
from checkpoints import tiny_model

from export_vq.backends import longest_sequence, open_runner
from export_vq.errors import UserError
from export_vq.graph import ExportOptions, export_onnx
from export_vq.records import EngineArtifact, EngineProfile, InputRange, OnnxArtifact
from export_vq.runners import CUDA, OrtRunner


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    export_onnx(tiny_model("llama", "product"), out, ExportOptions())
    return out


@pytest.fixture
def artifact(folder):
    return OnnxArtifact.load(folder / "model.onnx.json")


def engine_of(artifact, **changed):
    """The record of an engine that was built from a graph on some other machine."""
    profile = EngineProfile("decode", (InputRange("attention_mask", (1, 2), (1, 64), (8, 96)),))
    fields = {
        "path": "vq-plain.plan",
        "onnx": "vq-plain.onnx",
        "kind": "vq-plain",
        "dtype": "fp32",
        "flavour": "tensorrt",
        "tensorrt_version": "10.3.0",
        "gpu": "Orin",
        "compute_capability": "8.7",
        "plugin_sha256": None,
        "source_sha256": artifact.file_sha256,
        "profiles": (profile,),
        "options": {},
        "input_names": artifact.input_names,
        "output_names": artifact.output_names,
        "cache_shapes": artifact.cache_shapes,
        "plugin_layers": (),
        "layers": {},
        "layers_from": "engine",
        "num_bytes": 0,
        "sha256": "",
        "versions": {},
    }
    return EngineArtifact(**{**fields, **changed})


def test_the_cpu_is_what_is_left(folder, artifact):
    with open_runner(folder, artifact) as auto, open_runner(folder, artifact, "cpu", threads=1) as asked:
        assert auto.name == asked.name
        assert auto.name.startswith("model.onnx in ONNX Runtime")
        assert longest_sequence(auto) is None


@pytest.mark.skipif(CUDA in onnxruntime.get_available_providers(), reason="there is a CUDA provider here")
def test_cuda_is_refused_by_what_is_installed(folder, artifact):
    with pytest.raises(UserError, match=r"offers .*CPUExecutionProvider.* only; install onnxruntime-gpu"):
        open_runner(folder, artifact, "cuda")
    with pytest.raises(UserError, match="has no CUDAExecutionProvider that works here, it offers CPUExecutionProvider"):
        OrtRunner(folder / "model.onnx", open_runner(folder, artifact).signature, provider=CUDA)


def test_an_unknown_backend_is_refused(folder, artifact):
    with pytest.raises(UserError, match="--backend is 'tpu', expected one of auto, tensorrt, cuda, cpu"):
        open_runner(folder, artifact, "tpu")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"source_sha256": {"model.onnx": "0" * 64}}, "built from another model.onnx; build it again"),
        ({}, r"vq-plain\.plan: missing, or not the file"),
    ],
)
def test_an_engine_that_cannot_be_used_is_named_and_auto_goes_on(folder, artifact, tmp_path, changed, words):
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    place = tmp_path / "engines" / "orin-10.3.0"
    place.mkdir(parents=True)
    engine_of(artifact, **changed).save(place / "vq-plain.json")
    with pytest.raises(UserError, match=words):
        open_runner(tmp_path, artifact, "tensorrt")
    with open_runner(tmp_path, artifact) as runner:
        assert isinstance(runner, OrtRunner)


def test_an_engine_serves_sequences_as_long_as_its_profiles(artifact):
    class Engine:
        pass

    Engine.artifact = engine_of(artifact)
    assert longest_sequence(Engine()) == 96


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or CUDA not in onnxruntime.get_available_providers(), reason="no CUDA provider"
)
def test_cuda_gives_the_cpus_tokens_with_the_cache_on_the_gpu(folder, artifact):
    from export_vq.generate import generate

    with open_runner(folder, artifact, "cuda") as cuda, open_runner(folder, artifact, "cpu") as cpu:
        assert cuda.name.endswith(f"on {CUDA.removesuffix('ExecutionProvider')}")
        assert cuda.cache_device.type == "cuda"
        assert list(generate(cuda, [5, 9, 40], 20)) == list(generate(cpu, [5, 9, 40], 20))
