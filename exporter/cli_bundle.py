"""The commands around an output folder: what it holds, and whether it is whole."""

from __future__ import annotations

import json
from pathlib import Path

import click

from export_vq.errors import CheckFailed
from export_vq.terminal import mib, print_table


def print_bundle(folder: Path, *, verify: bool, as_json: bool) -> None:
    """Print what a folder's manifest lists; with `verify`, fail unless the folder is exactly that."""
    from export_vq import manifest

    listed = manifest.read(folder)
    differences = manifest.verify(folder) if verify else ()
    sizes = {name: (folder / name).stat().st_size for name in listed.files if (folder / name).is_file()}
    if as_json:
        click.echo(json.dumps({**listed.to_json(), "differences": list(differences)}, indent=1))
    else:
        rows = [
            ("what", f"output folder, {len(listed.files)} files, {mib(sum(sizes.values()))}"),
            ("contract", listed.contract),
            ("versions", ", ".join(f"{name} {version}" for name, version in listed.versions.items())),
            *((name, mib(sizes[name]) if name in sizes else "missing") for name in listed.files),
            *(("library", f"{name} is for {platform}") for name, platform in listed.libraries.items()),
        ]
        if verify:
            rows += [("differs", line) for line in differences] or [
                ("verified", "every file is as the manifest lists it")
            ]
        print_table(rows)
    if differences:
        raise CheckFailed(f"{folder}: {len(differences)} differences from the manifest; copy the folder again")
