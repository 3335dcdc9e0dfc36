"""Which tokens of a vocabulary to keep, as the user says it in one string."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from export_vq.errors import UserError
from export_vq.text import token_ids

SCRIPT = "script:"


def select_tokens(keep: str, tokenizer: Any, text: str, tokens: Mapping[int, str]) -> set[int]:
    """Ids of the tokens that a `--keep-tokens` value asks for.

    Args:
        keep: one of three things.
            A number N: the N most frequent tokens of the text, among equally frequent ones the lower ids.
            `script:latin` or `script:latin,greek,...`: tokens whose characters all belong to these Unicode scripts or to
            none in particular (digits, punctuation, white space, emoji, combining accents, the pieces of a character that
            byte-level vocabularies hold). Any text in these scripts is then encoded as before.
            A UTF-8 file: on each line a token as the vocabulary spells it, or an id in decimal digits.
        tokenizer: a transformers tokenizer.
        text: what the frequencies are of; unused otherwise.
        tokens: the tokens to choose from, by id.

    Raises:
        UserError: the string is none of these, asks for more than there is or for nothing, or the file names an unknown
            token.
    """
    if keep.startswith(SCRIPT):
        return _of_scripts(keep, tokenizer, tokens)
    try:
        number = int(keep)
    except ValueError:
        return _listed(Path(keep), tokens)
    return _most_frequent(number, tokenizer, text, tokens)


def _most_frequent(number: int, tokenizer: Any, text: str, tokens: Mapping[int, str]) -> set[int]:
    if not 1 <= number <= len(tokens):
        raise UserError(
            f"--keep-tokens is {number}, expected 1 to {len(tokens)}, the tokens of this vocabulary; give a number between"
        )
    ids = token_ids(tokenizer, text)
    counts = torch.bincount(torch.tensor(ids, dtype=torch.int64), minlength=max(tokens) + 1).tolist()
    return set(sorted(tokens, key=lambda token: (-counts[token], token))[:number])


def _of_scripts(keep: str, tokenizer: Any, tokens: Mapping[int, str]) -> set[int]:
    import regex

    written: dict[str, Any] = {}
    for name in keep.removeprefix(SCRIPT).split(","):
        try:
            # Letters only: anything else could be read as more of the pattern.
            written[name] = regex.compile(rf"\p{{Script={name}}}") if name.isalpha() and name.isascii() else None
        except regex.error:
            written[name] = None
        if written[name] is None:
            raise UserError(
                f"--keep-tokens is {keep!r}, in which {name!r} is no Unicode script; "
                "expected names such as latin, cyrillic or han; write script:latin or script:latin,cyrillic"
            )
    scripts = "".join(rf"\p{{Script={name}}}" for name in written)
    # Decoders write a piece of a character as U+FFFD, which is Common.
    wanted = regex.compile(rf"[\p{{Script=Common}}\p{{Script=Inherited}}{scripts}]*")
    spelled = {i: tokenizer.convert_tokens_to_string([token]) for i, token in tokens.items()}
    chosen = {i for i, word in spelled.items() if wanted.fullmatch(word)}
    for name, letter in written.items():
        if not any(letter.search(spelled[i]) for i in chosen):
            raise UserError(
                f"--keep-tokens is {keep!r}, but no token of this vocabulary is written in {name}; leave that script out"
            )
    return chosen


def _listed(path: Path, tokens: Mapping[int, str]) -> set[int]:
    try:
        # Not splitlines(): a token may hold one of the rarer line separators.
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(
            f"--keep-tokens is {str(path)!r} ({error.strerror}), expected a number of tokens, script:NAME, or a file with "
            "one token a line; correct it"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}), expected one token a line; convert it first"
        ) from error
    ids = {token: i for i, token in tokens.items()}
    chosen = set()
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        found = int(line) if line.isascii() and line.isdigit() else ids.get(line, -1)
        if found not in tokens:
            raise UserError(
                f"{path}: line {number} is {line!r}, which this vocabulary does not hold; "
                "expected a token as its tokenizer.json spells it, or an id"
            )
        chosen.add(found)
    if not chosen:
        raise UserError(f"{path}: names no token, expected one a line; add those to keep")
    return chosen
