"""The chat template of a tokenizer: a user's message becomes the prompt that an instruct model was trained on."""

from __future__ import annotations

from pathlib import Path

from export_vq.checkpoint import read_json
from export_vq.errors import UserError
from export_vq.validate import first_line

_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


def has_template(folder: Path) -> bool:
    """Whether the tokenizer in a folder has a chat template: a file of its own, or in tokenizer_config.json."""
    if (folder / _TEMPLATE).is_file():
        return True
    return (folder / _CONFIG).is_file() and bool(read_json(folder / _CONFIG).get("chat_template"))


class ChatTemplate:
    """Rendered by transformers in Jinja's sandbox; no code of the folder runs, and nothing is fetched."""

    def __init__(self, folder: Path) -> None:
        """Args: holds tokenizer.json and the template.

        Raises:
            UserError: they cannot be read.
        """
        from transformers import PreTrainedTokenizerFast

        self._folder = folder
        try:
            self._tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the library raises anything on damaged files
            raise self._unusable(error) from error

    def user_turn(self, message: str) -> str:
        """A conversation that begins with this message, up to where the model answers, special tokens written out.

        Raises:
            UserError: the template cannot be rendered.
        """
        turns = [{"role": "user", "content": message}]
        try:
            return str(self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # templates are programs, and raise anything
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> UserError:
        return UserError(
            f"{self._folder}: the tokenizer's chat template cannot be used ({first_line(error)}); give the prompt as it is "
            "with --raw"
        )
