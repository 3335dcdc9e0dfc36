"""Runs CMake in a build folder that is kept: one process at a time, everything said in a log, progress read from it."""

from __future__ import annotations

import fcntl
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from export_vq.errors import UserError

_DONE = re.compile(r"\[\s*(?:(\d+)/(\d+)|(\d+)%)\]\s+(.*)")
"""What ninja ('[3/12] ...') and make ('[ 25%] ...') print as they go."""
_LAST_LINES = 25


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`, which is made if need be, against other builds; waits for one that is under way.

    Raises:
        UserError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise UserError(
            f"{folder}: cannot build there ({error.strerror}); set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run_logged(
    command: list[str], log: Path, environment: Mapping[str, str], tell: Callable[[str, float], None]
) -> None:
    """Run a step of the build; what it prints is added to `log`, and `tell` hears which file is done and the fraction.

    Raises:
        UserError: the step failed; the sentence is followed by the last lines of the log.
    """
    with log.open("a", encoding="utf-8") as record:
        record.write(f"\n$ {' '.join(command)}\n")
        try:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
        except OSError as error:
            raise UserError(f"{command[0]} cannot be run ({error.strerror}); install CMake again") from error
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                record.write(line)
                if found := _DONE.match(line):
                    done, of, percent, what = found.groups()
                    tell(Path(what).stem, int(percent) / 100 if percent else int(done) / int(of))
    if process.returncode:
        last = log.read_text(encoding="utf-8").splitlines()[-_LAST_LINES:]
        raise UserError(
            f"building the native libraries failed; the whole log is {log}, which ends:\n" + "\n".join(last)
        )
