"""Text becomes documents, those to calibrate on and those to test on: never the same ones."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export_vq.calibration.options import CalibrationOptions
from export_vq.errors import UserError
from export_vq.text import read_text

LEAST_CHARACTERS = 2000
"""Of a document: paragraphs are gathered until they hold so many."""
TEST_SHARE = 8
"""Every eighth document is for testing."""
TELLING = 80
"""Characters that a paragraph needs for its presence in two documents to mean that one is the other's copy: a line of text.
Shorter ones, headings and separators, stand in many."""

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Document:
    """Token ids int64 [n], and the hashes of the paragraphs that tell it, or a part of it, apart."""

    ids: Ids
    parts: frozenset[str]


@dataclass(frozen=True)
class Material:
    """Token blocks int64 [n, S] to calibrate and to test on, from so many documents with these hashes."""

    calibration: Ids
    test: Ids
    documents: tuple[int, int]
    sha256: tuple[str, str]


def read_material(options: CalibrationOptions, tokenizer: Any, vocab_size: int, width: int) -> Material:
    """Read, split and cut into blocks; a document is known by its hash, so equal ones are one.

    With a held-out text that is tested on. Without, the eighth of the documents with the lowest hashes is: the same text is
    split in the same way every time. What shares a paragraph with a document that is tested on is not calibrated on.

    Args:
        options: `text` or `feeds` (its rows are the documents), `held_out`, `samples`, `test_tokens` count.
        tokenizer: a tokenizers.Tokenizer.
        vocab_size: every id must be below.
        width: tokens a block.

    Raises:
        UserError: a text cannot be read, is empty or too short, or holds ids that the model does not have.
    """
    origin = options.text or options.feeds
    assert origin is not None
    pool = _read_feeds(origin) if options.feeds is not None else _read_documents(origin, tokenizer)
    if options.held_out is not None:
        test = _read_documents(options.held_out, tokenizer)
    else:
        test = {digest: pool[digest] for digest in sorted(pool)[: max(1, len(pool) // TEST_SHARE)]}
    tested = frozenset[str]().union(*(document.parts for document in test.values()))
    rest = {digest: d for digest, d in pool.items() if digest not in test and not d.parts & tested}
    if not rest:
        raise UserError(
            f"{origin}: holds {len(pool)} document(s) of some {LEAST_CHARACTERS} characters, and none is left to calibrate on: each is "
            "tested on or shares a paragraph with one that is; give a longer text, or another one with --held-out FILE"
        )
    return Material(
        _blocks(origin, rest.values(), vocab_size, width, options.samples),
        _blocks(options.held_out or origin, test.values(), vocab_size, width, -(-options.test_tokens // width)),
        (len(rest), len(test)),
        (_digest("".join(rest).encode()), _digest("".join(test).encode())),
    )


def documents(text: str) -> list[str]:
    """Paragraphs, parted by blank lines, gathered until they hold LEAST_CHARACTERS; the last may hold fewer."""
    found = [""]
    for paragraph in filter(str.strip, text.split("\n\n")):
        if len(found[-1]) >= LEAST_CHARACTERS:
            found.append("")
        found[-1] += paragraph + "\n\n"
    return found


def _read_documents(path: Path, tokenizer: Any) -> dict[str, Document]:
    """Documents of a text by their hashes, as token ids with nothing put around them."""
    texts = documents(read_text(path))
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    return {
        _digest(t.encode()): Document(np.array(e.ids, np.int64), _parts(t))
        for t, e in zip(texts, encodings, strict=True)
    }


def _parts(text: str) -> frozenset[str]:
    paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return frozenset(_digest(words.encode()) for words in paragraphs if len(words) >= TELLING)


def _read_feeds(path: Path) -> dict[str, Document]:
    try:
        with path.open("rb") as stream, np.lib.npyio.NpzFile(stream) as arrays:
            ids = arrays["input_ids"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: not an .npz file with input_ids ({error}); write one with numpy.savez") from error
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size:
        raise UserError(
            f"{path}: input_ids is {ids.dtype} {list(ids.shape)}, expected integers [N, S], N and S above 0; write them so"
        )
    rows = ids.astype(np.int64)
    return {_digest(row.tobytes()): Document(row, frozenset()) for row in rows}


def _blocks(origin: Path, chosen: Iterable[Document], vocab_size: int, width: int, limit: int) -> Ids:
    """At most `limit` blocks [n, width], spread evenly over the documents one after the other."""
    ids = np.concatenate([document.ids for document in chosen])
    if len(ids) < width:
        raise UserError(
            f"{origin}: {len(ids)} tokens, at least {width} were expected to fill a block; give a longer text"
        )
    if not 0 <= ids.min() <= ids.max() < vocab_size:
        raise UserError(
            f"{origin}: holds the token id {ids.max()}, expected ids from 0 to {vocab_size - 1}; use the model's own "
            "tokenizer.json"
        )
    blocks: Ids = ids[: len(ids) // width * width].reshape(-1, width)
    chosen_rows: Ids = np.linspace(0, len(blocks) - 1, min(limit, len(blocks))).astype(np.int64)
    return np.take(blocks, chosen_rows, axis=0)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
