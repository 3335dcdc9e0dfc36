"""A smaller vocabulary for an ordinary causal LM, before it is given a VQ head.

The field's usual form of this (FR-Spec's, arXiv:2502.14856, and the vocabulary reduction of edge runtimes) shortens the output layer
only and maps its ids back. Here the vocabulary itself shrinks: tokens are renumbered in the order of their old ids, input
and output rows of the others go, the tokenizer encodes every text with what is left, and no runtime has to know.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from export_vq.errors import UserError
from export_vq.load import LoadedModel
from export_vq.text import token_ids
from export_vq.trim.select import select_tokens
from export_vq.trim.tokenizer import closure, inserted_ids, read_tokenizer, renumbered

_ID_FIELDS = ("_token_id", "_token_ids", "_token_index")
"""Endings of fields that hold a token id, or a list of them."""
_SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")
_UNSUPPORTED = ("force_words_ids", "forced_decoder_ids", "sequence_bias")


@dataclass(frozen=True)
class Trimmed:
    """`model` as `load_dense` would read it from its own files; `kept` int64 [V']: old id of each new one, rising."""

    model: LoadedModel
    kept: Tensor


def trim_vocabulary(dense: LoadedModel, keep: str, text: str) -> Trimmed:
    """Keep a part of an ordinary model's vocabulary.

    For inputs of kept tokens, the hidden states and the kept tokens' logits are those of the full model. A text that held
    other tokens is now encoded to more and shorter ones. The given model is left alone; the new one has its own tensors.

    Args:
        dense: from `load_dense`, with a tokenizer.
        keep: the number of most frequent tokens, `script:latin,...`, or a file (`select_tokens`). What the tokenizer needs
            besides is added, so that V' can be larger than a number given here.
        text: like what the model will meet; only a number needs it.

    Raises:
        UserError: the model has a VQ head or no tokenizer, its tokenizer or configuration is of a kind that cannot be
            trimmed, or `keep` makes no sense for it.
    """
    if dense.head is not None:
        raise UserError(
            f"{dense.source}: this model has a VQ-Logits head already, an ordinary output layer was expected; "
            "trim the model that it was made from"
        )
    model: Any = dense.model
    v = len(model.get_input_embeddings().weight)
    tokenizer = dense.tokenizer()
    data = read_tokenizer(dense.tokenizer_files, tokenizer, dense.source)
    ids: dict[str, int] = tokenizer.get_vocab()
    tokens = {i: token for token, i in ids.items() if i < v}
    generation = json.loads(dense.tokenizer_files.get("generation_config.json", "{}"))
    generating = model.generation_config.to_dict()

    chosen = select_tokens(keep, tokenizer, text, tokens)
    kept = {ids[token] for token in closure(data, (tokens[i] for i in chosen))} | inserted_ids(data)
    for settings in (dense.config, generation, generating):
        kept |= set(_named_ids(settings, dense.source))
    kept = {i for i in kept if 0 <= i < v}
    # Added tokens may lie beyond the model's rows, such as Gemma 3's image token; there they stay.
    kept |= set(tokenizer.get_added_vocab().values())
    new_ids = {old: new for new, old in enumerate(sorted(kept))}
    rows = torch.tensor([i for i in new_ids if i < v])

    files = renumbered(dense.tokenizer_files, data, new_ids)
    if generation:
        files["generation_config.json"] = json.dumps({**generation, **_mapped(generation, new_ids)}, indent=2) + "\n"
    network = _with_rows(model, rows, new_ids)
    changed = {**_mapped(dense.config, new_ids), "vocab_size": len(rows)}
    for config, fields in ((network.config, changed), (network.generation_config, _mapped(generating, new_ids))):
        for name, value in fields.items():
            setattr(config, name, value)
    trimmed = dataclasses.replace(
        dense,
        model=network,
        config={**dense.config, **changed},
        tokenizer_files=files,
        notes=(*dense.notes, f"the vocabulary was trimmed from {v} to {len(rows)} tokens"),
    )
    if trimmed.tokenizer().get_vocab() != {token: new_ids[i] for token, i in ids.items() if i in new_ids}:
        raise UserError(
            f"{dense.source}: with fewer tokens the tokenizer numbers them differently (its ids have gaps), "
            "expected ids in one piece; leave out --keep-tokens"
        )
    return Trimmed(trimmed, rows)


def bits_per_byte(dense: LoadedModel, text: str, block: int = 256) -> float:
    """How many bits a model needs for each UTF-8 byte of a text: comparable between vocabularies, as perplexity is not.

    The text goes through the model in windows of `block` tokens (at most its positions), each of which begins with the last
    token of the one before, so that every token but the first is predicted once.

    Args:
        dense: any model with a tokenizer.
        text: at least two tokens of it.
        block: tokens that the model sees together, 2 or more.

    Raises:
        UserError: no tokenizer, or the text is too short.
    """
    ids = token_ids(dense.tokenizer(), text)
    if len(ids) < 2:
        raise UserError(f"the text has {len(ids)} tokens, at least 2 were expected; give a longer text with --text")
    step = min(block, dense.max_positions) - 1
    nats = 0.0
    for start in range(0, len(ids) - 1, step):
        window = torch.tensor(ids[start : start + step + 1])
        with torch.no_grad():
            logits = dense.model(input_ids=window[None], use_cache=False).logits[0, :-1]  # [S-1, V]
        nats += nn.functional.cross_entropy(logits.float(), window[1:], reduction="none").double().sum().item()
    return nats / math.log(2) / len(text.encode())


# ------------------------------------------------------------------------------------------------------------- network


def _with_rows(model: Any, rows: Tensor, new_ids: Mapping[int, int]) -> Any:
    """A copy of the model with these rows of its input embedding and output layer, tied where they were."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    v = len(embedding.weight)
    # deepcopy takes what the memo holds instead of copying: the large matrices are never copied whole, and one that two layers
    # share is shared again.
    memo: dict[int, Any] = {}
    for parameter in (embedding.weight, output.weight, output.bias):
        if parameter is not None:
            memo[id(parameter)] = nn.Parameter(parameter.detach()[rows], requires_grad=parameter.requires_grad)
    network = copy.deepcopy(model, memo)
    network.get_input_embeddings().num_embeddings = len(rows)
    network.get_output_embeddings().out_features = len(rows)
    for old, new in zip(model.modules(), network.modules(), strict=True):
        if getattr(old, "vocab_size", None) == v:
            new.vocab_size = len(rows)
        # Other embeddings, such as OPT's of positions, count in another way.
        if getattr(old, "padding_idx", None) is not None and (old is embedding or not isinstance(old, nn.Embedding)):
            new.padding_idx = new_ids.get(old.padding_idx)
    return network.eval()


# ------------------------------------------------------------------------------------------------------------ settings


def _named_ids(settings: Mapping[str, Any], source: str) -> Iterator[int]:
    """Token ids that a config names, which must stay."""
    for name, value in settings.items():
        if name in _UNSUPPORTED and value:
            raise UserError(
                f"{source}: the config sets {name}, which --keep-tokens cannot renumber, expected it unset; remove it first"
            )
        if name.endswith(_ID_FIELDS) and value is not None:
            yield from value if isinstance(value, list) else [value]


def _mapped(settings: Mapping[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    """The fields of a config that hold token ids, with the new ones; what suppresses a token that is gone goes too."""
    changed: dict[str, Any] = {}
    for name, value in settings.items():
        if value is None:
            continue
        if name.endswith(_ID_FIELDS):
            # An id beyond the vocabulary, such as -1 or a class's default, stays what it is.
            changed[name] = [new_ids.get(i, i) for i in value] if isinstance(value, list) else new_ids.get(value, value)
        elif name in _SUPPRESSED:
            changed[name] = [new_ids[i] for i in value if i in new_ids]
        elif name == "bad_words_ids":
            changed[name] = [[new_ids[i] for i in word] for word in value if all(i in new_ids for i in word)] or None
    return changed
