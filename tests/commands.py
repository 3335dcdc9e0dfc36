"""`export-vq ARGS` as tests type it: in this process, on a wide terminal."""

from __future__ import annotations

import contextlib
import io

import pytest

from export_vq import cli


def run(*args: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        patch.setattr("sys.argv", ["export-vq", *map(str, args)])
        patch.setenv("COLUMNS", "300")
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, stdout.getvalue(), stderr.getvalue()
