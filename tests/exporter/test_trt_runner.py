"""TensorRT on plans: what it refuses without a GPU, that it calls what the bindings have, and on a GPU what it computes."""

import inspect
import re

import numpy as np
import pytest
import torch
from checkpoints import tiny_model
from tensorrt_fixture import install_tensorrt

from export_vq import plan, proof, trt_runner
from export_vq.decoding import DecodingOptions
from export_vq.engine import EngineOptions, build_engine
from export_vq.errors import UserError
from export_vq.feeds import left_pad, prefill, step, token_feeds
from export_vq.generate import stream
from export_vq.graph import ExportOptions, export_onnx, head_graph
from export_vq.kv_cache import BoundCache, HandedCache, open_cache
from export_vq.parity import CaseInput, check_parity
from export_vq.plugins.library import require_library
from export_vq.records import EngineArtifact
from export_vq.runners import TorchRunner
from export_vq.trt import DTYPES, find_tensorrt
from export_vq.trt_runner import TORCH_DTYPES, TrtRunner, signature_of_engine


@pytest.fixture(scope="module")
def head_sidecar(tmp_path_factory):
    """A dense head alone, built without a GPU."""
    import onnx_ir as ir
    from checkpoints import tiny_head

    install_tensorrt(tmp_path_factory.mktemp("tensorrt"))
    folder = tmp_path_factory.mktemp("head")
    ir.save(head_graph(tiny_head("single", 32, 97), "dense"), folder / "dense.onnx")
    build_engine(folder / "dense.onnx", "dense", folder)
    return next(folder.rglob("dense.json"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_runner_says_so(head_sidecar):
    with pytest.raises(UserError, match=r"dense\.plan: needs an NVIDIA GPU to run"):
        TrtRunner(head_sidecar)


@pytest.mark.parametrize(("dtype", "cache"), [("fp32", np.float32), ("fp16", np.float16), ("bf16", np.float32)])
def test_the_signature_is_the_graph_s(head_sidecar, dtype, cache):
    artifact = EngineArtifact.load(head_sidecar)
    assert signature_of_engine(artifact).cache_shapes == ()
    names = ("input_ids", "position_ids", "past_key_values.0.key", "past_key_values.0.value")
    decoder = EngineArtifact(**{**artifact.__dict__, "dtype": dtype, "input_names": names, "cache_shapes": ((2, 8),)})
    signature = signature_of_engine(decoder)
    assert (signature.cache_shapes, signature.has_position_ids) == (((2, 8),), True)
    assert signature.cache_dtype == cache


def test_every_type_of_a_graph_has_a_torch_type():
    assert set(TORCH_DTYPES) == {*DTYPES, "int32", "int64"}


@pytest.mark.parametrize(
    ("module", "variable", "binding"),
    [
        (trt_runner, "context", "IExecutionContext"),
        (trt_runner, "engine", "ICudaEngine"),
        (plan, "runtime", "Runtime"),
        (plan, "refitter", "Refitter"),
        (plan, "parser", "OnnxParserRefitter"),
        (proof, "engine", "ICudaEngine"),
        (proof, "inspector", "EngineInspector"),
    ],
)
def test_what_only_runs_on_a_gpu_calls_what_the_bindings_have(tmp_path_factory, module, variable, binding):
    """Signatures are not checked, names are: a renamed method is found before a GPU is."""
    bindings = install_tensorrt(tmp_path_factory.mktemp("tensorrt"))
    called = set(re.findall(rf"\b{variable}\.(\w+)", inspect.getsource(module)))
    assert called
    assert called <= set(dir(getattr(bindings, binding)))


# ---------------------------------------------------------------------------------------------------------- on a GPU


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """A tiny Llama with KV cache, built on this GPU: (loaded model, {(kind, dtype): sidecar})."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    try:
        find_tensorrt()
    except UserError as missing:
        pytest.skip(str(missing))
    loaded = tiny_model("llama", "product", rotation=True)
    kinds = ["vq-plain", "dense"]
    try:
        kinds.append("vq-plugin") if require_library("vq_trt") else None
    except UserError as missing:
        print(f"without vq-plugin: {missing}")
    sidecars = {}
    for dtype in ("fp32", "fp16"):
        folder = tmp_path_factory.mktemp(dtype)
        export_onnx(loaded, folder, ExportOptions(dtype=dtype))
        for kind in kinds:
            source = folder / ("dense.onnx" if kind == "dense" else "model.onnx")
            build_engine(source, kind, folder, EngineOptions(context=64))
            sidecars[kind, dtype] = next(folder.rglob(f"{kind}.json"))
    return loaded, sidecars


def _sidecar(engines, kind, dtype):
    if (kind, dtype) not in engines[1]:
        pytest.skip(f"{kind} was not built: libvq_trt.so is not there")
    return engines[1][kind, dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", ["vq-plugin", "vq-plain", "dense"])
def test_prefill_and_decode_compute_what_pytorch_computes(engines, kind, dtype):
    sidecar = _sidecar(engines, kind, dtype)
    loaded = engines[0]
    rng = np.random.default_rng(0)
    cases = [
        CaseInput("batch 1", rng.integers(2, 97, (1, 15)), 7, (0,)),
        CaseInput("batch 3, left padding", rng.integers(2, 97, (3, 17)), 9, (0, 3, 5)),
    ]
    half = dtype == "fp16"
    with TrtRunner(sidecar) as candidate:
        assert candidate.artifact.layers_from == "engine"
        reference = TorchRunner(loaded, candidate.signature, torch.float64 if half else torch.float32)
        native = TorchRunner(loaded, candidate.signature, torch.float16) if half else None
        report = check_parity(reference, candidate, cases, dtype=dtype, native=native, greedy_tokens=8)
    assert report, report.failures


def _decode_feeds(runner):
    ids = np.array([[5, 9, 40, 17, 23]])
    signature = runner.signature
    outputs = runner.infer(prefill(signature, ids, np.ones_like(ids)))
    return step(signature, ids[:, -1:], np.ones((1, 6), np.int64), outputs)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["vq-plugin", "dense"])
def test_a_captured_step_gives_the_same_numbers_from_the_same_memory(engines, kind):
    sidecar = _sidecar(engines, kind, "fp16")
    with TrtRunner(sidecar) as plain, TrtRunner(sidecar, cuda_graph=True) as graphed:
        feeds = _decode_feeds(plain)
        expected = plain.infer(feeds)
        tensors = graphed.to_device(feeds)
        first, second, third = (graphed.run(tensors) for _ in range(3))
        torch.cuda.current_stream().synchronize()
        for name, value in expected.items():
            for outputs in (first, second, third):
                np.testing.assert_array_equal(outputs[name].float().cpu().numpy(), value.astype(np.float32))
            assert second[name].data_ptr() == third[name].data_ptr()
        # New numbers in the same memory are what the graph computes with.
        tensors["input_ids"].copy_(torch.tensor([[9]]))
        torch.cuda.current_stream().synchronize()
        other = plain.infer({**feeds, "input_ids": np.array([[9]])})
        again = graphed.run(tensors)
        torch.cuda.current_stream().synchronize()
        np.testing.assert_array_equal(again["logits"].float().cpu().numpy(), other["logits"].astype(np.float32))
        assert not np.array_equal(other["logits"], expected["logits"])


@pytest.mark.gpu
def test_what_the_engine_does_not_serve_is_refused(engines):
    with TrtRunner(_sidecar(engines, "dense", "fp32")) as runner:
        feeds = _decode_feeds(runner)
        with pytest.raises(UserError, match="no profile of the engine serves these shapes"):
            runner.infer({**feeds, "input_ids": np.zeros((1, 65), np.int64)})
        with pytest.raises(UserError, match="inputs attention_mask missing and mask not known"):
            runner.infer({"mask" if name == "attention_mask" else name: array for name, array in feeds.items()})
        tensors = runner.to_device(feeds)
        with pytest.raises(UserError, match="pass it through to_device"):
            runner.run({**tensors, "input_ids": tensors["input_ids"].cpu()})
        assert set(runner.infer(feeds)) == set(runner.artifact.output_names)  # and goes on working


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", ["vq-plugin", "vq-plain"])
def test_text_is_written_with_the_cache_on_the_gpu(engines, kind, dtype):
    """Rows that end apart; the numbers are those of arrays handed over, as both are the same engine's."""
    prompts = [[5, 9, 40, 17, 23], [31, 8], [60]]
    each = [DecodingOptions(max_new_tokens=n) for n in (9, 3, 6)]
    with TrtRunner(_sidecar(engines, kind, dtype)) as runner:
        assert isinstance(open_cache(runner, 3, 14), BoundCache)
        bound = [(event.request, event.token_id) for event in stream(runner, prompts, each)]
        handed = HandedCache(runner, 3)
        ids, mask = left_pad(prompts)
        outputs = handed.infer(token_feeds(runner.signature, ids, mask))
        made = []
        for _ in range(3):
            made.append(outputs["logits"][:, -1].argmax(-1))
            mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
            outputs = handed.infer(token_feeds(runner.signature, made[-1][:, None], mask))
    for request in range(3):
        assert [token for row, token in bound if row == request][:3] == [int(step[request]) for step in made]
