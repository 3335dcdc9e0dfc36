"""The commands around an output folder: what it holds, whether it is whole, files for a server."""

from __future__ import annotations

import json
from pathlib import Path

import click

from export_vq.errors import CheckFailed
from export_vq.terminal import console, mib, plain, print_table


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


@click.command("serve-files")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--triton",
    "repository",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Model repository to write into; other models in it are left alone.",
)
@click.option("--name", default="vq_lm", show_default=True, help="Name of the model.")
@click.option(
    "--mounted-at",
    default="/models",
    show_default=True,
    help="Where the server sees the repository, as in docker run -v REPOSITORY:/models.",
)
def serve_files(folder: Path, repository: Path, name: str, mounted_at: str) -> None:
    """Write what is in FOLDER as a model repository of NVIDIA's Triton Inference Server."""
    from export_vq.runners import native_library
    from export_vq.triton import write_repository

    models, left_out = write_repository(folder, repository, name, mounted_at, native_library(folder))
    for model in models:
        click.echo(f"{repository / model}")
    for line in left_out:
        console.print(f"left out: {plain(Exception(line))}", soft_wrap=True)
