"""What this machine has, what it lacks, and how to mend it. Works with nothing but the tool itself installed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from export_vq.errors import UserError
from export_vq.plugins.library import LIBRARIES, build_command, find
from export_vq.plugins.toolchain import NVCC_MEND, find_toolchain
from export_vq.records import Record

_INSTALL = "pip install -c constraints.txt"
_PACKAGES = {
    # distribution -> what is not possible without it, how to get it
    "torch": ("reading checkpoints, exporting, checking", f"{_INSTALL} export-vq"),
    "transformers": ("reading checkpoints, exporting, checking", f"{_INSTALL} export-vq"),
    "onnx": ("exporting", f"{_INSTALL} export-vq"),
    "onnxscript": ("exporting", f"{_INSTALL} export-vq"),
    "faiss-cpu": ("compress", f"{_INSTALL} export-vq"),
    "onnxruntime": ("checking and timing ONNX files", f"{_INSTALL} 'export-vq[cpu]', or [gpu] on a machine with CUDA"),
    "tensorrt": ("TensorRT engines", f"{_INSTALL} 'export-vq[tensorrt]' on a machine with an NVIDIA GPU"),
}


@dataclass(frozen=True)
class Finding(Record):
    """One line of the examination: `state` is 'ok', 'missing' or 'wrong'; `mend` is empty when ok."""

    subject: str
    state: str
    detail: str
    mend: str = ""


def examine() -> list[Finding]:
    """Look at versions, packages, native libraries and what builds them, GPU, disk and memory."""
    findings = [Finding("Python", "ok", f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores")]
    findings += [_package(name) for name in _PACKAGES]
    if _version("onnxruntime") and _version("onnxruntime-gpu"):
        findings.append(
            Finding(
                "onnxruntime",
                "wrong",
                "onnxruntime and onnxruntime-gpu are both installed and overwrite each other",
                "pip uninstall onnxruntime onnxruntime-gpu, then install one of them",
            )
        )
    findings += [_library(name) for name in LIBRARIES]
    return [*findings, _compilers(), _gpu(), _memory(), _disk()]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(name: str) -> Finding:
    needed_for, mend = _PACKAGES[name]
    found = _version(name) or (_version("onnxruntime-gpu") if name == "onnxruntime" else None)
    if found:
        return Finding(name, "ok", found)
    return Finding(name, "missing", f"needed for {needed_for}", mend)


def _library(name: str) -> Finding:
    file = f"lib{name}.so"
    try:
        library = find(name)
    except UserError as error:
        return Finding(file, "wrong", str(error), build_command())
    if library is None:
        return Finding(file, "missing", f"not built: {LIBRARIES[name]}", build_command())
    if not library.current:
        return Finding(
            file, "wrong", f"{LIBRARIES[name]}: built from other sources than this version's", build_command()
        )
    return Finding(file, "ok", f"{LIBRARIES[name]}, {'with' if library.cuda else 'without'} CUDA kernels")


def _compilers() -> Finding:
    try:
        tools = find_toolchain()
    except UserError as error:
        return Finding("compilers", "missing", str(error), "none needed where the native libraries are built already")
    found = f"CMake {tools.cmake.version}, C++ {tools.compiler.command} {tools.compiler.version}"
    if tools.nvcc is None:
        return Finding(
            "compilers", "missing", f"{found}; no nvcc, so no CUDA kernels and no TensorRT plugin", NVCC_MEND
        )
    return Finding("compilers", "ok", f"{found}, nvcc {tools.nvcc.version}")


def _gpu() -> Finding:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Finding(
            "GPU",
            "missing",
            "no NVIDIA driver (nvidia-smi not found); engines are built and run where a GPU is",
            "none needed for ONNX on a CPU",
        )
    query = [tool, "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("GPU", "wrong", f"nvidia-smi failed ({error})", "repair the NVIDIA driver")
    return Finding("GPU", "ok", "; ".join(done.stdout.strip().splitlines()))


def _memory() -> Finding:
    info = Path("/proc/meminfo")
    if not info.is_file():
        return Finding("memory", "ok", "unknown on this system")
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines())
    return Finding(
        "memory",
        "ok",
        f"{int(fields['MemAvailable'].split()[0]) >> 20} GiB available of {int(fields['MemTotal'].split()[0]) >> 20} GiB",
    )


def _disk() -> Finding:
    free = shutil.disk_usage(".").free >> 30
    if free < 4:
        return Finding(
            "disk",
            "wrong",
            f"{free} GiB free here; a 135M-parameter model needs 2 GiB",
            "free some room, or give another folder with -o",
        )
    return Finding("disk", "ok", f"{free} GiB free here")
