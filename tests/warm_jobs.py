"""The command line in processes that can be killed, limited and counted by the dozen.

A fork server has everything imported and has exported one model before the first of them starts, so that each only pays for
its own work. One thread, as a process with more cannot be forked.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

JOBS = "fork server"


@functools.cache
def server() -> Any:
    context = multiprocessing.get_context("forkserver")
    os.environ |= {"OMP_NUM_THREADS": "1", JOBS.replace(" ", "_"): "1"}
    context.set_forkserver_preload(["warm_jobs"])
    return context


def start(log: Path, *args: object, file_bytes: int = resource.RLIM_INFINITY, preset: str = "") -> Any:
    """Start `export-vq ARGS` in a process of its own; what it prints goes to `log`.

    Args:
        file_bytes: the largest file that it may write.
        preset: the module attribute to change before, 'module:name=float': for times that no test can wait for.
    """
    process = server().Process(target=_run, args=(log, [str(arg) for arg in args], file_bytes))
    process.start()
    return process


def finish(log: Path, *args: object, limit: float = 120, **options: Any) -> tuple[int, str]:
    """Run it to its end, which must come in `limit` seconds: its exit code, and what it printed."""
    process = start(log, *args, **options)
    process.join(limit)
    hung = process.is_alive()
    process.kill()
    assert not hung, f"hangs: {args}\n{log.read_text()}"
    return process.exitcode, log.read_text()
