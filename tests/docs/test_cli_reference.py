"""docs/cli.md is what scripts/cli_reference.py writes of the command line as it is now."""

import subprocess
import sys

import documents

from export_vq.cli import cli

REFERENCE = documents.ROOT / "docs" / "cli.md"


def test_it_is_not_stale(tmp_path):
    script = documents.ROOT / "scripts" / "cli_reference.py"
    subprocess.run([sys.executable, script, tmp_path / "cli.md"], check=True)
    assert REFERENCE.read_text(encoding="utf-8") == (tmp_path / "cli.md").read_text(encoding="utf-8"), (
        "write it again with: .venv/bin/python scripts/cli_reference.py docs/cli.md"
    )


def test_every_command_has_its_options_in_a_table():
    listed = {
        table.heading: {row[0].split()[0].rstrip(",") for row in table.rows} for table in documents.tables(REFERENCE)
    }
    for name, command in cli.commands.items():
        if command.params:
            first = {p.opts[0] for p in command.params if p.param_type_name == "option"}
            assert listed.get(f"export-vq {name}", set()) == first
