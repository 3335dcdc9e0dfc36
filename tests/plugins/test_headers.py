"""Fetching headers: the package that was tested or none, only its headers kept, every failure named with its mend."""

import dataclasses
import hashlib
import io
import os
import stat
import subprocess
import sys
import tarfile
import zipfile

import pytest

from export_vq.errors import UserError
from export_vq.plugins import headers
from export_vq.plugins.headers import ONNX_RUNTIME, TENSORRT

INSTALLED = next((place for place in headers._TENSORRT_PLACES if (place / TENSORRT.marker).is_file()), None)
"""TensorRT's headers on this machine."""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and no TensorRT of this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TENSORRT_ROOT", raising=False)
    monkeypatch.setattr(headers, "_TENSORRT_PLACES", ())
    return tmp_path / "cache"


def _npm(folder, monkeypatch, script):
    """A stand-in for npm, in front of PATH."""
    folder.mkdir()
    program = folder / "npm"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def _package(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def served(tmp_path, monkeypatch):
    """ONNX Runtime's header set, as a small package that the stand-in serves."""
    files = {
        f"{ONNX_RUNTIME.folder}/onnxruntime_cxx_api.h": b"// C++",
        f"{ONNX_RUNTIME.folder}/onnxruntime_c_api.h": b"// C",
        f"{ONNX_RUNTIME.folder}/deeper/other.h": b"// not of the set",
        "package/libonnxruntime.a": b"big",
    }
    checksum = _package(tmp_path / "served.tgz", files)
    _npm(tmp_path / "bin", monkeypatch, f'cp {tmp_path}/served.tgz "$PWD/package-0.4.9.tgz"')
    return dataclasses.replace(ONNX_RUNTIME, sha256=checksum)


def test_only_the_headers_are_kept(served, cache, monkeypatch):
    monkeypatch.setattr(headers, "ONNX_RUNTIME", served)
    assert headers.on_this_machine(served) is None
    folder = headers.fetch(served)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "onnxruntime_cxx_api.h": "// C++",
        "onnxruntime_c_api.h": "// C",
    }
    assert list(folder.parent.iterdir()) == [folder]
    assert folder.is_relative_to(cache)
    assert headers.on_this_machine(served) == folder


def test_another_file_under_the_same_name_is_refused(served, cache, monkeypatch):
    tampered = dataclasses.replace(served, sha256="0" * 64)
    monkeypatch.setattr(headers, "ONNX_RUNTIME", tampered)
    with pytest.raises(UserError, match=rf"SHA-256 {served.sha256}, expected 0{{64}}.*--ort-include-dir"):
        headers.fetch(tampered)
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_no_network_is_named_with_what_npm_said(tmp_path, cache, monkeypatch):
    _npm(tmp_path / "bin", monkeypatch, "echo 'npm error network EAI_AGAIN' >&2; exit 1")
    with pytest.raises(UserError, match=r"npm failed .*EAI_AGAIN.*--ort-include-dir"):
        headers.fetch(ONNX_RUNTIME)
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_no_npm_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"npm was not found.*Node\.js.*--ort-include-dir"):
        headers.fetch(ONNX_RUNTIME)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        headers.fetch(ONNX_RUNTIME)


def test_a_wheel_is_read_too(tmp_path):
    with zipfile.ZipFile(tmp_path / "some-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{TENSORRT.folder}/NvInferRuntime.h", "// TensorRT")
        wheel.writestr("kernel_lens/code.py", "")
    members = headers._members(tmp_path / "some-1-py3-none-any.whl", TENSORRT.folder)
    assert list(members) == [("NvInferRuntime.h", b"// TensorRT")]


def _tensorrt(folder, major):
    folder.mkdir(parents=True)
    (folder / "NvInferRuntime.h").write_text("")
    (folder / "NvInferVersion.h").write_text(f"#define TRT_MAJOR_ENTERPRISE {major}\n#define TRT_MINOR_ENTERPRISE 3\n")
    return folder


@pytest.mark.parametrize(("major", "taken"), [(8, False), (9, False), (10, True), (11, True), (1, True)])
def test_tensorrt_root_counts_from_version_10(tmp_path, monkeypatch, major, taken):
    """TensorRT for RTX is version 1."""
    folder = _tensorrt(tmp_path / "sdk/include", major)
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path / "sdk"))
    assert headers.on_this_machine(TENSORRT) == (folder if taken else None)
    if taken:
        headers.check(TENSORRT, folder)
    else:
        with pytest.raises(UserError, match=rf"TensorRT {major}, but the plugin needs 10 or newer"):
            headers.check(TENSORRT, folder)


@pytest.mark.parametrize("header_set", [ONNX_RUNTIME, TENSORRT], ids=lambda header_set: header_set.runtime)
def test_a_folder_without_headers_is_named(tmp_path, header_set):
    with pytest.raises(UserError, match=rf"{header_set.option} {tmp_path}: no {header_set.marker} there"):
        headers.check(header_set, tmp_path)


def test_as_a_program_it_prints_cmake_options(cache):
    """What scripts/fetch_headers.sh runs; here everything is in the cache already, or TensorRT is installed."""
    folders = []
    for header_set in (ONNX_RUNTIME, TENSORRT):
        folder = cache / "export-vq/headers" / f"{header_set.package}-{header_set.version}"
        folder.mkdir(parents=True)
        (folder / header_set.marker).write_text("")
        folders.append(folder)
    done = subprocess.run([sys.executable, "-m", headers.__name__], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    ort, tensorrt = done.stdout.splitlines()
    assert ort == f"-DORT_INCLUDE_DIR={folders[0]}"
    assert tensorrt == f"-DTENSORRT_INCLUDE_DIR={INSTALLED or folders[1]}"
