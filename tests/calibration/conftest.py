"""One exported model for all of these tests, and a text of many documents."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from checkpoints import save_tiny

from export_vq.bundle import Bundle
from export_vq.graph import ExportOptions
from export_vq.steps import export_step
from export_vq.terminal import Steps

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "sat",
    "ran",
    "flew",
    "on",
    "over",
    "under",
    "mat",
    "roof",
    "tree",
    "and",
    "then",
    "it",
    "was",
    "gone",
    "again",
]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(" ".join(draw.choices(WORDS, k=90)) + "." for _ in range(120)))
    return path


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    loaded = save_tiny(folder / "model.pt")
    export_step(lambda: loaded, "a hash", Bundle(folder / "out"), ExportOptions(opset=21), Steps())
    return folder / "out"


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy of the exported folder, to write into."""
    return Path(shutil.copytree(exported, tmp_path / "out"))
