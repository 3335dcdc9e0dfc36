"""The house: what each file may import. Dependencies point one way, and the table here is the plan."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "exporter"
PLUGINS = ROOT / "plugins"
CALIBRATION = ROOT / "calibration"

MAY_IMPORT = {
    "contract": set(),
    "errors": set(),
    "files": {"errors"},
    "require": {"errors"},
    "records": {"contract", "errors", "files"},
    "head": {"records"},
    "embedding": {"head"},
    "codespace": {"head"},
    "text": {"errors"},
    "feeds": set(),
    "ranking": set(),
    "decoding": {"errors"},
    "detokenize": set(),
    "scores": {"feeds", "head", "plugins.host", "plugins.library", "ranking"},
    "sampling": {"decoding", "errors", "scores"},
    "kv_cache": {"errors", "feeds"},
    "generate": {"decoding", "detokenize", "errors", "feeds", "kv_cache", "sampling", "scores"},
    "validate": {"contract", "errors", "head", "records"},
    "checkpoint": {"contract", "errors", "files", "validate"},
    "load": {"checkpoint", "contract", "embedding", "errors", "files", "head", "records", "validate"},
    "outputs": {"contract"},
    "selection": {"contract", "outputs"},
    "bodies": {"contract", "outputs", "selection"},
    "forms": {"bodies", "contract", "errors", "outputs"},
    "head_output": {"contract", "errors", "outputs", "ranking", "records", "selection"},
    "layers": {"contract", "head", "head_output"},
    "graph": {
        "contract", "embedding", "errors", "files", "forms", "head", "head_output", "layers", "load", "outputs", "records",
    },
    "progress": set(),
    "runners": {
        "codespace", "contract", "errors", "feeds", "head", "load", "manifest", "outputs", "plugins.library", "records",
        "require",
    },
    "logit_errors": {"ranking", "records"},
    "choice_errors": {"feeds", "logit_errors", "ranking", "records"},
    "parity": {"choice_errors", "feeds", "generate", "logit_errors", "ranking", "records"},
    "bench": {"records"},
    "workloads": {"bench", "feeds", "graph", "head", "head_output", "outputs", "records", "runners"},
    "bundle": {"errors", "files", "records"},
    "staging": {"errors", "files"},
    "manifest": {"checkpoint", "contract", "errors", "files", "plugins.library", "records", "staging"},
    "wording": {"records"},
    "plots": {"records", "wording"},
    "report": {"plots", "records", "wording"},
    "doctor": {"errors", "plugins.library", "plugins.toolchain", "records"},
    "plugins.__init__": set(),
    "plugins.library": {"errors", "files"},
    "plugins.host": {"errors", "plugins.library"},
    "plugins.toolchain": {"errors"},
    "plugins.headers": {"errors", "files"},
    "plugins.compiling": {"errors"},
    "plugins.build": {
        "errors", "files", "plugins.compiling", "plugins.headers", "plugins.library", "plugins.toolchain", "progress",
        "records",
    },
    "resume": {"errors", "files"},
    "trim": {"errors", "load", "text"},
    "compress": {"codespace", "contract", "errors", "head", "load", "resume", "text", "trim"},
    "quality": {"codespace", "compress", "errors", "head", "load", "records", "require"},
    "rival_graphs": {"quality"},
    "tuning": {"codespace", "compress", "errors", "head", "load", "records", "require", "resume"},
    "inspection": {"contract", "errors", "files", "forms", "graph", "load", "quality", "records", "text"},
    "genai": {"files", "records"},
    "steps": {
        "bundle", "compress", "errors", "files", "genai", "graph", "load", "outputs", "progress", "records", "text", "tuning",
    },
    "build_progress": set(),
    "profiles": {"errors", "records"},
    "trt": {"contract", "errors", "files", "outputs", "require"},
    "quantised_products": set(),
    "layer_info": {"quantised_products"},
    "proof": {"contract", "errors", "layer_info", "outputs", "quantised_products", "records", "trt"},
    "engine_source": {"contract", "errors", "files", "forms", "graph", "outputs", "profiles", "quantised_products"},
    "engine": {
        "build_progress", "engine_source", "errors", "files", "plugins.library", "profiles", "proof", "records",
        "require", "trt",
    },
    "device_kit": {"engine", "engine_source", "errors", "files", "plugins.library", "profiles", "records"},
    "engines": {
        "checkpoint", "engine", "engine_source", "errors", "files", "forms", "plugins.library", "progress", "records", "trt",
    },
    "plan": {"errors", "files", "manifest", "plugins.library", "records", "trt"},
    "trt_runner": {"errors", "feeds", "plan", "profiles", "records", "trt"},
    "engine_steps": {
        "bench", "engine", "engines", "errors", "feeds", "progress", "records", "trt", "trt_runner", "workloads",
    },
    "pipeline": {
        "bench", "bundle", "calibrated", "engine_steps", "errors", "feeds", "files", "genai", "generate", "graph", "load",
        "manifest", "parity", "progress", "quality", "records", "report", "require", "runners", "staging", "steps",
        "text", "trt_runner", "workloads",
    },
    "triton": {"errors", "files", "forms", "plugins.library", "records"},
    "top_k_graph": {"contract", "forms", "head_output", "layers", "outputs", "records"},
    "backends": {"errors", "forms", "records", "require", "runners", "top_k_graph", "trt_runner"},
    "chat": {"checkpoint", "errors", "validate"},
    "textmodel": {
        "backends", "chat", "checkpoint", "decoding", "errors", "feeds", "files", "generate", "records", "staging",
        "validate",
    },
    "prompts": {"errors"},
    "pace": set(),
    "terminal": set(),
    "cli_bundle": {"errors", "manifest", "runners", "terminal", "triton"},
    "cli_generate": {"decoding", "errors", "generate", "pace", "prompts", "terminal", "textmodel"},
    "calibration": {
        "checkpoint", "contract", "errors", "feeds", "files", "forms", "genai", "graph", "logit_errors", "manifest",
        "progress", "quality", "records", "require", "runners", "text", "validate",
    },
    "calibrated": {"bundle", "files", "records", "report"},
    "cli_calibrate": {"calibrated", "calibration", "errors", "manifest", "terminal"},
    "variants": {"errors"},
    "quantised": {
        "bench", "bundle", "calibration", "checkpoint", "errors", "feeds", "files", "forms", "genai", "graph", "head",
        "head_output", "parity", "progress", "records", "runners", "text", "top_k_graph", "workloads",
    },
    "matrix_report": {"records", "wording"},
    "matrix": {
        "bench", "bundle", "calibration", "errors", "files", "graph", "head", "load", "manifest", "matrix_report",
        "pipeline", "progress", "quantised", "records", "steps", "text", "variants",
    },
    "cli_matrix": {"errors", "matrix", "matrix_report", "pipeline", "terminal", "variants"},
    "cli_native": {
        "bundle", "device_kit", "engine", "engines", "files", "load", "manifest", "plugins.build", "plugins.library",
        "profiles", "records", "steps", "terminal", "wording",
    },
    "folder_bench": {
        "bench", "checkpoint", "engine_steps", "errors", "progress", "records", "runners", "trt", "workloads",
    },
    "cli_bench": {"folder_bench", "records", "terminal", "wording"},
    "cli_make": {"compress", "steps", "terminal", "tuning"},
    "cli_inspect": {"cli_bundle", "cli_native", "doctor", "inspection", "terminal"},
    "cli": {
        "bundle", "cli_bench", "cli_bundle", "cli_calibrate", "cli_generate", "cli_inspect", "cli_make", "cli_matrix", "cli_native", "errors", "files", "graph",
        "load", "manifest", "pipeline", "report", "staging",
        "steps", "terminal", "wording",
    },
    "__init__": {
        "bench", "calibration", "compress", "decoding", "embedding", "engine", "errors", "folder_bench", "generate", "graph", "head", "load",
        "parity", "pipeline", "plan", "quality", "records", "runners", "textmodel", "trim", "trt_runner", "tuning",
    },
}  # fmt: skip
FOLDERS = ("calibration", "compress", "quality", "trim", "tuning")
"""Rooms of several files."""
STANDARD_LIBRARY_ONLY = (
    "contract", "errors", "files", "require", "records", "bundle", "doctor", "genai", "manifest", "staging",
    "plugins.library", "plugins.toolchain", "plugins.headers", "plugins.compiling", "plugins.build",
)  # fmt: skip
LIGHT = {
    "cli": {"click"},
    "cli_bench": {"click"},
    "cli_bundle": {"click"},
    "cli_calibrate": {"click"},
    "cli_generate": {"click"},
    "cli_inspect": {"click"},
    "cli_make": {"click"},
    "cli_matrix": {"click"},
    "cli_native": {"click"},
    "terminal": {"rich"},
}
"""Modules that must load in an environment without torch, onnx and the runtimes."""


def _room(path):
    folder = path.parent.name
    return folder if folder in FOLDERS else f"plugins.{path.stem}" if folder == "plugins" else path.stem


def _imports(path, *, top_level_only=False):
    """(our rooms, other packages) that a file imports."""
    tree = ast.parse(path.read_text())
    ours, others = set(), set()
    for node in tree.body if top_level_only else ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            holds_rooms = node.module in ("export_vq", "export_vq.plugins")
            names = [f"{node.module}.{alias.name}" for alias in node.names] if holds_rooms else [node.module]
        for name in names:
            package, *inner = name.split(".")
            if package != "export_vq":
                others.add(package)
            else:
                ours.add(".".join(inner[:2]) if inner[0] == "plugins" else inner[0])
    return ours, others


FILES = sorted([*PACKAGE.rglob("*.py"), *CALIBRATION.rglob("*.py"), *PLUGINS.rglob("*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
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
        if room not in ("__init__", *FOLDERS):
            assert MAY_IMPORT[room] == _imports(path)[0], f"{room}: the plan allows what is no longer used"
    for room in FOLDERS:
        used = set().union(*(_imports(path)[0] for path in FILES if _room(path) == room)) - {room}
        assert MAY_IMPORT[room] == used, f"{room}: the plan allows what is no longer used"


@pytest.mark.parametrize("room", [*STANDARD_LIBRARY_ONLY, *LIGHT])
def test_the_light_rooms_need_nothing_heavy(room):
    import sys

    (path,) = {path.resolve() for path in FILES if _room(path) == room}
    _, others = _imports(path, top_level_only=True)
    assert others <= set(sys.stdlib_module_names) | LIGHT.get(room, set())


def test_nothing_imports_the_command_line():
    assert not [path for path in FILES if "cli" in _imports(path)[0]]
