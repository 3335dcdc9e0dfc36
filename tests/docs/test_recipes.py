"""docs/recipes.md: every command that needs no GPU runs as it stands there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import bundles
import pytest

from export_vq import manifest

DOCUMENT = Path(__file__).parents[2] / "docs" / "recipes.md"
BLOCKS = re.findall(r"^```(\w+) cpu\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
NEEDS = {"polygraphy": "polygraphy", "onnxruntime_genai": "onnxruntime_genai"}


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """A folder that holds out/."""
    folder = tmp_path_factory.mktemp("beside")
    shutil.copytree(bundles.exported(), folder / "out")
    manifest.seal(folder / "out")
    return folder


def test_the_document_has_what_it_promises():
    words = " ".join(code for _, code in BLOCKS)
    for tool in ("export-vq inspect", "onnxruntime", "onnxruntime_genai", "polygraphy run", "polygraphy inspect"):
        assert tool in words


@pytest.mark.parametrize(("language", "code"), BLOCKS, ids=[code.strip().splitlines()[0] for _, code in BLOCKS])
def test_a_block_runs(beside, language, code):
    for word, module in NEEDS.items():
        if word in code:
            pytest.importorskip(module, reason=f"{module} is in the extra 'dev'")
    # The tools that pip put beside this interpreter come first.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = {"sh": ["bash", "-euo", "pipefail", "-c", code], "python": [sys.executable, "-c", code]}[language]
    done = subprocess.run(
        command, cwd=beside, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
    if "for step in range(8)" in code:
        assert [int(token) for token in done.stdout.split()] == _pytorch([5, 9, 40, 17], 8)
    if "--load-outputs" in code:
        assert "PASSED" in done.stdout + done.stderr


def _pytorch(prompt, count):
    from export_vq.generate import generate
    from export_vq.records import OnnxArtifact
    from export_vq.runners import TorchRunner, signature_of

    signature = signature_of(OnnxArtifact.load(bundles.exported() / "model.onnx.json"))
    with TorchRunner(bundles.llama(), signature) as runner:
        return list(generate(runner, prompt, count))
