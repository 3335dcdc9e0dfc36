"""The token loop: batches, seeds, ends, streams, every kind of graph, a real transformer through its KV cache."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from checkpoints import tiny_model
from decoders import TableRunner, TopKRunner, distribution, numbers

from export_vq import codespace
from export_vq.decoding import DecodingOptions
from export_vq.errors import UserError
from export_vq.generate import generate, stream
from export_vq.graph import ExportOptions, export_onnx
from export_vq.head import gather_scatter
from export_vq.records import OnnxArtifact
from export_vq.runners import OrtRunner, signature_of

V = 30
LETTERS = "abcdefghijklmnopqrstuvwxyz .☃!"


def table(kind, k=4, m=2, seed=0, last_token=True):
    """A random TableRunner over V tokens."""
    random = torch.Generator().manual_seed(seed)
    rows, bias = numbers(random, V, m * 8, integers=False), numbers(random, V, integers=False)
    codes = torch.randint(0, 8, (V, m), generator=random, dtype=torch.int32)
    return TableRunner(rows, codes, bias, kind, k, last_token)


def tokens_of(events, request=0):
    return [event.token_id for event in events if event.request == request]


def spell(ids):
    return "".join(LETTERS[i] for i in ids)


OPTIONS = {
    "greedy": DecodingOptions(max_new_tokens=12),
    "corrected": DecodingOptions(max_new_tokens=12, repetition_penalty=1.5, logit_bias={3: 4.0, 9: -math.inf}),
    "filtered": DecodingOptions(max_new_tokens=12, temperature=0.8, top_k=5, top_p=0.9, min_p=0.05, seed=11),
    "everything": DecodingOptions(
        max_new_tokens=12, temperature=1.4, top_p=0.95, repetition_penalty=1.2, logit_bias={2: 1.0}, seed=12
    ),
    "plain": DecodingOptions(max_new_tokens=12, temperature=1.0, seed=13),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny Llama, and the graph of it with logits."""
    folder = tmp_path_factory.mktemp("exported")
    loaded = tiny_model("llama", "product")
    export_onnx(loaded, folder, ExportOptions())
    return loaded, folder / "model.onnx", signature_of(OnnxArtifact.load(folder / "model.onnx.json"))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_transformer_writes_the_same_from_both_kinds_of_graph_alone_or_in_a_batch(exported, name):
    loaded, path, signature = exported
    prompts = [[5, 9, 40, 17, 23], [31, 8], [60]]
    first = OPTIONS[name]
    # Rows stop on their own: the second after 3 tokens, the third where the first run shows a token to end at.
    each = [first, dataclasses.replace(first, max_new_tokens=3), dataclasses.replace(first, seed=99)]
    with OrtRunner(path, signature) as runner:
        alone = [tokens_of(stream(runner, [p], one)) for p, one in zip(prompts, each, strict=True)]
        each[2] = dataclasses.replace(each[2], eos_ids=frozenset({alone[2][6]}))
        alone[2] = alone[2][: alone[2].index(alone[2][6]) + 1]
        batched = list(stream(runner, prompts, each))
    from_list = list(stream(TopKRunner(loaded, signature, 7), prompts, each))
    for request in range(3):
        assert tokens_of(batched, request) == alone[request]
        assert tokens_of(from_list, request) == alone[request]
    assert [event.finish_reason for event in batched if event.finish_reason] == [
        reason for _, reason in sorted([(len(alone[0]), "length"), (3, "length"), (len(alone[2]), "stop")])
    ]


def test_greedy_is_what_transformers_generates(exported):
    """With repetition_penalty, through the KV cache; and the simple entry is the same without it."""
    loaded, path, signature = exported
    prompt = [5, 9, 40, 17, 23]
    ids = torch.tensor([prompt])
    common = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 10, "eos_token_id": None}
    runner = TopKRunner(loaded, signature, 5)
    for penalty in (1.0, 1.6):
        expected = loaded.model.generate(ids, repetition_penalty=penalty, **common)[0, 5:].tolist()
        options = DecodingOptions(max_new_tokens=10, repetition_penalty=penalty)
        assert tokens_of(stream(runner, [prompt], options)) == expected
        if penalty == 1:
            with OrtRunner(path, signature) as logits:
                for each in (logits, runner):
                    assert list(generate(each, prompt, 10)) == expected
                    assert (
                        list(generate(each, prompt, 10, frozenset({expected[4]})))
                        == expected[: expected.index(expected[4])]
                    )


def test_logprobs_are_the_models_own_whatever_the_options():
    options = DecodingOptions(
        max_new_tokens=6, temperature=1.3, top_k=3, logit_bias={4: 9.0}, repetition_penalty=2.0, logprobs=6, seed=1
    )
    for kind, k in (("logits", 0), ("topk", 2), ("topk", 9)):
        runner = table(kind, k)
        last = 7
        for event in stream(runner, [[1, last]], options):
            logits = gather_scatter(runner._table[last], runner._codes, runner._bias).double()
            own = logits.log_softmax(-1)
            best = sorted(range(V), key=lambda v: (-float(own[v]), v))[:6]
            # A float32 logsumexp of numbers up to 20: their rounding, and V additions.
            assert event.logprob == pytest.approx(float(own[event.token_id]), abs=2**-23 * (20 + V))
            assert [token for token, _ in event.top_logprobs] == best
            np.testing.assert_allclose([p for _, p in event.top_logprobs], own[best], rtol=0, atol=2**-23 * (20 + V))
            last = event.token_id
    plain = DecodingOptions(max_new_tokens=1)
    assert [(e.logprob, e.top_logprobs) for e in stream(table("topk"), [[1]], plain)] == [(None, ())]
    own = dataclasses.replace(plain, logprobs=0)
    assert [(type(e.logprob), e.top_logprobs) for e in stream(table("topk"), [[1]], own)] == [(float, ())]


@pytest.mark.parametrize(
    "options",
    [
        DecodingOptions(temperature=1.0),
        DecodingOptions(temperature=1.6),
        DecodingOptions(temperature=0.7, top_k=9, logit_bias={3: 1.0, 8: -1.0}),
        DecodingOptions(temperature=1.0, top_p=0.9, min_p=0.01),
    ],
    ids=["plain", "hot", "top_k", "top_p"],
)
@pytest.mark.parametrize(("kind", "k", "m"), [("logits", 0, 2), ("topk", 6, 1), ("topk", 6, 2)])
def test_seeded_draws_follow_the_distribution(options, kind, k, m):
    """Pearson's chi-square over 600 draws, with the bound of test_codespace.py: a false alarm in a million."""
    draws, t = 600, 14
    random = torch.Generator().manual_seed(5)
    row, bias = 0.6 * torch.randn(m * 8, generator=random), 0.6 * torch.randn(V, generator=random)
    codes = torch.randint(0, 8, (V, m), generator=random, dtype=torch.int32)
    runner = TableRunner(row.expand(V, -1), codes, bias, kind, k)  # every step draws from the same distribution
    options = dataclasses.replace(options, max_new_tokens=draws, seed=2026)
    counts = np.bincount(tokens_of(stream(runner, [[0]], options)), minlength=V)
    wanted = np.zeros(V)
    for token, share in distribution(gather_scatter(row, codes, bias).tolist(), options, set()):
        wanted[token] = draws * share
    assert counts[wanted == 0].sum() == 0
    counts, wanted = counts[wanted > 0], wanted[wanted > 0]
    rare = wanted < 5  # the usual condition for the statistic to be chi-square: what is rarer is taken together
    if rare.any():
        counts, wanted = (np.append(a[~rare], a[rare].sum()) for a in (counts, wanted))
    freedom = len(wanted) - 1
    assert freedom >= 3
    assert ((counts - wanted) ** 2 / wanted).sum() < freedom + 2 * math.sqrt(freedom * t) + 2 * t


def test_a_seed_is_reproducible_and_no_seed_is_fresh():
    options = DecodingOptions(max_new_tokens=40, temperature=1.0, seed=5)
    once, again = (tokens_of(stream(table("topk"), [[1]], options)) for _ in range(2))
    assert once == again
    for other in (6, None):
        assert tokens_of(stream(table("topk"), [[1]], dataclasses.replace(options, seed=other))) != once


@pytest.mark.parametrize("last_token", [True, False])
def test_a_graph_that_draws_itself_gets_the_uniform_numbers_of_the_seed(last_token):
    """One number a token and row, the seed's own, as float32 below 1; the same draws as codespace.sample of them."""
    prompts, temperature = [[1, 2], [3]], 0.9
    each = [DecodingOptions(max_new_tokens=n, temperature=temperature, seed=n) for n in (3, 5)]
    runner = table("sample", last_token=last_token)
    events = list(stream(runner, prompts, each))
    assert [feeds["uniform"].shape for feeds in runner.calls] == [(2, 1 if last_token else 2)] + [(2, 1)] * 2 + [
        (1, 1)
    ] * 2
    for feeds in runner.calls:
        assert feeds["uniform"].dtype == feeds["temperature"].dtype == np.float32
        assert feeds["temperature"].tolist() == [np.float32(temperature)]
    for request, one in enumerate(each):
        random, last = np.random.Generator(np.random.PCG64(one.seed)), prompts[request][-1]
        for token in tokens_of(events, request):
            uniform = torch.tensor(math.floor(random.random() * 2**24) / 2**24)
            drawn, _ = codespace.sample(
                runner._table[last], runner._codes, runner._bias, uniform, float(np.float32(temperature))
            )
            assert token == int(drawn)
            last = token


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"temperature": 0.0}, "temperature 0"),
        ({"top_k": 5}, "top_k"),
        ({"top_p": 0.5}, "top_p"),
        ({"min_p": 0.5}, "min_p"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"logit_bias": {1: 1.0}}, "logit_bias"),
        ({"temperature": 1.0, "logprobs": 2}, "logprobs of the best"),
        ({"logprobs": 0}, "logprobs at a temperature"),
    ],
)
def test_a_graph_that_draws_itself_refuses_what_it_cannot_do(changed, word):
    runner = table("sample")
    options = dataclasses.replace(DecodingOptions(temperature=0.9), **changed)
    with pytest.raises(UserError, match=rf"for {word}.* export with --output topk"):
        stream(runner, [[1]], options)
    with pytest.raises(UserError, match="several temperatures"):
        stream(runner, [[1], [2]], [DecodingOptions(temperature=0.9), DecodingOptions(temperature=1.0)])
    with pytest.raises(UserError, match="greedy decoding"):
        next(generate(runner, [1], 1))
    own = DecodingOptions(temperature=1.0, logprobs=0, max_new_tokens=1)
    assert [event.logprob is not None for event in stream(runner, [[1]], own)] == [True]


@pytest.mark.parametrize("kind", ["logits", "topk"])
def test_text_is_streamed_and_ends_before_a_stop_string(kind):
    options = DecodingOptions(max_new_tokens=60, temperature=1.0, seed=3)
    whole = list(stream(table(kind), [[1]], options, spell))
    text = spell(tokens_of(whole))
    assert "".join(event.text for event in whole) == text
    assert [event.finish_reason for event in whole] == [None] * 59 + ["length"]
    stop = text[20:23]
    events = list(stream(table(kind), [[1]], dataclasses.replace(options, stop=("☃☃☃☃", stop)), spell))
    assert "".join(event.text for event in events) == text[: text.index(stop)]
    assert len(events) == text.index(stop) + 3  # it ran no token past the stop string
    assert events[-1].finish_reason == "stop"
    eos = tokens_of(whole)[9]
    events = list(stream(table(kind), [[1]], dataclasses.replace(options, eos_ids=frozenset({eos})), spell))
    assert events[-1].token_id == eos
    assert "".join(event.text for event in events) == spell(tokens_of(whole)[: tokens_of(whole).index(eos)])


def test_rows_that_finished_are_not_computed_any_more():
    runner = table("topk")
    each = [DecodingOptions(max_new_tokens=n) for n in (1, 4, 2)]
    list(stream(runner, [[1], [2, 3], [4]], each))
    assert [len(feeds["input_ids"]) for feeds in runner.calls] == [3, 2, 1, 1]
    assert [feeds["attention_mask"].shape[1] for feeds in runner.calls] == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([], DecodingOptions(), "0 prompts"),
        ([[1], [2]], [DecodingOptions()], "2 prompts with 1 options"),
        ([[1], []], DecodingOptions(), "prompt 1 is empty"),
        ([[1, V]], DecodingOptions(), f"prompt 0 holds token id {V}, expected 0 to {V - 1}"),
        ([[1]], DecodingOptions(logit_bias={V: 1.0}), "logit_bias holds token id"),
        ([[1]], DecodingOptions(stop=("x",)), "without a tokenizer"),
    ],
)
def test_what_cannot_be_decoded_is_refused_before_anything_runs(prompts, options, words):
    runner = table("topk")
    with pytest.raises(UserError, match=words):
        stream(runner, prompts, options)
    assert not runner.calls


@pytest.mark.parametrize("kind", ["logits", "topk"])
def test_logits_that_are_no_numbers_end_the_stream(kind):
    runner = table(kind)
    runner._table[5] = torch.nan
    events = stream(runner, [[1]], DecodingOptions(logit_bias={5: 1e6}))
    assert next(events).token_id == 5
    with pytest.raises(UserError, match="new token 2 of request 0 hold NaN or infinity"):
        next(events)


def test_code_logits_without_the_heads_constants_are_refused():
    runner = table("topk")
    runner.head = None
    with pytest.raises(UserError, match=r"no constants lm_head\.codes"):
        next(stream(runner, [[1]], DecodingOptions()))
