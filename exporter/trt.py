"""The TensorRT on this machine: which flavour and version, its GPU, its log, its plugin registry."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from export_vq import contract
from export_vq.errors import UserError
from export_vq.files import sha256
from export_vq.outputs import OPS
from export_vq.require import require

FLAVOURS = ("tensorrt", "tensorrt_rtx")
"""Import names: TensorRT, and TensorRT for RTX, whose builder needs no GPU."""
DTYPES = {"float": "fp32", "half": "fp16", "bf16": "bf16"}
"""TensorRT's names of the types that an export can have, lower case -> ours."""

_KEPT_LINES = 20
_LAYERS = ("Layers:", "Engine Layer Information:")
"""How the builder's account of an engine begins, by version."""
_NOISE = ("--- Begin node", "--- End node", "catchCudaError")
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True)
class Gpu:
    """A CUDA device."""

    name: str
    compute_capability: str


@dataclass(frozen=True)
class TensorRT:
    """An importable TensorRT: its module, flavour and version, and the GPU it would use, if there is one."""

    module: Any
    flavour: str
    version: str
    gpu: Gpu | None

    def __str__(self) -> str:
        return f"{'TensorRT' if self.flavour == 'tensorrt' else 'TensorRT for RTX'} {self.version}"


def find_tensorrt(flavour: str | None = None) -> TensorRT:
    """Import TensorRT.

    Args:
        flavour: one of FLAVOURS; None takes TensorRT where there is a GPU, else TensorRT for RTX.

    Raises:
        UserError: it is not installed, or cannot be loaded.
    """
    gpu = find_gpu()
    if flavour is None:
        order = FLAVOURS if gpu else FLAVOURS[::-1]
        flavour = next((name for name in order if _importable(name)), "tensorrt")
    module = require(flavour, extra="tensorrt" if flavour == "tensorrt" else "rtx")
    return TensorRT(module, flavour, str(module.__version__), gpu)


def find_gpu() -> Gpu | None:
    """The first CUDA device, asked of the driver itself; None without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, count = ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    numbers = [ctypes.c_int(), ctypes.c_int()]
    asked: tuple[Callable[[], int], ...] = (
        lambda: driver.cuInit(0),
        lambda: driver.cuDeviceGetCount(ctypes.byref(count)),
        lambda: driver.cuDeviceGet(ctypes.byref(device), 0),
        lambda: driver.cuDeviceGetName(name, len(name), device),
        lambda: driver.cuDeviceGetAttribute(ctypes.byref(numbers[0]), _MAJOR, device),
        lambda: driver.cuDeviceGetAttribute(ctypes.byref(numbers[1]), _MINOR, device),
    )
    if any(ask() != 0 for ask in asked):
        return None
    return Gpu(name.value.decode(), f"{numbers[0].value}.{numbers[1].value}")


def polygraphy(here: TensorRT) -> ModuleType:
    """Polygraphy's TensorRT backend, speaking to this flavour and logging to `log(here)`.

    Raises:
        UserError: it is not installed, or speaks to the other flavour already: it chooses once a process.
    """
    rtx = here.flavour == "tensorrt_rtx"
    loaded = "polygraphy.backend.trt" in sys.modules
    if not loaded:
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(rtx))
    config: Any = require("polygraphy.config", extra="tensorrt")
    if loaded and rtx != getattr(config, "USE_TENSORRT_RTX", False):
        raise UserError(
            f"Polygraphy already uses the other flavour of TensorRT in this process; start another one for {here}"
        )
    config.USE_TENSORRT_RTX = rtx
    backend = require("polygraphy.backend.trt", extra="tensorrt")
    # Polygraphy prints what TensorRT logs; ours keeps the errors for the message.
    util: Any = require("polygraphy.backend.trt.util")
    util.TRT_LOGGER = log(here)
    return backend


_logs: dict[str, Any] = {}


def log(here: TensorRT) -> Any:
    """The process's logger for this flavour: an ILogger with `lines`, the latest errors, and `layers`, what the builder told
    last of an engine's layers."""
    if here.flavour not in _logs:
        trt = here.module

        class Log(trt.ILogger):  # type: ignore[misc,name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.clear()

            def clear(self) -> None:
                self.lines: list[str] = []
                self.layers = ""

            def log(self, severity: Any, message: str) -> None:
                if message.startswith(_LAYERS):
                    self.layers = message
                if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                    self.lines = [*self.lines, message.strip()][-_KEPT_LINES:]

        _logs[here.flavour] = Log()
    return _logs[here.flavour]


def last_errors(here: TensorRT, count: int = 3) -> str:
    """What TensorRT logged last as errors, for a message."""
    lines = [" ".join(line.split()) for line in log(here).lines]
    # Frames around a message, and what follows any error where there is no GPU.
    telling = [line for line in lines if not any(noise in line for noise in _NOISE)]
    return " | ".join(list(dict.fromkeys(telling or lines))[-count:]) or "it gave no reason"


_registered: dict[str, str] = {}
"""SHA-256 of the plugin library that this process uses, by flavour."""


def load_plugin(here: TensorRT, library: Path) -> str:
    """Register the creators of libvq_trt with TensorRT, once a process; returns the SHA-256 of the library.

    Raises:
        UserError: the library is missing, cannot be loaded, brings no creator of this contract, or another one did.
    """
    if not library.is_file():
        raise UserError(f"{library}: no such file; build the plugin library with: export-vq plugins build")
    digest = sha256(library)
    registry = here.module.get_plugin_registry()

    def missing() -> list[str]:
        found = {(creator.name, creator.plugin_version, creator.plugin_namespace) for creator in registry.all_creators}
        return [name for name in OPS.values() if (name, str(contract.VERSION), contract.DOMAIN) not in found]

    if not missing():
        if _registered.get(here.flavour) != digest:
            raise UserError(f"{library}: this process already uses another plugin library; start another one for this")
        return digest
    log(here).clear()
    try:
        registry.load_library(str(library))
        reason = last_errors(here)
    except Exception as error:  # the bindings' exceptions share no base
        reason = str(error).strip().split("\n")[0]
    if names := missing():
        raise UserError(
            f"{library}: {here} found no creator of {', '.join(names)} version {contract.VERSION} in namespace "
            f"{contract.DOMAIN} there ({reason}); build the library again with: export-vq plugins build"
        )
    _registered[here.flavour] = digest
    return digest


def _importable(name: str) -> bool:
    try:
        require(name)
    except UserError:
        return False
    return True
