"""Building: what is missing is named with its mend, nothing is compiled twice, files appear whole or not at all.

The sources here are a small project with the real one's settings and the real build_info.cpp, so that a build takes a
second; scripts/test.sh builds the real libraries with the same command before the tests run.
"""

import json
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from export_vq import cli
from export_vq.errors import UserError
from export_vq.plugins import build, headers, library, toolchain
from export_vq.plugins.build import BuildOptions

CMAKE = """
cmake_minimum_required(VERSION 3.24)
project(small LANGUAGES CXX)
function(small name)
    add_library(${name} SHARED capi/build_info.cpp)
    target_include_directories(${name} PRIVATE include)
    target_compile_definitions(${name} PRIVATE VQ_SOURCE_HASH="${VQ_SOURCE_HASH}" $<$<BOOL:${VQ_CUDA}>:VQ_HAS_CUDA>)
    install(TARGETS ${name} LIBRARY DESTINATION .)
endfunction()
small(vq)
if(ORT_INCLUDE_DIR)
    small(vq_ort)
endif()
if(TENSORRT_INCLUDE_DIR AND VQ_CUDA)
    small(vq_trt)
endif()
"""


class Steps:
    """Remembers what was done and what was skipped."""

    def __init__(self):
        self.done, self.current, self.fractions = [], [], []

    @contextmanager
    def step(self, name):
        self.done.append(name)
        yield lambda what, fraction: self.fractions.append((what, fraction))

    def skipped(self, name):
        self.current.append(name)


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "sources"
    for name in ("capi/build_info.cpp", "include/vq/contract.h"):
        (folder / name).parent.mkdir(parents=True)
        shutil.copyfile(library.SOURCES / name, folder / name)
    (folder / "CMakeLists.txt").write_text(CMAKE)
    return folder


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """An empty cache, a folder with ONNX Runtime's headers, no TensorRT, and no nvcc but the one a test adds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(headers, "_TENSORRT_PLACES", ())
    monkeypatch.setattr(toolchain, "_CUDA_PLACES", ())
    for name in ("CUDACXX", "CUDA_HOME", "CXX", "TENSORRT_ROOT"):
        monkeypatch.delenv(name, raising=False)
    _only(tmp_path, monkeypatch, "c++", "cmake", "ninja", "make", "as", "ld", "sh", "uname")
    (tmp_path / "ort").mkdir()
    (tmp_path / "ort/onnxruntime_cxx_api.h").write_text("")


def _only(tmp_path, monkeypatch, *programs):
    """A PATH with these programs and no others."""
    folder = tmp_path / f"bin{len(programs)}"
    folder.mkdir()
    for name in programs:
        if found := toolchain._in_environment(name) or shutil.which(name):
            (folder / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(folder))


def _program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def make(tmp_path, sources):
    """Build the small project; (result, steps)."""

    def run(**options):
        steps = Steps()
        given = {"output": tmp_path / "out", "ort_include_dir": tmp_path / "ort", **options}
        return build.build_libraries(BuildOptions(**given), steps, sources=sources), steps

    return run


def _files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_built_then_skipped_then_built_again_when_a_source_changes(make, sources, tmp_path):
    result, steps = make()
    assert [(found.name, found.cuda) for found in result.libraries] == [("vq", False), ("vq_ort", False)]
    assert {found.source_hash for found in result.libraries} == {library.source_hash(sources)}
    assert _files(tmp_path / "out") == ["libvq.so", "libvq_ort.so"]
    assert steps.done == ["native libraries"]
    assert max(fraction for _, fraction in steps.fractions) == 1.0
    assert "build_info.cpp" in {what for what, _ in steps.fractions}

    written = (tmp_path / "out/libvq.so").stat()
    again, steps = make()
    assert again == result
    assert (steps.done, steps.current) == ([], ["native libraries"])
    assert (tmp_path / "out/libvq.so").stat() == written, "the same file was written again"

    elsewhere, steps = make(output=tmp_path / "elsewhere")
    assert steps.done == []
    assert [found.sha256 for found in elsewhere.libraries] == [found.sha256 for found in result.libraries]

    header = sources / "include/vq/contract.h"
    header.write_text(header.read_text() + "// changed\n")
    changed, steps = make()
    assert steps.done == ["native libraries"]
    assert {found.source_hash for found in changed.libraries} == {library.source_hash(sources)}
    assert changed.libraries[0].source_hash != result.libraries[0].source_hash


def test_a_library_that_was_damaged_in_the_cache_is_made_again(make, tmp_path):
    result, _ = make()
    (cached,) = (tmp_path / "cache").rglob("lib/libvq.so")
    cached.write_bytes(b"damaged")
    again, steps = make()
    assert steps.done == ["native libraries"]
    assert again == result


def test_no_nvcc_leaves_out_what_needs_it_and_says_why(make):
    result, steps = make()
    assert set(result.not_built) == {"CUDA kernels", "vq_trt"}
    for why in result.not_built.values():
        assert "nvcc was not found" in why
        assert "CUDA_HOME" in why
    assert "TensorRT headers" not in steps.done, "fetched for nothing"


def test_cuda_can_be_left_out(make, tmp_path, monkeypatch):
    _program(tmp_path / "cuda/bin/nvcc", "echo release 13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    result, _ = make(cuda=False)
    assert result.not_built == dict.fromkeys(("CUDA kernels", "vq_trt"), "left out by --no-cuda")


def test_with_nvcc_and_an_sdk_everything_is_built(make, tmp_path, monkeypatch):
    _program(tmp_path / "cuda/bin/nvcc", "echo release 13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    (tmp_path / "trt").mkdir()
    (tmp_path / "trt/NvInferRuntime.h").write_text("")
    result, _ = make(tensorrt_include_dir=tmp_path / "trt")
    assert [(found.name, found.cuda) for found in result.libraries] == [
        ("vq", True),
        ("vq_ort", True),
        ("vq_trt", True),
    ]
    assert result.not_built == {}


def test_nvcc_is_looked_for_where_the_user_says_first(tmp_path, monkeypatch):
    usual, home, named = (
        _program(tmp_path / name / "bin/nvcc", "echo release 13.0") for name in ("usual", "home", "named")
    )
    on_path = _program(tmp_path / "path/nvcc", "echo release 12.8")
    assert toolchain.find_nvcc() is None
    monkeypatch.setattr(toolchain, "_CUDA_PLACES", (tmp_path / "usual",))
    assert toolchain.find_nvcc().command == str(usual)
    monkeypatch.setenv("PATH", f"{on_path.parent}{os.pathsep}{os.environ['PATH']}")
    assert toolchain.find_nvcc() == toolchain.Tool(str(on_path), "12.8")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert toolchain.find_nvcc().command == str(home)
    monkeypatch.setenv("CUDACXX", str(named))
    assert toolchain.find_nvcc().command == str(named)


def test_a_build_without_cuda_does_not_pass_for_one_with_it(make, tmp_path, monkeypatch):
    without, _ = make()
    _program(tmp_path / "cuda/bin/nvcc", "echo release 13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    (tmp_path / "trt").mkdir()
    (tmp_path / "trt/NvInferRuntime.h").write_text("")
    with_cuda, steps = make(tensorrt_include_dir=tmp_path / "trt")
    assert steps.done == ["native libraries"]
    assert [without.libraries[0].cuda, with_cuda.libraries[0].cuda] == [False, True]


def test_headers_that_cannot_be_fetched_leave_one_library_out(make):
    result, _ = make(ort_include_dir=None)
    assert [found.name for found in result.libraries] == ["vq"]
    assert "npm was not found" in result.not_built["vq_ort"]
    assert "--ort-include-dir" in result.not_built["vq_ort"]


@pytest.mark.parametrize("option", ["ort_include_dir", "tensorrt_include_dir"])
def test_a_named_folder_without_headers_is_refused_before_anything_is_done(make, tmp_path, option):
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')} .*nowhere: no "):
        make(**{option: tmp_path / "nowhere"})
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("there", "missing"),
    [
        (("cmake", "ninja", "as", "ld"), r"no C\+\+ compiler was found.*apt-get install g\+\+"),
        (("c++", "ninja", "as"), r"CMake 3\.24 or newer was not found; install it with: pip install"),
        (("c++", "cmake"), r"neither ninja nor make was found; install one with: pip install"),
    ],
)
def test_a_missing_tool_is_named(make, tmp_path, monkeypatch, there, missing):
    _only(tmp_path, monkeypatch, *there)
    monkeypatch.setattr(toolchain, "_in_environment", lambda _: None)
    with pytest.raises(UserError, match=missing):
        make()


def test_a_cmake_that_is_too_old_is_named(make, tmp_path, monkeypatch):
    monkeypatch.setattr(toolchain, "_in_environment", lambda _: None)
    old = _program(tmp_path / "old/cmake", "echo cmake version 3.18.4")
    monkeypatch.setenv("PATH", f"{old.parent}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(UserError, match=rf"CMake 3\.24 or newer was not found \({old} is 3\.18\.4\)"):
        make()


def test_the_compiler_can_be_named(make, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -v")
    with pytest.raises(UserError, match="CXX names 'no-such-compiler -v'"):
        make()
    wrapper = _program(tmp_path / "mine", f'echo "$@" >> {tmp_path}/calls\nexec {shutil.which("c++")} "$@"')
    monkeypatch.setenv("CXX", str(wrapper))
    make()
    assert "build_info.cpp" in (tmp_path / "calls").read_text()


def test_a_compiler_error_is_shown_and_what_was_there_stays(make, sources, tmp_path):
    before, _ = make()
    (sources / "capi/build_info.cpp").write_text("int broken = nonsense;\n")
    with pytest.raises(UserError, match=r"error: .nonsense. was not declared") as failed:
        make()
    log = re.search(r"the whole log is (\S+),", str(failed.value))[1]
    with open(log) as text:
        assert "nonsense" in text.read()
    assert [library.find(name, tmp_path / "out") for name in ("vq", "vq_ort")] == list(before.libraries)
    assert _files(tmp_path / "out") == ["libvq.so", "libvq_ort.so"]


def test_an_output_folder_that_cannot_be_made_is_named(make, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file/out/libvq\.so: cannot write there.*-o"):
        make(output=tmp_path / "file/out")


def test_a_cache_that_cannot_be_made_is_named(make, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        make()


def test_two_builds_at_once_make_one(make, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(make, output=tmp_path / f"out{number}") for number in range(2)]
        steps = [run.result()[1] for run in runs]
    assert sorted(len(step.done) for step in steps) == [0, 1]
    assert _files(tmp_path / "out0") == _files(tmp_path / "out1") == ["libvq.so", "libvq_ort.so"]


def _type(capsys, monkeypatch, *args):
    """(exit code, stdout, stderr) of `export-vq plugins ARGS`."""
    monkeypatch.setattr(sys, "argv", ["export-vq", "plugins", *map(str, args)])
    monkeypatch.setattr(cli.console, "width", 1000)
    monkeypatch.setenv("COLUMNS", "1000")
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_list_says_current_stale_or_missing(make, tmp_path, capsys, monkeypatch):
    make()  # from other sources than the package's
    hash_, info = library.source_hash(), (tmp_path / "out/libvq.so").read_bytes()
    (tmp_path / "out/libvq.so").write_bytes(re.sub(rb'(?<="source_hash": ")\w+', hash_.encode(), info))
    code, stdout, _ = _type(capsys, monkeypatch, "list", tmp_path / "out")
    assert code == 0
    lines = [line.rstrip().split("  ->  ") for line in stdout.splitlines()]
    assert [line[0].split()[:2] for line in lines] == [["current", "vq"], ["stale", "vq_ort"], ["missing", "vq_trt"]]
    assert [line[1:] for line in lines] == [[], *[[f"export-vq plugins build -o {tmp_path / 'out'}"]] * 2]
    code, stdout, _ = _type(capsys, monkeypatch, "list", tmp_path / "out", "--json")
    listed = json.loads(stdout)
    assert {name: found and found["current"] for name, found in listed.items()} == {
        "vq": True,
        "vq_ort": False,
        "vq_trt": None,
    }


def test_a_failed_build_is_exit_code_2(tmp_path, capsys, monkeypatch):
    code, stdout, stderr = _type(capsys, monkeypatch, "build", "--ort-include-dir", tmp_path / "nowhere")
    assert (code, stdout) == (2, "")
    assert stderr.startswith(f"error: --ort-include-dir {tmp_path}")
