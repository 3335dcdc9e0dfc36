"""The commands that say what is there: in a file or folder, on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import click

from export_vq.cli_bundle import print_bundle
from export_vq.cli_native import print_engine
from export_vq.terminal import mib, print_table, yes


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="UTF-8 text: prints the lowest perplexity that the mapping allows on it.",
)
@click.option("--verify", is_flag=True, help="An output folder: compare every file with the manifest.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(path: Path, text: Path | None, verify: bool, as_json: bool) -> None:
    """Say what PATH is: a checkpoint, an ONNX file, a TensorRT plan or an output folder."""
    from export_vq.inspection import inspect_engine, inspect_path

    if verify or (path / "manifest.json").is_file():
        print_bundle(path, verify=verify, as_json=as_json)
        return
    if path.suffix == ".plan":
        engine = inspect_engine(path)
        if as_json:
            click.echo(json.dumps(engine.to_json(), indent=1))
        else:
            print_engine(engine)
        return
    found = inspect_path(path, text)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=1))
        return
    spec = found.spec
    rows = [
        ("what", f"{found.what}, {found.model_type}, {found.dtype}"),
        ("file", mib(found.file_bytes)),
        (
            "head",
            f"{spec.kind}: V={spec.vocab_size} D={spec.hidden_size} M={spec.num_codebooks} K={spec.num_codes}, bias: {yes(spec.has_bias)}, rotation: {yes(spec.has_rotation)}",
        ),
        (
            "head numbers",
            f"{spec.float_numbers:,} against {spec.dense_numbers:,} dense ({1 - spec.float_numbers / spec.dense_numbers:.1%} fewer)",
        ),
        (
            "head bytes",
            f"{mib(found.head_bytes)} against {mib(found.dense_head_bytes)} dense ({found.head_bytes / found.dense_head_bytes:.1%})",
        ),
        ("model bytes", f"{mib(found.model_bytes)} against {mib(found.dense_model_bytes)} with the dense head"),
    ]
    if spec.tie_embedding:
        rows.append(("tied", "the input embedding is read from the head's own codes and codebooks"))
    elif found.tied_embedding:
        rows.append(
            (
                "tied",
                "the input embedding stays dense, so nothing is saved on disk; bandwidth and time of the output layer are",
            )
        )
    if found.dead_codes is not None:
        rows.append(("unused codes", f"{found.dead_codes:,} of {spec.num_codebooks * spec.num_codes:,}"))
    if found.floor is not None:
        rows.append(("perplexity floor", f"{found.floor:.3f} on this text: no training of this mapping can go below"))
    rows += [("note", note) for note in found.notes]
    print_table(rows)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """What this machine has, what it lacks, and how to mend it."""
    from export_vq.doctor import examine

    findings = examine()
    if as_json:
        click.echo(json.dumps([finding.to_json() for finding in findings], indent=1))
        return
    print_table([(f"{f.state:8s}{f.subject}", f.detail + (f"  ->  {f.mend}" if f.mend else "")) for f in findings])
