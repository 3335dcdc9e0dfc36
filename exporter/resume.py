"""The state of a training run on disk: whole or not there, and only for the run that it belongs to."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export_vq.errors import UserError
from export_vq.files import whole

FILE = "training.pt"


class RunFolder:
    """Where a run keeps its state.

    `identity` says what the run is: names and values of everything that its result depends on.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.path = folder / FILE
        self.identity = dict(identity)

    def save(self, state: Mapping[str, Any]) -> None:
        """Write tensors, numbers, strings, lists and dicts; a process that dies meanwhile leaves the last state in place.

        Raises:
            UserError: the folder cannot be written.
        """
        with whole(self.path, mend="choose another folder") as staged:
            torch.save({"identity": self.identity, **state}, staged)

    def load(self) -> dict[str, Any] | None:
        """What `save` wrote last, on the CPU; None where there is nothing yet.

        Raises:
            UserError: the folder holds another run, or a file that is no state.
        """
        for left in self.path.parent.glob(f".{FILE}.*"):  # of a process that died while it wrote
            shutil.rmtree(left, ignore_errors=True)
        if not self.path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
            found: dict[str, Any] = state.pop("identity")
        except Exception as error:  # torch.load raises anything on damaged files
            raise UserError(
                f"{self.path}: not readable as the state of a run ({type(error).__name__}), expected one that this tool wrote; "
                "delete it to start anew"
            ) from error
        differ = [name for name in {**self.identity, **found} if self.identity.get(name) != found.get(name)]
        if differ:
            name = differ[0]
            others = f" (and {', '.join(differ[1:])} differ)" if differ[1:] else ""
            raise UserError(
                f"{self.path}: of another run: its {name} is {found.get(name)}, expected {self.identity.get(name)}{others}; "
                "choose another folder, or delete the file to start anew"
            )
        return state


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A hash over names, types, shapes and values, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
