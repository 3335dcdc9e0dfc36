"""Exported graphs: every architecture through prefill and cached decode, every form, every dtype, large and small files."""

import json

import ml_dtypes
import numpy as np
import onnx
import onnx.numpy_helper
import onnx.reference
import onnx_ir as ir
import pytest
import torch
from checkpoints import save_tiny, tiny_model

from export_vq import contract, feeds, forms
from export_vq.errors import UserError
from export_vq.forms import FORMS
from export_vq.graph import METADATA_KEY, ExportOptions, export_onnx, head_graph
from export_vq.head import VQHead
from export_vq.load import TESTED_MODEL_TYPES, load_model
from export_vq.parity import CaseInput, check_parity
from export_vq.records import OnnxArtifact
from export_vq.runners import OrtRunner, TorchRunner, signature_of


def _cases(vocab_size):
    """Batch 1, and batch 3 with left padding; a prefill and 8 cached decode steps each."""
    rng = np.random.default_rng(0)
    return [
        CaseInput("batch 1", rng.integers(2, vocab_size, (1, 15)), 7, (0,)),
        CaseInput("batch 3, left padding", rng.integers(2, vocab_size, (3, 17)), 9, (0, 3, 5)),
    ]


@pytest.mark.parametrize("model_type", TESTED_MODEL_TYPES)
def test_architecture_through_prefill_and_eight_decode_steps(model_type, tmp_path):
    kind = ("single", "product", "additive")[TESTED_MODEL_TYPES.index(model_type) % 3]
    loaded = tiny_model(model_type, kind)
    for artifact in export_onnx(loaded, tmp_path, ExportOptions()).values():
        signature = signature_of(artifact)
        with TorchRunner(loaded, signature) as reference, OrtRunner(tmp_path / artifact.path, signature) as candidate:
            report = check_parity(reference, candidate, _cases(loaded.spec.vocab_size), dtype="fp32", greedy_tokens=8)
        assert report, report.failures
        assert all(case.decode_steps == 8 for case in report.cases)
        assert report.total.logit_range > 1  # logits that hardly vary would agree by chance


def test_reference_is_what_transformers_generates(tmp_path):
    """The runner's cache and positions are those of Hugging Face's own generate, padding included."""
    loaded = tiny_model("llama", "product")
    export_onnx(loaded, tmp_path, ExportOptions())
    signature = signature_of(OnnxArtifact.load(tmp_path / "model.onnx.json"))
    rows = [[5, 9, 40, 17, 23], [31, 8]]
    ids, mask = feeds.left_pad(rows)
    expected = loaded.model.generate(
        torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        do_sample=False,
        max_new_tokens=8,
        eos_token_id=None,
    )[:, 5:]
    with OrtRunner(tmp_path / "model.onnx", signature) as runner:
        outputs = runner.infer(feeds.prefill(signature, ids, mask))
        made = []
        for _ in range(8):
            made.append(outputs["logits"][:, -1].argmax(-1)[:, None])
            mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
            outputs = runner.infer(feeds.step(signature, made[-1], mask, outputs))
    np.testing.assert_array_equal(np.concatenate(made, 1), expected.numpy())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A rotated product head of a tiny Llama in every form and type: {(form, dtype): folder}."""
    loaded = tiny_model("llama", "product", rotation=True)
    folders = {}
    for form, dtype in [*((form, "fp32") for form in FORMS), ("portable", "fp16"), ("portable", "bf16")]:
        folder = tmp_path_factory.mktemp(f"{form}-{dtype}")
        export_onnx(loaded, folder, ExportOptions(form=form, dtype=dtype))
        folders[form, dtype] = folder
    return loaded, folders


def test_names_and_dimensions_follow_the_convention(exported):
    _, folders = exported
    model = onnx.load(folders["portable", "fp32"] / "model.onnx")
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in [*model.graph.input, *model.graph.output]
    }
    cache = {f"{i}.{part}" for i in range(2) for part in ("key", "value")}
    assert shapes == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        "logits": ["batch_size", "sequence_length", 97],
        **{f"past_key_values.{n}": ["batch_size", 2, "past_sequence_length", 8] for n in cache},
        **{f"present.{n}": ["batch_size", 2, "total_sequence_length", 8] for n in cache},
    }
    OnnxArtifact.from_json(json.loads({p.key: p.value for p in model.metadata_props}[METADATA_KEY]))


@pytest.mark.parametrize("form", FORMS)
def test_checker_passes_in_every_form_and_the_node_is_as_contracted(exported, form):
    loaded, folders = exported
    path = folders[form, "fp32"] / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path)
    nodes = [n for n in model.graph.node if n.domain == contract.DOMAIN]
    functions = [(f.domain, f.name) for f in model.functions]
    if form == "plain":
        assert (nodes, functions) == ([], [])
        return
    (node,) = nodes
    assert node.op_type == contract.GATHER_SCATTER
    assert len(node.input) == 3
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert attributes["num_codebooks"] == loaded.spec.num_codebooks
    assert functions == ([(contract.DOMAIN, contract.GATHER_SCATTER)] if form == "portable" else [])
    if form == "plugin":
        assert attributes == {
            "num_codebooks": 4,
            "code_bits": 8,
            "vocab_size": 97,
            "plugin_namespace": b"com.vqlogits",
            "plugin_version": b"1",
        }


def test_plain_form_computes_what_the_portable_form_computes(exported):
    _, folders = exported
    ids = np.random.default_rng(1).integers(2, 97, (2, 6))
    outputs = []
    for form in ("portable", "plain"):
        signature = signature_of(OnnxArtifact.load(folders[form, "fp32"] / "model.onnx.json"))
        with OrtRunner(folders[form, "fp32"] / "model.onnx", signature, native=False) as runner:
            outputs.append(runner.infer(feeds.prefill(signature, ids, np.ones_like(ids)))["logits"])
    np.testing.assert_array_equal(outputs[0], outputs[1])


def test_fp16_is_no_worse_than_twice_pytorch_in_fp16(exported):
    loaded, folders = exported
    artifact = OnnxArtifact.load(folders["portable", "fp16"] / "model.onnx.json")
    signature = signature_of(artifact)
    oracle = TorchRunner(loaded, signature, torch.float64)
    native = TorchRunner(loaded, signature, torch.float16)
    with OrtRunner(folders["portable", "fp16"] / "model.onnx", signature) as candidate:
        report = check_parity(oracle, candidate, _cases(97), dtype="fp16", native=native)
    assert report, report.failures
    assert report.native_error > 0
    assert report.oracle_error > 1e-5  # fp16 really was used


def test_bf16_graph_holds_bf16_weights_and_the_cpu_says_what_it_lacks(exported):
    _, folders = exported
    folder = folders["portable", "bf16"]
    model = onnx.load(folder / "model.onnx")
    assert {t.data_type for t in model.graph.initializer if t.name in ("lm_head.codebook", "lm_head.bias")} == {
        onnx.TensorProto.BFLOAT16
    }
    assert {v.type.tensor_type.elem_type for v in model.graph.output} == {onnx.TensorProto.BFLOAT16}
    artifact = OnnxArtifact.load(folder / "model.onnx.json")
    with pytest.raises(UserError, match=r"ONNX Runtime cannot run it on CPUExecutionProvider .*--dtype fp32 or fp16"):
        OrtRunner(folder / "model.onnx", signature_of(artifact))


def test_bf16_head_in_the_reference_evaluator():
    """No CPU runtime runs bf16; ONNX's own evaluator runs the head: codebook product in bf16, sums in fp32, rounded once."""
    head = VQHead.from_tensors(
        "single", torch.randn(1, 8, 16).bfloat16(), torch.randint(0, 8, (31, 1)), torch.randn(31).bfloat16()
    )
    hidden = torch.randn(3, 1, 16).bfloat16()
    model = ir.serde.serialize_model(head_graph(head, "vq"))
    array = hidden.float().numpy().astype(ml_dtypes.bfloat16)
    (logits,) = onnx.reference.ReferenceEvaluator(model).run(None, {"hidden_states": array})
    scores = (hidden.double() @ head.codebook[0].detach().double().T).float().numpy()
    # A bf16 product may round differently, by one unit of bf16 (2^-8), whatever the order of its sum.
    expected = scores[..., head.codes[:, 0]] + head.bias.detach().float().numpy()
    np.testing.assert_allclose(logits.astype(np.float32), expected, rtol=2**-6, atol=2**-7 * np.abs(scores).max())


def test_external_data_is_one_file_with_a_relative_name(tmp_path):
    loaded = tiny_model("llama", "product")
    artifacts = export_onnx(loaded, tmp_path, ExportOptions(external_data_bytes=0))
    for stem, artifact in (("model", artifacts["vq"]), ("dense", artifacts["dense"])):
        (data,) = tmp_path.glob(f"{stem}.*.data")
        assert set(artifact.file_sha256) == {f"{stem}.onnx", data.name}
        model = onnx.load(tmp_path / f"{stem}.onnx", load_external_data=False)
        locations = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
        assert locations == {data.name}
    moved = tmp_path.rename(tmp_path.with_name("moved"))  # relative names keep working
    signature = signature_of(artifacts["vq"])
    with TorchRunner(loaded, signature) as reference, OrtRunner(moved / "model.onnx", signature) as candidate:
        assert check_parity(reference, candidate, _cases(97), dtype="fp32", greedy_tokens=0)


def test_new_weights_never_overwrite_those_an_older_graph_refers_to(tmp_path):
    options = ExportOptions(external_data_bytes=0)
    for kind in ("product", "additive"):
        save_tiny(tmp_path / f"{kind}.pt", kind=kind)
        export_onnx(load_model(tmp_path / f"{kind}.pt"), tmp_path / "out", options)
        names = {p.name for p in (tmp_path / "out").iterdir()}
        assert len([n for n in names if n.endswith(".data")]) == 2  # one for each graph, the replaced ones are gone
        assert not any(n.startswith(".") for n in names)


@pytest.mark.usefixtures("traced_anew")
def test_caller_keeps_the_model_as_it_was(tmp_path):
    loaded = tiny_model("gpt2", "single")
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    export_onnx(loaded, tmp_path, ExportOptions(dtype="fp16"))
    assert loaded.model.lm_head is loaded.head
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("tied", [False, True])
def test_a_kept_trace_gives_the_graph_that_a_new_one_gives(tied, tmp_path, request):
    """What the tests of this run look at (tests/quick.py) is what users get; that of another head serves as well."""
    export_onnx(tiny_model("llama", "single", tied=tied), tmp_path, ExportOptions())
    loaded, files = tiny_model("llama", "product", tied=tied), []
    for name in ("kept", "anew"):
        if name == "anew":
            request.getfixturevalue("traced_anew")
        export_onnx(loaded, tmp_path / name, ExportOptions())
        files.append((tmp_path / name / "model.onnx").read_bytes())
    assert files[0] == files[1]


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A tied Llama with a rotated product head, exported, and the size that its graph has untied."""
    folder = tmp_path_factory.mktemp("tied")
    untied = export_onnx(tiny_model("llama", "product", rotation=True), folder, ExportOptions())["vq"].num_bytes
    loaded = tiny_model("llama", "product", rotation=True, tied=True)
    return loaded, folder, export_onnx(loaded, folder, ExportOptions()), untied


def _floats(path):
    """Floating-point weights of a graph file, by name."""
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    return {name: array for name, array in arrays.items() if array.dtype.kind == "f"}


def test_a_tied_graph_holds_every_number_once(tied):
    loaded, folder, artifacts, untied = tied
    assert artifacts["vq"].spec.tie_embedding
    vq, dense = (_floats(folder / name) for name in ("model.onnx", "dense.onnx"))
    v, d, m = loaded.spec.vocab_size, loaded.spec.hidden_size, loaded.spec.num_codebooks
    assert not [name for name, array in vq.items() if array.size >= v * d]
    assert [name for name, array in dense.items() if v in array.shape and d in array.shape] == ["lm_head.weight"]
    head = {name: array.size for name, array in vq.items() if name.startswith("lm_head.")}
    assert sum(head.values()) == loaded.spec.float_numbers
    codes = [t for t in onnx.load(folder / "model.onnx").graph.initializer if v in t.dims and t.data_type == t.INT32]
    assert [t.name for t in codes] == ["lm_head.codes"]
    # Smaller by the embedding; the nodes and names that read the rows take less than another copy of the codes would.
    assert untied - artifacts["vq"].num_bytes > 4 * v * d - 4 * v * m


@pytest.mark.parametrize("form", ["portable", "plain", "dense"])
def test_a_tied_graph_computes_the_tied_model(tied, form, tmp_path):
    loaded, folder, artifacts, _ = tied
    path = folder / ("dense.onnx" if form == "dense" else "model.onnx")
    if form == "plain":
        model = ir.load(path)
        forms.convert(model, "plain")
        path = tmp_path / "model.onnx"
        ir.save(model, path)
    signature = signature_of(artifacts["vq"])
    with TorchRunner(loaded, signature) as reference, OrtRunner(path, signature, native=False) as candidate:
        report = check_parity(reference, candidate, _cases(97), dtype="fp32", greedy_tokens=8)
    assert report, report.failures
    assert report.total.logit_range > 1


@pytest.mark.parametrize(("model_type", "kind"), [("gemma3_text", "single"), ("gpt2", "additive"), ("opt", "product")])
def test_other_architectures_keep_what_they_do_to_their_embeddings(model_type, kind, tmp_path):
    """Gemma scales its rows, GPT-2 adds positions, OPT's rows are narrower than the network."""
    loaded = tiny_model(model_type, kind, tied=True)
    for artifact in export_onnx(loaded, tmp_path, ExportOptions()).values():
        signature = signature_of(artifact)
        path = tmp_path / artifact.path
        with TorchRunner(loaded, signature) as reference, OrtRunner(path, signature, native=False) as candidate:
            report = check_parity(reference, candidate, _cases(loaded.spec.vocab_size), dtype="fp32", greedy_tokens=8)
        assert report, report.failures
    assert loaded.model.get_output_embeddings() is loaded.model.get_input_embeddings().head is loaded.head


def test_a_tied_graph_in_fp16_is_no_worse_than_twice_pytorch_in_fp16(tmp_path):
    loaded = tiny_model("llama", "additive", tied=True)
    signature = signature_of(export_onnx(loaded, tmp_path, ExportOptions(dtype="fp16"))["vq"])
    oracle, native = TorchRunner(loaded, signature, torch.float64), TorchRunner(loaded, signature, torch.float16)
    with OrtRunner(tmp_path / "model.onnx", signature, native=False) as candidate:
        report = check_parity(oracle, candidate, _cases(97), dtype="fp16", native=native)
    assert report, report.failures


def test_an_old_opset_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--opset is 17, expected 18 or more"):
        export_onnx(tiny_model(), tmp_path, ExportOptions(opset=17))
    assert not list(tmp_path.iterdir())
