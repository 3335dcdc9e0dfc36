"""The next token from V logits and from code space, against plain float64 definitions and against Hugging Face's own."""

import math

import numpy as np
import pytest
import torch
from decoders import allowed, corrected, distribution, empty_ids, head_outputs, head_tables, numbers
from hypothesis import given, settings
from hypothesis import strategies as st

from export_vq.decoding import DecodingOptions
from export_vq.errors import UserError
from export_vq.head import gather_scatter
from export_vq.plugins.library import find_current
from export_vq.sampling import next_token
from export_vq.scores import CodeSpace, ScoreReader

EPS = float(torch.finfo(torch.float32).eps)
both_ways = pytest.mark.parametrize(
    "native",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif(
                find_current("vq") is None, reason="libvq.so is not built; run: export-vq plugins build"
            ),
        ),
    ],
    ids=["torch", "kernel"],
)
"""Where the list of a row does not decide, its V logits are summed in torch, or by the kernel where that is built."""


@st.composite
def heads(draw):
    """(code_logits [M*K], codes [V, M], bias or None): few codes, so that tokens tie; integers tie even more.

    From 8 codebooks on kernels may sum in fixed point, which is off by no more than float32 but not exact for integers.
    """
    m, k, v = draw(st.sampled_from([1, 1, 2, 3, 9])), draw(st.sampled_from([1, 2, 5, 16])), draw(st.integers(1, 120))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    integers = m < 8 and draw(st.booleans())
    code_logits, bias = numbers(random, m * k, integers=integers), numbers(random, v, integers=integers)
    codes = torch.randint(0, k, (v, m), generator=random, dtype=torch.int32)
    return code_logits, codes, bias if draw(st.booleans()) else None


@st.composite
def options_for(draw, v):
    tokens = st.integers(0, v - 1)
    return DecodingOptions(
        temperature=draw(st.sampled_from([0.0, 0.2, 1.0, 1.0, 1.7])),
        top_k=draw(st.sampled_from([0, 0, 1, 2, 7, 40, 300])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.97, 0.5, 0.05])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.03, 0.3, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.6])),
        logit_bias=draw(
            st.dictionaries(tokens, st.sampled_from([-math.inf, -3.0, 0.0, 2.5, 60.0]), max_size=min(v - 1, 30))
        ),
    )


def slack_of(head):
    """How far a probability made from a float32 logsumexp can be from the exact one.

    As in test_codespace.py: M + 3 roundings of numbers up to the largest, V additions, exp and log; the same once more
    for the terms taken out of it; twice that where half of it was taken out.
    """
    v, m = head[1].shape
    return 4 * 2 * EPS * ((m + 3) * 2 * largest_of(head) + v + 8)


def rounding_of(head):
    """How far a logit can be from the exact sum: M + 3 roundings of float32, which fixed point stays within."""
    return EPS * (head[1].shape[1] + 3) * largest_of(head)


def largest_of(head):
    code_logits, codes, bias = head
    return codes.shape[1] * float(code_logits.abs().max()) + (0.0 if bias is None else float(bias.abs().max()))


def both(head, k, native=False):
    """The same position as V logits and as the k best with code logits."""
    code_logits, codes, bias = head
    read = ScoreReader(head_tables(codes, bias), native=native).read
    return [read(head_outputs(code_logits[None, None], codes, bias, kind, k), 0) for kind in ("logits", "topk")]


@both_ways
@settings(max_examples=400, deadline=None)
@given(heads(), st.data())
def test_both_kinds_of_graph_choose_what_the_definitions_choose(native, head, data):
    code_logits, codes, bias = head
    v = len(codes)
    options = data.draw(options_for(v))
    seen = data.draw(st.sets(st.integers(0, v - 1), max_size=40))
    k = data.draw(st.integers(1, v))
    logits = gather_scatter(code_logits, codes, bias).tolist()
    for uniform in (0.0, data.draw(st.floats(0, 1, exclude_max=True)), 1 - 2**-53):
        right = allowed(logits, options, seen, uniform, slack_of(head))
        for scores in both(head, k, native):
            assert next_token(scores, options, seen, uniform) in right


@both_ways
@settings(max_examples=150, deadline=None)
@given(heads(), st.data())
def test_rankings_and_totals_of_code_space_are_those_of_the_logits(native, head, data):
    """With tokens left out, whatever the list holds of them; in torch to the last bit."""
    code_logits, codes, bias = head
    v = len(codes)
    dense, code = both(head, data.draw(st.integers(1, v)), native)
    without = np.array(sorted(data.draw(st.sets(st.integers(0, v - 1)))), np.int64)
    logits = gather_scatter(code_logits, codes, bias).double().numpy()
    exact = gather_scatter(code_logits.double(), codes, bias).numpy()
    left = [i for i in sorted(range(v), key=lambda i: (-logits[i], i)) if i not in set(without.tolist())]
    least = data.draw(st.integers(1, v + 3))
    for scores in (dense, code):
        found = scores.best(least, without)
        assert len(found.ids) >= min(least, len(left))
        assert found.complete == (len(found.ids) == len(left))
        falls, ties = np.diff(found.values) < 0, np.diff(found.values) == 0
        assert (falls | (ties & (np.diff(found.ids) > 0))).all()
        if native:
            # The n-th best of numbers that are each off by so much is off by as much.
            assert set(found.ids.tolist()) <= set(left)
            for ids in (found.ids, left[: len(found.ids)]):
                np.testing.assert_allclose(found.values, exact[ids], rtol=0, atol=rounding_of(head))
        else:
            assert found.ids.tolist() == left[: len(found.ids)]
            assert found.values.tolist() == logits[found.ids].tolist()
        np.testing.assert_array_equal(scores.logits(without), logits[without])
        for temperature in (0.3, 1.0, 4.0):
            total = math.log(math.fsum(np.exp(exact[left] / temperature))) if left else -math.inf
            assert scores.log_total(temperature, without) == pytest.approx(total, abs=slack_of(head), rel=0)


@both_ways
@pytest.mark.parametrize("m", [1, 3])
def test_taking_out_nearly_all_of_the_mass_leaves_exact_probabilities(m, native):
    """One token holds all but 1e-9 of the mass: taken out of a float32 normaliser, nothing of the rest would be left."""
    random = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 9, (60, m), generator=random, dtype=torch.int32)
    bias = torch.randn(60, generator=random)
    bias[17] = 40.0
    head = torch.randn(m * 9, generator=random), codes, bias
    logits = gather_scatter(*head).tolist()
    options = DecodingOptions(temperature=1.0, logit_bias={17: -math.inf})
    for uniform in np.linspace(0, 1, 50, endpoint=False).tolist():
        right = allowed(logits, options, set(), uniform, slack_of((*head[:2], bias.clamp_max(3))))
        for scores in both(head, 5, native):
            assert next_token(scores, options, set(), uniform) in right


def test_the_list_alone_decides_where_it_can(monkeypatch):
    """Greedy, top_k, a narrow nucleus, min_p and plain draws at temperature 1 never look past the list of the graph."""
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 64, (500, 2), generator=random, dtype=torch.int32)
    head = 4 * torch.randn(128, generator=random), codes, torch.randn(500, generator=random)
    _, scores = both(head, 50)
    monkeypatch.setattr(CodeSpace, "everything", lambda *_: pytest.fail("left the list"))
    ids = scores.best(1, empty_ids()).ids.tolist()
    common = {"logit_bias": {ids[9]: -1.0, ids[7]: 0.5, 499: -5.0}, "repetition_penalty": 1.2}
    for extra in (common, {}):
        for options in (
            DecodingOptions(**extra),
            DecodingOptions(temperature=0.7, top_k=40, top_p=0.95, **extra),
            DecodingOptions(temperature=0.7, min_p=0.2, **extra),
            DecodingOptions(temperature=1.0, top_p=0.5, **extra),
            DecodingOptions(temperature=1.0, **extra),
        ):
            next_token(scores, options, set(ids[3:8]), 0.3)


def test_worked_example_of_the_order_of_steps():
    """Bias first, then the penalty on the sum: 1 - 3 = -2 is negative and multiplied; 4 is divided; 2 was not seen."""
    options = DecodingOptions(logit_bias={0: -3.0}, repetition_penalty=2.0)
    assert corrected([1.0, 4.0, 2.0], options.logit_bias, 2.0, {0, 1}) == [-4.0, 2.0, 2.0]
    scores = ScoreReader(None).read({"logits": np.array([[[1.0, 4.0, 2.0]]], np.float32)}, 0)
    assert next_token(scores, options, {0, 1}, 0.0) == 1  # equal to token 2, and lower


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**31), st.data())
def test_the_definitions_are_hugging_faces(seed, data):
    """The dense reference of these tests against transformers' own processors, on logits without ties."""
    import transformers as hf

    v = 50
    logits = torch.randn(v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    options = data.draw(options_for(v).filter(lambda o: o.temperature > 0))
    seen = data.draw(st.sets(st.integers(0, v - 1), min_size=1, max_size=20))
    scores, ids = logits[None].clone(), torch.tensor([sorted(seen)])
    if options.logit_bias:
        bias = {(token,): max(addition, -1e9) for token, addition in options.logit_bias.items()}
        scores = scores + hf.SequenceBiasLogitsProcessor(bias)(ids, torch.zeros_like(scores))
    scores = hf.RepetitionPenaltyLogitsProcessor(options.repetition_penalty)(ids, scores)
    scores = hf.TemperatureLogitsWarper(options.temperature)(ids, scores)
    if options.top_k:
        scores = hf.TopKLogitsWarper(options.top_k)(ids, scores)
    if options.top_p < 1:
        scores = hf.TopPLogitsWarper(options.top_p)(ids, scores)
    scores = hf.MinPLogitsWarper(options.min_p)(ids, scores)
    ours = torch.zeros(v, dtype=torch.float64)
    for token, share in distribution(logits.tolist(), options, seen):
        ours[token] = share
    torch.testing.assert_close(ours, scores.softmax(-1)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [0, 1], ids=["logits", "topk"])
def test_all_tokens_forbidden_is_said(kind):
    random = torch.Generator().manual_seed(0)
    head = torch.randn(4, generator=random), torch.randint(0, 4, (6, 1), generator=random, dtype=torch.int32), None
    options = DecodingOptions(temperature=1.0, logit_bias=dict.fromkeys(range(6), -math.inf))
    with pytest.raises(UserError, match="logit_bias forbids every token"):
        next_token(both(head, 3)[kind], options, set(), 0.5)


@both_ways
@pytest.mark.parametrize("temperature", [1e-5, 1e-3, 1e4])
@pytest.mark.parametrize("k", [1, 8])
def test_extreme_temperatures(temperature, k, native):
    """Cold: the best tokens alone, shared evenly among equals. Hot: all tokens alike."""
    codes = torch.arange(40, dtype=torch.int32)[:, None] % 4
    head = torch.tensor([1.0, 9.0, 9.0, 8.9]), codes, None
    options = DecodingOptions(temperature=temperature)
    places = (np.arange(40) + 0.5) / 40
    for scores in both(head, k, native):
        drawn = [next_token(scores, options, set(), u) for u in places.tolist()]
        if temperature > 1:
            assert sorted(drawn) == list(range(40))
        else:
            assert sorted(drawn) == sorted([v for v in range(40) if v % 4 in (1, 2)] * 2)


@pytest.mark.parametrize("place", ["values", "logsumexp", "code_logits"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_scores_that_are_no_numbers_are_not_sound(place, poison):
    """A NaN that the list does not show included: a kernel's maximum may pass it by."""
    code_logits, codes = torch.tensor([1.0, 3.0, 0.0]), torch.tensor([[0], [1]], dtype=torch.int32)
    outputs = head_outputs(code_logits[None, None], codes, None, "topk", 1)
    read = ScoreReader(head_tables(codes, None)).read
    assert read(outputs, 0).sound
    outputs[place][..., -1] = poison
    # An infinite entry of the table is told by the list and the normaliser, where any token uses it: here none does.
    assert read(outputs, 0).sound == (place == "code_logits" and poison == np.inf)
    assert not read({"logits": np.array([[[1.0, poison]]], np.float32)}, 0).sound
    assert read({"logits": np.array([[[1.0, -np.inf]]], np.float32)}, 0).sound
