"""Many heads on the same text, against direct computation in float64; the report around them; what models write."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from checkpoints import tiny_head, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from export_vq.compress.statistics import OutputLayer, replace_output
from export_vq.errors import UserError
from export_vq.head import VQHead, oracle_logits
from export_vq.load import LoadedModel
from export_vq.logit_errors import top_ids
from export_vq.quality import RIVALS, continuations, judge, quality_report
from export_vq.quality.floor import mapping_floor
from export_vq.quality.judge import HeldOut, Rival, measure_heads
from export_vq.quality.rivals import quantised
from export_vq.quality.scores import best_tokens
from export_vq.records import HeadQuality, QualityReport, Sample

V, D = 97, 32


def dense_model(model_type: str = "llama", seed: int = 5) -> LoadedModel:
    """An ordinary tiny model: the backbone of `tiny_model` with a full output layer."""
    vq = tiny_model(model_type, seed=seed)
    assert vq.head is not None
    return dataclasses.replace(vq, model=replace_output(vq.model, vq.head.dense_twin(), share=False), head=None)


def some_blocks(rows: int, width: int = 20, seed: int = 0, v: int = V) -> Tensor:
    return torch.randint(0, v, (rows, width), generator=torch.Generator().manual_seed(seed))


def some_texts() -> dict[str, HeldOut]:
    random = torch.Generator().manual_seed(3)
    return {
        name: HeldOut(some_blocks(rows, seed=rows), torch.randn(rows, 20, D, generator=random))
        for name, rows in {"letters": 2, "plays": 5}.items()
    }


def some_layer(bias: bool = True, softcap: float | None = None) -> OutputLayer:
    random = torch.Generator().manual_seed(4)
    return OutputLayer(
        0.4 * torch.randn(V, D, generator=random), torch.randn(V, generator=random) if bias else None, softcap
    )


def hold_against(found: HeadQuality, dense: Tensor, own: Tensor, following: Tensor, text: str = "all") -> None:
    """Compare a record with what float64 logits [n, V] say, computed position by position."""
    record = found.total if text == "all" else next(t for t in found.texts if t.text == text)
    log_a, log_b = dense.log_softmax(-1), own.log_softmax(-1)
    kl = (log_a.exp() * (log_a - log_b)).sum(-1)
    nll_a, nll_b = (-logs.gather(1, following[:, None]).mean() for logs in (log_a, log_b))
    best = [[set(top_ids(row.numpy(), 5).tolist()) for row in logits] for logits in (dense, own)]
    first = [[top_ids(row.numpy(), 1)[0] for row in logits] for logits in (dense, own)]
    # A log-probability is a difference of float32 numbers of the logits' size, summed over D and V.
    error = 2.0**-24 * (D + 8) * float(own.abs().max() + dense.abs().max())
    assert record.positions == len(following)
    assert record.perplexity == pytest.approx(math.exp(nll_b), rel=error)
    assert record.perplexity_dense == pytest.approx(math.exp(nll_a), rel=error)
    assert record.kl_mean == pytest.approx(float(kl.mean()), abs=2 * error)
    assert record.kl_p99 == pytest.approx(float(kl.quantile(0.99)), abs=2 * error)
    assert record.top1_agreement == pytest.approx(sum(a == b for a, b in zip(*first, strict=True)) / len(following))
    assert record.top5_agreement == pytest.approx(
        sum(len(a & b) / 5 for a, b in zip(*best, strict=True)) / len(following)
    )


def flat(texts: dict[str, HeldOut]) -> tuple[Tensor, Tensor]:
    """(hidden states float64 [n, D], next tokens [n]) of all positions that have a next token."""
    hidden = torch.cat([text.hidden[:, :-1].reshape(-1, D) for text in texts.values()])
    return hidden.double(), torch.cat([text.ids[:, 1:].flatten() for text in texts.values()])


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
def test_every_kind_against_float64(bias: bool, softcap: float | None) -> None:
    layer, texts = some_layer(bias, softcap), some_texts()
    vq = {
        kind: tiny_head(kind, D, V, bias=bias, rotation=kind == "product") for kind in ("single", "product", "additive")
    }
    found = measure_heads(layer, texts, {"dense": layer, "INT8": Rival(8), "INT4": Rival(4, 64), **vq})
    hidden, following = flat(texts)

    def logits(raw: Tensor) -> Tensor:
        return raw if softcap is None else softcap * torch.tanh(raw / softcap)

    shift = 0.0 if layer.bias is None else layer.bias.double()
    dense = logits(hidden @ layer.weight.double().T + shift)
    expected = {
        "dense": dense,
        "INT8": logits(hidden @ quantised(layer.weight, 8).weight.double().T + shift),
        "INT4": logits(hidden @ quantised(layer.weight, 4, 64).weight.double().T + shift),
        **{kind: logits(oracle_logits(head, hidden)) for kind, head in vq.items()},
    }
    assert [head.name for head in found] == list(expected)
    for head, own in zip(found, expected.values(), strict=True):
        # Tokens with the same codes tie in exact numbers: rounding in float64 must not order them in the expectation.
        hold_against(head, dense, own.float().double(), following)
        n = texts["letters"].ids[:, 1:].numel()
        hold_against(head, dense[:n], own[:n].float().double(), following[:n], "letters")
        hold_against(head, dense[n:], own[n:].float().double(), following[n:], "plays")
    assert (found[0].total.perplexity_increase, found[0].total.kl_mean, found[0].total.top5_agreement) == (
        0.0,
        0.0,
        1.0,
    )


def test_what_heads_take() -> None:
    layer, texts = some_layer(), some_texts()
    vq = tiny_head("product", D, V)
    _, following = flat(texts)
    dense, int8, int4, product = measure_heads(
        layer, texts, {"dense": layer, "INT8": Rival(8), "INT4": Rival(4, 16), "vq": vq}
    )
    assert (dense.kind, dense.float_numbers, dense.num_bytes, dense.bytes_share) == (
        "dense",
        V * D + V,
        2 * (V * D + V),
        1.0,
    )
    assert (int8.kind, int8.float_numbers, int8.num_bytes) == ("int8", V + V, V * D + 2 * (V + V))
    assert (int4.kind, int4.float_numbers, int4.num_bytes) == ("int4", 2 * V + V, V * D // 2 + 2 * (2 * V + V))
    assert (product.kind, product.spec) == ("product", vq.spec)
    assert (product.float_numbers, product.num_bytes) == (vq.spec.float_numbers, vq.spec.head_bytes())
    assert product.bytes_share == vq.spec.head_bytes() / dense.num_bytes
    assert {head.dense_bytes for head in (dense, int8, int4, product)} == {dense.num_bytes}
    assert (dense.dead_codes, dense.total.floor) == (None, 1.0)
    assert product.total.floor == pytest.approx(mapping_floor(vq, following))
    assert product.texts[1].floor == pytest.approx(mapping_floor(vq, texts["plays"].ids[:, 1:]))


def test_a_hopeless_head_is_infinite_and_no_crash() -> None:
    head = tiny_head("single", D, V)
    with torch.no_grad():
        head.codebook.mul_(1e4)
    (found,) = measure_heads(some_layer(), some_texts(), {"vq": head})
    assert found.total.perplexity == math.inf


def test_dead_codes_are_those_that_no_token_uses() -> None:
    codes = torch.zeros(V, 2, dtype=torch.int32)
    codes[:, 0] = torch.arange(V) % 7
    codes[3, 1] = 9
    head = VQHead.from_tensors("product", torch.randn(2, 10, D // 2), codes)
    (found,) = measure_heads(some_layer(), some_texts(), {"vq": head})
    assert found.dead_codes == 3 + 8


def test_tokens_with_the_same_codes_tie_by_id() -> None:
    """A single head without bias: all tokens of the best code are best, and the lowest of them count."""
    codes = torch.arange(V)[:, None] % 4
    book = torch.randn(1, 4, D, generator=torch.Generator().manual_seed(0))
    twin = OutputLayer(book[0, codes[:, 0]])
    (found,) = measure_heads(twin, some_texts(), {"vq": VQHead.from_tensors("single", book, codes)})
    assert (found.total.top1_agreement, found.total.top5_agreement) == (1.0, 1.0)


@settings(deadline=None, max_examples=80)
@given(
    st.integers(1, 12),
    st.integers(1, 7),
    st.lists(st.lists(st.integers(-3, 3), min_size=12, max_size=12), min_size=1, max_size=6),
)
def test_best_tokens_keep_the_tie_rule(v: int, count: int, values: list[list[int]]) -> None:
    logits = torch.tensor(values, dtype=torch.float32)[:, :v]
    expected = [top_ids(row.numpy(), count).tolist() for row in logits]
    assert best_tokens(logits, count).tolist() == expected


def test_in_parts_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also at sizes that nothing divides, and with one layer in memory at a time."""
    heads = {"INT8": Rival(8), "a": tiny_head("single", D, V), "b": tiny_head("additive", D, V)}
    told: list[float] = []
    whole = measure_heads(some_layer(), some_texts(), heads)
    monkeypatch.setattr(judge, "ROWS", 7)
    monkeypatch.setattr(judge, "TOGETHER", 1)
    parts = measure_heads(some_layer(), some_texts(), heads, tell=told.append)
    assert told == sorted(told)
    assert told[-1] == 1.0
    for a, b in zip(whole, parts, strict=True):
        assert (a.num_bytes, a.total.top5_agreement) == (b.num_bytes, b.total.top5_agreement)
        assert a.total.perplexity == pytest.approx(b.total.perplexity, rel=1e-5)


def test_a_head_with_a_backbone_of_its_own() -> None:
    texts, layer, head = some_texts(), some_layer(), tiny_head("product", D, V)
    other = {name: torch.randn_like(text.hidden) for name, text in texts.items()}
    (found,) = measure_heads(layer, texts, {"vq": head}, own_hidden={"vq": other})
    hidden, following = flat(texts)
    own, _ = flat({name: HeldOut(texts[name].ids, other[name]) for name in texts})
    hold_against(found, hidden @ layer.weight.double().T + layer.bias, oracle_logits(head, own), following)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "opt"])
def test_report_is_what_the_models_say(model_type: str, tmp_path: Path) -> None:
    """Heads on the dense backbone, models on their own, the tuned dense control too: all as `model(ids).logits` has it."""
    dense = dense_model(model_type)
    if model_type == "gemma3_text":
        dense.model.config.final_logit_softcapping = dense.config["final_logit_softcapping"] = 2.0
    v, d = OutputLayer.of(dense).weight.shape
    head = tiny_head("product", d, v, seed=9)
    tuned, control = tiny_model(model_type, seed=6), dense_model(model_type, seed=7)
    if model_type == "gemma3_text":
        for other in (tuned, control):
            other.model.config.final_logit_softcapping = 2.0
    texts = {"a": some_blocks(2, 9, v=v), "b": some_blocks(3, 9, seed=1, v=v)}
    told: list[tuple[str, float]] = []
    report = quality_report(
        dense,
        {"head": head, "tuned": tuned, "control": control},
        texts,
        progress=lambda step, part: told.append((step, part)),
    )
    assert [found.name for found in report.heads] == ["dense", *RIVALS, "head", "tuned", "control"]
    assert [found.kind for found in report.heads] == ["dense", "int8", "int4", "product", "product", "dense"]
    assert (report.dense, report.block, report.positions) == ("tiny", 9, {"a": 16, "b": 24})
    assert (
        [part for step, part in told if step == "backbone"][-1]
        == [part for step, part in told if step == "heads"][-1]
        == 1
    )
    with_head = replace_output(dense.model, head, share=True)
    blocks = torch.cat(list(texts.values()))
    models = {"dense": dense.model, "head": with_head, "tuned": tuned.model, "control": control.model}
    for name, model in models.items():
        found = next(found for found in report.heads if found.name == name)
        with torch.no_grad():
            logits = model(input_ids=blocks).logits.double()[:, :-1]
        nll = -logits.log_softmax(-1).gather(-1, blocks[:, 1:, None]).mean()
        assert found.total.perplexity == pytest.approx(math.exp(nll), rel=1e-4), name
    report.save(tmp_path / "quality.json")
    assert QualityReport.load(tmp_path / "quality.json") == report


def test_what_does_not_fit_is_refused() -> None:
    dense, texts = dense_model(), {"a": some_blocks(2)}
    with pytest.raises(UserError, match="has a VQ-Logits head, the ordinary model"):
        quality_report(tiny_model(), {}, texts)
    with pytest.raises(UserError, match="gpt: vocab_size is 101, expected 97"):
        quality_report(dense, {"gpt": tiny_model("gpt2")}, texts)
    with pytest.raises(UserError, match="wide: hidden_size is 64, expected 32"):
        quality_report(dense, {"wide": tiny_head("single", 64, V)}, texts)
    with pytest.raises(UserError, match="'dense', which the report uses itself"):
        quality_report(dense, {"dense": tiny_model()}, texts)
    with pytest.raises(UserError, match=r"blocks of a \[2, 20\], b \[2, 9\], expected .* one width"):
        quality_report(dense, {}, {**texts, "b": some_blocks(2, 9)})
    with pytest.raises(UserError, match="a: found a token id of 97, expected ids from 0 to 96"):
        quality_report(dense, {}, {"a": torch.full((1, 4), 97)})


def test_continuations_are_the_greedy_ones() -> None:
    models = {"dense": dense_model(), "vq": tiny_model("llama", seed=6)}
    prompts = ["the cat", "on a"]
    samples = continuations(models, prompts, tokens=7)
    assert [sample.prompt for sample in samples] == prompts
    tokenizer = models["dense"].tokenizer()
    for sample in samples:
        for name, loaded in models.items():
            ids = tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
            start = len(ids)
            for _ in range(7):
                with torch.no_grad():
                    ids.append(int(loaded.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
                if ids[-1] == 1:  # the end of the text
                    break
            assert sample.texts[name] == tokenizer.decode(ids[start:], skip_special_tokens=True)
    assert Sample.from_json(samples[0].to_json()) == samples[0]
    with pytest.raises(UserError, match="has 0 tokens, expected 1 to 57"):
        continuations(models, [""], tokens=7)
