"""Prompts from a file: one a line, or JSON lines where a prompt has lines of its own or a name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from export_vq.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """A prompt, its `id` (the file's, else the number of its line from 1), and where it stands, for messages."""

    id: str | int
    text: str
    where: str


def read_prompts(path: Path) -> list[Prompt]:
    """Read a UTF-8 file; empty lines are left out.

    Args:
        path: `.jsonl`: an object a line, with `prompt` and, where wanted, `id`; anything else: a prompt a line.

    Raises:
        UserError: it cannot be read, holds no prompt, or a line is no such object.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a file of prompts with --prompts") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it first") from error
    parse = _from_json if path.suffix == ".jsonl" else _from_line
    prompts = [parse(path, i, line.rstrip("\r")) for i, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise UserError(f"{path}: holds no prompt, expected one a line; write some")
    return prompts


def _from_line(path: Path, number: int, line: str) -> Prompt:
    return Prompt(number, line, f"{path} line {number}")


def _from_json(path: Path, number: int, line: str) -> Prompt:
    try:
        data = json.loads(line)
        prompt = data["prompt"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f'{path} line {number}: not a JSON object with a prompt ({type(error).__name__}), expected {{"prompt": "..."}}; '
            "correct the line"
        ) from error
    name = data.get("id", number)
    if not isinstance(prompt, str) or not isinstance(name, (str, int)) or isinstance(name, bool):
        raise UserError(
            f"{path} line {number}: prompt is a {type(prompt).__name__} and id a {type(name).__name__}, expected a text and a "
            "text or a whole number; correct the line"
        )
    return Prompt(name, prompt, f"{path} line {number}")
