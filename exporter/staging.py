"""An output folder that is the old one or the new one, whenever the process that writes it dies.

A command that writes into an output folder works in `steps/next-<key>` of it, which begins with what is there, as hard
links. At its end that folder is renamed to `steps/commit`, and from this moment the output is the new one; its files are
then moved to their places. A process that dies before leaves the old output, and what it had finished: the same command
goes on from there. One that dies after leaves moves to be made, and who opens the folder next makes them first.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from export_vq.errors import UserError
from export_vq.files import sha256, write_text

STATE = "steps"
"""The folder of what resumable steps keep: no part of what is shipped."""
_NEXT, _COMMIT, _DONE = "next-", "commit", "done"
_BEGAN, _REMOVED = ".began.json", ".removed.json"
_LAST = "manifest.json"
_OURS = (".onnx", ".data", ".json", ".txt", ".html", ".jinja")
"""Endings of what lies at the top of an output folder. Other files there are the user's, and are left alone."""


@contextmanager
def staged(out: Path, identity: str) -> Iterator[Path]:
    """Hold an output folder against other writers, and yield a folder that holds what it holds, to be changed at will.

    When the block ends well, the output is what that folder is then. When it does not, the output stays what it was, and
    what the block had finished waits for the next call with the same identity.

    Args:
        out: made if missing.
        identity: what the block makes, in words.

    Raises:
        UserError: another process is writing there, or the folder cannot be written.
    """
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    with _held(out) as free:
        if not free:
            raise UserError(
                f"{out}: another export-vq is writing there; wait until it has ended, or choose another output with -o"
            )
        with _told(out):
            work, found = _begin(out, identity)
        try:
            yield work
            with _told(out):
                _commit(out, work)
        except UserError as error:
            # What the user knows is the output folder, and that is where the files will be.
            raise UserError(str(error).replace(str(work), str(out))) from error
        finally:
            with suppress(OSError):
                if work.is_dir() and _inodes(work) == found:  # nothing was finished
                    _forget(work)
                    for folder in (out / STATE, *missing):
                        folder.rmdir()


def settle(out: Path) -> None:
    """Finish what a process that died had begun to put in place. Call it before an output folder is read.

    Raises:
        UserError: there is something to finish, but the folder cannot be written.
    """
    if not (out / STATE / _COMMIT).is_dir():
        return
    with _held(out) as free:
        if free:  # else whoever holds it is at it
            try:
                _put_in_place(out)
            except OSError as error:
                raise UserError(
                    f"{out}: what export-vq wrote is not all in place yet, and cannot be put there ({error.strerror}); "
                    "make the folder writable and try again"
                ) from error


@contextmanager
def _held(out: Path) -> Iterator[bool]:
    """Lock the folder itself, so that no file has to stay behind; the lock ends with the process. Yields whether it is ours."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(f"{out}: cannot write there ({error.strerror}); choose another output with -o") from error
    try:
        free = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:
            pass  # a file system without locks: two runs at once are the user's to avoid
        yield free
    finally:
        os.close(handle)


@contextmanager
def _told(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{out}: cannot write there ({error.strerror}); free some room or choose another output with -o"
        ) from error


def _begin(out: Path, identity: str) -> tuple[Path, dict[str, int]]:
    """The folder to work in, and what a run that makes nothing leaves in it; one gone on with has been worth keeping before."""
    with tempfile.TemporaryFile(dir=out):
        pass  # a folder that cannot be written is refused now, not when all is made
    _put_in_place(out)
    manifest = out / _LAST
    base = sha256(manifest) if manifest.is_file() else ""
    key = hashlib.sha256(f"{base} {identity}".encode()).hexdigest()[:12]
    work = out / STATE / f"{_NEXT}{key}"
    for other in work.parent.glob(f"{_NEXT}*"):
        if other != work or not (work / _BEGAN).is_file():
            _forget(other)
    if work.is_dir():
        for left in [path for path in work.rglob(".*") if path.is_dir()]:  # half written when the process died
            shutil.rmtree(left, ignore_errors=True)
        return work, {}
    work.mkdir(parents=True)
    names = _ours(out)
    for name in names:
        _link(out / name, work / name)
    write_text(work / _BEGAN, json.dumps(names))
    return work, _inodes(work)


def _commit(out: Path, work: Path) -> None:
    names = set(_files(work))
    removed = [name for name in json.loads((work / _BEGAN).read_text(encoding="utf-8")) if name not in names]
    write_text(work / _REMOVED, json.dumps(removed))
    (work / _BEGAN).unlink()
    work.rename(out / STATE / _COMMIT)
    _put_in_place(out)


def _put_in_place(out: Path) -> None:
    """Every act can be done again: a process may die after any of them."""
    state, commit = out / STATE, out / STATE / _COMMIT
    if commit.is_dir():
        for name in sorted(_files(commit), key=lambda name: (name == _LAST, name)):
            if name != _REMOVED:
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                (commit / name).replace(out / name)
        for name in json.loads((commit / _REMOVED).read_text(encoding="utf-8")):
            (out / name).unlink(missing_ok=True)
            with suppress(OSError):  # until a folder is not empty
                for folder in (out / name).relative_to(out).parents:
                    (out / folder).rmdir()
        _forget(commit)
    shutil.rmtree(state / _DONE, ignore_errors=True)


def _forget(folder: Path) -> None:
    """Remove a folder of the state; half removed, it has another name already."""
    done = folder.with_name(_DONE)
    shutil.rmtree(done, ignore_errors=True)
    folder.rename(done)
    shutil.rmtree(done, ignore_errors=True)


def _files(folder: Path) -> list[str]:
    """Names of all files and links below a folder, but for those of unfinished work."""
    found = []
    for parent, folders, files in os.walk(folder):
        here = Path(parent).relative_to(folder)
        if here == Path(STATE):
            folders[:] = []
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        found += [(here / name).as_posix() for name in (*files, *links)]
    return found


def _ours(out: Path) -> list[str]:
    """Files that a command may have written: an output folder may hold others' files too, a whole disk of them."""
    top = [path for path in sorted(out.iterdir()) if not path.name.startswith(".")]
    names = [p.name for p in top if p.is_symlink() or (p.is_file() and p.suffix in _OURS)]
    for folder in top:
        inside = folder.name in ("engines", "lib", STATE) or (folder / "calibration.json").is_file()
        if inside and folder.is_dir() and not folder.is_symlink():
            below = _files(folder) if folder.name != STATE else [p.name for p in folder.iterdir() if p.is_file()]
            names += [f"{folder.name}/{name}" for name in below if (folder / name).is_file()]
    return [name for name in names if not any(part.startswith(".") for part in name.split("/"))]


def _link(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        target.symlink_to(os.readlink(path))
        return
    try:
        os.link(path, target)
    except OSError:  # a file system without hard links
        shutil.copy2(path, target)


def _inodes(folder: Path) -> dict[str, int]:
    return {name: (folder / name).lstat().st_ino for name in _files(folder)}
