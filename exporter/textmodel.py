"""An output folder as the main job writes it, opened for writing text: graph, tokenizer, ends of text.

A graph with V logits is run as the one that gives the best tokens of the last position (top_k_graph.py), where it has
the head's node for that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from export_vq.checkpoint import read_json, tokenizer_files
from export_vq.decoding import DecodingOptions
from export_vq.errors import UserError
from export_vq.feeds import Closing
from export_vq.files import is_inside
from export_vq.forms import read_graph
from export_vq.generate import TokenEvent, stream
from export_vq.records import OnnxArtifact
from export_vq.runners import OrtRunner, signature_of
from export_vq.staging import settle
from export_vq.top_k_graph import end_in_top_k
from export_vq.validate import check_tokenizer, mapping, shown


class TextModel(Closing):
    """Text in, text out. The tokenizer is read from tokenizer.json alone: nothing is fetched, and no code of it runs.

    Attributes:
        runner: the graph that it writes with.
        eos_ids: tokens that end a text.
    """

    def __init__(self, folder: Path, threads: int = 0) -> None:
        """Args: holds model.onnx with its record, config.json, tokenizer.json; intra-op threads (0: the runtime's choice).

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
        self._positions = config.get("max_position_embeddings") or config.get("n_positions")
        if self._positions is not None and type(self._positions) is not int:
            raise UserError(
                f"{folder}/config.json: the number of positions is {shown(self._positions)}, expected a whole number; correct it"
            )
        self._vocab_size = artifact.spec.vocab_size
        self._tokenizer = Tokenizer.from_str(text)
        self.runner = _runner(folder, artifact, threads)

    def write(self, prompt: str, options: DecodingOptions) -> Iterator[TokenEvent]:
        """Go on from a prompt. Text ends at the model's own ends too, and where its positions do ('length').

        Raises:
            UserError: the prompt has no tokens, tokens that the model lacks, or leaves no position to write in; an
                option cannot be used.
        """
        ids: list[int] = self._tokenizer.encode(prompt).ids
        unknown = [token for token in ids if token >= self._vocab_size]
        if unknown:
            name = self._tokenizer.id_to_token(unknown[0])
            raise UserError(
                f"the prompt holds the token {name!r} with id {unknown[0]}, expected ids below {self._vocab_size}; "
                "remove it from the prompt"
            )
        room = options.max_new_tokens if self._positions is None else self._positions - len(ids)
        if room < 1:
            raise UserError(
                f"the prompt has {len(ids)} tokens, expected fewer than the model's {self._positions} positions; shorten it"
            )
        options = dataclasses.replace(
            options,
            eos_ids=options.eos_ids | self.eos_ids,
            max_new_tokens=min(options.max_new_tokens, room),
        )
        return stream(self.runner, [ids], options, self.decode)

    def decode(self, ids: Any) -> str:
        """Token ids -> text, without special tokens."""
        return str(self._tokenizer.decode(list(ids)))

    def close(self) -> None:
        self.runner.close()


def _runner(folder: Path, artifact: OnnxArtifact, threads: int) -> OrtRunner:
    """The graph that generation runs."""
    file, signature = folder / artifact.path, signature_of(artifact)
    graph = read_graph(file)
    output = end_in_top_k(graph, artifact)
    if output is None:
        return OrtRunner(file, signature, threads=threads, bundle=folder, fuse_quantised=artifact.fusible)
    signature = dataclasses.replace(signature, output=output.word, top_k=output.top_k, last_token=output.last_token)
    return OrtRunner(file, signature, threads=threads, bundle=folder, edited=graph, fuse_quantised=artifact.fusible)


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
