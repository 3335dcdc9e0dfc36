"""What a compression has done so far, so that a run that was stopped does not do it again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from export_vq.head import VQHead
from export_vq.resume import RunFolder


class Stages:
    """What is done so far, in a folder that belongs to one input and one set of options; nowhere where it is None."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def run(self, name: str) -> RunFolder | None:
        """Where a stage keeps its state."""
        return None if self.folder is None else RunFolder(self.folder / name, {})

    def _made(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        place = self.run(name)
        found = None if place is None else place.load()
        if found is None:
            found = make()
            if place is not None:
                place.save(found)
        return found

    def tensor(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A stage's tensor, made where it is not there yet."""
        found: Tensor = self._made(name, lambda: {name: make()})[name]
        return found

    def head(self, name: str, make: Callable[[], VQHead]) -> VQHead:
        """A stage's head, made where it is not there yet."""

        return VQHead.from_tensors(**self._made(name, lambda: make().tensors))

    def done(self) -> None:
        """Nothing is needed any more."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
