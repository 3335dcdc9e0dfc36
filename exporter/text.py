"""Text files become blocks of token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export_vq.errors import UserError


def read_text(path: Path) -> str:
    """A UTF-8 text file, or all .txt files of a folder in the order of their names, joined by blank lines.

    Raises:
        UserError: missing, empty or not UTF-8.
    """
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    try:
        text = "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a UTF-8 text file with --text") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it first") from error
    if not text.strip():
        raise UserError(f"{path}: holds no text; give a UTF-8 text file, or a folder of .txt files, with --text")
    return text


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """A text as token ids, nothing put around it, however long."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return ids


def filled_blocks(tokenizer: Any, text: str, width: int, count: int, *, vocab_size: int) -> NDArray[np.int64]:
    """As many blocks as asked for, int64 [count, width]: those of `token_blocks`, again and again where they are fewer."""
    blocks: NDArray[np.int64] = token_blocks(tokenizer, text, width, count, vocab_size=vocab_size).numpy()
    return np.resize(blocks, (count, width)) if len(blocks) < count else blocks


def token_blocks(tokenizer: Any, text: str, block: int, limit: int | None = None, *, vocab_size: int) -> Tensor:
    """Cut a text into blocks of token ids, int64 [N, block]; the rest that fills no block is dropped.

    Args:
        tokenizer: a transformers tokenizer.
        text: any length above one block.
        block: tokens a block.
        limit: at most this many blocks, spread evenly over the text.
        vocab_size: of the model; every id must be below.

    Raises:
        UserError: the text is shorter than one block, or holds a token that the model does not know.
    """
    ids = token_ids(tokenizer, text)
    if len(ids) < block:
        raise UserError(
            f"the text has {len(ids)} tokens, at least {block} were expected; give a longer text with --text"
        )
    if max(ids) >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(max(ids))
        raise UserError(
            f"the text holds the token {token!r} with id {max(ids)}, expected ids below vocab_size {vocab_size}; remove it from the text"
        )
    blocks = torch.tensor(ids[: len(ids) // block * block]).reshape(-1, block)
    if limit is None or len(blocks) <= limit:
        return blocks
    return blocks[torch.linspace(0, len(blocks) - 1, limit).long()]
