"""What holds for every test, and for the processes that tests start."""

from __future__ import annotations

import os
import sys
import tempfile

import pytest

# Times of tiny models say nothing, and are not what tests look at.
os.environ.setdefault("EXPORT_VQ_BENCH_SECONDS", "0.01")
# The matrices are tiny, and threads that wait for each other are slow where other work runs beside.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """One folder of traces for all workers, which take the environment over."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory()
        config.add_cleanup(folder.cleanup)
        os.environ["EXPORT_VQ_TEST_TRACES"] = folder.name


@pytest.fixture(scope="session", autouse=True)
def _quick() -> None:
    """See quick.py; no matter where no test of this run has to do with models."""
    if "torch" in sys.modules:
        import quick

        quick.install()


@pytest.fixture
def traced_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the tracing itself."""
    from export_vq import graph

    monkeypatch.setattr(graph, "_trace", graph._trace.__wrapped__)
