"""Decoding options out of range are refused in one sentence that names them."""

import math

import pytest

from export_vq.decoding import DecodingOptions
from export_vq.errors import UserError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.0),
        ("temperature", -0.1),
        ("temperature", 1e-6),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", True),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.01),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.inf),
        ("logit_bias", {3: math.inf}),
        ("logit_bias", {3: math.nan}),
        ("logprobs", -1),
        ("seed", -1),
        ("seed", 1.5),
        ("stop", ("",)),
        ("stop", "END"),
    ],
)
def test_a_bad_value_is_refused_by_name(name, value):
    with pytest.raises(UserError, match=rf"^{name}.*expected .*; correct the option"):
        DecodingOptions(**{name: value})


def test_the_edges_of_every_range_are_taken():
    DecodingOptions(max_new_tokens=1, temperature=1e-5, top_k=10**9, top_p=1, min_p=1, repetition_penalty=0.01, seed=0)
    DecodingOptions(temperature=0, min_p=0, logprobs=0, seed=2**128, logit_bias={0: -math.inf, 1: -1e30})


@pytest.mark.parametrize("token", [-1, 97, 1.0, True])
@pytest.mark.parametrize("field", ["logit_bias", "eos_ids"])
def test_tokens_that_the_model_lacks_are_refused(field, token):
    held = {token: 1.0} if field == "logit_bias" else frozenset({token})
    with pytest.raises(UserError, match=f"{field} holds token id {token}, expected 0 to 96"):
        DecodingOptions(**{field: held}).check_tokens(97)
