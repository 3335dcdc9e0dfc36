"""`export-vq inspect FOLDER --verify`: exit code 1 and the files' names when a folder is not what its manifest lists."""

import json

import commands
import pytest
from checkpoints import save_tiny


def run(*args):
    """(exit code, stdout, stderr) of `export-vq ARGS`, each with single spaces."""
    code, *texts = commands.run(*args)
    return code, *(" ".join(text.split()) for text in texts)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_tiny(folder / "model.pt", "llama")
    assert run("export", folder / "model.pt", "-o", folder / "out")[0] == 0
    return folder / "out"


def test_export_leaves_a_sealed_folder_that_says_what_it_holds(out):
    code, stdout, _ = run("inspect", out)
    assert code == 0
    assert "contract com.vqlogits 1" in stdout
    assert "model.onnx.json" in stdout
    assert "verified" not in stdout
    code, stdout, _ = run("inspect", out, "--verify")
    assert code == 0
    assert "verified every file is as the manifest lists it" in stdout


def test_differences_are_exit_code_1_with_every_file_named(out):
    (out / "extra.txt").write_text("x")
    config = (out / "config.json").read_text()
    (out / "config.json").write_text(config + " ")
    (out / "tokenizer.json").rename(out.parent / "tokenizer.json")
    try:
        code, stdout, stderr = run("inspect", out, "--verify")
        assert code == 1
        assert "3 differences from the manifest" in stderr
        for line in ("config.json: changed", "extra.txt: extra", "tokenizer.json: missing"):
            assert f"differs {line}" in stdout
        code, stdout, _ = run("inspect", out, "--verify", "--json")
        assert (code, len(json.loads(stdout)["differences"])) == (1, 3)
    finally:
        (out.parent / "tokenizer.json").rename(out / "tokenizer.json")
        (out / "config.json").write_text(config)
        (out / "extra.txt").unlink()


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_without_a_manifest_is_refused(tmp_path, there):
    code, _, stderr = run("inspect", tmp_path if there else tmp_path / "nowhere", "--verify")
    assert code == 2
    assert "holds no manifest.json" in stderr
    assert "Traceback" not in stderr
