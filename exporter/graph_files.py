"""ONNX files as graphs, their large weights left on disk: read, edited, written anew beside links to the weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx_ir as ir

from export_vq.errors import UserError


def read_graph(path: Path) -> ir.Model:
    """An ONNX file, its large weights left on disk.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return ir.load(path)
    except Exception as error:  # protobuf's and onnx_ir's errors share no base
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path}: not a readable ONNX file ({reason}); export it again") from error


def data_files(model: ir.Model) -> tuple[str, ...]:
    """Weights files beside the source that a graph refers to."""
    weights = (v.const_value for v in model.graph.initializers.values())
    return tuple(sorted({str(w.location) for w in weights if isinstance(w, ir.ExternalTensor)}))


def write_linked(model: ir.Model, source: Path, target: Path) -> tuple[str, ...]:
    """Write a graph that was read from `source` into another folder.

    Returns:
        the names of the links to its weights there.

    Raises:
        UserError: a weights file is missing.
    """
    names = data_files(model)
    for name in names:
        origin = source.with_name(name)
        if not origin.is_file():
            raise UserError(f"{source}: its weights file {name} is missing; keep both files in one folder")
        try:
            target.with_name(name).symlink_to(origin.resolve())
        except OSError:  # a file system without links
            shutil.copyfile(origin, target.with_name(name))
    ir.save(model, target)
    return names
