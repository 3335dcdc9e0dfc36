"""The command `generate`: text from an exported model, as it comes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from export_vq.errors import UserError
from export_vq.pace import Pace
from export_vq.prompts import Prompt, read_prompts
from export_vq.terminal import console

if TYPE_CHECKING:
    from export_vq.decoding import DecodingOptions
    from export_vq.generate import TokenEvent
    from export_vq.textmodel import TextModel


def _token_biases(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[int, float]:
    """ID=ADDITION, as in 50256=-inf."""
    biases = {}
    for value in values:
        token, _, addition = value.partition("=")
        try:
            biases[int(token)] = float(addition)
        except ValueError:
            raise click.BadParameter(f"{value!r} is not a token id, '=' and a number, as in 50256=-inf") from None
    return biases


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--prompt", help="Text to go on from; with an instruct model the message that it answers.")
@click.option(
    "--prompts",
    "file",
    type=click.Path(path_type=Path),
    help="Many prompts: a file with one a line, or .jsonl with an object a line (prompt, id). Prints JSON, a line for each.",
)
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Of --prompts, run at once.")
@click.option("--raw", is_flag=True, help="The prompt as it is, without the tokenizer's chat template.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "tensorrt", "cuda", "cpu"]),
    default="auto",
    show_default=True,
    help="What runs the model; auto: the first of them that works here.",
)
@click.option("--max-new-tokens", type=int, default=128, show_default=True, help="The most tokens to write.")
@click.option(
    "--temperature",
    type=float,
    help="Divides the logits; 0: greedy.  [default: 1 with a seed or a filter such as --top-p, else 0]",
)
@click.option("--top-k", type=int, default=0, show_default=True, help="Draw from the k best tokens; 0: from all.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Draw from the best tokens that sum to this.")
@click.option(
    "--min-p",
    type=float,
    default=0.0,
    show_default=True,
    help="Draw from tokens at least this times as probable as the best.",
)
@click.option(
    "--repetition-penalty",
    type=float,
    default=1.0,
    show_default=True,
    help="Divides the positive logits of all tokens seen, multiplies the negative ones.",
)
@click.option(
    "--logit-bias",
    metavar="ID=ADDITION",
    multiple=True,
    callback=_token_biases,
    help="Added to a token's logit; -inf forbids it; repeat for more.",
)
@click.option(
    "--logprobs",
    type=int,
    help="With --json: log-probabilities of each token and of the N best, the model's own before all of the above.",
)
@click.option("--seed", type=int, help="Of the draws: the same seed writes the same text.  [default: a fresh one]")
@click.option("--stop", multiple=True, help="End before this text; repeat for more.")
@click.option("--threads", type=click.IntRange(0), default=0, help="ONNX Runtime's threads; 0: its own choice.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: text, tokens, log-probabilities, reason of the end.")
def generate(
    folder: Path,
    prompt: str | None,
    file: Path | None,
    batch_size: int,
    raw: bool,
    backend: str,
    temperature: float | None,
    threads: int,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Go on from a prompt with the model in FOLDER, as export-vq MODEL -o FOLDER writes it.

    A tokenizer with a chat template has the prompt answered as a user's message; --raw leaves the template out. In ONNX
    Runtime a graph that gives logits is run with the 50 best tokens of the last position in their place, which writes the
    same text without building logits of the whole vocabulary for every position. Standard output is only the text; how
    fast it came, and from what, is said on standard error.
    """
    from export_vq.decoding import DecodingOptions
    from export_vq.textmodel import TextModel

    if (prompt is None) == (file is None):
        raise UserError("give what to go on from with --prompt TEXT or --prompts FILE, one of them")
    if temperature is None:
        is_drawn = chosen["seed"] is not None or chosen["top_k"] or chosen["top_p"] != 1 or chosen["min_p"]
        temperature = 1.0 if is_drawn else 0.0
    options = DecodingOptions(temperature=temperature, **chosen)
    prompts = read_prompts(file) if file is not None else []
    with TextModel(folder, threads, backend) as model:
        if prompt is not None:
            ids = model.encode(prompt, raw=raw)
            _timed(model, lambda pace: _one(model, pace, prompt, ids, options, as_json))
        else:
            encoded = [model.encode(p.text, raw=raw, where=p.where) for p in prompts]
            _timed(model, lambda pace: _many(model, pace, prompts, encoded, options, batch_size, as_json))


def _timed(model: TextModel, write: Callable[[Pace], None]) -> None:
    """Write, and say how fast it went; Ctrl-C ends the text where it is."""
    pace, stopped = Pace(), False
    try:
        write(pace)
    except KeyboardInterrupt:
        stopped = True
    console.print(f"{pace}; {model.runner.name}", soft_wrap=True, markup=False)
    if stopped:
        sys.exit(130)


def _one(model: TextModel, pace: Pace, prompt: str, ids: list[int], options: DecodingOptions, as_json: bool) -> None:
    events = []
    try:
        for event in pace.watch(model.write_batch([ids], options)):
            events.append(event)
            if not as_json:
                click.echo(event.text, nl=False)
    finally:
        if not as_json and events:
            click.echo()
    if as_json:
        click.echo(json.dumps({"prompt": prompt, **_told(events), "tokens": _tokens(events)}, indent=1))


def _many(
    model: TextModel,
    pace: Pace,
    prompts: list[Prompt],
    encoded: list[list[int]],
    options: DecodingOptions,
    batch_size: int,
    as_json: bool,
) -> None:
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        events: list[list[TokenEvent]] = [[] for _ in prompts[batch]]
        for event in pace.watch(model.write_batch(encoded[batch], options)):
            events[event.request].append(event)
        for prompt, its in zip(prompts[batch], events, strict=True):
            tokens = {"tokens": _tokens(its)} if as_json else {}
            click.echo(json.dumps({"id": prompt.id, "prompt": prompt.text, **_told(its), **tokens}))


def _told(events: list[TokenEvent]) -> dict[str, Any]:
    return {"text": "".join(event.text for event in events), "finish_reason": events[-1].finish_reason}


def _tokens(events: list[TokenEvent]) -> list[dict[str, Any]]:
    return [{name: value for name, value in asdict(event).items() if name != "request"} for event in events]
