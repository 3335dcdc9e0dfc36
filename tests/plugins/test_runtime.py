"""vq_run_ort, the C++ program with no Python in it, on bundles: the ids that the Python token loop writes.

Compiled and run by the native tests (scripts/test_native.sh), which name the folder of the programs.
"""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import bundles
import pytest

from export_vq.generate import generate
from export_vq.records import OnnxArtifact
from export_vq.runners import OrtRunner, TorchRunner, signature_of

PROMPTS = ([5, 9, 40, 17], [96], list(range(2, 40)))
COUNT = 20


@pytest.fixture(scope="module")
def program(request):
    folder = request.config.getoption("--runtime-programs", None)
    if folder is None:
        pytest.skip("the native tests compile vq_run_ort and run this: scripts/test_native.sh")
    return folder / "vq_run_ort"


@pytest.fixture(scope="module")
def onnxruntime_library():
    """The library inside the pip package, found without importing it."""
    (found,) = Path(importlib.util.find_spec("onnxruntime").origin).parent.glob("capi/libonnxruntime.so.1.*")
    return found


def _run(program, *args):
    # The runtime keeps memory until the process ends, and the interpreter's own preloads are not for this program.
    environment = {n: v for n, v in os.environ.items() if n != "LD_PRELOAD"}
    environment["ASAN_OPTIONS"] = "detect_leaks=0:protect_shadow_gap=0"
    return subprocess.run(
        [program, *map(str, args)], capture_output=True, text=True, timeout=240, env=environment, check=False
    )


def _python(graph, prompt, *, torch):
    artifact = OnnxArtifact.load(graph.with_name("model.onnx.json"))
    signature = signature_of(artifact)
    with TorchRunner(bundles.llama(), signature) if torch else OrtRunner(graph, signature, native=False) as runner:
        return list(generate(runner, prompt, COUNT))


@pytest.mark.parametrize("native", [True, False], ids=["native kernels", "stock ops"])
@pytest.mark.parametrize(("output", "last_token"), [("logits", False), ("topk", True)])
def test_the_same_ids_as_python(program, onnxruntime_library, native_library, output, last_token, native):
    graph = bundles.exported(output, last_token=last_token) / "model.onnx"
    library = ["--library", native_library("vq_ort")] if native else []
    for prompt in PROMPTS:
        done = _run(program, graph, *prompt, "--runtime", onnxruntime_library, "--max-new-tokens", COUNT, *library)
        assert done.returncode == 0, done.stderr
        ids = [int(line) for line in done.stdout.split()]
        assert ids == _python(graph, prompt, torch=False) == _python(graph, prompt, torch=True)


def test_a_text_ends_before_an_end_token(program, onnxruntime_library):
    graph = bundles.exported() / "model.onnx"
    whole = _python(graph, PROMPTS[0], torch=False)
    end = whole[3]
    done = _run(program, graph, *PROMPTS[0], "--runtime", onnxruntime_library, "--end", 1, "--end", end)
    assert [int(line) for line in done.stdout.split()] == whole[: whole.index(end)]


def test_a_copied_bundle_runs_from_anywhere(program, onnxruntime_library, tmp_path):
    shutil.copytree(bundles.exported(), tmp_path / "a b")
    args = (tmp_path / "a b" / "model.onnx", *PROMPTS[0], "--runtime", onnxruntime_library, "--max-new-tokens", 3)
    assert [int(line) for line in _run(program, *args).stdout.split()] == _python(
        bundles.exported() / "model.onnx", PROMPTS[0], torch=False
    )[:3]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "usage: MODEL TOKEN_ID"),
        (("model.onnx",), "usage: MODEL TOKEN_ID"),
        (("model.onnx", "five"), "'five' was given where a number"),
        (("model.onnx", "-3"), "'-3' was given where a number"),
        (("model.onnx", "99999999999999999999"), "was given where a number"),
        (("model.onnx", "5", "--end"), "--end has no value"),
        (("model.onnx", "5", "--beams", "4"), "--beams is no option"),
        (("model.onnx", "5", "--runtime", "nowhere.so"), "nowhere.so: cannot open shared object file"),
        (("model.onnx", "5", "--runtime", "libm.so.6"), "libm.so.6: not ONNX Runtime"),
        (("nowhere.onnx", "5"), "nowhere.onnx"),
        (("model.onnx", "5", "--library", "nowhere.so"), "nowhere.so"),
    ],
)
def test_what_cannot_be_used_is_one_sentence_and_exit_code_2(program, onnxruntime_library, args, words):
    if args and args[0] == "model.onnx":
        args = (bundles.exported() / args[0], *args[1:])
    runtime = [] if "--runtime" in args else ["--runtime", onnxruntime_library]
    done = _run(program, *runtime, *args)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr


def test_a_graph_that_draws_its_tokens_is_refused_by_name(program, onnxruntime_library):
    graph = bundles.exported("sample") / "model.onnx"
    done = _run(program, graph, 5, "--runtime", onnxruntime_library)
    assert done.returncode == 2
    assert "an input temperature" in done.stderr
    assert "--output topk or logits" in done.stderr
