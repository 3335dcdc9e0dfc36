"""Finding the native libraries: by name, in one folder, with what they were built from read out of their bytes."""

import ctypes
import hashlib
import json
import shutil
from pathlib import Path

import pytest

from export_vq import doctor
from export_vq.errors import UserError
from export_vq.plugins import library

ROOT = Path(__file__).parents[2]


def _write(folder, name, *, source_hash, cuda=False):
    """A file with the build info among other bytes, as a linker leaves it."""
    info = json.dumps({"vq_build_info": 1, "source_hash": source_hash, "cuda": cuda}).encode()
    path = folder / f"lib{name}.so"
    path.write_bytes(b'\x7fELF\0{"vq\0' + info + b"\0more")
    return path


def test_a_library_that_is_not_there(tmp_path):
    assert library.find("vq", tmp_path) is None
    with pytest.raises(UserError, match=rf"no libvq\.so.*export-vq plugins build -o {tmp_path}"):
        library.require_library("vq", tmp_path)


@pytest.mark.parametrize("cuda", [False, True])
def test_a_current_library(tmp_path, cuda):
    path = _write(tmp_path, "vq_ort", source_hash=library.source_hash(), cuda=cuda)
    found = library.require_library("vq_ort", tmp_path)
    assert found == library.Library(
        "vq_ort", path, library.source_hash(), cuda, hashlib.sha256(path.read_bytes()).hexdigest(), True
    )


def test_a_stale_library_is_found_and_refused(tmp_path):
    _write(tmp_path, "vq", source_hash="0" * 64)
    assert not library.find("vq", tmp_path).current
    with pytest.raises(UserError, match=r"built from other sources.*000000000000, expected.*export-vq plugins build"):
        library.require_library("vq", tmp_path)


def test_a_file_of_that_name_that_is_not_ours_is_refused(tmp_path):
    (tmp_path / "libvq.so").write_bytes(b"\x7fELF and nothing that we know")
    with pytest.raises(UserError, match="unknown"):
        library.require_library("vq", tmp_path)


def test_doctor_names_each_library_and_the_command_that_mends_it(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "LIB", tmp_path)
    _write(tmp_path, "vq", source_hash=library.source_hash(), cuda=True)
    _write(tmp_path, "vq_ort", source_hash="0" * 64)
    found = {finding.subject: finding for finding in doctor.examine()}
    lines = [found[f"lib{name}.so"] for name in library.LIBRARIES]
    assert [line.state for line in lines] == ["ok", "wrong", "missing"]
    assert [line.mend for line in lines] == ["", *["export-vq plugins build"] * 2]
    assert lines[0].detail.endswith("with CUDA kernels")


@pytest.fixture
def copy(tmp_path):
    for path in library.source_files():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library.SOURCES / path, tmp_path / path)
    return tmp_path


def test_the_hash_is_the_same_wherever_the_sources_lie(copy):
    assert library.source_hash(copy) == library.source_hash()


def test_the_hash_covers_contents_and_names(copy):
    before = library.source_hash(copy)
    path = copy / "include/vq/contract.h"
    text = path.read_text()
    path.write_text(text + "\n")
    assert library.source_hash(copy) != before
    path.write_text(text)
    assert library.source_hash(copy) == before
    path.rename(path.with_name("contract2.h"))
    assert library.source_hash(copy) != before


def test_the_hash_covers_all_native_files_and_no_python():
    native = {".h", ".cpp", ".cu", ".cuh", ".inl", ".cmake", ".txt"}
    there = {p.relative_to(library.SOURCES) for p in library.SOURCES.rglob("*") if p.suffix in native}
    # The programs of runtime/ are built by whoever wants them, and no library has to be built again for their sake.
    assert {p for p in there if p.parts[0] not in ("lib", "runtime")} == set(library.source_files())


def test_a_wheel_carries_every_source():
    """The package is built where it is installed: a file that the wheel lacks would only be missed there."""
    programs = {p.relative_to(library.SOURCES) for p in (library.SOURCES / "runtime").iterdir()}
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["export_vq.plugins"]
    carried = [{p for p in (ROOT / "plugins").glob(_files(pattern)) if p.is_file()} for pattern in patterns]
    assert all(carried), "a pattern that matches nothing"
    assert {path.relative_to(ROOT / "plugins") for path in set().union(*carried)} == {
        *library.source_files(),
        *programs,
    }


def _files(pattern):
    """setuptools' `folder/**` also means the files in it; pathlib's before 3.13 means folders only."""
    return pattern + "/*" if pattern.endswith("**") else pattern


@pytest.mark.parametrize("name", ["vq", "vq_ort"])
def test_what_is_read_from_the_bytes_is_what_the_library_says(name):
    """The libraries of this machine: scripts/test.sh builds them."""
    found = library.require_library(name)
    say = ctypes.CDLL(str(found.path)).vq_build_info
    say.restype = ctypes.c_char_p
    assert json.loads(say()) == {"vq_build_info": 1, "source_hash": found.source_hash, "cuda": found.cuda}
