"""Headers of ONNX Runtime and TensorRT for machines without their SDKs: fetched once, by exact version and checksum.

The pip packages of both ship no headers, but packages of other projects carry them. Only the headers are kept, in a
cache folder of the user's. `python -m export_vq.plugins.headers` fetches both and prints them as CMake options.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from export_vq.errors import UserError
from export_vq.files import sha256, whole


@dataclass(frozen=True)
class HeaderSet:
    """A runtime's headers, and the package that carries them."""

    runtime: str
    library: str
    """The library that is compiled against them."""
    option: str
    """The option of `export-vq plugins build` that names a folder with them instead."""
    variable: str
    """The same for CMake."""
    marker: str
    """The header that an adapter includes."""
    package: str
    version: str
    sha256: str
    folder: str
    """Where the headers lie in the package."""
    megabytes: int


ONNX_RUNTIME: Final = HeaderSet(
    runtime="ONNX Runtime",
    library="vq_ort",
    option="--ort-include-dir",
    variable="ORT_INCLUDE_DIR",
    marker="onnxruntime_cxx_api.h",
    package="com.github.asus4.onnxruntime",
    version="0.4.9",
    sha256="e59788788818fdde1b2e522e766a21ba0f7d8391de55737abf81e32cc801785d",
    folder="package/Plugins/iOS~/onnxruntime.xcframework/ios-arm64/onnxruntime.framework/Headers",
    megabytes=150,
)
TENSORRT: Final = HeaderSet(
    runtime="TensorRT",
    library="vq_trt",
    option="--tensorrt-include-dir",
    variable="TENSORRT_INCLUDE_DIR",
    marker="NvInferRuntime.h",
    package="kernel-lens",
    version="2.0.1",
    sha256="07cc714e8b5e7f34b672f7c7fad93febe7c747be5837ba276b1527370134ffe0",
    folder="kernel_lens/include/tensorrt",
    megabytes=1,
)

_TENSORRT_TOO_OLD = range(2, 10)
"""Major versions without IPluginV3; TensorRT for RTX counts from 1 again."""
_TENSORRT_PLACES = (Path("/usr/include/x86_64-linux-gnu"), Path("/usr/include/aarch64-linux-gnu"))


def cache_folder() -> Path:
    """Where this tool keeps what it can make again: XDG_CACHE_HOME/export-vq, or ~/.cache/export-vq."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "export-vq"


def check(headers: HeaderSet, folder: Path) -> None:
    """Is a folder that the user named usable?

    Raises:
        UserError: the headers are not in it, or are of a version that is too old.
    """
    if not (folder / headers.marker).is_file():
        raise UserError(
            f"{headers.option} {folder}: no {headers.marker} there; name the folder that holds {headers.runtime}'s headers"
        )
    if headers is TENSORRT and (major := tensorrt_major(folder)) in _TENSORRT_TOO_OLD:
        raise UserError(
            f"{headers.option} {folder}: TensorRT {major}, but the plugin needs 10 or newer; leave the option out to fetch headers"
        )


def on_this_machine(headers: HeaderSet) -> Path | None:
    """A TensorRT SDK (TENSORRT_ROOT, or Debian's places), else what was fetched before; None where there is neither."""
    if headers is TENSORRT:
        root = os.environ.get("TENSORRT_ROOT")
        for place in (*([Path(root) / "include"] if root else []), *_TENSORRT_PLACES):
            if (place / headers.marker).is_file() and tensorrt_major(place) not in _TENSORRT_TOO_OLD:
                return place
    fetched = _home(headers)
    return fetched if (fetched / headers.marker).is_file() else None


def fetch(headers: HeaderSet) -> Path:
    """Download the package, check it, keep its headers in the cache folder; returns their folder.

    Raises:
        UserError: no network, no npm or pip, not the file that was meant, or no room.
    """
    home = _home(headers)
    mend = f"or name a folder that has them with {headers.option}"
    with (
        tempfile.TemporaryDirectory(prefix="export-vq-") as scratch,
        whole(home, mend="set XDG_CACHE_HOME to a folder that can be written") as staged,
    ):
        archive = _download(headers, Path(scratch), mend)
        if (found := sha256(archive)) != headers.sha256:
            raise UserError(
                f"{archive.name}: the downloaded file is not the one that was tested (SHA-256 {found}, expected "
                f"{headers.sha256}), so nothing of it is used; try again, {mend}"
            )
        staged.mkdir()
        for name, content in _members(archive, headers.folder):
            (staged / name).write_bytes(content)
    return home


def tensorrt_major(folder: Path) -> int | None:
    """The major version that TensorRT's headers tell; None where they tell none."""
    version = folder / "NvInferVersion.h"
    if not version.is_file():
        return None
    text = version.read_text(encoding="utf-8", errors="replace")
    found = re.search(r"#define\s+(?:NV_TENSORRT_MAJOR|TRT_MAJOR_\w+)\s+(\d+)", text)
    return int(found[1]) if found else None


def _home(headers: HeaderSet) -> Path:
    return cache_folder() / "headers" / f"{headers.package}-{headers.version}"


def _download(headers: HeaderSet, scratch: Path, mend: str) -> Path:
    if headers is ONNX_RUNTIME:
        command = ["npm", "pack", "--silent", "--ignore-scripts", "--cache", str(scratch / "cache")]
        command += [f"{headers.package}@{headers.version}"]
    else:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
        command += ["--no-deps", "--only-binary=:all:", f"{headers.package}=={headers.version}"]
    tool = "npm" if command[0] == "npm" else "pip"
    failed = f"{headers.runtime}'s headers could not be fetched"
    try:
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=3600, check=False)
    except FileNotFoundError as error:
        raise UserError(f"{failed}: {tool} was not found; install it (npm comes with Node.js), {mend}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"{failed} ({error}); {mend.removeprefix('or ')}") from error
    archives = [path for path in scratch.iterdir() if path.suffix in (".tgz", ".whl")]
    if done.returncode or len(archives) != 1:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise UserError(
            f"{failed}: {tool} failed ({said[-1] if said else f'exit code {done.returncode}'}); check the network, {mend}"
        )
    return archives[0]


def _members(archive: Path, folder: str) -> Iterator[tuple[str, bytes]]:
    """(file name, content) of the files directly in `folder` of the archive."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if str(PurePosixPath(name).parent) == folder:
                    yield PurePosixPath(name).name, wheel.read(name)
        return
    with tarfile.open(archive) as package:
        for member in package:
            content = package.extractfile(member) if member.isfile() else None
            if content is not None and str(PurePosixPath(member.name).parent) == folder:
                yield PurePosixPath(member.name).name, content.read()


def main() -> int:
    """Print the folders of both header sets as CMake options, one a line, fetching what is not here."""
    try:
        for headers in (ONNX_RUNTIME, TENSORRT):
            print(f"-D{headers.variable}={on_this_machine(headers) or fetch(headers)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
