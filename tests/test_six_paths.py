"""One output folder, six ways to run it: the same greedy tokens in each; time and memory of each are printed (pytest -s)."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import bundles
import pytest

from export_vq import manifest
from export_vq.generate import generate
from export_vq.records import OnnxArtifact
from export_vq.runners import TorchRunner, signature_of

ROOT = Path(__file__).parent.parent
TEXT, PROMPT, COUNT = "#'F/", [5, 9, 40, 17], 8
"""The recipe for ONNX Runtime has these tokens and this number of steps in it."""

GENAI = f"""
import onnxruntime_genai as og
params = og.GeneratorParams(model := og.Model("out"))
params.set_search_options(max_length={len(PROMPT) + COUNT}, do_sample=False)
generator = og.Generator(model, params)
generator.append_tokens({PROMPT})
while not generator.is_done():
    generator.generate_next_token()
print(*generator.get_sequence(0)[{len(PROMPT)}:])
"""
POLYGRAPHY_SESSION = """
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
runner = OnnxrtRunner(SessionFromOnnx("out/model.onnx"))
runner.activate()
"""


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """A folder that holds out/."""
    folder = tmp_path_factory.mktemp("beside")
    shutil.copytree(bundles.exported(), folder / "out")
    manifest.seal(folder / "out")
    return folder


@pytest.fixture(scope="module")
def expected():
    """What PyTorch writes; no end of text among it, which some of the six would stop at."""
    assert bundles.llama().tokenizer()(TEXT)["input_ids"] == PROMPT
    signature = signature_of(OnnxArtifact.load(bundles.exported() / "model.onnx.json"))
    with TorchRunner(bundles.llama(), signature) as runner:
        ids = list(generate(runner, PROMPT, COUNT))
    assert len(set(ids)) > 2
    assert 1 not in ids
    return ids


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The folder of the C++ programs, compiled as docs/recipes.md says."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is in the extra 'plugins'")
    build = tmp_path_factory.mktemp("runtime")
    told = [sys.executable, "-m", "export_vq.plugins.headers"]
    headers = subprocess.run(told, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    for command in (["cmake", "-S", ROOT / "plugins" / "runtime", "-B", build, *headers], ["cmake", "--build", build]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return build


LAUNCHER = """
import resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[2:])
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
open(sys.argv[1], "w").write(f"{time.perf_counter() - start:6.2f} s {peak / 1024:7.0f} MiB")
sys.exit(done.returncode)
"""
"""A small process between: a program's peak of memory begins with that of the process that started it."""


def _said(name, beside, *command):
    """What a program prints, run beside out/ in a process of its own."""
    command = (sys.executable, "-S", "-c", LAUNCHER, beside / "used", *map(str, command))
    done = subprocess.run(command, cwd=beside, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(f"\n{name:20s}", (beside / "used").read_text(), end=" ")
    return done.stdout


def _recipe():
    """The loop over ONNX Runtime that users copy."""
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    (code,) = (c for c in re.findall(r"^```python cpu\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) if "range(8)" in c)
    return code


def _ids(text):
    return [int(token) for token in text.split()]


def test_cli(beside, expected):
    command = (sys.executable, "-m", "export_vq.cli", "generate", "out", "--prompt", TEXT, "--max-new-tokens", COUNT)
    told = json.loads(_said("CLI", beside, *command, "--json"))
    assert [token["token_id"] for token in told["tokens"]] == expected


def test_onnxruntime(beside, expected):
    assert _ids(_said("onnxruntime", beside, sys.executable, "-c", _recipe())) == expected


def test_onnxruntime_genai(beside, expected):
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is in the extra 'dev'")
    assert _ids(_said("onnxruntime-genai", beside, sys.executable, "-c", GENAI)) == expected


def test_polygraphy(beside, expected):
    """The same loop, with Polygraphy's runner in the place of the session."""
    pytest.importorskip("polygraphy", reason="polygraphy is in the extra 'dev'")
    code = _recipe()
    call = "dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds)))"
    opening = 'session = ort.InferenceSession("out/model.onnx", options)\n'
    assert call in code
    assert opening in code
    code = code.replace(call, "{name: np.array(a) for name, a in runner.infer(feeds).items()}")
    code = code.replace(opening, opening + POLYGRAPHY_SESSION)
    lines = _said("polygraphy", beside, sys.executable, "-c", code).splitlines()
    assert _ids(" ".join(line for line in lines if not line.startswith("["))) == expected  # its log is there too


def test_cpp_onnxruntime(beside, expected, programs):
    import onnxruntime

    (library,) = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.1.*")
    command = (programs / "vq_run_ort", "out/model.onnx", *PROMPT, "--runtime", library, "--max-new-tokens", COUNT)
    assert _ids(_said("C++ ONNX Runtime", beside, *command)) == expected


def test_cpp_tensorrt_is_compiled(programs):
    """scripts/gpu_check.sh runs it, where TensorRT and its GPU are."""
    if not (programs / "vq_run_trt").is_file():
        pytest.skip("vq_run_trt is not compiled: the CUDA toolkit was not found")
    done = subprocess.run([programs / "vq_run_trt"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage: MODEL TOKEN_ID" in done.stderr
