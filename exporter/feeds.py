"""Feeds for a decoder graph: a prefill from token ids, then steps that hand the KV cache back in."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Feeds = dict[str, Array]


@dataclass(frozen=True)
class Signature:
    """What a decoder graph takes and gives.

    `cache_shapes` is (KV heads, head_dim) per layer, `cache_dtype` the type of the cache arrays. `output` is 'logits',
    'topk' (the best `top_k` tokens) or 'sample', with `last_token` of the last position only.
    """

    cache_shapes: tuple[tuple[int, int], ...]
    has_position_ids: bool
    cache_dtype: type[np.floating[Any]] = np.float32
    output: str = "logits"
    top_k: int = 0
    last_token: bool = False


@dataclass(frozen=True)
class HeadTables:
    """The constants of a VQ head that turn code logits into logits: `codes` int32 [V, M], `bias` float32 [V] or None."""

    codes: NDArray[np.int32]
    bias: NDArray[np.float32] | None


class Runner(Protocol):
    """A model ready to run, whatever runs it."""

    name: str
    signature: Signature

    @property
    def head(self) -> HeadTables | None:
        """The constants of its VQ head; None where it has none, or cannot tell them."""
        ...

    def infer(self, feeds: Feeds) -> Feeds:
        """Named input arrays -> named output arrays."""
        ...


class Closing:
    """`with runner:` frees what the runner holds at the end."""

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free what the runner holds; it cannot run after."""


def prefill(signature: Signature, input_ids: Array, mask: Array) -> Feeds:
    """The first call: all tokens of the prompts, an empty cache.

    Args:
        input_ids: int64 [B, S].
        mask: int64 [B, S], 1 = token, 0 = padding (on the left).
    """
    return token_feeds(signature, input_ids, mask) | empty_past(signature, len(input_ids))


def step(signature: Signature, input_ids: Array, mask: Array, outputs: Feeds) -> Feeds:
    """A later call: new tokens, and the cache that the previous call returned.

    Args:
        input_ids: int64 [B, S], usually S = 1.
        mask: int64 [B, past + S].
        outputs: of the previous call, with present.{i}.key and .value.
    """
    return token_feeds(signature, input_ids, mask) | past_of(outputs)


def empty_past(signature: Signature, batch: int) -> Feeds:
    """The cache of `batch` sequences before their first call."""
    return {
        name: np.zeros((batch, heads, 0, dim), signature.cache_dtype)
        for i, (heads, dim) in enumerate(signature.cache_shapes)
        for name in (f"past_key_values.{i}.key", f"past_key_values.{i}.value")
    }


def past_of(outputs: Feeds) -> Feeds:
    """The cache that a call returned, as the next call takes it."""
    return {
        name.replace("present.", "past_key_values."): a for name, a in outputs.items() if name.startswith("present.")
    }


def draws(
    signature: Signature, input_ids: Array, random: np.random.Generator, temperature: float = 1.0
) -> dict[str, Array]:
    """What a 'sample' graph takes besides: temperature float32 [1], uniform float32 [B, S]. Nothing for other graphs."""
    if signature.output != "sample":
        return {}
    batch, positions = input_ids.shape
    uniform = random.random((batch, 1 if signature.last_token else positions), np.float32)
    return {"temperature": np.array([temperature], np.float32), "uniform": uniform}


def first_step(runner: Runner, input_ids: Array) -> Feeds:
    """Feeds of the decode step that repeats the last token after a prompt int64 [1, S] went through the KV cache."""
    signature, again, random = runner.signature, input_ids[:, -1:], np.random.default_rng(0)
    whole = prefill(signature, input_ids, np.ones_like(input_ids)) | draws(signature, input_ids, random)
    mask = np.ones((1, input_ids.shape[1] + 1), np.int64)
    return step(signature, again, mask, runner.infer(whole)) | draws(signature, again, random)


def token_feeds(signature: Signature, input_ids: Array, mask: Array) -> Feeds:
    """A call's inputs without the cache: tokens int64 [B, S], mask int64 [B, past + S]."""
    feeds = {"input_ids": input_ids, "attention_mask": mask}
    if signature.has_position_ids:
        # Padding has no position of its own; Hugging Face's generate counts the same way.
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
        feeds["position_ids"] = positions[:, -input_ids.shape[1] :]
    return feeds


def left_pad(rows: list[list[int]], pad_id: int = 0) -> tuple[Array, Array]:
    """Token lists of different lengths -> (input_ids int64 [B, S], mask int64 [B, S]), padded on the left."""
    width = max(map(len, rows))
    ids = np.array([[pad_id] * (width - len(row)) + list(row) for row in rows], dtype=np.int64)
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows], dtype=np.int64)
    return ids, mask
