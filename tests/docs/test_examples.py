"""scripts/examples: each is short, calls the command line alone, and runs as it is on a tiny model."""

import json
import os
import re
import subprocess
import sys

import documents
import pytest
from checkpoints import save_dense, save_tiny

FOLDER = documents.ROOT / "scripts" / "examples"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
every_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A VQ model, an ordinary one, two texts, and an export-vq that wastes no time (tests/quick.py)."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny(folder / "model.pt", "llama", "product")
    save_dense(folder / "dense", "llama")
    sentences = "the cat and the hat sat on the mat, and that is all there is to it. "
    (folder / "text.txt").write_text(sentences * 100)
    (folder / "heldout.txt").write_text("that is the hat that the cat sat on, and there it is. " * 100)
    (folder / "bin").mkdir()
    (folder / "bin" / "export-vq").write_text(f'#!/bin/sh\nexec {sys.executable} -m quick "$@"\n')
    (folder / "bin" / "export-vq").chmod(0o755)
    return folder


def run(name, world, *args):
    """Standard output of a script that must succeed."""
    path = os.pathsep.join([str(world / "bin"), os.environ["PATH"]])
    modules = os.pathsep.join(filter(None, [str(documents.ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        ["bash", FOLDER / name, *map(str, args)],
        cwd=world,
        env=os.environ | {"PATH": path, "PYTHONPATH": modules},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@every_script
def test_it_is_sound_shell_that_anyone_may_run(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n# For those who ")
    assert "set -euo pipefail" in text


@every_script
def test_its_calls_are_ones_that_the_tool_takes(script):
    calls = documents.commands(script.read_text())
    assert calls
    for call in calls:
        documents.check_call([word for word in call if word != "$@"])


@every_script
def test_without_arguments_it_says_what_it_wants(script):
    done = subprocess.run(["bash", script], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "usage:" in done.stderr
    wanted = re.search(r"^#   \S+ (.+)$", script.read_text(), re.MULTILINE)[1]
    assert f"{script.name} {wanted}" in done.stderr


def test_has_a_vq_model(world):
    said = run("has_a_vq_model.sh", world, "model.pt", "text.txt", "vq")
    assert "PASS" in said
    assert "perplexity floor" in said
    assert "every file is as the manifest lists it" in said
    assert json.loads((world / "vq" / "report.json").read_text())["parity"]


def test_has_an_ordinary_model(world):
    args = ("dense", "text.txt", "heldout.txt", "made", "--num-codes", 16)
    said = run("has_an_ordinary_model.sh", world, *args, "--calibration-tokens", 256, "--tune-tokens", 256)
    assert "PASS" in said
    assert re.search(r"model gap: perplexity .* against .* of dense", said)
    assert (world / "made" / "model.pt").is_file()
    assert (world / "made" / "deploy" / "report.html").is_file()


def test_deploys_on_jetson(world):
    said = run("deploys_on_jetson.sh", world, "model.pt", "jetson", "sm87-trt10.3")
    assert "PASS" in said
    kit = world / "jetson" / "kit"
    graph = json.loads((world / "jetson" / "graphs" / "model.onnx.json").read_text())
    assert (graph["dtype"], graph["output"], graph["last_token"]) == ("fp16", "topk", True)
    assert {"build.sh", "vq-plugin.onnx", "vq-plain.onnx", "plugins"} <= {path.name for path in kit.iterdir()}
