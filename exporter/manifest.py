"""The manifest of an output folder: which files are shipped, with their hashes, and what wrote them.

`manifest.json` is written last, so a folder is whole when it says so. What belongs to it: every graph and engine that a
record beside it describes, with its weights; config and tokenizer; the report; libraries in lib/. What steps keep to go
on from (steps/, ranges/) stays out. A quantised copy in a folder of its own (int8/) has its own manifest, so that it can be
shipped alone. The hashes find accidents and tampering with single files; who can replace the manifest too
can replace everything, so take bundles from people whose programs you would run.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from export_vq import contract
from export_vq.errors import UserError
from export_vq.files import is_inside, sha256, whole
from export_vq.plugins import library
from export_vq.plugins.library import Library
from export_vq.records import EngineArtifact, OnnxArtifact, Record
from export_vq.staging import STATE, settle

FILE = "manifest.json"
FORMAT = 1
UNSHIPPED = (STATE, "ranges")
"""Folders of what resumable steps keep: no part of what is shipped."""
QUANTISED = "calibration.json"
"""What `calibrate` writes beside a graph: a folder in this one with that and a manifest is an output folder of its own."""
CONTRACT = f"{contract.DOMAIN} {contract.VERSION}"
_SHIPPED = ("vq_ort", "vq_trt")
_NAMED = ("config.json", "genai_config.json", QUANTISED, "report.json", "report.html")


@dataclass(frozen=True)
class Manifest(Record):
    """What an output folder holds. File names are relative to it, with '/'.

    `contract` is the ops' domain and version, `versions` of the tool and of the packages that exported the graphs.
    `files` has the SHA-256 of each; `libraries` the platform that each of lib/*.so is for, as in 'linux-x86_64'.
    """

    format: int
    contract: str
    versions: dict[str, str]
    files: dict[str, str]
    libraries: dict[str, str]


def seal(folder: Path) -> Manifest:
    """Put the native libraries of this machine into lib/ and write the manifest: the last act of whoever wrote the folder.

    A library that is there already is kept where this machine has none that is current, or an engine in the folder was
    built with it; one that no manifest listed before is not taken up.

    Raises:
        UserError: the folder cannot be written, or one of its files is a link out of it.
    """
    graphs = [r for p in sorted(folder.glob("*.onnx.json")) if (r := _record(OnnxArtifact, p)) is not None]
    libraries = _put_libraries(folder)
    names = sorted({*_belonging(folder, graphs), *libraries})
    files = {}
    for name in names:
        problem = _link_problem(folder, name, names)
        if problem:
            raise UserError(f"{folder / name}: {problem}; put the file itself there")
        files[name] = sha256(folder / name)
    versions = {"export-vq": version("export-vq")}
    for artifact in graphs:
        versions |= {k: v for k, v in artifact.versions.items() if k != "export-vq"}
    manifest = Manifest(FORMAT, CONTRACT, versions, files, libraries)
    manifest.save(folder / FILE)
    return manifest


def read(folder: Path) -> Manifest:
    """The manifest of a folder, held to its form: nothing in it can lead out of the folder.

    Raises:
        UserError: there is none, or it is not one.
    """
    settle(folder)
    path = folder / FILE
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{folder}: holds no {FILE}, expected a folder that export-vq wrote to its end; run export-vq on it again"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({str(error) or error!r}); copy the folder again") from error
    problem = _form_problem(data)
    if problem:
        raise UserError(f"{path}: {problem}; copy the folder again, or run export-vq on it again")
    return Manifest.from_json(data)


def verify(folder: Path) -> tuple[str, ...]:
    """Compare a folder with its manifest, every byte; quantised copies in it with theirs.

    Returns:
        a line for each file that is changed, missing, extra or a link; empty when all is as it was written.

    Raises:
        UserError: there is no manifest, or it is not one.
    """
    manifest = read(folder)
    found = {}
    for name, path in _walk(folder):
        problem = _link_problem(folder, name, manifest.files)
        if problem:
            found[name] = problem
        elif name not in manifest.files:
            found[name] = "extra: the manifest does not list it"
        else:
            found[name] = _content_problem(path, manifest.files[name])
    missing = {name: "missing" for name in manifest.files if name not in found}
    lines = sorted((found | missing).items())
    own = [f"{_shown(name)}: {problem}" for name, problem in lines if problem]
    return (*own, *(f"{_shown(path.name)}/{line}" for path in _quantised(folder) for line in verify(path)))


def bundled_library(folder: Path, name: str) -> Library | None:
    """The native library `name` that an output folder brings along, when it is for this platform and contract.

    Raises:
        UserError: the manifest lists it, but the file is another one; such a library is never loaded.
    """
    settle(folder)
    if not (folder / FILE).is_file():
        return None
    manifest, file = read(folder), f"lib/lib{name}.so"
    if (manifest.libraries.get(file), manifest.contract) != (_platform(), CONTRACT):
        return None
    path = folder / file
    problem = _link_problem(folder, file, manifest.files) or _content_problem(path, manifest.files[file])
    if problem:
        raise UserError(
            f"{path}: {problem}, so it is not loaded; copy the folder again, or build the library here with: "
            f"{library.build_command()}"
        )
    return library.find(name, path.parent)


# --------------------------------------------------------------------------------------------------- what belongs


def _belonging(folder: Path, graphs: list[OnnxArtifact]) -> Iterator[str]:
    from export_vq.checkpoint import TOKENIZER_FILES  # needs torch, which verifying does not

    yield from (name for name in (*_NAMED, *TOKENIZER_FILES) if (folder / name).is_file())
    for graph in graphs:
        yield from (f"{graph.path}.json", *graph.file_sha256)
    for sidecar, engine in _engines(folder):
        place = sidecar.parent.relative_to(folder).as_posix()
        data = [path.name for path in sidecar.parent.glob("*.data")]
        cache = ["timing.cache"] if (sidecar.parent / "timing.cache").is_file() else []
        yield from (f"{place}/{name}" for name in (sidecar.name, engine.path, engine.onnx, *data, *cache))


def _engines(folder: Path) -> Iterator[tuple[Path, EngineArtifact]]:
    for path in sorted(folder.glob("engines/*/*.json")):
        engine = _record(EngineArtifact, path)
        if engine is not None:
            yield path, engine


def _record(kind: Any, path: Path) -> Any:
    """A record whose files are where it says; None for another or an old one."""
    try:
        record = kind.load(path)
    except UserError:
        return None
    names = record.file_sha256 if kind is OnnxArtifact else (record.path, record.onnx)
    return record if all(is_inside(name) and path.with_name(name).is_file() for name in names) else None


def _put_libraries(folder: Path) -> dict[str, str]:
    """Copies the current libraries to lib/; returns {file: platform} of all that may be listed."""
    before = _before(folder)
    platforms = before.libraries if before is not None else {}
    needed = {engine.plugin_sha256 for _, engine in _engines(folder)}
    libraries = {}
    for name in _SHIPPED:
        file = f"lib/lib{name}.so"
        target = folder / file
        there = sha256(target) if target.is_file() else None
        kept = before is not None and file in platforms and before.files[file] == there
        own = library.find(name)
        if own is not None and own.current and not (kept and there in needed):
            if there != own.sha256:
                with whole(target) as staged:
                    shutil.copyfile(own.path, staged)
            libraries[file] = _platform()
        elif kept:
            libraries[file] = platforms[file]
    return libraries


def _before(folder: Path) -> Manifest | None:
    try:
        return read(folder)
    except UserError:
        return None


def _platform() -> str:
    return f"{platform.system()}-{platform.machine()}".lower()


# --------------------------------------------------------------------------------------------------- what is found


def _form_problem(data: Any) -> str:
    """Why this is no manifest; '' when it is one."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        return f"its format is not {FORMAT}, the one that this version knows"
    texts = {"contract": str, "versions": dict, "files": dict, "libraries": dict}
    if set(data) != {"format", *texts} or any(not isinstance(data[name], kind) for name, kind in texts.items()):
        return f"its fields are not format, {', '.join(texts)}"
    for name, digest in data["files"].items():
        if not is_inside(name) or name == FILE or name.split("/")[0] in UNSHIPPED:
            return f"it lists {_shown(name)!r}, expected a relative path inside the folder"
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            return f"the hash of {_shown(name)} is no SHA-256"
    if not all(isinstance(v, str) for part in ("versions", "libraries") for v in data[part].values()):
        return "a version or platform in it is no text"
    unlisted = [name for name in data["libraries"] if name not in data["files"]]
    return f"it has no hash of the library {_shown(unlisted[0])}" if unlisted else ""


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """Everything in the folder that is no folder, links to folders among it; state, the manifest and what has its own
    manifest left out."""
    left_out = {*UNSHIPPED, *(path.name for path in _quantised(folder))}
    for parent, folders, files in os.walk(folder):
        here = Path(parent)
        if here == folder:
            folders[:] = [name for name in folders if name not in left_out or (here / name).is_symlink()]
            files = [name for name in files if name != FILE]
        for name in (*files, *(name for name in folders if (here / name).is_symlink())):
            yield (here / name).relative_to(folder).as_posix(), here / name


def _quantised(folder: Path) -> list[Path]:
    """The output folders in this one."""
    found = sorted(file.parent for file in folder.glob(f"*/{QUANTISED}"))
    return [path for path in found if (path / FILE).is_file() and not path.is_symlink()]


def _link_problem(folder: Path, name: str, listed: Any) -> str:
    """Links are refused. The one exception is what engines share: a data file that is a relative link to the listed file
    of that name elsewhere in this folder, read as that file.
    """
    path = folder / name
    if any((folder / parent).is_symlink() for parent in Path(name).parents if parent != Path(".")):
        return "lies in a folder that is a link, which a bundle may not hold"
    if not path.is_symlink():
        return ""
    origin = os.readlink(path)
    target = os.path.normpath(os.path.join(os.path.dirname(name), origin))
    shared = path.suffix == ".data" and target in listed and target != name and os.path.basename(target) == path.name
    if os.path.isabs(origin) or not shared or (folder / target).is_symlink():
        return "a link, which a bundle may not hold"
    return ""


def _content_problem(path: Path, digest: str) -> str:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return "not a regular file"
        return "" if sha256(path) == digest else "changed: not the content that the manifest lists"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _shown(name: str) -> str:
    """A file name for a screen, whatever bytes it is made of."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
