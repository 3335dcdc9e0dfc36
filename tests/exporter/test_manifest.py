"""An output folder and its manifest: every difference is found, nothing leads out, a library loads only by its hash."""

import json
import os
import shutil

import bundles
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from export_vq import manifest, runners
from export_vq.errors import UserError
from export_vq.feeds import prefill
from export_vq.files import is_inside, sha256
from export_vq.plugins import library
from export_vq.records import OnnxArtifact
from export_vq.textmodel import TextModel


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    out = tmp_path_factory.mktemp("exported")
    shutil.copytree(bundles.exported(), out, dirs_exist_ok=True)
    (out / "steps").mkdir()
    (out / "steps" / "check.json").write_text("{}")
    return out


@pytest.fixture
def out(exported, tmp_path, monkeypatch):
    """A sealed folder of a machine without libraries."""
    monkeypatch.setattr(library, "LIB", tmp_path / "no-such-folder")
    shutil.copytree(exported, tmp_path / "out")
    manifest.seal(tmp_path / "out")
    return tmp_path / "out"


def _library(folder, text=b""):
    """A file that tells that it was built from these sources."""
    folder.mkdir(parents=True, exist_ok=True)
    info = json.dumps({"vq_build_info": 1, "source_hash": library.source_hash(), "cuda": False}).encode()
    (folder / "libvq_ort.so").write_bytes(b"\x7fELF" + info + text)
    return folder / "libvq_ort.so"


def test_what_is_shipped_is_listed_with_its_hash_and_state_is_not(out):
    listed = manifest.read(out)
    there = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert set(listed.files) == there - {"manifest.json", "steps/check.json"}
    assert {"model.onnx", "dense.onnx.json", "config.json", "tokenizer.json"} <= set(listed.files)
    assert sum(name.endswith(".data") for name in listed.files) == 2
    assert all(sha256(out / name) == digest for name, digest in listed.files.items())
    assert listed.contract == "com.vqlogits 1"
    assert {"export-vq", "torch", "onnx"} <= set(listed.versions)
    assert manifest.verify(out) == ()


def test_files_that_no_record_describes_are_not_taken_up(out):
    (out / "stranger.onnx").write_bytes(b"x")
    (out / "notes.txt").write_text("x")
    assert {"stranger.onnx", "notes.txt"}.isdisjoint(manifest.seal(out).files)


def test_a_copied_and_moved_folder_verifies_and_writes_the_same(out, tmp_path, monkeypatch):
    shutil.copytree(out, tmp_path / "copy")
    with TextModel(out) as model:
        before = [event.token_id for event in model.write("the cat", _greedy())]
    out.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "copy", tmp_path / "elsewhere"):
        assert manifest.verify(folder) == ()
        with TextModel(folder) as model:
            assert [event.token_id for event in model.write("the cat", _greedy())] == before
    assert str(tmp_path) not in (tmp_path / "copy" / "manifest.json").read_text()


def _greedy():
    from export_vq.decoding import DecodingOptions

    return DecodingOptions(max_new_tokens=5, temperature=0)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_changed_byte_anywhere_is_found(out, data):
    name = data.draw(st.sampled_from(sorted(manifest.read(out).files)))
    before = (out / name).read_bytes()
    content = bytearray(before)
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    (out / name).write_bytes(content)
    assert manifest.verify(out) == (f"{name}: changed: not the content that the manifest lists",)
    (out / name).write_bytes(before)


def test_missing_and_extra_files_are_named(out):
    (out / "config.json").unlink()
    (out / "engines" / "gpu").mkdir(parents=True)
    (out / "engines" / "gpu" / "planted.plan").write_bytes(b"x")
    (out / ".hidden").write_bytes(b"x")
    os.mkfifo(out / "pipe")
    os.unlink(out / "model.onnx")
    os.mkfifo(out / "model.onnx")
    assert manifest.verify(out) == (
        ".hidden: extra: the manifest does not list it",
        "config.json: missing",
        "engines/gpu/planted.plan: extra: the manifest does not list it",
        "model.onnx: not a regular file",
        "pipe: extra: the manifest does not list it",
    )


def test_links_are_refused_even_to_the_right_content(out, tmp_path):
    shutil.move(out / "model.onnx", tmp_path / "model.onnx")
    (out / "model.onnx").symlink_to(tmp_path / "model.onnx")
    (tmp_path / "folder").mkdir()
    (out / "lib").symlink_to(tmp_path / "folder")
    assert manifest.verify(out) == (
        "lib: a link, which a bundle may not hold",
        "model.onnx: a link, which a bundle may not hold",
    )
    with pytest.raises(UserError, match=r"model\.onnx: a link"):
        manifest.seal(out)


def test_the_weights_that_engines_share_may_be_a_link_inside_the_folder_or_a_copy(out, engine_record):
    data = next(name for name in manifest.read(out).files if name.startswith("model.") and name.endswith(".data"))
    place = engine_record(out / "engines" / "gpu-tensorrt-10.3")
    (place / data).symlink_to(f"../../{data}")
    assert f"engines/gpu-tensorrt-10.3/{data}" in manifest.seal(out).files
    assert manifest.verify(out) == ()
    (place / data).unlink()
    shutil.copy(out / data, place / data)  # what `cp -L`, `scp` and archives make of it
    assert manifest.verify(out) == ()
    for target in (f"../../../{out.name}/{data}", out / data, "../../config.json", data):
        (place / data).unlink()
        (place / data).symlink_to(target)
        found = manifest.verify(out)
        assert found == (f"engines/gpu-tensorrt-10.3/{data}: a link, which a bundle may not hold",), target


@pytest.fixture
def engine_record():
    """Writes what a build leaves behind: plan, ONNX file, record."""
    from export_vq.records import EngineArtifact

    def write(place, plugin_sha256=None):
        place.mkdir(parents=True)
        (place / "vq-plugin.plan").write_bytes(b"plan")
        (place / "vq-plugin.onnx").write_bytes(b"onnx")
        (place / "timing.cache").write_bytes(b"cache")
        record = EngineArtifact(
            *("vq-plugin.plan", "vq-plugin.onnx", "vq-plugin", "fp16", "tensorrt", "10.3", "Orin", "8.7"),
            plugin_sha256=plugin_sha256, source_sha256={}, profiles=(), options={}, input_names=(), output_names=(),
            cache_shapes=(), plugin_layers=(), layers={}, layers_from="engine", num_bytes=4, sha256="", versions={},
        )  # fmt: skip
        record.save(place / "vq-plugin.json")
        return place

    return write


def test_a_plan_with_its_record_onnx_and_timing_cache_is_shipped(out, engine_record):
    engine_record(out / "engines" / "gpu")
    names = {f"engines/gpu/{name}" for name in ("vq-plugin.plan", "vq-plugin.onnx", "vq-plugin.json", "timing.cache")}
    assert names <= set(manifest.seal(out).files)


# ------------------------------------------------------------------------------------------------------- damaged manifests


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["files"].update({"../secret": "0" * 64}), r"lists '\.\./secret', expected a relative path inside"),
        (lambda m: m["files"].update({"/etc/passwd": "0" * 64}), "lists '/etc/passwd'"),
        (lambda m: m["files"].update({"a/../../b": "0" * 64}), "expected a relative path inside"),
        (lambda m: m["files"].update({"a\\..\\b": "0" * 64}), "expected a relative path inside"),
        (lambda m: m["files"].update({"manifest.json": "0" * 64}), "expected a relative path inside"),
        (lambda m: m["files"].update({"model.onnx": "abc"}), "the hash of model.onnx is no SHA-256"),
        (lambda m: m["files"].update({"model.onnx": None}), "the hash of model.onnx is no SHA-256"),
        (lambda m: m["libraries"].update({"lib/libvq_ort.so": "linux-x86_64"}), "no hash of the library"),
        (lambda m: m["libraries"].update({"model.onnx": 1}), "is no text"),
        (lambda m: m.update(format=2), "format is not 1"),
        (lambda m: m.update(files=[]), "its fields are not"),
        (lambda m: m.update(more=1), "its fields are not"),
        (lambda m: m.pop("contract"), "its fields are not"),
    ],
)
def test_a_damaged_manifest_is_refused_with_the_reason(out, change, words):
    data = json.loads((out / "manifest.json").read_text())
    change(data)
    (out / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=words):
        manifest.verify(out)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "\udcff", '"text"'])
def test_what_is_no_manifest_is_refused(out, text):
    (out / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"manifest\.json"):
        manifest.read(out)


@given(st.text())
def test_a_name_that_is_inside_stays_inside(name):
    path = os.path.normpath(os.path.join("/a/b", name))
    assert not is_inside(name) or (path.startswith("/a/b/") and path == f"/a/b/{name}")


# --------------------------------------------------------------------------------------------------------------- libraries


def test_the_library_of_this_machine_is_put_into_the_folder_and_found_there(out, tmp_path, monkeypatch):
    own = _library(tmp_path / "own")
    monkeypatch.setattr(library, "LIB", own.parent)
    listed = manifest.seal(out)
    assert list(listed.libraries) == ["lib/libvq_ort.so"]
    assert sha256(out / "lib" / "libvq_ort.so") == sha256(own) == listed.files["lib/libvq_ort.so"]
    monkeypatch.setattr(library, "LIB", tmp_path / "nothing")
    assert manifest.bundled_library(out, "vq_ort").path == out / "lib" / "libvq_ort.so"
    assert manifest.bundled_library(out, "vq_trt") is None
    # Sealed again on a machine that has none, it stays.
    assert manifest.seal(out).libraries == listed.libraries


def test_a_library_that_was_changed_or_linked_is_never_loaded(out, tmp_path, monkeypatch):
    monkeypatch.setattr(library, "LIB", _library(tmp_path / "own").parent)
    manifest.seal(out)
    monkeypatch.setattr(library, "LIB", tmp_path / "nothing")
    _library(out / "lib", b"one byte more")
    with pytest.raises(UserError, match=r"libvq_ort\.so: changed.*not loaded.*export-vq plugins build"):
        TextModel(out)
    (out / "lib" / "libvq_ort.so").unlink()
    (out / "lib" / "libvq_ort.so").symlink_to(tmp_path / "own" / "libvq_ort.so")
    with pytest.raises(UserError, match="a link"):
        TextModel(out)
    (out / "lib" / "libvq_ort.so").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        TextModel(out)


def test_a_library_that_someone_laid_there_is_not_taken_up(out):
    _library(out / "lib")
    assert manifest.seal(out).libraries == {}
    assert manifest.verify(out) == ("lib/libvq_ort.so: extra: the manifest does not list it",)
    assert manifest.bundled_library(out, "vq_ort") is None


@pytest.mark.parametrize(("field", "value"), [("contract", "com.vqlogits 2"), ("libraries", "linux-riscv64")])
def test_a_library_for_another_platform_or_contract_is_left_alone(out, tmp_path, monkeypatch, field, value):
    monkeypatch.setattr(library, "LIB", _library(tmp_path / "own").parent)
    manifest.seal(out)
    data = json.loads((out / "manifest.json").read_text())
    data[field] = {"lib/libvq_ort.so": value} if field == "libraries" else value
    (out / "manifest.json").write_text(json.dumps(data))
    assert manifest.bundled_library(out, "vq_ort") is None


def test_the_library_that_an_engine_was_built_with_is_kept(out, tmp_path, monkeypatch, engine_record):
    def put(text):
        (tmp_path / "own").mkdir(exist_ok=True)
        _library(tmp_path / "own", text).rename(tmp_path / "own" / "libvq_trt.so")
        return sha256(tmp_path / "own" / "libvq_trt.so")

    monkeypatch.setattr(library, "LIB", tmp_path / "own")
    first = put(b"1")
    manifest.seal(out)
    second = put(b"2")
    assert manifest.seal(out).files["lib/libvq_trt.so"] == second
    engine_record(out / "engines" / "gpu", plugin_sha256=second)
    assert put(b"3") not in (first, second)
    assert manifest.seal(out).files["lib/libvq_trt.so"] == second


def test_the_real_library_of_a_bundle_runs_the_head_where_none_is_built(exported, tmp_path, monkeypatch):
    if runners.native_library() is None:
        pytest.skip("libvq_ort.so is not built; run: export-vq plugins build")
    out = tmp_path / "out"
    shutil.copytree(exported, out)
    manifest.seal(out)
    monkeypatch.setattr(library, "LIB", tmp_path / "nothing")
    assert runners.native_library() is None
    artifact = OnnxArtifact.load(out / "model.onnx.json")
    with runners.OrtRunner(out / "model.onnx", runners.signature_of(artifact), bundle=out) as runner:
        ids = np.array([[5, 9, 40]])
        runner.infer(prefill(runner.signature, ids, np.ones_like(ids)))
        runner.demand_native()


def test_a_record_that_points_out_of_the_folder_is_refused(out):
    record = json.loads((out / "model.onnx.json").read_text())
    (out / "model.onnx.json").write_text(json.dumps({**record, "path": "../model.onnx"}))
    with pytest.raises(UserError, match=r"its path is '\.\./model\.onnx', expected a file of the same folder"):
        TextModel(out)
