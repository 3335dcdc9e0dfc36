"""A folder that builds an engine on a device that has TensorRT and no Python: plans are not portable, this is.

vq-plugin.onnx vq-plain.onnx (+ .data)   what TensorRT's parser reads
plugins/                                 sources of libvq_trt.so and of the runner
build.sh                                 compiles both, builds the plan with trtexec, says how to run it
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from export_vq.engine import EngineOptions
from export_vq.engine_source import EngineSource
from export_vq.errors import UserError
from export_vq.files import whole
from export_vq.plugins.library import SOURCES, source_files, source_hash
from export_vq.profiles import make_profiles
from export_vq.records import EngineProfile

_MARK = "# Written by export-vq build --for "


@dataclass(frozen=True)
class Target:
    """A device: compute capability in digits ('87'), TensorRT's version ('10.3')."""

    sm: str
    tensorrt: str

    @classmethod
    def parse(cls, text: str) -> Target:
        """From 'sm87-trt10.3'.

        Raises:
            UserError: it is not of this form, or names a TensorRT that the plugin does not compile against.
        """
        found = re.fullmatch(r"sm(\d{2,3})-trt(\d+)\.(\d+)", text)
        if found is None:
            raise UserError(f"--for is {text!r}, expected sm<compute capability>-trt<version>, as in sm87-trt10.3")
        if int(found[2]) not in (10, 11):
            raise UserError(
                f"--for names TensorRT {found[2]}.{found[3]}, expected 10.0 to 11.x: what the plugin is for"
            )
        return cls(found[1], f"{found[2]}.{found[3]}")


def write_kit(source: Path, target: str, kit: Path, options: EngineOptions) -> None:
    """Write the folder, whole or not at all.

    Args:
        source: model.onnx in portable form.
        target: 'sm87-trt10.3'.
        kit: the folder; one that an earlier call wrote is replaced.
        options: the shapes and the context count.

    Raises:
        UserError: an input or option cannot be used, or `kit` holds other things.
    """
    device = Target.parse(target)
    script = kit / "build.sh"
    if kit.exists() and not (script.is_file() and _MARK in script.read_text(encoding="utf-8")):
        raise UserError(f"{kit}: is there and not written by export-vq build --for; choose another output with -o")
    graphs = {kind: EngineSource(source, kind) for kind in ("vq-plugin", "vq-plain")}
    shapes = {"min": options.min_shapes, "opt": options.opt_shapes, "max": options.max_shapes}
    given = {bound: text for bound, text in shapes.items() if text}
    profiles = make_profiles(graphs["vq-plugin"].inputs, given, context=options.context)
    with whole(kit) as staged:
        staged.mkdir()
        for kind, graph in graphs.items():
            _write_graph(graph, staged, kind)
        for file in (*source_files(), *_programs()):
            (staged / "plugins" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(SOURCES / file, staged / "plugins" / file)
        (staged / "build.sh").write_text(_script(device, target, profiles), encoding="utf-8")
        (staged / "build.sh").chmod(0o755)


def _write_graph(graph: EngineSource, folder: Path, kind: str) -> None:
    """Both forms refer to the same weights file: a copy, as links stay behind when a folder travels."""
    for name in graph.data_files:
        (folder / name).unlink(missing_ok=True)
    for name in graph.write_onnx(folder / f"{kind}.onnx"):
        (folder / name).unlink()
        shutil.copyfile(graph.path.with_name(name), folder / name)


def _programs() -> list[Path]:
    return sorted(path.relative_to(SOURCES) for path in (SOURCES / "runtime").iterdir() if path.is_file())


def _shapes(profiles: tuple[EngineProfile, ...], bound: str) -> str:
    """One range that holds all profiles, in trtexec's words; what is usual is the last one's, a decode step."""

    def pick(sizes: tuple[int, ...]) -> int:
        return sizes[-1] if bound == "opt" else min(sizes) if bound == "min" else max(sizes)

    words = []
    for each in zip(*(profile.inputs for profile in profiles), strict=True):
        dims = [pick(sizes) for sizes in zip(*(getattr(given, bound) for given in each), strict=True)]
        words.append(f"{each[0].name}:{'x'.join(map(str, dims))}")
    return ",".join(words)


def _script(device: Target, target: str, profiles: tuple[EngineProfile, ...]) -> str:
    typed = " --stronglyTyped" if device.tensorrt.startswith("10.") else ""  # 11 knows nothing else
    ranges = " \\\n    ".join(f"--{bound}Shapes={_shapes(profiles, bound)}" for bound in ("min", "opt", "max"))
    return f"""#!/usr/bin/env bash
{_MARK}{target}: compiles the plugin and the runner on the device and builds the plan there.
set -euo pipefail
cd "$(dirname "${{BASH_SOURCE[0]}}")"
export PATH="$PATH:/usr/local/cuda/bin:/usr/src/tensorrt/bin"
include=${{TENSORRT_INCLUDE_DIR:-/usr/include/$(uname -m)-linux-gnu}}

[ -f "$include/NvInferVersion.h" ] || {{
    echo "no TensorRT headers in $include; name their folder with TENSORRT_INCLUDE_DIR=..." >&2
    exit 2
}}
found=$(printf '#include <NvInferVersion.h>\\nNV_TENSORRT_MAJOR NV_TENSORRT_MINOR\\n' | "${{CXX:-c++}}" -E -P -I "$include" -x c++ - | tail -n 1)
[ "$found" = "{device.tensorrt.replace(".", " ")}" ] || {{
    echo "TensorRT {device.tensorrt} was expected, the headers in $include are of ${{found/ /.}}; write this folder again for that version" >&2
    exit 2
}}

cmake -S plugins -B build/native -DTENSORRT_INCLUDE_DIR="$include" -DVQ_CUDA_ARCHITECTURES={device.sm} \\
    -DVQ_SOURCE_HASH={source_hash()}
cmake --build build/native --target vq_trt
cmake -S plugins/runtime -B build/runtime -DTENSORRT_INCLUDE_DIR="$include"
cmake --build build/runtime
trtexec --onnx=vq-plugin.onnx --dynamicPlugins="$PWD/build/native/libvq_trt.so"{typed} --saveEngine=vq-plugin.plan \\
    {ranges}
echo "run it: build/runtime/vq_run_trt vq-plugin.plan TOKEN_ID... --library build/native/libvq_trt.so"
"""
