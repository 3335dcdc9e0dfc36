"""scripts/quantized.py from start to end, on a tiny model."""

import json
import runpy
import sys
from pathlib import Path

from checkpoints import save_tiny

SCRIPT = Path(__file__).parents[2] / "scripts" / "quantized.py"


def test_the_script_measures_all_precisions_with_both_heads_and_goes_on(tmp_path, text, capsys, monkeypatch):
    save_tiny(tmp_path / "model.pt")
    small = (
        "--samples",
        "2",
        "--width",
        "24",
        "--test-tokens",
        "72",
        "--prompt",
        "9",
        "--seconds",
        "0.01",
        "--int8-keep",
        "auto:2",
    )
    places = ("--folder", tmp_path / "out", "-o", tmp_path / "rows.json", "--table", tmp_path / "table.md")
    command = [SCRIPT, tmp_path / "model.pt", "--text", text, "--int4-eight", "auto:3", *small, *places]
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "ranges" in capsys.readouterr().err
    made = json.loads((tmp_path / "rows.json").read_text())
    assert str(tmp_path) not in json.dumps(made)
    rows = {(row["precision"], row["head"]): row for row in made["rows"]}
    names = ("fp32", "fp16", "int8 dynamic", "int8 static", "int8 weights", "int4 weights", "fp8")
    assert list(rows) == [(name, head) for name in names for head in ("vq", "dense")]
    for (name, _), row in rows.items():
        assert (row["kl_mean"] < 1e-9) == (name == "fp32")
        assert (row["step_ms"] is None) == (name == "fp8")
    table = (tmp_path / "table.md").read_text()
    assert all(f"| {name} | {head} |" in table for name, head in rows)
    assert table.count("target") == 4
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "ranges" not in capsys.readouterr().err
    kept = {(row["precision"], row["head"]): row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert all(kept[key]["kl_mean"] == row["kl_mean"] for key, row in rows.items())
