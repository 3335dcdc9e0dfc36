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

_LONGEST = (
    "test_graph",
    "test_kill",
    "test_examples",
    "test_matrix",
    "test_script",
    "test_limits",
    "test_cli",
    "test_loss",
    "test_six_paths",
    "test_engines",
    "test_engine",
    "test_finetune",
    "test_mutants",
)


def pytest_configure(config: pytest.Config) -> None:
    """One folder of traces for all workers, which take the environment over."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory()
        config.add_cleanup(folder.cleanup)
        os.environ["EXPORT_VQ_TEST_TRACES"] = folder.name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first: one of them begun at the end would keep one worker busy and the others idle."""
    items.sort(key=lambda item: _LONGEST.index(item.path.stem) if item.path.stem in _LONGEST else len(_LONGEST))


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
