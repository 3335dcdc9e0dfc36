"""Files that appear whole or not at all, and their hashes."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from export_vq.errors import UserError


@contextmanager
def whole(path: Path, *, mend: str = "choose another output with -o") -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it into place when the block ends well.

    The block may write a file or make a folder under the temporary name. An existing file is replaced atomically; an
    existing folder is moved aside first.

    Raises:
        UserError: the folder cannot be made or written, or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise UserError(f"{path}: cannot write there ({error.strerror}); {mend}") from error
    try:
        staged = scratch / path.name
        yield staged
        if path.is_dir():
            path.rename(scratch / "replaced")
        staged.replace(path)
    except OSError as error:
        raise UserError(f"{path}: writing failed ({error.strerror or error}); free some room or {mend}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole, UTF-8."""
    with whole(path) as staged:
        staged.write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """SHA-256 of a file; of a folder, over the names and hashes of the regular files directly in it."""
    digest = hashlib.sha256()
    if path.is_dir():
        for child in sorted(path.iterdir()):
            if child.is_file() and not child.name.startswith("."):
                digest.update(f"{child.name}\0{sha256(child)}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_inside(name: str) -> bool:
    """Whether a name that a file brings along is a plain relative path, with '/', that cannot lead out of its folder."""
    parts = name.split("/")
    return not any(part in ("", ".", "..") for part in parts) and not any(c in name for c in "\\:\0")


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def free_bytes(path: Path) -> int:
    """Free bytes on the disk that would hold `path`."""
    parent = path
    while not parent.exists():
        parent = parent.parent
    return shutil.disk_usage(os.fspath(parent)).free
