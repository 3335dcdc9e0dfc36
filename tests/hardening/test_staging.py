"""An output folder that is the old one or the new one: a process killed before each of its acts on the disk in turn."""

import contextlib
import os
import signal
import sys

import pytest

from export_vq.errors import UserError
from export_vq.files import write_text
from export_vq.staging import settle, staged

_ACTS = ("open", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink")
"""Audit events, raised just before Python's own acts on files."""

OLD = {
    "config.json": "old",
    "engines/gpu/a.plan": "old",
    "engines/other/b.plan": "old",
    "lib/lib.so": "kept",
    "manifest.json": "old",
    "model.onnx": "old",
    "model.1.data": "old",
    "steps/check.json": "old",
}
NEW = {
    "config.json": "new",
    "engines/gpu/a.plan": "new",
    "lib/lib.so": "kept",
    "manifest.json": "new",
    "model.onnx": "new",
    "model.2.data": "new",
    "steps/check.json": "new",
    "tokenizer.json": "new",
}
FOREIGN = {"notes": "the user's", "photos/1.png": "the user's", ".hidden": "the user's"}


def _fill(out, files):
    for name, text in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)


def _read(out):
    """Files of an output folder, without unfinished work."""
    names = [p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()]
    return {name: (out / name).read_text() for name in names if not name.startswith(("steps/next-", "steps/done/"))}


def _make(work):
    """A job: some files anew, some gone, some kept; it goes on from what it finds."""
    for name, text in NEW.items():
        if not (work / name).is_file() or (work / name).read_text() != text:
            write_text(work / name, text)
    for name in OLD.keys() - NEW.keys():
        (work / name).unlink(missing_ok=True)


def _run(out):
    with staged(out, "job") as work:
        _make(work)


def _killed_before(act, out):
    """Run the job in a process that is killed before its act number `act`; whether it came so far."""
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event, _):
            nonlocal count
            if event in _ACTS:
                count += 1
                if count == act:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            _run(out)
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("old", [{}, OLD], ids=["no-output", "old-output"])
def test_a_kill_before_any_act_leaves_the_old_or_the_new_and_a_rerun_completes(old, tmp_path):
    seen, act = [], 1
    while True:
        out = tmp_path / str(act)
        _fill(out, old | FOREIGN)
        killed = _killed_before(act, out)
        settle(out)  # as everything that reads a folder does
        found = _read(out)
        assert found in (old | FOREIGN, NEW | FOREIGN), act
        seen.append(found == NEW | FOREIGN)
        if killed:
            _run(out)
            assert _read(out) == NEW | FOREIGN, act
        assert [p.name for p in (out / "steps").iterdir()] == ["check.json"]
        if not killed:
            break
        act += 1
    assert act > 30
    assert seen == sorted(seen)  # once new, never old again
    assert {True, False} <= set(seen)


def test_what_a_failed_run_had_finished_is_there_for_the_next_one_of_its_kind_only(tmp_path):
    out = tmp_path / "out"
    _fill(out, OLD)

    def stopped(identity, name):
        with contextlib.suppress(ZeroDivisionError), staged(out, identity) as work:
            found = _read(work)
            write_text(work / name, "half")
            _ = 1 / 0
        assert _read(out) == OLD
        return found

    assert "first.json" not in stopped("a", "first.json")
    assert stopped("a", "second.json")["first.json"] == "half"
    assert "first.json" not in stopped("b", "third.json")
    assert "second.json" not in stopped("a", "first.json")


@pytest.mark.parametrize("old", [{}, OLD], ids=["no-output", "old-output"])
def test_a_run_that_made_nothing_leaves_nothing(old, tmp_path):
    out = tmp_path / "deep" / "out"
    _fill(out, old)
    with pytest.raises(UserError, match="no good"), staged(out, "job"):
        raise UserError("no good")
    assert (_read(out) if old else list(tmp_path.iterdir())) == (old or [])
    assert not list(tmp_path.rglob("next-*"))


def test_an_error_names_the_folder_that_the_user_named(tmp_path):
    with pytest.raises(UserError) as caught, staged(tmp_path / "out", "job") as work:
        raise UserError(f"{work}/model.onnx: no good")
    assert str(caught.value) == f"{tmp_path}/out/model.onnx: no good"


def test_a_second_writer_is_refused_and_a_reader_is_not(tmp_path):
    _fill(tmp_path, OLD)
    with staged(tmp_path, "job") as work:
        _make(work)
        with pytest.raises(UserError, match=r"another export-vq is writing there; wait .* -o"), staged(tmp_path, "x"):
            pass
        settle(tmp_path)
        assert _read(tmp_path) == OLD
    assert _read(tmp_path) == NEW


def test_links_are_carried_over_as_links(tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    _fill(out, OLD)
    elsewhere.mkdir()
    (out / "engines" / "gpu" / "model.1.data").symlink_to("../../model.1.data")
    (out / "place").symlink_to(elsewhere)
    with staged(out, "job") as work:
        assert (work / "engines" / "gpu" / "model.1.data").read_text() == "old"
        _make(work)
    assert os.readlink(out / "engines" / "gpu" / "model.1.data") == "../../model.1.data"
    assert os.readlink(out / "place") == str(elsewhere)


def test_where_there_are_no_hard_links_files_are_copied(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    _fill(tmp_path, OLD)
    _run(tmp_path)
    assert _read(tmp_path) == NEW
