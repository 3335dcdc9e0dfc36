"""Engines built by NVIDIA's own parser and builder, with no GPU: all kinds, what is proven of them, and every refusal."""

import json
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from checkpoints import save_tiny, tiny_head, tiny_model
from commands import run
from tensorrt_fixture import install_tensorrt

from export_vq import contract, proof, trt_runner
from export_vq.build_progress import Phases
from export_vq.engine import EngineOptions, build_engine
from export_vq.errors import CheckFailed, UserError
from export_vq.files import sha256
from export_vq.forms import convert
from export_vq.graph import METADATA_KEY, ExportOptions, export_onnx, head_graph
from export_vq.head import VQHead
from export_vq.head_output import HeadOutput
from export_vq.plan import check_fit, load_engine
from export_vq.plugins.library import require_library
from export_vq.records import EngineArtifact, PluginLayer
from export_vq.trt import Gpu, TensorRT, find_tensorrt, load_plugin

FOLDER = "any-tensorrt_rtx-1.7.1"
CONTEXT = 64


@pytest.fixture(scope="module")
def trt(tmp_path_factory):
    return install_tensorrt(tmp_path_factory.mktemp("tensorrt"))


@pytest.fixture(scope="module")
def library():
    try:
        return require_library("vq_trt").path
    except UserError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def from_checkpoint(tmp_path_factory):
    """`export-vq build model.pt` on a tiny Llama with KV cache and a rotated product head: (its result, output folder)."""
    install_tensorrt(tmp_path_factory.mktemp("tensorrt"))
    folder = tmp_path_factory.mktemp("fp16")
    save_tiny(folder / "model.pt", "llama", "product", rotation=True)
    return run("build", folder / "model.pt", "-o", folder / "out", "--kind", "dense"), folder / "out"


@pytest.fixture(scope="module")
def decoders(from_checkpoint, tmp_path_factory):
    """The same model's graphs: {dtype: folder}."""
    folder = tmp_path_factory.mktemp("fp32")
    export_onnx(tiny_model("llama", "product", rotation=True), folder, ExportOptions(dtype="fp32"))
    return {"fp16": from_checkpoint[1], "fp32": folder}


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """A head alone, M=4, K=16, V=97, D=32, in float16: files 'vq', 'plugin' (form) and 'dense'."""
    install_tensorrt(tmp_path_factory.mktemp("tensorrt"))
    folder = tmp_path_factory.mktemp("heads")
    head = tiny_head("product", 32, 97).half()
    files = {name: folder / f"{name}.onnx" for name in ("vq", "plugin", "dense")}
    for name, file in files.items():
        graph = head_graph(head, "dense" if name == "dense" else "vq")
        if name == "plugin":
            convert(graph, "plugin")
        ir.save(graph, file)
    return files


def _left_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# ----------------------------------------------------------------------------------------------------- what is built


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", ["vq-plain", "dense"])
def test_a_decoder_without_plugin(decoders, kind, dtype, tmp_path):
    source = decoders[dtype] / ("dense.onnx" if kind == "dense" else "model.onnx")
    artifact = build_engine(source, kind, tmp_path, EngineOptions(context=CONTEXT))
    folder = tmp_path / FOLDER
    assert {f"{kind}.json", f"{kind}.onnx", f"{kind}.plan", "timing.cache"} == set(_left_in(folder))
    assert EngineArtifact.load(folder / f"{kind}.json") == artifact
    assert artifact.sha256 == sha256(folder / f"{kind}.plan")
    assert artifact.num_bytes == (folder / f"{kind}.plan").stat().st_size
    assert (artifact.kind, artifact.dtype, artifact.plugin_layers) == (kind, dtype, ())
    assert artifact.layers["matrix_multiply"] > 10
    assert "plugin_v3" not in artifact.layers
    assert (artifact.flavour, artifact.tensorrt_version) == ("tensorrt_rtx", "1.7.1")
    assert (artifact.gpu, artifact.compute_capability, artifact.layers_from) == (None, None, "network")
    assert [profile.name for profile in artifact.profiles] == ["prefill", "decode"]
    assert artifact.cache_shapes == ((2, 8), (2, 8))
    assert artifact.source_sha256 == {source.name: sha256(source)}
    node_types = {(n.domain, n.op_type) for n in onnx.load(folder / f"{kind}.onnx").graph.node}
    assert (contract.DOMAIN, contract.GATHER_SCATTER) not in node_types


@pytest.mark.parametrize("kind", ["vq-plain", "dense"])
@pytest.mark.parametrize(("word", "names"), [("topk", ["values", "ids", "logsumexp"]), ("sample", ["ids", "logprob"])])
def test_a_head_that_chooses_without_plugin(trt, word, names, kind, tmp_path):  # noqa: ARG001
    """More tokens than TensorRT's TopK sorts, and no bias among the inputs."""
    head = tiny_head("single", 32, 5000, bias=False).half()
    output = HeadOutput(word, 5 if word == "topk" else 0, last_token=word == "topk")
    ir.save(head_graph(head, "dense" if kind == "dense" else "vq", output=output), tmp_path / "head.onnx")
    artifact = build_engine(tmp_path / "head.onnx", kind, tmp_path)
    scores = ["code_logits"] if (word, kind) == ("topk", "vq-plain") else []
    assert list(artifact.output_names) == names + scores
    assert (artifact.output, artifact.top_k, artifact.last_token) == (word, output.top_k, False)
    assert (artifact.dtype, artifact.plugin_layers) == ("fp16", ())
    assert trt_runner.signature_of_engine(artifact).output == word


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_decoder_with_the_plugin(decoders, library, dtype, tmp_path):
    options = EngineOptions(context=CONTEXT, plugin=library)
    artifact = build_engine(decoders[dtype] / "model.onnx", "vq-plugin", tmp_path, options)
    real = {"fp32": "float", "fp16": "half"}[dtype]
    assert artifact.plugin_layers == (
        PluginLayer("lm_head", "VQGatherScatter", "1", "com.vqlogits", (real, "int32", real), (real,)),
    )
    assert artifact.layers["plugin_v3"] == 1
    assert artifact.plugin_sha256 == sha256(library)
    plan = (tmp_path / FOLDER / "vq-plugin.plan").read_bytes()
    # The plugin's fields as TensorRT serialised them: name, type INT32, one value.
    for name, value in {"num_codebooks": 4, "code_bits": 8, "vocab_size": 97}.items():
        assert name.encode() + b"\0" + struct.pack("<iii", 5, 1, value) in plan
    model = onnx.load(tmp_path / FOLDER / "vq-plugin.onnx")
    (node,) = [n for n in model.graph.node if n.op_type == contract.GATHER_SCATTER]
    assert {a.name for a in node.attribute} > {contract.PLUGIN_NAMESPACE, contract.PLUGIN_VERSION, contract.CODE_BITS}
    assert not model.functions


@pytest.mark.parametrize("kind", ["vq-plugin", "vq-plain", "dense"])
def test_a_head_alone(heads, kind, tmp_path, request):
    plugin = request.getfixturevalue("library") if kind == "vq-plugin" else None
    told = []
    options = EngineOptions(max_shapes="hidden_states:256x1x32", workspace_bytes=64 << 20, plugin=plugin)
    source = heads["dense" if kind == "dense" else "vq"]
    artifact = build_engine(source, kind, tmp_path, options, lambda what, fraction: told.append((what, fraction)))
    (profile,) = artifact.profiles
    assert (profile.name, profile.inputs[0].max) == ("head", (256, 1, 32))
    assert artifact.dtype == "fp16"
    assert len(artifact.plugin_layers) == (kind == "vq-plugin")
    assert told
    assert all(what and 0 <= fraction <= 1 for what, fraction in told)


def test_a_graph_already_in_the_plugin_form_is_built_as_it_is(heads, library, tmp_path):
    artifact = build_engine(heads["plugin"], "vq-plugin", tmp_path, EngineOptions(plugin=library))
    assert len(artifact.plugin_layers) == 1
    with pytest.raises(UserError, match=r"is in the plugin form.*give the portable one"):
        build_engine(heads["plugin"], "vq-plain", tmp_path)


def test_the_plugin_library_can_be_embedded(heads, library, tmp_path):
    embedded = build_engine(heads["vq"], "vq-plugin", tmp_path, EngineOptions(plugin=library, embed_plugin=True))
    code = library.read_bytes()
    middle = code[len(code) // 2 : len(code) // 2 + 512]
    plan = (tmp_path / FOLDER / "vq-plugin.plan").read_bytes()
    assert len(set(middle)) > 16
    assert middle in plan
    assert embedded.options["embed_plugin"]


def test_the_timing_cache_is_read_and_written_and_a_damaged_one_is_replaced(heads, tmp_path):
    cache = tmp_path / "kept.cache"
    cache.write_bytes(b"no timing cache")
    options = EngineOptions(timing_cache=cache)
    build_engine(heads["dense"], "dense", tmp_path / "a", options)
    first = cache.read_bytes()
    assert first != b"no timing cache"
    build_engine(heads["dense"], "dense", tmp_path / "b", options)
    assert len(cache.read_bytes()) >= len(first)
    assert "timing.cache" not in _left_in(tmp_path / "b")


def _with_weights_apart(source, file):
    """A copy of a graph with its weights in a .data file beside it; returns that file."""
    file.parent.mkdir(exist_ok=True)
    data = file.with_suffix(".1.data")
    ir.save(ir.load(source), file, external_data=data.name, size_threshold_bytes=0)
    return data


def test_large_weights_are_linked_not_copied(heads, tmp_path):
    source = tmp_path / "source" / "model.onnx"
    data = _with_weights_apart(heads["vq"], source)
    artifact = build_engine(source, "vq-plain", tmp_path / "engines")
    link = tmp_path / "engines" / FOLDER / data.name
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == data.resolve()
    assert artifact.source_sha256 == {file.name: sha256(file) for file in (source, data)}
    onnx.checker.check_model(source)  # refuses weights with more than one name
    # A source written anew leaves no dangling link.
    data.unlink()
    shutil.copy(heads["vq"], source)
    build_engine(source, "vq-plain", tmp_path / "engines")
    assert not link.is_symlink()


def test_a_missing_weights_file_is_named(heads, tmp_path):
    data = _with_weights_apart(heads["dense"], tmp_path / "dense.onnx")
    data.unlink()
    with pytest.raises(UserError, match=f"weights file {data.name} is missing"):
        build_engine(tmp_path / "dense.onnx", "dense", tmp_path / "engines")
    assert _left_in(tmp_path / "engines") == []


# ------------------------------------------------------------------------------------------------- plugin and parser


def test_the_creator_is_found_by_name_version_and_namespace(trt, library):
    load_plugin(find_tensorrt("tensorrt_rtx"), library)
    registry = trt.get_plugin_registry()
    creator = registry.get_creator("VQGatherScatter", "1", "com.vqlogits")
    assert (creator.name, creator.plugin_version, creator.plugin_namespace) == ("VQGatherScatter", "1", "com.vqlogits")
    assert {field.name for field in creator.field_names} == {"num_codebooks", "code_bits", "vocab_size"}
    for other in [("VQGatherScatter", "2", "com.vqlogits"), ("VQGatherScatter", "1", ""), ("Vq", "1", "com.vqlogits")]:
        assert registry.get_creator(*other) is None


def _node(model):
    return next(n for n in model.graph.node if n.op_type == contract.GATHER_SCATTER)


def _attribute(name, value):
    def change(model):
        node = _node(model)
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend(kept + ([] if value is None else [onnx.helper.make_attribute(name, value)]))

    return change


def _codes(array):
    def change(model):
        (codes,) = [t for t in model.graph.initializer if t.name == _node(model).input[1]]
        codes.CopyFrom(onnx.numpy_helper.from_array(array, codes.name))

    return change


@pytest.mark.parametrize(
    ("change", "plugin_says", "parser_says"),
    [
        (_attribute("code_bits", 12), "code_bits is 12", "Could not create the plugin"),
        (_attribute("num_codebooks", 0), "num_codebooks is 0", "Could not create the plugin"),
        (_attribute("vocab_size", None), "vocab_size is missing", "Could not create the plugin"),
        (_attribute("plugin_version", "2"), "", "Plugin not found"),
        (_attribute("num_codebooks", 3), "num_codebooks, 3", "lm_head"),
        (_attribute("vocab_size", 98), "98", "lm_head"),
        (_codes(np.zeros((4, 27), np.int32)), "codes", "lm_head"),
        (_codes(np.zeros((4, 28), np.int64)), "codes", "VQGatherScatter"),
    ],
    ids=["bits", "no codebooks", "no vocab_size", "version", "codebooks", "vocab_size", "codes shape", "codes type"],
)
def test_a_wrong_node_is_refused_by_plugin_and_parser(
    heads, library, change, plugin_says, parser_says, tmp_path, capfd
):
    model = onnx.load(heads["plugin"])
    change(model)
    onnx.save(model, tmp_path / "wrong.onnx")
    with pytest.raises(UserError) as refused:
        build_engine(tmp_path / "wrong.onnx", "vq-plugin", tmp_path / "engines", EngineOptions(plugin=library))
    message = str(refused.value)
    assert message.startswith(f"{tmp_path / 'wrong.onnx'}: TensorRT for RTX 1.7.1 cannot parse the vq-plugin graph: ")
    assert parser_says in message
    # TensorRT for RTX gives plugins no logger, so they speak to stderr there.
    assert plugin_says in message + capfd.readouterr().err
    assert _left_in(tmp_path / "engines") == []


def test_a_function_in_place_of_the_plugin_is_found_out(trt, heads, library):
    """What goes wrong silently when a file with both is parsed (TensorRT up to 10.6, and from 10.15 without namespace)."""
    load_plugin(find_tensorrt("tensorrt_rtx"), library)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(heads["vq"]))
    found = proof.network_layers(trt, network)
    assert found.plugins == ()
    with pytest.raises(CheckFailed, match=r"1 com.vqlogits layer.* were meant, the network has"):
        proof.check_layers(found, "vq-plugin", "fp16", ["lm_head"])


def test_an_engine_in_another_type_than_the_export_s_fails(decoders, tmp_path):
    model = onnx.load(decoders["fp32"] / "model.onnx")
    record = next(p for p in model.metadata_props if p.key == METADATA_KEY)
    record.value = json.dumps({**json.loads(record.value), "dtype": "fp16"})
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(CheckFailed, match=r"in fp16 were meant, the network has logits fp32"):
        build_engine(tmp_path / "model.onnx", "vq-plain", tmp_path / "engines", EngineOptions(context=CONTEXT))
    assert _left_in(tmp_path / "engines") == []


CHOOSING = PluginLayer("lm_head", "VQTopK", "1", "com.vqlogits", ("half", "int32"), ("float", "int64", "float"))
OURS = PluginLayer("lm_head", "VQGatherScatter", "1", "com.vqlogits", ("half", "int32"), ("half",))


@pytest.mark.parametrize(
    ("plugins", "kind", "dtype", "says"),
    [
        ((), "vq-plugin", "fp16", "has 7 layers of which 0 by plugins"),
        ((OURS, OURS), "vq-plugin", "fp16", "7 layers of which 2 by plugins"),
        ((replace(OURS, plugin="Other"),), "vq-plugin", "fp16", "com.vqlogits::Other"),
        ((replace(OURS, plugin="", name="other"),), "vq-plugin", "fp16", "other: com.vqlogits::?"),
        ((replace(OURS, namespace="other"),), "vq-plugin", "fp16", "other::VQGatherScatter"),
        ((OURS,), "vq-plugin", "fp32", "meant to compute in fp32"),
        ((replace(OURS, output_dtypes=("float",)),), "vq-plugin", "fp16", "half int32 -> float"),
        (
            (replace(CHOOSING, input_dtypes=("float", "int32")),),
            "vq-plugin",
            "fp16",
            "float int32 -> float int64 float",
        ),
        ((OURS,), "dense", "fp16", "no plugin was meant"),
        ((OURS,), "vq-plain", "fp16", "no plugin was meant"),
    ],
)
def test_layers_that_are_not_what_was_meant_fail(plugins, kind, dtype, says):
    with pytest.raises(CheckFailed, match=re.escape(says)):
        proof.check_layers(proof.Layers("engine", {"gather": 7}, plugins), kind, dtype, ["lm_head"])


def test_a_plugin_that_tells_no_name_is_known_by_its_node():
    """The bindings of TensorRT up to 10.6."""
    unnamed = replace(OURS, plugin="", version="", namespace="")
    proof.check_layers(proof.Layers("network", {"plugin_v3": 1}, (unnamed,)), "vq-plugin", "fp16", ["lm_head"])


@pytest.mark.parametrize("name", ["VQTopK", "VQSample", ""])
def test_a_plugin_that_chooses_gives_other_types_than_it_takes(name):
    proof.check_layers(
        proof.Layers("network", {"plugin_v3": 1}, (replace(CHOOSING, plugin=name),)), "vq-plugin", "fp16", ["lm_head"]
    )


def test_the_inspector_s_layers_are_read_however_it_writes_them():
    def layer(kind, types, **more):
        tensors = [{"Name": "bf16 by name only", "Dimensions": [-1], "Format/Datatype": t} for t in types]
        return {"Name": "lm_head", "LayerType": kind, "Inputs": tensors[:-1], "Outputs": tensors[-1:], **more}

    linear = ("Row major linear FP16 format", "Row major Int32 format", "Row major linear FP16 format")
    cases = {
        "by type": layer("PluginV3", linear, PluginType="VQGatherScatter"),
        "by metadata": layer("PluginV3", ("Half", "Int32", "Half"), Metadata="VQGatherScatter 1 num_codebooks=4"),
        "without types": layer("PluginV3", ("N/A due to dynamic shapes",) * 3, PluginType="VQGatherScatter"),
    }
    for entry in cases.values():
        found = proof.read_layers(json.dumps({"Layers": ["a fused node", layer("gemm", ("Float",) * 2), entry]}))
        proof.check_layers(found, "vq-plugin", "fp16", ["lm_head"])
        assert found.counts == {"gemm": 1, "pluginv3": 1, "unknown": 1}
        assert found.source == "engine"
    other = proof.read_layers(json.dumps({"Layers": [layer("PluginV3", ("BF16", "BFloat16"), PluginType="Else")]}))
    assert other.plugins[0].input_dtypes == ("bf16",)
    with pytest.raises(CheckFailed):
        proof.check_layers(other, "vq-plugin", "bf16", ["lm_head"])


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("source", "kind", "options", "says"),
    [
        ("vq", "int8", {}, ("kind of engine is 'int8'", "vq-plugin, vq-plain, dense")),
        ("vq", "dense", {}, ("VQGatherScatter node", "give dense.onnx")),
        ("dense", "vq-plain", {}, ("no com.vqlogits node", "give the portable model.onnx")),
        ("dense", "dense", {"embed_plugin": True}, ("no plugin to embed", "leave")),
        ("dense", "dense", {"max_shapes": "input_ids:1x1"}, ("'input_ids'", "hidden_states")),
        ("dense", "dense", {"flavour": "tensorrt"}, ("TensorRT 11.4", "NVIDIA GPU", "TensorRT for RTX")),
        ("dense", "dense", {"version_compatible": True}, ("cannot build the dense engine", "libnvinfer_lean")),
    ],
    ids=["kind", "no dense graph", "no VQ graph", "nothing to embed", "shapes", "no GPU", "no lean runtime"],
)
def test_what_cannot_be_built_is_refused_and_leaves_nothing(heads, source, kind, options, says, tmp_path):
    with pytest.raises(UserError) as refused:
        build_engine(heads[source], kind, tmp_path, EngineOptions(**options))
    assert all(words in str(refused.value) for words in says), refused.value
    assert _left_in(tmp_path) == []


def test_files_that_are_none_are_refused(heads, tmp_path):
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(UserError, match="not a readable ONNX file"):
        build_engine(tmp_path / "text.onnx", "dense", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another output with -o"):
        build_engine(heads["dense"], "dense", tmp_path / "file")


def test_a_library_that_is_none_or_has_no_creator_is_refused(heads, tmp_path):  # noqa: ARG001
    """In a process of its own, as another test may have registered the creator in this one."""
    (tmp_path / "broken.so").write_bytes(b"\x7fELF" + bytes(100))
    (tmp_path / "empty.cpp").write_text("")
    subprocess.run(["g++", "-shared", "-o", tmp_path / "empty.so", tmp_path / "empty.cpp"], check=True)
    script = """if True:
        import sys
        from pathlib import Path
        from tensorrt_fixture import install_tensorrt
        from export_vq.errors import UserError
        from export_vq.trt import find_tensorrt, load_plugin
        folder = Path(sys.argv[1])
        install_tensorrt(folder)
        for name in ("broken.so", "empty.so"):
            try:
                load_plugin(find_tensorrt("tensorrt_rtx"), folder / name)
            except UserError as error:
                print(error)
    """
    tests = Path(__file__).parent.parent
    command = [sys.executable, "-c", script, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tests, check=True)
    for name in ("broken.so", "empty.so"):
        said = "TensorRT for RTX 1.7.1 found no creator of VQGatherScatter, VQTopK, VQSample version 1 in namespace com.vqlogits"
        assert f"{tmp_path / name}: {said}" in done.stdout
    assert "plugins build" in done.stdout


# ---------------------------------------------------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def built(heads, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    return build_engine(heads["dense"], "dense", folder), folder / FOLDER / "dense.json"


def test_loading_here_says_that_a_gpu_is_needed(built):
    with pytest.raises(UserError, match=r"dense\.plan: needs an NVIDIA GPU"):
        load_engine(built[1])


def test_a_damaged_plan_is_refused(built, tmp_path):
    shutil.copytree(built[1].parent, tmp_path / "copy")
    plan = tmp_path / "copy" / "dense.plan"
    plan.write_bytes(plan.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"not the file that dense\.json describes"):
        load_engine(tmp_path / "copy" / "dense.json")
    plan.unlink()
    with pytest.raises(UserError, match="missing"):
        load_engine(tmp_path / "copy" / "dense.json")


ORIN, THOR = Gpu("Orin", "8.7"), Gpu("Thor", "11.0")


@pytest.mark.parametrize(
    ("flavour", "version", "gpu", "compatible", "says"),
    [
        ("tensorrt", "10.3.0", ORIN, False, None),
        ("tensorrt", "10.3.0", ORIN, True, None),
        ("tensorrt", "11.4.0", ORIN, True, None),
        ("tensorrt", "11.4.0", ORIN, False, ("tensorrt 10.3.0", "that version only", "here is 11.4.0")),
        ("tensorrt", "10.2.9", ORIN, True, ("version-compatible with later versions", "here is 10.2.9")),
        ("tensorrt", "10.3.0", THOR, False, ("built for Orin", "8.7", "here is Thor (11.0)")),
        ("tensorrt", "10.3.0", Gpu("Orin", "8.6"), False, ("built for Orin", "8.7", "8.6")),
        ("tensorrt", "10.3.0", None, False, ("needs an NVIDIA GPU",)),
        ("tensorrt_rtx", "10.3.0", ORIN, False, ("built by tensorrt,", "here is tensorrt_rtx")),
    ],
)
def test_a_plan_is_refused_where_it_does_not_fit(built, tmp_path, flavour, version, gpu, compatible, says):
    artifact = replace(
        built[0],
        flavour="tensorrt",
        tensorrt_version="10.3.0",
        gpu=ORIN.name,
        compute_capability=ORIN.compute_capability,
        options={**built[0].options, "version_compatible": compatible},
    )
    here = TensorRT(None, flavour, version, gpu)
    if says is None:
        check_fit(tmp_path, artifact, here)
        return
    with pytest.raises(UserError) as refused:
        check_fit(tmp_path, artifact, here)
    assert all(words in str(refused.value) for words in (*says, str(tmp_path)))


def test_a_plan_of_tensorrt_for_rtx_fits_every_gpu(built, tmp_path):
    for gpu in (ORIN, THOR):
        check_fit(tmp_path, built[0], TensorRT(None, "tensorrt_rtx", "1.7.1", gpu))


# -------------------------------------------------------------------------------------------- progress, command line


def test_progress_is_the_outermost_phase_with_the_share_of_those_inside():
    phases = Phases()
    assert phases.fraction() == 0
    phases.start("Building engine", None, 4)
    phases.step("Building engine", 0)
    assert phases.fraction() == 1 / 4
    phases.start("Timing", "Building engine", 2)
    phases.step("Timing", 0)
    assert phases.fraction() == (1 + 1 / 2) / 4
    phases.start("Kernel", "Timing", 0)  # a phase without steps
    phases.step("Kernel", 0)
    assert phases.fraction() == 2 / 4
    for name in ("Kernel", "Timing", "Building engine"):
        phases.finish(name)
    assert phases.fraction() == 0


def test_ctrl_c_stops_a_build_and_leaves_nothing(heads, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(heads["dense"], "dense", tmp_path, tell=interrupt)
    assert _left_in(tmp_path) == []


def test_the_command_builds_from_a_checkpoint_then_skips_what_is_current(from_checkpoint):
    (code, stdout, _), out = from_checkpoint
    assert code == 0
    # 64 positions, as the model's config says
    assert "  prefill: input_ids and 2 more 1x1 .. 1x64 .. 8x64" in stdout
    assert "dense in TensorRT for RTX 1.7.1 for any GPU that it supports: fp16" in stdout
    assert "by plugins: none" in stdout
    plan = out / "engines" / FOLDER / "dense.plan"
    assert run("inspect", plan)[:2] == (0, stdout)
    stamp = plan.stat().st_mtime_ns
    code, stdout, stderr = run("build", out, "--kind", "dense", "--json")
    assert code == 0
    assert "build dense" in stderr
    assert "unchanged, skipped" in stderr
    assert plan.stat().st_mtime_ns == stamp
    (entry,) = json.loads(stdout)["engines"]
    assert EngineArtifact.from_json(entry) == EngineArtifact.load(plan.with_suffix(".json"))


def test_inspect_refuses_a_plan_that_its_sidecar_does_not_describe(heads, tmp_path):
    code, _, stderr = run("inspect", tmp_path / "dense.plan")
    assert (code, "no such file; give a plan" in stderr) == (2, True)
    build_engine(heads["dense"], "dense", tmp_path)
    plan = tmp_path / FOLDER / "dense.plan"
    plan.write_bytes(plan.read_bytes()[:-1])
    code, _, stderr = run("inspect", plan)
    assert code == 2
    assert "not the file that dense.json describes; build it again" in " ".join(stderr.split())


def test_other_options_or_a_changed_plan_are_built_anew(heads, tmp_path):
    build = ("build", heads["dense"], "-o", tmp_path)
    plan = tmp_path / "engines" / FOLDER / "dense.plan"
    assert run(*build)[0] == 0
    assert "skipped" in run(*build)[2]
    assert "skipped" not in run(*build, "--max-shapes", "hidden_states:2x1x32")[2]
    assert EngineArtifact.load(plan.with_suffix(".json")).profiles[0].inputs[0].max == (2, 1, 32)
    assert run(*build)[0] == 0
    plan.write_bytes(b"")
    assert "skipped" not in run(*build)[2]
    assert plan.stat().st_size > 1000


def test_without_the_library_the_other_engines_are_built_and_the_mend_is_told(heads, tmp_path, monkeypatch):
    monkeypatch.setattr("export_vq.engines.require_library", partial(require_library, folder=tmp_path / "empty"))
    code, stdout, stderr = run("build", heads["vq"], "-o", tmp_path)
    assert code == 0
    assert "vq-plain" in stdout
    assert "export-vq plugins build" in stderr
    assert _left_in(tmp_path) == ["timing.cache", "vq-plain.json", "vq-plain.onnx", "vq-plain.plan"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["missing"], "no such file or folder"),
        (["folder", "--kind", "dense"], "no such file"),
        (["vq.onnx", "--kind", "dense"], "give dense.onnx"),
        (["vq.onnx", "--kind", "vq-plain", "--max-shapes", "hidden:1"], "'hidden'"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_one_sentence(heads, args, says, tmp_path):
    shutil.copy(heads["vq"], tmp_path)
    (tmp_path / "folder").mkdir()
    shutil.copy(heads["vq"], tmp_path / "folder" / "model.onnx")
    code, stdout, stderr = run("build", tmp_path / args[0], *args[1:], "-o", tmp_path / "out")
    assert (code, stdout) == (2, "")
    (message,) = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert says in message
    assert not (tmp_path / "out").exists() or _left_in(tmp_path / "out") == []


def test_a_failed_check_is_exit_code_1(decoders, tmp_path, monkeypatch):
    monkeypatch.setattr("export_vq.engine_source._dtype", lambda *_: "bf16")
    code, _, stderr = run("build", decoders["fp16"] / "dense.onnx", "--kind", "dense", "-o", tmp_path)
    assert code == 1
    assert "FAILED: dense: outputs logits" in stderr


@pytest.mark.parametrize("kind", ["vq-plugin", "vq-plain", "dense"])
def test_a_head_of_the_real_size(heads, kind, tmp_path, request):  # noqa: ARG001
    """SmolLM2's head: D=576, V=49152, M=144, K=256, float16."""
    plugin = request.getfixturevalue("library") if kind == "vq-plugin" else None
    random = torch.Generator().manual_seed(0)
    head = VQHead.from_tensors(
        "product",
        torch.randn(144, 256, 4, generator=random),
        torch.randint(0, 256, (49152, 144), generator=random),
        torch.randn(49152, generator=random),
        None,
    ).half()
    ir.save(head_graph(head, kind.split("-")[0]), tmp_path / "head.onnx")
    artifact = build_engine(tmp_path / "head.onnx", kind, tmp_path, EngineOptions(plugin=plugin))
    assert [p.output_dtypes for p in artifact.plugin_layers] == [("half",)] * (kind == "vq-plugin")
    weights = {"vq-plugin": 49152 * 144, "vq-plain": 4 * 49152 * 144, "dense": 2 * 49152 * 576}[kind]
    assert artifact.num_bytes > weights  # codes in 8 bits, codes in 32 bits, a matrix in 16
