"""The graph that generation runs, made of one with V logits: the same function, and when there is none."""

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from checkpoints import tiny_model

from export_vq.feeds import prefill
from export_vq.forms import read_graph
from export_vq.graph import ExportOptions, export_onnx
from export_vq.parity import CaseInput, check_parity
from export_vq.runners import OrtRunner, TorchRunner, signature_of
from export_vq.top_k_graph import end_in_top_k

CASES = [
    CaseInput("batch 1", np.random.default_rng(0).integers(2, 97, (1, 12)), 7, (0,)),
    CaseInput("batch 3, left padding", np.random.default_rng(1).integers(2, 97, (3, 14)), 9, (0, 3, 5)),
]
MODELS = {
    "product": ({"kind": "product"}, {}),
    "product, embedding tied": ({"kind": "product", "rotation": True, "tied": True}, {}),
    "single, no bias": ({"kind": "single", "bias": False}, {}),
    "additive, of the last position already": ({"kind": "additive"}, {"last_token": True}),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_gives_what_a_topk_export_gives(name, tmp_path):
    """Judged as such an export is: prefill and steps through the cache, against PyTorch; the weights are the file's."""
    head, options = MODELS[name]
    loaded = tiny_model("llama", **head)
    artifact = export_onnx(loaded, tmp_path, ExportOptions(external_data_bytes=0, **options))["vq"]
    graph = read_graph(tmp_path / "model.onnx")
    output = end_in_top_k(graph, artifact)
    assert output is not None
    signature = dataclasses.replace(
        signature_of(artifact), output=output.word, top_k=output.top_k, last_token=output.last_token
    )
    assert (signature.output, signature.top_k, signature.last_token) == ("topk", 50, True)
    with (
        TorchRunner(loaded, signature) as reference,
        OrtRunner(tmp_path / "model.onnx", signature, edited=graph) as candidate,
    ):
        report = check_parity(reference, candidate, CASES, dtype="fp32")
        assert report, report.failures
        ids = CASES[1].ids
        outputs = candidate.infer(prefill(signature, ids, np.ones_like(ids)))
    spec = artifact.spec
    shapes = {name: array.shape for name, array in outputs.items() if not name.startswith("present.")}
    width = spec.num_codebooks * spec.num_codes
    assert shapes == {"values": (3, 1, 50), "ids": (3, 1, 50), "logsumexp": (3, 1), "code_logits": (3, 1, width)}
    assert [str(v.name) for v in graph.graph.inputs] == list(artifact.input_names)


@pytest.mark.parametrize(
    "options", [{"form": "plain"}, {"output": "topk"}, {"output": "sample"}], ids=lambda o: next(iter(o.values()))
)
def test_there_is_none_of_a_graph_without_that_node(options, tmp_path):
    artifact = export_onnx(tiny_model(), tmp_path, ExportOptions(**options))["vq"]
    graph = read_graph(tmp_path / "model.onnx")
    before = ir.to_proto(graph).SerializeToString(deterministic=True)
    assert end_in_top_k(graph, artifact) is None
    assert ir.to_proto(graph).SerializeToString(deterministic=True) == before


def test_there_is_none_of_a_graph_that_changes_its_logits(tmp_path):
    loaded = tiny_model("gemma3_text", "single")
    loaded.model.config.final_logit_softcapping = 2.0
    artifact = export_onnx(loaded, tmp_path, ExportOptions())["vq"]
    graph = read_graph(tmp_path / "model.onnx")
    before = ir.to_proto(graph).SerializeToString(deterministic=True)
    assert end_in_top_k(graph, artifact) is None
    assert ir.to_proto(graph).SerializeToString(deterministic=True) == before
