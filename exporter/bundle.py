"""The output folder: where things lie, and which of them are still current.

out/  model.onnx dense.onnx (+ .data), each with its record *.onnx.json
      config.json and the tokenizer's files
      engines/<gpu>-<tensorrt>/  plans, each with its record and its ONNX file
      lib/             the native libraries of the machine that wrote it
      report.json report.html
      manifest.json    all of the above with hashes (manifest.py)
      steps/*.json     results of measuring steps, each with the key it was made from: not shipped
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from export_vq.errors import UserError
from export_vq.files import is_inside, sha256, write_text
from export_vq.records import OnnxArtifact, Record

R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Bundle:
    """An output folder, existing or not."""

    folder: Path

    @property
    def report_html(self) -> Path:
        return self.folder / "report.html"

    @property
    def report_json(self) -> Path:
        return self.folder / "report.json"

    def artifact(self, name: str) -> OnnxArtifact | None:
        """The record of `name` ('model.onnx') when the files that it lists are there unchanged; else None."""
        try:
            artifact = OnnxArtifact.load(self.folder / f"{name}.json")
        except UserError:
            return None
        for file, digest in artifact.file_sha256.items():
            path = self.folder / file
            if not is_inside(file) or not path.is_file() or sha256(path) != digest:
                return None
        return artifact

    def remember(self, name: str, key: dict[str, Any], kind: type[R], make: Callable[[], R]) -> tuple[R, bool]:
        """A step's result: the one on disk when it was made from an equal key, else a new one, which is kept.

        Returns:
            the result, and whether it was made now.
        """
        file = self.folder / "steps" / f"{name}.json"
        key = json.loads(json.dumps(key))
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept["key"] == key:
                return kind.from_json(kept["record"]), False
        except (OSError, ValueError, KeyError, TypeError):
            pass  # missing, damaged or of an older layout: made again
        record = make()
        write_text(file, json.dumps({"key": key, "record": record.to_json()}, indent=1) + "\n")
        return record, True
