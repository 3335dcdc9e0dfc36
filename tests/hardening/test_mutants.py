"""A thousand damaged inputs: each is taken or refused in one sentence; no traceback, no hang, no crash, nothing lost."""

import contextlib
import copy
import io
import json
import random
import shutil
import signal
import sys

import bundles
import pytest
import torch
from checkpoints import save_tiny
from mutants import damaged_bytes, damaged_data

from export_vq import cli, manifest

SECONDS = 60
"""Of processor time for one input, some of which take a twentieth of a second: more is a hang."""


class _Hang(BaseException):
    pass


def _stop(*_):
    raise _Hang


@pytest.fixture
def run(monkeypatch):
    """Runs `export-vq ARGS` here; it must end well or with one sentence. Returns whether it ended well."""
    before = signal.signal(signal.SIGVTALRM, _stop)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["export-vq", *map(str, args)])
        said, code = io.StringIO(), 0
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                cli.main()
        except SystemExit as stop:
            code = stop.code
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        lines = said.getvalue().splitlines()
        told = {0: "", 1: "FAILED: ", 2: "error: "}  # 1: a folder is not what its manifest lists
        assert code in told, f"exit code {code}: {said.getvalue()}"
        if code:
            assert len(lines) == 1, said.getvalue()
            assert lines[0].startswith(told[code])
        return code == 0

    yield run
    signal.signal(signal.SIGVTALRM, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sealed output folder."""
    out = tmp_path_factory.mktemp("sealed") / "out"
    shutil.copytree(bundles.exported(), out)
    manifest.seal(out)
    return out


def _rounds(count, seed):
    """Independent chances, so that a failure's number repeats it alone."""
    return [(i, random.Random(f"{seed} {i}")) for i in range(count)]


def _refused(results):
    """Damage must matter to most, or it was no damage."""
    assert sum(results) < 0.5 * len(results)


def test_checkpoints_with_damaged_bytes(run, tmp_path):
    path = tmp_path / "model.pt"
    save_tiny(path, rotation=True)
    sound, taken = path.read_bytes(), []
    for i, chance in _rounds(200, "bytes"):
        damaged = damaged_bytes(sound, chance)
        path.write_bytes(damaged)
        taken.append(run("inspect", path))
        assert path.read_bytes() == damaged, i
    _refused(taken)


@pytest.mark.parametrize("kind", ["product", "single"])
def test_checkpoints_with_odd_values(run, tmp_path, kind):
    path = tmp_path / "model.pt"
    save_tiny(path, kind=kind)
    sound, taken = torch.load(path, weights_only=True), []
    for _, chance in _rounds(100, kind):
        # All of the data about the model is damaged, and which tensors there are; not the tensors, which bytes are for.
        names = {name: name for name in sound["state_dict"]}
        data = damaged_data({**sound, "state_dict": names}, chance)
        if isinstance(data, dict) and isinstance(data.get("state_dict"), dict):
            tensors = {
                n: sound["state_dict"].get(t, t) if isinstance(t, str) else t for n, t in data["state_dict"].items()
            }
            data["state_dict"] = tensors
        torch.save(data, path)
        taken.append(run("inspect", path))
    _refused(taken)


def test_hugging_face_folders_with_damaged_files(run, tmp_path):
    sound, path = tmp_path / "sound", tmp_path / "model"
    save_tiny(sound)
    names = sorted(p.name for p in sound.iterdir())
    taken = []
    for _, chance in _rounds(150, "folder"):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(sound, path)
        name = chance.choice(names)
        _damage(path / name, chance)
        taken.append(run("inspect", path))
    _refused(taken)


def test_graphs_with_damaged_bytes(run, folder, tmp_path):
    """Looked at, and run: whatever ONNX Runtime makes of them."""
    taken = []
    for i, chance in _rounds(200, "graph"):
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(folder, out)
        (out / "model.onnx").write_bytes(damaged_bytes((folder / "model.onnx").read_bytes(), chance))
        if i % 2:
            taken.append(run("inspect", out / "model.onnx"))
        else:
            taken.append(run("generate", out, "--prompt", "the", "--max-new-tokens", 2, "--threads", 1))
    _refused(taken)


def test_manifests_with_damage(run, folder, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    taken = []
    for _, chance in _rounds(200, "manifest"):
        shutil.copy(folder / "manifest.json", out)
        _damage(out / "manifest.json", chance)
        before = (out / "manifest.json").read_bytes()
        taken.append(run("inspect", out, *["--verify"] * chance.randrange(2)))
        assert (out / "manifest.json").read_bytes() == before
        assert {p.name for p in out.iterdir()} == {p.name for p in folder.iterdir()}
    assert not all(taken)


def test_output_folders_with_damaged_records(run, folder, tmp_path):
    names = ("model.onnx.json", "config.json", "tokenizer.json", "manifest.json")
    out, taken = tmp_path / "out", []
    shutil.copytree(folder, out)
    for _, chance in _rounds(150, "records"):
        name = chance.choice(names)
        _damage(out / name, chance)
        taken.append(run("generate", out, "--prompt", "the", "--max-new-tokens", 2, "--threads", 1))
        shutil.copy(folder / name, out)
    assert not all(taken)


def _damage(file, chance):
    """Of a JSON file as often what it says as its bytes."""
    content = file.read_bytes()
    if file.suffix == ".json" and chance.random() < 0.5:
        file.write_text(json.dumps(damaged_data(copy.deepcopy(json.loads(content)), chance)))
    else:
        file.write_bytes(damaged_bytes(content, chance))
