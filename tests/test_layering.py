"""The house: what each file may import. Dependencies point one way, and the table here is the plan."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "exporter"

MAY_IMPORT = {
    "contract": set(),
    "errors": set(),
    "files": {"errors"},
    "require": {"errors"},
    "records": {"contract", "errors", "files"},
    "head": {"records"},
    "codespace": {"head"},
    "text": {"errors"},
    "feeds": set(),
    "generate": {"feeds"},
    "validate": {"contract", "errors", "head", "records"},
    "checkpoint": {"contract", "errors", "files", "validate"},
    "load": {"checkpoint", "contract", "errors", "files", "head", "records", "validate"},
    "forms": {"contract", "errors"},
    "graph": {"contract", "errors", "files", "forms", "head", "load", "records"},
    "runners": {"errors", "feeds", "load", "records", "require"},
    "parity": {"feeds", "generate", "records"},
    "bench": {"feeds", "records"},
    "bundle": {"errors", "files", "records"},
    "wording": {"records"},
    "plots": {"records", "wording"},
    "report": {"plots", "records", "wording"},
    "doctor": {"records"},
    "compress": {"contract", "errors", "head", "load", "parity", "records", "text"},
    "inspection": {"compress", "contract", "errors", "files", "forms", "graph", "load", "records", "text"},
    "pipeline": {
        "bench", "bundle", "compress", "errors", "feeds", "files", "generate", "graph", "load", "parity", "records",
        "report", "require", "runners", "text",
    },
    "cli": {"bundle", "compress", "doctor", "errors", "files", "graph", "inspection", "load", "pipeline", "report"},
    "__init__": {"bench", "compress", "errors", "graph", "head", "load", "parity", "pipeline", "records", "runners"},
}  # fmt: skip
STANDARD_LIBRARY_ONLY = ("contract", "errors", "files", "require", "records", "bundle", "doctor")
LIGHT = {"cli": {"click", "rich"}}
"""Modules that must load in an environment without torch, onnx and the runtimes."""


def _room(path):
    return "compress" if path.parent.name == "compress" else path.stem


def _imports(path, *, top_level_only=False):
    """(our rooms, other packages) that a file imports."""
    tree = ast.parse(path.read_text())
    ours, others = set(), set()
    for node in tree.body if top_level_only else ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module != "export_vq" else [f"export_vq.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            (ours if parts[0] == "export_vq" else others).add(parts[1] if parts[0] == "export_vq" else parts[0])
    return ours, others


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_plan(path):
    room = _room(path)
    ours, _ = _imports(path)
    assert ours - {room} <= MAY_IMPORT[room]


def test_the_plan_has_no_circle():
    def below(room, seen=()):
        assert room not in seen, f"circle: {' -> '.join((*seen, room))}"
        return MAY_IMPORT[room] | {r for inner in MAY_IMPORT[room] for r in below(inner, (*seen, room))}

    for room in MAY_IMPORT:
        below(room)


def test_the_plan_names_what_is_there():
    assert set(MAY_IMPORT) == {_room(path) for path in FILES} | {"__init__"}
    for path in FILES:
        room = _room(path)
        if room not in ("__init__", "compress"):
            assert MAY_IMPORT[room] == _imports(path)[0], f"{room}: the plan allows what is no longer used"


@pytest.mark.parametrize("room", [*STANDARD_LIBRARY_ONLY, "cli"])
def test_the_light_rooms_need_nothing_heavy(room):
    import sys

    _, others = _imports(PACKAGE / f"{room}.py", top_level_only=True)
    assert others <= set(sys.stdlib_module_names) | LIGHT.get(room, set())


def test_nothing_imports_the_command_line():
    assert not [path for path in FILES if "cli" in _imports(path)[0]]
