"""A model repository for NVIDIA's Triton Inference Server, written from an output folder.

DIR/<name>/           config.pbtxt, 1/model.onnx (+ .data), libvq_ort.so where there is one: the ONNX Runtime backend
DIR/<name>_tensorrt/  config.pbtxt, 1/<compute capability>.plan: the TensorRT backend, where the folder has engines

The server keeps no state: a client sends the KV cache that the last answer gave. Its `plugins` option only opens a
library, which registers nothing in ours, so a plan must carry the plugin inside (`build --embed-plugin`) or need none.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir

from export_vq.errors import UserError
from export_vq.files import is_inside, whole
from export_vq.forms import read_graph
from export_vq.plugins.library import Library
from export_vq.records import EngineArtifact, OnnxArtifact

_TYPES = {
    ir.DataType.FLOAT: "TYPE_FP32",
    ir.DataType.FLOAT16: "TYPE_FP16",
    ir.DataType.BFLOAT16: "TYPE_BF16",
    ir.DataType.INT32: "TYPE_INT32",
    ir.DataType.INT64: "TYPE_INT64",
}
_MARK = "# Written by export-vq serve-files from "


def write_repository(
    folder: Path, repository: Path, name: str, mounted_at: str, library: Library | None
) -> tuple[list[str], list[str]]:
    """Write the models of an output folder into a model repository, each one whole or not at all.

    Args:
        folder: holds model.onnx with its record, and engines where they were built.
        repository: made if missing; other models in it are left alone.
        name: of the model; letters, digits, '_', '-' and '.'.
        mounted_at: where the server will see `repository`: it wants absolute paths of libraries.
        library: libvq_ort.so for the server's platform; None leaves the head to stock ops.

    Returns:
        the names of the models, and what was left out, each with the mend.

    Raises:
        UserError: the folder has no graph that runs outside of TensorRT, or a name is taken by somebody else's model.
    """
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise UserError(f"--name is {name!r}, expected letters, digits, '_', '-' and '.'")
    record = folder / "model.onnx.json"
    if not record.is_file():
        raise UserError(f"{folder}: holds no model.onnx.json; make the folder with: export-vq MODEL -o {folder}")
    artifact = OnnxArtifact.load(record)
    if not all(is_inside(file) for file in (artifact.path, *artifact.file_sha256)):
        raise UserError(f"{record}: it names files elsewhere, expected files of the same folder; export it again")
    if artifact.form == "plugin":
        raise UserError(f"{folder}: model.onnx is in the plugin form, for TensorRT only; export with --form portable")
    plans, left_out = _plans(folder)
    _refuse_strangers(repository / n for n in (name, f"{name}_tensorrt"))
    _write_onnx(folder, artifact, repository / name, mounted_at, library)
    if library is None:
        left_out.append("libvq_ort.so: stock ops run the head; build it with: export-vq plugins build")
    if not plans:
        return [name], left_out
    _write_plans(folder, plans, repository / f"{name}_tensorrt")
    return [name, f"{name}_tensorrt"], left_out


def _write_onnx(folder: Path, artifact: OnnxArtifact, target: Path, mounted_at: str, library: Library | None) -> None:
    config = [*_head(folder, target.name, "onnxruntime", artifact.path), *_tensors(folder / artifact.path)]
    with whole(target, mend="choose another folder with --triton") as staged:
        (staged / "1").mkdir(parents=True)
        for file in artifact.file_sha256:
            shutil.copyfile(folder / file, staged / "1" / file)
        if library is not None:
            shutil.copyfile(library.path, staged / library.path.name)
            path = f"{mounted_at.rstrip('/')}/{target.name}/{library.path.name}"
            config.append(f"model_operations {{ op_library_filename: {_quoted(path)} }}")
        (staged / "config.pbtxt").write_text("\n".join(config) + "\n", encoding="utf-8")


def _write_plans(folder: Path, plans: dict[str, tuple[Path, EngineArtifact]], target: Path) -> None:
    sidecar, artifact = next(iter(plans.values()))
    first = f"{next(iter(plans))}.plan"
    config = [*_head(folder, target.name, "tensorrt", first), *_tensors(sidecar.with_name(artifact.onnx))]
    files = (f"{{ key: {_quoted(cc)} value: {_quoted(cc + '.plan')} }}" for cc in plans)
    config.append(f"cc_model_filenames [ {', '.join(files)} ]")
    profiles = ", ".join(_quoted(str(i)) for i in range(len(artifact.profiles)))
    config.append(f"instance_group [ {{ kind: KIND_GPU count: 1 profile: [ {profiles} ] }} ]")
    with whole(target, mend="choose another folder with --triton") as staged:
        (staged / "1").mkdir(parents=True)
        for cc, (file, engine) in plans.items():
            shutil.copyfile(file.with_name(engine.path), staged / "1" / f"{cc}.plan")
        (staged / "config.pbtxt").write_text("\n".join(config) + "\n", encoding="utf-8")


def _plans(folder: Path) -> tuple[dict[str, tuple[Path, EngineArtifact]], list[str]]:
    """{compute capability: (sidecar, engine)}: the plugin's plan where it carries the plugin, else the plain one."""
    found: dict[str, tuple[Path, EngineArtifact]] = {}
    left_out = []
    for kind in ("vq-plugin", "vq-plain"):
        for sidecar in sorted(folder.glob(f"engines/*/{kind}.json")):
            engine = EngineArtifact.load(sidecar)
            if not all(is_inside(file) for file in (engine.path, engine.onnx)):
                raise UserError(
                    f"{sidecar}: it names files elsewhere, expected files of the same folder; build it again"
                )
            place = sidecar.relative_to(folder)
            if engine.flavour != "tensorrt" or engine.compute_capability is None:
                left_out.append(f"{place}: of {engine.flavour}, which Triton does not run; build with TensorRT")
            elif kind == "vq-plugin" and not engine.options["embed_plugin"]:
                left_out.append(
                    f"{place}: the plugin is not in the plan; build it with: export-vq build --embed-plugin"
                )
            elif engine.compute_capability in found:
                left_out.append(f"{place}: another plan is there for compute capability {engine.compute_capability}")
            else:
                found[engine.compute_capability] = (sidecar, engine)
    return found, left_out


def _refuse_strangers(targets: Iterable[Path]) -> None:
    """A folder that is replaced must be one of ours."""
    for target in targets:
        config = target / "config.pbtxt"
        if target.exists() and not (config.is_file() and config.read_text(encoding="utf-8").startswith(_MARK)):
            raise UserError(f"{target}: holds a model that export-vq did not write; choose another --name or --triton")


def _head(folder: Path, name: str, backend: str, file: str) -> list[str]:
    return [
        f"{_MARK}{folder.resolve().name!r}.",
        f"name: {_quoted(name)}",
        f"backend: {_quoted(backend)}",
        f"default_model_filename: {_quoted(file)}",
        "max_batch_size: 0  # the batch is a dimension of the tensors: requests are not merged",
    ]


def _tensors(graph: Path) -> list[str]:
    """`input` and `output` of a graph's tensors, free dimensions as -1."""
    read = read_graph(graph).graph
    blocks = []
    for block, values in (("input", read.inputs), ("output", read.outputs)):
        lines = []
        for value in values:
            assert value.dtype is not None
            dims = ", ".join(str(d if isinstance(d, int) else -1) for d in value.shape or ())
            lines.append(f"  {{ name: {_quoted(str(value.name))} data_type: {_TYPES[value.dtype]} dims: [ {dims} ] }}")
        blocks.append(f"{block} [\n" + ",\n".join(lines) + "\n]")
    return blocks


def _quoted(text: str) -> str:
    """A string of protobuf's text format."""
    return '"' + text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") + '"'
