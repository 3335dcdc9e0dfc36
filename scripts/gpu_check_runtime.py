"""A node of every op through a runtime on the GPU, against the definition in float64.

    python scripts/gpu_check_runtime.py tensorrt|tensorrt_rtx vq_trt
    python scripts/gpu_check_runtime.py onnxruntime vq_ort

For gpu_check.py, in a process of its own. Exit code 0: right; 1: wrong or it broke; 77: cannot run here; the last line
says which and why.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

SKIPPED = 77
ROWS, M, K, V = 17, 3, 300, 50257  # V is odd, so logits are not aligned; more than 256 codes take 16 bits
BEST, TEMPERATURE = 50, 0.5


class Unavailable(Exception):
    """Cannot run here; the message says why."""


def main() -> int:
    name, library = sys.argv[1:3]
    try:
        for module in ("torch", "onnx", name):
            if importlib.util.find_spec(module) is None:
                raise Unavailable(f"the Python module {module} is not installed")
        print((onnxruntime if name == "onnxruntime" else tensorrt)(name, library_path(library)))
    except Unavailable as reason:
        print(reason)
        return SKIPPED
    return 0


def library_path(name: str) -> Path:
    from export_vq.plugins import library

    found = library.find(name)
    if found is None:
        raise Unavailable(f"lib{name}.so was not built")
    if not found.cuda:
        raise Unavailable(f"{found.path} was built without CUDA")
    return found.path


def problem() -> tuple[Any, Any, Any, Any]:
    """code_logits float16 [ROWS, M*K], bias float16 [V] and uniform float32 [ROWS] on the GPU, codes int64 [V, M]."""
    import torch

    if not torch.cuda.is_available():
        raise Unavailable("torch finds no CUDA device")
    random = torch.Generator().manual_seed(0)
    scores = torch.randn(ROWS, M * K, generator=random).half().cuda()
    bias = torch.randn(V, generator=random).half().cuda()
    uniform = torch.rand(ROWS, generator=random).cuda()
    return scores, torch.randint(K, (V, M), generator=random), bias, uniform


def check(found: dict[str, Any], scores: Any, codes: Any, bias: Any, uniform: Any) -> str:
    """Logits within one rounding of float16 and M + 1 of float32, the other outputs within theirs of float32; or a failure."""
    import torch

    table = scores.view(ROWS, M, K)
    ids = codes.cuda()
    terms = torch.stack([table[:, m, ids[:, m]].double() for m in range(M)] + [bias.double().expand(ROWS, V)])
    expected, sums = terms.sum(0), (M + 1) * 2.0**-24 * terms.abs().sum(0)
    bound = sums + (expected.abs() + sums).clamp(min=2.0**-14) * 2.0**-11
    logit, shares = float(sums.max()), (expected / TEMPERATURE).softmax(-1)
    share = 2 * logit / TEMPERATURE + 64 * 2.0**-24  # of sums of exponentials
    best, drawn = found["ids"].cuda(), found["drawn"].cuda()[:, None]
    end = shares.cumsum(-1).gather(1, drawn)[:, 0]
    mass = shares.gather(1, drawn)[:, 0]
    wrong = {
        "logits": ~((found["logits"].cuda().double() - expected).abs() <= bound),
        "values": ~((found["values"].cuda() - expected.topk(BEST).values).abs() <= logit),
        "ids": ~((found["values"].cuda() - expected.gather(1, best)).abs() <= logit),
        "logsumexp": ~((found["logsumexp"].cuda() - expected.logsumexp(-1)).abs() <= share + 2.0**-20),
        "drawn": ~((end + share > uniform) & (end - mass - share <= uniform)),
        "logprob": ~((found["logprob"].cuda() - mass.log()).abs() <= share + 2.0**-19),
    }
    counts = {name: int(which.sum()) for name, which in wrong.items()}
    if any(counts.values()):
        raise AssertionError(f"wrong: {', '.join(f'{count} {name}' for name, count in counts.items() if count)}")
    return f"{ROWS} rows, M={M}, K={K}, V={V}, fp16 with bias, logits, top {BEST} and draws: right"


def graph(codes: Any, bias: Any, attributes: dict[str, Any]) -> bytes:
    """A model of the three ops on one head; its inputs are `inputs()`."""
    from onnx import TensorProto, helper, numpy_helper

    domain, shared = "com.vqlogits", ["code_logits", "codes", "bias"]
    outputs = {
        "logits": (TensorProto.FLOAT16, ["rows", V]),
        "values": (TensorProto.FLOAT, ["rows", BEST]),
        "ids": (TensorProto.INT64, ["rows", BEST]),
        "logsumexp": (TensorProto.FLOAT, ["rows"]),
        "drawn": (TensorProto.INT64, ["rows"]),
        "logprob": (TensorProto.FLOAT, ["rows"]),
    }
    names = list(outputs)
    nodes = [
        helper.make_node("VQGatherScatter", shared, names[:1], name="head", domain=domain, **attributes),
        helper.make_node("VQTopK", shared, names[1:4], name="top_k", domain=domain, k=BEST, **attributes),
        helper.make_node(
            "VQSample", [*shared, "temperature", "uniform"], names[4:], name="sample", domain=domain, **attributes
        ),
    ]
    inputs = {
        "code_logits": (TensorProto.FLOAT16, ["rows", M * K]),
        "temperature": (TensorProto.FLOAT, [1]),
        "uniform": (TensorProto.FLOAT, ["rows"]),
    }
    body = helper.make_graph(
        nodes,
        "head",
        [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()],
        [helper.make_tensor_value_info(name, *kind) for name, kind in outputs.items()],
        [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(bias.cpu().numpy(), "bias")],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(domain, 1)]
    return bytes(helper.make_model(body, opset_imports=opsets, ir_version=9).SerializeToString())


def onnxruntime(name: str, path: Path) -> str:
    import numpy as np
    import torch

    ort: Any = importlib.import_module(name)
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise Unavailable(f"onnxruntime {ort.__version__} has no CUDA execution provider")
    scores, codes, bias, uniform = problem()
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(path))
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    model = graph(codes.numpy().astype(np.int32), bias, {"num_codebooks": M})
    session = ort.InferenceSession(model, options, providers=["CUDAExecutionProvider"])
    if session.get_providers()[0] != "CUDAExecutionProvider":
        raise AssertionError("the CUDA execution provider was not taken; are its libraries found?")
    feeds = {
        "code_logits": scores.cpu().numpy(),
        "temperature": np.array([TEMPERATURE], np.float32),
        "uniform": uniform.cpu().numpy(),
    }
    names = [output.name for output in session.get_outputs()]
    found = {name: torch.from_numpy(array) for name, array in zip(names, session.run(None, feeds), strict=True)}
    return f"onnxruntime {ort.__version__}: {check(found, scores, codes, bias, uniform)}"


def tensorrt(name: str, path: Path) -> str:
    import numpy as np
    import torch

    try:
        trt: Any = importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"the Python module {name} does not load: {error}") from error
    scores, codes, bias, uniform = problem()
    ids = codes.T.contiguous().numpy().astype("<u2")  # [M, V], packed as the plugin wants them
    words = np.pad(ids, ((0, 0), (0, -V % 8))).view("<i4").astype(np.int32)
    attributes = {
        "num_codebooks": M,
        "code_bits": 16,
        "vocab_size": V,
        "plugin_namespace": "com.vqlogits",
        "plugin_version": "1",
    }
    logger = trt.Logger(trt.Logger.WARNING)
    trt.get_plugin_registry().load_library(str(path))
    builder = trt.Builder(logger)
    # Strongly typed: a flag in TensorRT 10, the only way from 11 on.
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph(words, bias, attributes)):
        raise AssertionError("; ".join(str(parser.get_error(i)) for i in range(parser.num_errors)))
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape("code_logits", (1, M * K), (ROWS, M * K), (64, M * K))
    profile.set_shape("uniform", (1,), (ROWS,), (64,))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise AssertionError("the engine was not built")
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        raise AssertionError("the engine was built, but not loaded")
    context = engine.create_execution_context()
    context.set_input_shape("code_logits", (ROWS, M * K))
    context.set_input_shape("uniform", (ROWS,))
    found = {
        "logits": torch.full((ROWS, V), torch.nan, dtype=torch.float16, device="cuda"),
        "values": torch.full((ROWS, BEST), torch.nan, device="cuda"),
        "ids": torch.zeros((ROWS, BEST), dtype=torch.int64, device="cuda"),
        "logsumexp": torch.full((ROWS,), torch.nan, device="cuda"),
        "drawn": torch.zeros(ROWS, dtype=torch.int64, device="cuda"),
        "logprob": torch.full((ROWS,), torch.nan, device="cuda"),
    }
    temperature = torch.tensor([TEMPERATURE], device="cuda")
    for tensor, memory in {"code_logits": scores, "temperature": temperature, "uniform": uniform, **found}.items():
        context.set_tensor_address(tensor, memory.data_ptr())
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    if not context.execute_async_v3(stream.cuda_stream):
        raise AssertionError("the engine did not run")
    stream.synchronize()
    return f"{name} {trt.__version__}: {check(found, scores, codes, bias, uniform)}"


if __name__ == "__main__":
    sys.exit(main())
