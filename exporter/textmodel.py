"""An output folder as the main job writes it, opened for writing text: graph, tokenizer, chat template, ends of text.

In ONNX Runtime a graph with V logits is run as the one that gives the best tokens of the last position (top_k_graph.py),
where it has the head's node for that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from export_vq.backends import AUTO, longest_sequence, open_runner
from export_vq.chat import ChatTemplate, has_template
from export_vq.checkpoint import positions_of, read_json, tokenizer_files
from export_vq.decoding import DecodingOptions
from export_vq.errors import UserError
from export_vq.feeds import Closing
from export_vq.files import is_inside
from export_vq.generate import TokenEvent, stream
from export_vq.records import OnnxArtifact
from export_vq.staging import settle
from export_vq.validate import check_tokenizer, mapping, shown


class TextModel(Closing):
    """Text in, text out. The tokenizer is read from tokenizer.json alone: nothing is fetched, and no code of it runs.

    Attributes:
        runner: the graph that it writes with.
        eos_ids: tokens that end a text.
        has_template: whether prompts are messages in a chat, as the tokenizer's template writes it.
    """

    def __init__(self, folder: Path, threads: int = 0, backend: str = AUTO) -> None:
        """Args: holds model.onnx with its record, config.json, tokenizer.json; intra-op threads (0: the runtime's choice);
        what runs it, see backends.py.

        Raises:
            UserError: a file is missing or damaged, or this machine cannot run the graph.
        """
        from tokenizers import Tokenizer

        settle(folder)
        for name in ("model.onnx", "model.onnx.json", "config.json", "tokenizer.json"):
            if not (folder / name).is_file():
                raise UserError(
                    f"{folder}: holds no {name}, expected a folder with model.onnx, config.json and tokenizer.json; "
                    f"make one with: export-vq MODEL -o {folder}"
                )
        artifact = OnnxArtifact.load(folder / "model.onnx.json")
        if not is_inside(artifact.path):
            raise UserError(
                f"{folder}/model.onnx.json: its path is {artifact.path!r}, expected a file of the same folder; export it again"
            )
        text = tokenizer_files(folder)["tokenizer.json"]
        check_tokenizer(folder, artifact.spec.vocab_size, {"tokenizer.json": text})
        config = _read_dict(folder / "config.json")
        self.eos_ids = _eos_ids(folder, config)
        self._positions = positions_of(config)
        if self._positions is not None and type(self._positions) is not int:
            raise UserError(
                f"{folder}/config.json: the number of positions is {shown(self._positions)}, expected a whole number; correct it"
            )
        self._vocab_size = artifact.spec.vocab_size
        self._tokenizer = Tokenizer.from_str(text)
        self._folder = folder
        self.has_template = has_template(folder)
        self.runner = open_runner(folder, artifact, backend, threads)
        self._longest = longest_sequence(self.runner)

    def encode(self, prompt: str, *, raw: bool = False, where: str = "the prompt") -> list[int]:
        """A prompt as token ids: the user's message of a chat where the tokenizer has a template, else the text as it is.

        Args:
            prompt: any text.
            raw: leave the template out.
            where: what the sentence of an error calls the prompt.

        Raises:
            UserError: it has no tokens, tokens that the model lacks, or leaves no position to write in; the template
                cannot be used.
        """
        templated = self.has_template and not raw
        text = self._template.user_turn(prompt) if templated else prompt
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=not templated).ids
        if not ids:
            raise UserError(f"{where} is empty, expected at least one token; give a text to go on from")
        unknown = [token for token in ids if token >= self._vocab_size]
        if unknown:
            name = self._tokenizer.id_to_token(unknown[0])
            raise UserError(
                f"{where} holds the token {name!r} with id {unknown[0]}, expected ids below {self._vocab_size}; remove it "
                "from the prompt"
            )
        for holder, most in (("model", self._positions), ("engine", self._longest)):
            if most is not None and len(ids) >= most:
                raise UserError(
                    f"{where} has {len(ids)} tokens, expected fewer than the {holder}'s {most} positions; shorten it"
                )
        return ids

    def write(self, prompt: str, options: DecodingOptions, *, raw: bool = False) -> Iterator[TokenEvent]:
        """Go on from one prompt; see `encode` and `write_batch`."""
        return self.write_batch([self.encode(prompt, raw=raw)], options)

    def write_batch(self, prompts: Sequence[list[int]], options: DecodingOptions) -> Iterator[TokenEvent]:
        """Go on from several prompts at once, token ids as `encode` gives them.

        Texts end at the model's own ends too, and where its positions do ('length').

        Raises:
            UserError: an option cannot be used, or the graph cannot do what it asks.
        """
        widest = max(map(len, prompts), default=0)
        each = []
        for ids in prompts:
            # The model counts a row's own tokens, an engine the padding too.
            room = [self._positions - len(ids)] if self._positions is not None else []
            room += [self._longest - widest] if self._longest is not None else []
            most = min([options.max_new_tokens, *room])
            each.append(dataclasses.replace(options, eos_ids=options.eos_ids | self.eos_ids, max_new_tokens=most))
        return stream(self.runner, prompts, each, self.decode)

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self._folder)

    def decode(self, ids: Any) -> str:
        """Token ids -> text, without special tokens."""
        return str(self._tokenizer.decode(list(ids)))

    def close(self) -> None:
        self.runner.close()


def _eos_ids(folder: Path, config: dict[str, Any]) -> frozenset[int]:
    """The tokens that end a text: generation_config.json's where it names any, else config.json's."""
    file = folder / "generation_config.json"
    found = _read_dict(file).get("eos_token_id") if file.is_file() else None
    if found is None:
        found = config.get("eos_token_id")
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if any(type(token) is not int for token in ids):
        raise UserError(f"{folder}: eos_token_id is {shown(found)}, expected token ids; correct the config")
    return frozenset(ids)


def _read_dict(file: Path) -> dict[str, Any]:
    return mapping(file, "(top level)", read_json(file))
