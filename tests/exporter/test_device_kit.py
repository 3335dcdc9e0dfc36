"""`export-vq build --for`: a folder that compiles and builds on a device, with nothing of this machine in it."""

import re
import shutil
import subprocess

import bundles
import onnx
import pytest

from export_vq.device_kit import Target, write_kit
from export_vq.engine import EngineOptions
from export_vq.errors import UserError
from export_vq.plugins import headers, library
from export_vq.plugins.headers import TENSORRT


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kits") / "kit"
    write_kit(bundles.exported() / "model.onnx", "sm87-trt10.3", folder, EngineOptions(context=64))
    return folder


def test_both_graphs_lie_there_with_their_weights_as_files(kit):
    assert not [path for path in kit.rglob("*") if path.is_symlink()]
    ops = {}
    for name in ("vq-plugin", "vq-plain"):
        graph = onnx.load(kit / f"{name}.onnx")  # weights too
        ops[name] = {(node.domain, node.op_type) for node in graph.graph.node}
        assert not graph.functions
        assert str(bundles.exported()) not in str(graph)
    assert ("com.vqlogits", "VQGatherScatter") in ops["vq-plugin"]
    assert {domain for domain, _ in ops["vq-plain"]} == {""}


def test_the_sources_are_those_of_this_package(kit):
    assert library.source_hash(kit / "plugins") == library.source_hash()
    programs = {path.name for path in (kit / "plugins" / "runtime").iterdir()}
    assert programs == {path.name for path in (library.SOURCES / "runtime").iterdir()}
    assert f"-DVQ_SOURCE_HASH={library.source_hash()}" in (kit / "build.sh").read_text()


def test_the_script_builds_one_profile_that_holds_prefill_and_decode(kit):
    script = (kit / "build.sh").read_text()
    assert subprocess.run(["bash", "-n", kit / "build.sh"], check=False).returncode == 0
    assert "-DVQ_CUDA_ARCHITECTURES=87" in script
    shapes = dict(re.findall(r"--(min|opt|max)Shapes=(\S+)", script))
    ranges = {b: dict(item.split(":") for item in text.split(",")) for b, text in shapes.items()}
    names = {i.name for i in onnx.load(kit / "vq-plugin.onnx", load_external_data=False).graph.input}
    assert all(set(given) == names for given in ranges.values())
    # An empty cache and a whole prompt; a decode step; the longest text.
    assert [ranges[b]["past_key_values.0.key"] for b in ("min", "opt", "max")] == ["1x2x0x8", "1x2x32x8", "8x2x63x8"]
    assert [ranges[b]["input_ids"] for b in ("min", "opt", "max")] == ["1x1", "1x1", "8x64"]
    assert [ranges[b]["attention_mask"] for b in ("min", "opt", "max")] == ["1x1", "1x33", "8x64"]


def test_the_script_refuses_another_tensorrt_before_it_compiles_anything(kit, tmp_path):
    include = headers.on_this_machine(TENSORRT)
    if include is None:
        pytest.skip("no TensorRT headers here; fetch them with: scripts/fetch_headers.sh")
    done = subprocess.run(
        [kit / "build.sh"], env={"PATH": "/usr/bin:/bin", "TENSORRT_INCLUDE_DIR": str(include)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert re.search(r"TensorRT 10\.3 was expected, the headers in .* are of \d+\.\d+;", done.stderr)
    done = subprocess.run(
        [kit / "build.sh"], env={"PATH": "/usr/bin:/bin", "TENSORRT_INCLUDE_DIR": str(tmp_path)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no TensorRT headers in" in done.stderr
    assert not (kit / "build").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sm87", "expected sm<compute capability>-trt<version>"),
        ("sm8-trt10.3", "expected sm"),
        ("sm87-trt10.3; reboot", "expected sm"),
        ("sm87-trt8.6", "TensorRT 8.6, expected 10.0 to 11.x"),
    ],
)
def test_a_target_that_is_none_is_refused(text, words):
    with pytest.raises(UserError, match=words):
        Target.parse(text)


def test_typing_is_a_flag_up_to_10_only(kit, tmp_path):
    assert "--stronglyTyped" in (kit / "build.sh").read_text()
    write_kit(bundles.exported() / "model.onnx", "sm110-trt11.4", tmp_path / "kit", EngineOptions(context=64))
    assert "--stronglyTyped" not in (tmp_path / "kit" / "build.sh").read_text()


def test_a_kit_is_replaced_and_other_folders_are_not(kit, tmp_path):
    shutil.copytree(kit, tmp_path / "kit")
    (tmp_path / "kit" / "vq-plain.onnx").unlink()
    args = (bundles.exported() / "model.onnx", "sm87-trt10.3")
    write_kit(*args, tmp_path / "kit", EngineOptions(context=64))
    assert (tmp_path / "kit" / "vq-plain.onnx").is_file()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not written by export-vq build --for"):
        write_kit(*args, tmp_path / "home", EngineOptions(context=64))
    assert (tmp_path / "home" / "thesis.txt").is_file()
