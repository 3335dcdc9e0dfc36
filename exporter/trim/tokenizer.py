"""A tokenizer with fewer tokens: which more it needs besides the chosen ones, and its files under new ids.

Every text must still encode, to shorter pieces where its own are gone. So a smaller vocabulary keeps, besides the chosen tokens:
- what any text falls back to: the 256 byte pieces where the model has such a fallback, else all single characters
  (those are the bytes, where the vocabulary is byte-level), and the unknown token;
- all added tokens, special or not, and those that the post-processor inserts;
- of BPE, all tokens on the way to a chosen one. BPE applies the merge of lowest rank first, so for each token there is
  one sequence of merges that makes it, inside any word the same as alone. As long as these merges are there, those that
  are gone cannot come in between: the smaller vocabulary makes the token just as the full one does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

from export_vq.errors import UserError

MODELS = ("BPE", "Unigram", "WordPiece")
REPLACED = ("vocab.json", "merges.txt", "vocab.txt")
"""Older forms of what tokenizer.json says; they would contradict the new one."""
SPACE = "\u2581"
"""What many tokenizers write for a space: as bytes it would not be decoded to one."""


def read_tokenizer(files: Mapping[str, str], tokenizer: Any, source: str) -> dict[str, Any]:
    """The content of tokenizer.json; where the checkpoint has only older files, as the loaded tokenizer would write it.

    Raises:
        UserError: the tokenizer is of a kind that cannot be trimmed.
    """
    if "tokenizer.json" not in files and not tokenizer.is_fast:
        raise UserError(
            f"{source}: the tokenizer is a {type(tokenizer).__name__} without a tokenizer.json, which --keep-tokens expects; "
            "save it as a fast tokenizer first"
        )
    data: dict[str, Any] = json.loads(files.get("tokenizer.json") or tokenizer.backend_tokenizer.to_str())
    model = data["model"]
    kind = model.get("type")
    if kind not in MODELS:
        raise UserError(
            f"{source}: the tokenizer's model is {kind}, expected {', '.join(MODELS)}, whose vocabularies can be trimmed; "
            "leave out --keep-tokens"
        )
    affix = kind == "BPE" and (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
    if affix:
        raise UserError(
            f"{source}: the tokenizer's merges mark word parts with {affix!r}, expected plain BPE merges; leave out --keep-tokens"
        )
    return data


def closure(data: dict[str, Any], chosen: Iterable[str]) -> set[str]:
    """The chosen tokens of the model's vocabulary and those it needs besides, added tokens apart."""
    model = data["model"]
    vocab = _vocab(model)
    kept = {token for token in chosen if token in vocab}
    pieces = {f"<0x{byte:02X}>" for byte in range(256)} & set(vocab) if model.get("byte_fallback") else set()
    kept |= pieces
    if len(pieces) < 256:
        prefix = model.get("continuing_subword_prefix") or ""
        kept |= {token for token in vocab if len(token.removeprefix(prefix)) == 1}
    kept |= {token for token in (SPACE, _unknown(model)) if token in vocab}
    if model["type"] == "BPE":
        # The last of equal merges is the one that counts, as in the tokenizers library.
        ranks = {merge: rank for rank, merge in enumerate(_merges(model))}
        kept |= {part for token in list(kept) for part in _derivation(token, ranks)}
    return kept


def _derivation(token: str, ranks: Mapping[tuple[str, str], int]) -> set[str]:
    """All symbols on BPE's way from the characters to the token; nothing where it does not get there."""
    parts = list(token)
    seen = set(parts)
    never = len(ranks)
    while len(parts) > 1:
        rank, at = min((ranks.get(pair, never), i) for i, pair in enumerate(pairwise(parts)))
        if rank == never:
            return set()
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        seen.add(parts[at])
    return seen


def inserted_ids(data: dict[str, Any]) -> set[int]:
    """Ids that post-processor and padding put around a text."""
    return {i for ids in _inserted(data) for i in ids}


def renumbered(files: Mapping[str, str], data: dict[str, Any], new_ids: Mapping[int, int]) -> dict[str, str]:
    """The tokenizer's files with the tokens of `new_ids` (old id -> new id) only; templates and settings stay as they are.

    Args:
        files: all files by name.
        data: of `read_tokenizer`; it is changed in place.
        new_ids: closed, and rising like the old ids.
    """
    model = data["model"]
    vocab = _vocab(model)
    if model["type"] == "Unigram":
        model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in new_ids]
        if model.get("unk_id") is not None:
            model["unk_id"] = new_ids[model["unk_id"]]
    else:
        model["vocab"] = {token: new_ids[i] for token, i in vocab.items() if i in new_ids}
    if model["type"] == "BPE":
        model["merges"] = [
            [left, right] for left, right in _merges(model) if {left, right, left + right} <= model["vocab"].keys()
        ]
    data["added_tokens"] = [
        {**token, "id": new_ids[token["id"]]} for token in data["added_tokens"] if token["id"] in new_ids
    ]
    for ids in _inserted(data):
        ids[:] = [new_ids[i] for i in ids]
    result = {name: text for name, text in files.items() if name not in REPLACED}
    result["tokenizer.json"] = json.dumps(data, ensure_ascii=False)
    settings = json.loads(files.get("tokenizer_config.json", "{}"))
    if "added_tokens_decoder" in settings:
        old = settings["added_tokens_decoder"]
        settings["added_tokens_decoder"] = {str(new_ids[int(i)]): old[i] for i in old if int(i) in new_ids}
        result["tokenizer_config.json"] = json.dumps(settings, ensure_ascii=False, indent=2) + "\n"
    if "added_tokens.json" in files:
        added = json.loads(files["added_tokens.json"])
        result["added_tokens.json"] = json.dumps(
            {token: new_ids[i] for token, i in added.items() if i in new_ids}, ensure_ascii=False
        )
    return result


# ------------------------------------------------------------------------------------------------ inside tokenizer.json


def _vocab(model: dict[str, Any]) -> dict[str, int]:
    if model["type"] == "Unigram":  # pieces with scores, the id is the place
        return {piece: i for i, (piece, _) in enumerate(model["vocab"])}
    return dict(model["vocab"])


def _unknown(model: dict[str, Any]) -> str | None:
    if model["type"] == "Unigram":
        return None if model.get("unk_id") is None else model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def _merges(model: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for merge in model["merges"]:  # "a b" in files written by older versions
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def _inserted(data: dict[str, Any]) -> Iterator[list[int]]:
    """The ids that post-processor and padding insert, as lists that may be changed in place."""
    if data.get("padding"):
        yield from _in_place(data["padding"], "pad_id")
    processors = [data["post_processor"]] if data.get("post_processor") else []
    while processors:
        processor = processors.pop()
        processors += processor.get("processors", ())  # a sequence of them
        for special in processor.get("special_tokens", {}).values():
            yield special["ids"]
        for name in ("sep", "cls"):  # of Bert's and Roberta's: [token, id]
            if name in processor:
                yield from _in_place(processor[name], 1)


def _in_place(holder: Any, key: str | int) -> Iterator[list[int]]:
    ids = [holder[key]]
    yield ids
    holder[key] = ids[0]
