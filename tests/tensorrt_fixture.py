"""A real TensorRT parser and builder on a machine with no GPU.

TensorRT for RTX builds ahead of time without a device. Its libraries come in ONNX Runtime's plugin wheel, without Python
bindings; TensorRT's own bindings come in a wheel without libraries. Five small libraries bring the two together, found by
their sonames because they are loaded first: `libnvinfer.so.11` forwards (native/trt_forward.cpp), the others only carry a
name. The result is importable as `tensorrt_rtx`, which it is, and as `tensorrt`, whose interface it has.
"""

import ctypes
import importlib.util
import re
import subprocess
import sys
import types
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

WHEELS = ("onnxruntime-ep-nv-tensorrt-rtx-cu13", "tensorrt-cu13-bindings")
FORWARD = Path(__file__).parent / "native" / "trt_forward.cpp"
_EMPTY = ("libnvonnxparser.so.11", "libnvinfer_plugin.so.11", "libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so")
"""The bindings ask for the first two; TensorRT for RTX itself opens the others, by names without a version."""

_held = []


def install_tensorrt(folder):
    """Make `tensorrt` and `tensorrt_rtx` importable in this process; skips the test with the reason where it cannot.

    `folder` takes the libraries, some hundred kilobytes; one call a process, later ones do nothing.
    """
    if _held:
        return sys.modules["tensorrt_rtx"]
    for wheel in WHEELS:
        try:
            version(wheel)
        except PackageNotFoundError:
            pytest.skip(f"{wheel} is not installed; pip install --no-deps {' '.join(WHEELS)}")
    package = importlib.util.find_spec("onnxruntime_ep_nv_tensorrt_rtx")
    (rtx,) = Path(package.submodule_search_locations[0]).glob("libtensorrt_rtx.so.*.*")
    parser = next(rtx.parent.glob("libtensorrt_onnxparser_rtx.so.*.*"))
    number = re.search(r"\.so\.(.*)", rtx.name)[1]
    major, minor, patch = map(int, number.split("."))
    macros = {
        "VQ_RTX_VERSION": 10000 * major + 100 * minor + patch,
        "VQ_RTX_LIBRARY": f'"{rtx}"',
        "VQ_RTX_PARSER": f'"{parser}"',
    }
    _compile(folder, "libnvinfer.so.11", FORWARD, *(f"-D{name}={value}" for name, value in macros.items()), "-ldl")
    empty = folder / "empty.cpp"
    empty.write_text("")
    for name in _EMPTY:
        needed = [rtx] * (name == "libtensorrt_rtx.so") + [parser] * (name == "libtensorrt_onnxparser_rtx.so")
        _compile(folder, name, empty, "-Wl,--no-as-needed", *needed)
    # Each kept out of the global scope, or the bindings would meet the RTX entry points themselves.
    for library in (rtx, parser, *(folder / name for name in reversed((*_EMPTY, "libnvinfer.so.11")))):
        _held.append(ctypes.CDLL(str(library)))
    import tensorrt_bindings as bindings

    _bridge_differences(bindings)
    module = types.ModuleType("tensorrt_rtx")
    module.__dict__.update({**bindings.__dict__, "__name__": "tensorrt_rtx", "__version__": number})
    sys.modules["tensorrt_rtx"] = module
    sys.modules["tensorrt"] = bindings
    return module


def _compile(folder, name, source, *options):
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", f"-Wl,-soname,{name}", "-o", folder / name, source]
    subprocess.run([*map(str, command), *map(str, options)], check=True)


def _bridge_differences(bindings):
    """Two calls that these bindings and that library lay out differently; with bindings of the same release they just work.

    No input of our graphs is a shape tensor, and every network of TensorRT for RTX is strongly typed.
    """
    bindings.ITensor.is_shape_tensor = property(lambda _: False)
    bindings.INetworkDefinition.get_flag = lambda _, flag: flag == flag.STRONGLY_TYPED
