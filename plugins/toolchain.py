"""The tools that build the native libraries: where they are, and what to do about one that is not."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from export_vq.errors import UserError

_CMAKE_LEAST = (3, 24)
_CUDA_PLACES = (Path("/usr/local/cuda"),)
_PYPI_TOOLS = "pip install -c constraints.txt 'export-vq[plugins]'"
NVCC_MEND = "install the CUDA toolkit, or set CUDA_HOME to where it is"


@dataclass(frozen=True)
class Tool:
    """A program and what it says its version is."""

    command: str
    version: str


@dataclass(frozen=True)
class Toolchain:
    """What a build runs. Without `nvcc` there are no CUDA kernels."""

    cmake: Tool
    maker: Tool
    """ninja, or make where there is none."""
    compiler: Tool
    nvcc: Tool | None

    @property
    def generator(self) -> str:
        """CMake's name for what drives the compilers."""
        return "Ninja" if Path(self.maker.command).name == "ninja" else "Unix Makefiles"


def find_toolchain() -> Toolchain:
    """Look for CMake and ninja (PyPI's in this environment, then PATH), a C++ compiler (CXX, then PATH) and nvcc.

    Raises:
        UserError: CMake, ninja and make, or the C++ compiler is not there.
    """
    maker = _installed("ninja") or _installed("make")
    if maker is None:
        raise UserError(f"neither ninja nor make was found; install one with: {_PYPI_TOOLS}")
    return Toolchain(_cmake(), _tool(maker), _compiler(), find_nvcc())


def find_nvcc() -> Tool | None:
    """NVIDIA's compiler: CUDACXX, CUDA_HOME, PATH, then the toolkit's usual place."""
    home = os.environ.get("CUDA_HOME")
    candidates = [
        os.environ.get("CUDACXX"),
        home and f"{home}/bin/nvcc",
        "nvcc",
        *(str(place / "bin/nvcc") for place in _CUDA_PLACES),
    ]
    for candidate in filter(None, candidates):
        if found := shutil.which(candidate):
            return _tool(found)
    return None


def _cmake() -> Tool:
    wanted = ".".join(map(str, _CMAKE_LEAST))
    too_old = ""
    for found in filter(None, (_in_environment("cmake"), shutil.which("cmake"))):
        tool = _tool(found)
        if tuple(map(int, tool.version.split(".")[:2])) >= _CMAKE_LEAST:
            return tool
        too_old = f" ({found} is {tool.version})"
    raise UserError(f"CMake {wanted} or newer was not found{too_old}; install it with: {_PYPI_TOOLS}")


def _compiler() -> Tool:
    named = os.environ.get("CXX")
    if named:
        program = shlex.split(named)
        if shutil.which(program[0]) is None:
            raise UserError(f"CXX names {named!r}, which is no program; unset it or name a C++17 compiler")
        return Tool(named, _version(program))
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return _tool(found)
    raise UserError(
        "no C++ compiler was found (looked for c++, g++, clang++); install one, as in: apt-get install g++; or name one with CXX"
    )


def _installed(name: str) -> str | None:
    return _in_environment(name) or shutil.which(name)


def _in_environment(name: str) -> str | None:
    """A program that a wheel put beside this Python, which need not be on PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts"))


def _tool(path: str) -> Tool:
    return Tool(path, _version([path]))


def _version(program: list[str]) -> str:
    """What a program says its version is; '0' where it does not say, so that the build's own log tells why."""
    try:
        done = subprocess.run([*program, "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError):
        return "0"
    found = re.search(r"\d+(\.\d+)+", done.stdout)
    return found[0] if found else "0"
