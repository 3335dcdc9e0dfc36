"""An embedding tied to the head: no numbers of its own, and tied it stays through everything done to a whole model."""

import copy

import pytest
import torch
from checkpoints import tiny_model

from export_vq.load import TESTED_MODEL_TYPES, convert

IDS = torch.tensor([[5, 9, 20], [33, 0, 96]])


@pytest.mark.parametrize("model_type", TESTED_MODEL_TYPES)
def test_every_number_is_listed_once_under_the_heads_name(model_type):
    loaded, untied = tiny_model(model_type, tied=True), tiny_model(model_type)
    names = set(loaded.model.state_dict())
    gone = set(untied.model.state_dict()) - names
    assert gone == {f"{n}.weight" for n, m in untied.model.named_modules() if m is untied.model.get_input_embeddings()}
    assert len(gone) == 1
    assert {n for n in names if "codebook" in n or "codes" in n} == {"lm_head.codebook", "lm_head.codes"}
    assert sum(m is loaded.head for m in loaded.model.modules()) == 1
    spec = loaded.spec
    count = [sum(p.numel() for p in model.parameters()) for model in (untied.model, loaded.model)]
    assert count[0] - count[1] == spec.vocab_size * spec.hidden_size


def _twin_rows(model):
    return model.get_output_embeddings().dense_twin().weight[IDS]


def test_a_copy_is_tied_to_the_copied_head():
    model = tiny_model("llama", "product", rotation=True, tied=True).model
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.codebook.add_(1.0)
        twin.lm_head.codes.zero_()
    assert torch.equal(twin.get_input_embeddings()(IDS), _twin_rows(twin))
    assert torch.equal(model.get_input_embeddings()(IDS), _twin_rows(model))
    assert not torch.equal(_twin_rows(model), _twin_rows(twin))


@pytest.mark.parametrize("change", [lambda m: m.to(torch.bfloat16), lambda m: convert(m, torch.bfloat16)])
def test_another_type_is_the_heads_type(change):
    model = change(tiny_model("llama", "additive", tied=True).model)
    rows = model.get_input_embeddings()(IDS)
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows, _twin_rows(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gemmas_rows_are_scaled_as_its_own_embedding_scales_them(dtype):
    tied, untied = (convert(tiny_model("gemma3_text", tied=t).model, dtype) for t in (True, False))
    own = untied.get_input_embeddings()
    with torch.no_grad():
        own.weight.copy_(untied.lm_head.dense_twin().weight)
    rows = tied.get_input_embeddings()(IDS)
    assert torch.equal(rows, own(IDS))
    assert not torch.equal(rows, _twin_rows(tied))


def test_training_through_both_ends_moves_one_codebook():
    model = tiny_model("llama", "product", rotation=True, tied=True).model
    both = {}
    for end in ("input", "output", "whole"):
        model.zero_grad()
        rows = model.get_input_embeddings()(IDS)
        rows = rows.detach() if end == "output" else rows
        for parameter in model.lm_head.parameters():
            parameter.requires_grad_(end != "input")
        logits = model(inputs_embeds=rows).logits
        for parameter in model.lm_head.parameters():
            parameter.requires_grad_(True)
        logits.square().mean().backward()
        both[end] = model.lm_head.codebook.grad.clone()
    assert both["input"].abs().max() > 0
    # One float32 gradient against the sum of two: each is a sum of under 2000 terms, rounded at every step.
    torch.testing.assert_close(both["whole"], both["input"] + both["output"], rtol=2000 * 2**-24, atol=2000 * 2**-24)
