"""The native libraries on this machine: where they are, and what they were built from. Reading never runs them."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from export_vq.errors import UserError
from export_vq.files import sha256

LIBRARIES: Final = {
    "vq": "the kernels behind plain C calls",
    "vq_ort": "ONNX Runtime custom ops",
    "vq_trt": "TensorRT plugin",
}
"""Name -> what it is; the file of each is lib<name>.so."""

SOURCES: Final = Path(__file__).resolve().parent
"""Where CMakeLists.txt and the C++ and CUDA sources lie, in a checkout as in an installed package."""
LIB: Final = SOURCES / "lib"
"""Where libraries are built to and looked for, unless the user names another folder."""

_SOURCE_FOLDERS = ("cmake", "include", "kernels", "capi", "onnxruntime", "tensorrt")
_BUILD_INFO = re.compile(rb'\{"vq_build_info": 1, [^{}\0]*\}')


@dataclass(frozen=True)
class Library:
    """A library file. `current`: built from the sources that lie in this package. `source_hash` is '' where the file tells none."""

    name: str
    path: Path
    source_hash: str
    cuda: bool
    """Holds the CUDA kernels too."""
    sha256: str
    current: bool


def find(name: str, folder: Path | None = None) -> Library | None:
    """The library `name` in `folder` (default: the package's own), current or not; None where there is no such file.

    Raises:
        UserError: the file cannot be read.
    """
    path = (folder or LIB) / f"lib{name}.so"
    if not path.is_file():
        return None
    try:
        found = _BUILD_INFO.search(path.read_bytes())
        digest = sha256(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); build it again with: {build_command(folder)}"
        ) from error
    info: dict[str, Any] = json.loads(found[0]) if found else {"source_hash": "", "cuda": False}
    built_from = info["source_hash"]
    return Library(name, path, built_from, info["cuda"], digest, built_from == source_hash())


def find_current(name: str) -> Library | None:
    """The library `name`, built from the sources of this package; None where there is none."""
    library = find(name)
    return library if library is not None and library.current else None


def require_library(name: str, folder: Path | None = None) -> Library:
    """The library `name`, built from the sources of this package: safe to load.

    Raises:
        UserError: it is not there, or was built from other sources than these.
    """
    library = find(name, folder)
    if library is None:
        raise UserError(f"{folder or LIB}: no lib{name}.so ({LIBRARIES[name]}); build it with: {build_command(folder)}")
    if not library.current:
        raise UserError(
            f"{library.path}: built from other sources than this version's "
            f"({library.source_hash[:12] or 'unknown'}, expected {source_hash()[:12]}); build it again with: {build_command(folder)}"
        )
    return library


def source_files(sources: Path = SOURCES) -> list[Path]:
    """Every file that the native libraries are made of, relative to `sources`, sorted."""
    below = (path for folder in _SOURCE_FOLDERS for path in (sources / folder).rglob("*"))
    files = [path for path in below if path.is_file() and not path.name.startswith(".")]
    return sorted(path.relative_to(sources) for path in [sources / "CMakeLists.txt", *files])


def source_hash(sources: Path = SOURCES) -> str:
    """SHA-256 over the names and contents of the native sources, which every library carries."""
    digest = hashlib.sha256()
    for path in source_files(sources):
        digest.update(f"{path.as_posix()}\0{sha256(sources / path)}\n".encode())
    return digest.hexdigest()


def build_command(folder: Path | None = None) -> str:
    """What the user types to have the libraries in `folder` (default: the package's own) built again."""
    return f"export-vq plugins build -o {folder}" if folder else "export-vq plugins build"
