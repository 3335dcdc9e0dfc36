"""How a request wants its text decoded: the options, under the names that Hugging Face and OpenAI gave them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from export_vq.errors import UserError

COLDEST = 1e-5
"""The lowest temperature above 0: below it logits / temperature leave no digits for their differences."""


@dataclass(frozen=True)
class DecodingOptions:
    """Options of one request. What they do to the model's logits, in this order (Hugging Face's):

    1. `logit_bias`: {token id: addition}; -inf forbids the token.
    2. `repetition_penalty`: positive logits of all tokens in prompt and output are divided by it, negative multiplied.
    3. `temperature`: logits are divided by it. 0 is greedy: the best token, and 4 to 6 change nothing.
    4. `top_k`: the k best tokens stay, exactly k: of equal logits the lower ids. 0: all.
    5. `top_p`: the fewest best tokens stay whose probabilities sum to at least this. 1: all.
    6. `min_p`: tokens stay that are at least this times as probable as the best. 0: all.

    Attributes:
        max_new_tokens: the most tokens to write.
        logprobs: None: no log-probabilities; n: those of the drawn token and of the n best. They are the model's own,
            log softmax of its logits before any of the steps above.
        seed: of this request's draws; the same seed gives the same tokens in whatever batch. None: a fresh one.
        stop: the text ends before the first of these strings.
        eos_ids: tokens that end the text; their own text is left out.

    Raises:
        UserError: a value is out of range; the sentence names the option.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    eos_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        self._whole("max_new_tokens", 1)
        self._whole("top_k", 0, "0 (all tokens) or more")
        for name in ("logprobs", "seed"):
            if getattr(self, name) is not None:
                self._whole(name, 0)
        t = self.temperature
        if not (_number(t) and (t == 0 or COLDEST <= t < math.inf)):
            _refuse("temperature", t, f"0 (greedy) or a number from {COLDEST:g}")
        if not (_number(self.top_p) and 0 < self.top_p <= 1):
            _refuse("top_p", self.top_p, "a number above 0 and at most 1")
        if not (_number(self.min_p) and 0 <= self.min_p <= 1):
            _refuse("min_p", self.min_p, "a number from 0 to 1")
        if not (_number(self.repetition_penalty) and 0 < self.repetition_penalty < math.inf):
            _refuse("repetition_penalty", self.repetition_penalty, "a number above 0")
        for token, addition in self.logit_bias.items():
            if not (_number(addition) and addition < math.inf):
                _refuse(f"logit_bias of token {token}", addition, "a finite number, or -inf to forbid the token")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            _refuse("stop", self.stop, "strings of at least one character")

    def check_tokens(self, vocab_size: int) -> None:
        """Raise UserError where `logit_bias` or `eos_ids` name a token that the model does not have."""
        for name, ids in (("logit_bias", self.logit_bias), ("eos_ids", self.eos_ids)):
            for token in ids:
                check_token(name, token, vocab_size)

    def _whole(self, name: str, least: int, expected: str = "") -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            _refuse(name, value, expected or f"a whole number from {least}")


def check_token(where: str, token: Any, vocab_size: int) -> None:
    """Raise UserError unless `token` is a token id of the model; `where` names what holds it."""
    if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
        raise UserError(
            f"{where} holds token id {token!r}, expected 0 to {vocab_size - 1}; use the ids of this model's tokenizer"
        )


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _refuse(name: str, found: object, expected: str) -> NoReturn:
    raise UserError(f"{name} is {found!r}, expected {expected}; correct the option")
