"""Optimisation profiles: the defaults, overrides in trtexec's words, and which profile serves which shapes."""

import pytest

from export_vq.errors import UserError
from export_vq.profiles import choose_profile, describe, make_profiles

PAST = ("batch_size", 2, "past_sequence_length", 8)
DECODER = {
    "input_ids": ("batch_size", "sequence_length"),
    "attention_mask": ("batch_size", "total_sequence_length"),
    "past_key_values.0.key": PAST,
    "past_key_values.0.value": PAST,
}
HEAD = {"hidden_states": ("rows", 1, 32)}


def _ranges(profile):
    return {given.name: (given.min, given.opt, given.max) for given in profile.inputs}


def test_a_decoder_gets_a_prefill_and_a_decode_profile():
    prefill, decode = make_profiles(DECODER, context=100)
    assert (prefill.name, decode.name) == ("prefill", "decode")
    assert _ranges(prefill) == {
        "input_ids": ((1, 1), (1, 100), (8, 100)),
        "attention_mask": ((1, 1), (1, 100), (8, 100)),
        "past_key_values.0.key": ((1, 2, 0, 8), (1, 2, 0, 8), (8, 2, 0, 8)),
        "past_key_values.0.value": ((1, 2, 0, 8), (1, 2, 0, 8), (8, 2, 0, 8)),
    }
    assert _ranges(decode) == {
        "input_ids": ((1, 1), (1, 1), (8, 1)),
        "attention_mask": ((1, 2), (1, 51), (8, 100)),
        "past_key_values.0.key": ((1, 2, 1, 8), (1, 2, 50, 8), (8, 2, 99, 8)),
        "past_key_values.0.value": ((1, 2, 1, 8), (1, 2, 50, 8), (8, 2, 99, 8)),
    }


def test_a_head_gets_one_profile_over_its_rows():
    (head,) = make_profiles(HEAD)
    assert (head.name, _ranges(head)) == ("head", {"hidden_states": ((1, 1, 32), (1, 1, 32), (64, 1, 32))})


@pytest.mark.parametrize("context", [1, 2, 3])
def test_a_tiny_context_still_gives_ordered_bounds(context):
    for profile in make_profiles(DECODER, context=context):
        for given in profile.inputs:
            assert all(a <= b <= c for a, b, c in zip(given.min, given.opt, given.max, strict=True))


def test_an_override_moves_every_input_that_shares_the_dimension_in_every_profile():
    prefill, decode = make_profiles(DECODER, {"max": "past_key_values.0.key:32x2x300x8"}, context=100)
    assert _ranges(prefill)["input_ids"][2] == (32, 100)
    assert _ranges(prefill)["attention_mask"][2] == (32, 400)
    assert _ranges(decode)["attention_mask"][2] == (32, 301)
    assert _ranges(decode)["past_key_values.0.value"] == ((1, 2, 1, 8), (1, 2, 50, 8), (32, 2, 300, 8))


def test_an_override_can_name_one_profile():
    prefill, decode = make_profiles(
        DECODER, {"opt": "decode/input_ids:4x1", "max": "prefill/input_ids:2x16, decode/input_ids:16x1"}, context=100
    )
    assert _ranges(prefill)["input_ids"] == ((1, 1), (1, 16), (2, 16))  # the usual length follows the largest down
    assert _ranges(decode)["input_ids"] == ((1, 1), (4, 1), (16, 1))


def test_all_three_bounds_can_be_given_as_for_trtexec():
    (head,) = make_profiles(
        HEAD, {"min": "hidden_states:8x1x32", "opt": "hidden_states:16x1x32", "max": "hidden_states:4096x1x32"}
    )
    assert _ranges(head)["hidden_states"] == ((8, 1, 32), (16, 1, 32), (4096, 1, 32))
    assert describe(head) == "hidden_states 8x1x32 .. 16x1x32 .. 4096x1x32"


def test_a_description_joins_inputs_with_equal_ranges():
    decode = make_profiles(DECODER, context=100)[1]
    assert describe(decode).endswith("past_key_values.0.key and 1 more 1x2x1x8 .. 1x2x50x8 .. 8x2x99x8")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"max": "input_id:1x1"}, ("--max-shapes", "'input_id'", "expected one of", "input_ids, attention_mask")),
        ({"min": "chat/input_ids:1x1"}, ("--min-shapes", "'chat/input_ids'", "expected one of")),
        ({"max": "input_ids:1x1x1"}, ("input_ids 3 dimensions", "expected 2", "batch_sizexsequence_length")),
        ({"opt": "input_ids=1x1"}, ("--opt-shapes", "'input_ids=1x1'", "input_ids:1x128")),
        ({"opt": "input_ids:1x-1"}, ("--opt-shapes", "1x-1", "input_ids:1x128")),
        ({"opt": "input_ids:"}, ("--opt-shapes", "input_ids:1x128")),
        ({"max": "past_key_values.0.key:1x3x9x8"}, ("3 where it is always 2",)),
        ({"max": "input_ids:4x9,attention_mask:5x9"}, ("batch_size twice", "4 by input_ids", "5 by attention_mask")),
        ({"max": "prefill/attention_mask:8x50"}, ("total_sequence_length 50", "expected 100", "leave it out")),
        ({"min": "input_ids:4x1", "max": "input_ids:2x1"}, ("batch_size of profile prefill", "min <= opt <= max")),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) else None,
)
def test_a_wrong_override_is_refused(overrides, says):
    with pytest.raises(UserError) as refused:
        make_profiles(DECODER, overrides, context=100)
    assert all(words in str(refused.value) for words in says), refused.value


def test_an_unknown_dynamic_dimension_is_refused():
    with pytest.raises(UserError, match="dynamic dimension 'height'"):
        make_profiles({"image": ("height", 3)})


def _shapes(batch, sequence, past):
    cache = (batch, 2, past, 8)
    return {
        "input_ids": (batch, sequence),
        "attention_mask": (batch, past + sequence),
        "past_key_values.0.key": cache,
        "past_key_values.0.value": cache,
    }


@pytest.mark.parametrize(("shapes", "name"), [((1, 1, 0), "prefill"), ((8, 100, 0), "prefill"), ((3, 1, 7), "decode")])
def test_the_profile_is_chosen_by_the_shapes(shapes, name):
    profiles = make_profiles(DECODER, context=100)
    assert profiles[choose_profile(profiles, _shapes(*shapes))].name == name


def test_the_narrower_of_two_fitting_profiles_is_chosen():
    profiles = make_profiles(DECODER, {"max": "prefill/past_key_values.0.key:8x2x99x8"}, context=100)
    assert profiles[choose_profile(profiles, _shapes(1, 1, 5))].name == "decode"
    assert profiles[choose_profile(profiles, _shapes(1, 2, 5))].name == "prefill"


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ((9, 1, 5), ("input_ids is 9x1, decode takes 1x1 to 8x1",)),
        ((1, 2, 5), ("past_key_values.0.key is 1x2x5x8, prefill takes 1x2x0x8 to 8x2x0x8", "input_ids is 1x2, decode")),
    ],
)
def test_shapes_that_no_profile_serves_are_refused_with_where_each_ends(shapes, says):
    with pytest.raises(UserError) as refused:
        choose_profile(make_profiles(DECODER, context=100), _shapes(*shapes))
    assert all(words in str(refused.value) for words in (*says, "--max-shapes"))
