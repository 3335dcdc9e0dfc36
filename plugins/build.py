"""Builds the native libraries with CMake: tools and headers in, whole library files out, compiled outside of the tree."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from export_vq.errors import UserError
from export_vq.files import sha256, whole
from export_vq.plugins import headers
from export_vq.plugins.compiling import locked, run_logged
from export_vq.plugins.headers import ONNX_RUNTIME, TENSORRT, HeaderSet
from export_vq.plugins.library import LIB, LIBRARIES, SOURCES, Library, find, source_hash
from export_vq.plugins.toolchain import NVCC_MEND, Toolchain, find_toolchain
from export_vq.progress import Progress
from export_vq.records import Record

_FLAGS = ("CXXFLAGS", "LDFLAGS", "CUDAFLAGS", "CUDAHOSTCXX")
"""Environment variables that CMake takes its first settings from."""


@dataclass(frozen=True)
class BuildOptions:
    """What to build and with what. A folder of headers that is None is looked for on this machine, then fetched."""

    output: Path = LIB
    ort_include_dir: Path | None = None
    tensorrt_include_dir: Path | None = None
    cuda: bool = True
    cuda_architectures: tuple[str, ...] = ()
    """Compute capabilities as CMake writes them ('87', '120'); empty: all that nvcc knows."""
    jobs: int = 0
    """Compilers at a time; 0: one per core."""


@dataclass(frozen=True)
class BuildResult:
    """The libraries that are there now; and what was not built, with the reason and the mend."""

    libraries: tuple[Library, ...]
    not_built: dict[str, str]


@dataclass(frozen=True)
class _Receipt(Record):
    """Left in a build folder when all was built: from which sources, and the SHA-256 of each library that came out."""

    source_hash: str
    libraries: dict[str, str]


def build_libraries(options: BuildOptions, progress: Progress, *, sources: Path = SOURCES) -> BuildResult:
    """Build every native library that this machine can build, into `options.output`.

    Nothing is compiled where the same sources were built the same way before. A library that cannot be built for lack of
    nvcc or headers is left out, and the result says why.

    Raises:
        UserError: no CMake or no compiler, a folder that the user named holds no headers, or compiling failed.
    """
    tools = find_toolchain()
    named = {ONNX_RUNTIME: options.ort_include_dir, TENSORRT: options.tensorrt_include_dir}
    for header_set, folder in named.items():
        if folder is not None:
            headers.check(header_set, folder)

    no_cuda = _why_no_cuda(options, tools)
    not_built = {"CUDA kernels": no_cuda, TENSORRT.library: no_cuda} if no_cuda else {}
    include: dict[HeaderSet, Path] = {}
    for header_set, folder in named.items():
        if header_set.library not in not_built:
            try:
                include[header_set] = folder or _headers(header_set, progress)
            except UserError as error:
                not_built[header_set.library] = str(error)

    wanted = [name for name in LIBRARIES if name not in not_built]
    settings = _settings(options, tools, include)
    build = headers.cache_folder() / "build" / _key(sources, tools, settings, include)
    with locked(build):
        _compile(build, tools, settings, wanted, options.jobs, progress, sources)
        for name in wanted:
            _put(build / "lib" / f"lib{name}.so", options.output)
    found = (find(name, options.output) for name in wanted)
    return BuildResult(tuple(library for library in found if library is not None), not_built)


def _why_no_cuda(options: BuildOptions, tools: Toolchain) -> str | None:
    if not options.cuda:
        return "left out by --no-cuda"
    return f"nvcc was not found; {NVCC_MEND}" if tools.nvcc is None else None


def _headers(header_set: HeaderSet, progress: Progress) -> Path:
    found = headers.on_this_machine(header_set)
    if found is not None:
        return found
    with progress.step(f"{header_set.runtime} headers") as tell:
        tell(f"fetching {header_set.megabytes} MB", 0.0)
        return headers.fetch(header_set)


def _settings(options: BuildOptions, tools: Toolchain, include: dict[HeaderSet, Path]) -> list[str]:
    cuda = tools.nvcc if options.cuda else None
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_MAKE_PROGRAM": tools.maker.command,
        "VQ_CUDA": "ON" if cuda else "OFF",
        "VQ_CUDA_ARCHITECTURES": ";".join(options.cuda_architectures),
        **({"CMAKE_CUDA_COMPILER": cuda.command} if cuda else {}),
        **{header_set.variable: str(folder.resolve()) for header_set, folder in include.items()},
    }
    return ["-G", tools.generator, *(f"-D{name}={value}" for name, value in settings.items())]


def _key(sources: Path, tools: Toolchain, settings: list[str], include: dict[HeaderSet, Path]) -> str:
    """A name for everything that decides what comes out, what the sources say aside: those are compiled incrementally."""
    versions = [sha256(folder / header_set.marker) for header_set, folder in include.items()]
    flags = [os.environ.get(name) for name in _FLAGS]
    return hashlib.sha256(json.dumps([str(sources), repr(tools), settings, versions, flags]).encode()).hexdigest()[:16]


def _compile(
    build: Path,
    tools: Toolchain,
    settings: list[str],
    wanted: list[str],
    jobs: int,
    progress: Progress,
    sources: Path,
) -> None:
    """Make build/lib hold the libraries `wanted`, compiled from `sources` as they are now."""
    expected = source_hash(sources)
    lib, receipt, log = build / "lib", build / "receipt.json", build / "build.log"
    if receipt.is_file() and _Receipt.load(receipt) == _receipt(expected, lib, wanted):
        progress.skipped("native libraries")
        return
    receipt.unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    shutil.rmtree(lib, ignore_errors=True)  # CMake leaves an installed file alone that looks newer than its own
    environment = {**os.environ, "CXX": tools.compiler.command}
    cmake, tree = tools.cmake.command, str(build / "cmake")
    with progress.step("native libraries") as tell:
        for step in (
            ["-S", str(sources), "-B", tree, *settings, f"-DVQ_SOURCE_HASH={expected}"],
            ["--build", tree, "--parallel", str(jobs or len(os.sched_getaffinity(0)))],
            ["--install", tree, "--prefix", str(lib)],
        ):
            run_logged([cmake, *step], log, environment, tell)
    _receipt(expected, lib, wanted).save(receipt)


def _receipt(built_from: str, lib: Path, names: list[str]) -> _Receipt:
    files = {name: lib / f"lib{name}.so" for name in names}
    return _Receipt(built_from, {name: sha256(file) if file.is_file() else "" for name, file in files.items()})


def _put(library: Path, folder: Path) -> None:
    target = folder / library.name
    if not (target.is_file() and sha256(target) == sha256(library)):
        with whole(target) as staged:
            shutil.copyfile(library, staged)
