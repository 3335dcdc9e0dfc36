"""The command line in processes that can be killed, limited and counted by the dozen.

A fork server has everything imported, and the tiny Llama traced (quick.py), before the first of them starts: seconds of
computation that write no file. It has one thread, as a process with more cannot be forked safely.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import multiprocessing
import os
import resource
import sys
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

_ROLE = "EXPORT_VQ_FORK_SERVER"


@functools.cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    before = dict(os.environ)
    # Python before 3.13 does not tell the server where to import from.
    os.environ |= {"OMP_NUM_THREADS": "1", _ROLE: "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ensure_running()
    os.environ.clear()
    os.environ.update(before)
    return context


def start(log: Path, *args: object, file_bytes: int = resource.RLIM_INFINITY) -> Any:
    """Start `export-vq ARGS` in a process of its own that heeds permissions even as root; it prints to `log`.

    Args:
        file_bytes: what no file may exceed, as on a disk that is full.
    """
    process = _server().Process(target=_run, args=(log, [str(arg) for arg in args], file_bytes))
    process.start()
    return process


def finish(log: Path, *args: object, limit: float = 300, **options: Any) -> tuple[int, str]:
    """Run it to its end, which must come in `limit` seconds: exit code and what it printed."""
    process = start(log, *args, **options)
    process.join(limit)
    hangs = process.is_alive()
    process.kill()
    process.join()
    assert not hangs, f"hangs: {args}\n{log.read_text()}"
    return process.exitcode, log.read_text()


def _run(log: Path, args: list[str], file_bytes: int) -> None:
    with log.open("w") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    _heed_permissions()
    from export_vq.cli import main

    sys.argv = ["export-vq", *args]
    try:
        main()
    finally:
        _peak(log).write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10))


def peak_bytes(log: Path) -> int:
    """The most memory that the finished process with this log held."""
    return int(_peak(log).read_text())


def _peak(log: Path) -> Path:
    return log.with_name(f"{log.name}.peak")


def _heed_permissions() -> None:
    """Give up what lets root read and write everything: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH (capabilities(7))."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    if libc.capget(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    sets[0] &= ~(1 << 1 | 1 << 2)
    if libc.capset(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def _warm() -> None:
    import bundles
    import quick
    import torch
    import tqdm

    from export_vq import pipeline  # noqa: F401

    quick.install()
    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0  # a thread otherwise, as importing onnxruntime is
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        bundles.exported()
    assert len(os.listdir("/proc/self/task")) == 1


if os.environ.pop(_ROLE, None):
    _warm()
