"""Where the native libraries under test lie."""

from pathlib import Path

import pytest

from export_vq.plugins.library import find


def pytest_addoption(parser):
    parser.addoption(
        "--native-libraries", type=Path, help="folder of the libraries to test, instead of the package's own"
    )
    parser.addoption("--runtime-programs", type=Path, help="folder of vq_run_ort and vq_run_trt")


@pytest.fixture(scope="session")
def native_library(request):
    """The path of a library by its name; skips where it is not built."""

    def path(name):
        folder = request.config.getoption("--native-libraries", None)
        library = find(name, folder)
        if library is None or not (folder or library.current):
            pytest.skip(f"lib{name}.so is not built; run: export-vq plugins build")
        return library.path

    return path
