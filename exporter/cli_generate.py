"""The command `generate`: text from an exported model, as it comes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click


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
@click.option("--prompt", required=True, help="Text to go on from.")
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
    prompt: str,
    temperature: float | None,
    threads: int,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Go on from a prompt with the model in FOLDER, as export-vq MODEL -o FOLDER writes it.

    A graph that gives logits is run with the 50 best tokens of the last position in their place, which writes the same
    text without building logits of the whole vocabulary for every position.
    """
    from export_vq.decoding import DecodingOptions
    from export_vq.textmodel import TextModel

    if temperature is None:
        is_drawn = chosen["seed"] is not None or chosen["top_k"] or chosen["top_p"] != 1 or chosen["min_p"]
        temperature = 1.0 if is_drawn else 0.0
    options = DecodingOptions(temperature=temperature, **chosen)
    with TextModel(folder, threads) as model:
        events = []
        for event in model.write(prompt, options):
            events.append(event)
            if not as_json:
                click.echo(event.text, nl=False)
    if not as_json:
        click.echo()
        return
    tokens = [{name: value for name, value in asdict(event).items() if name != "request"} for event in events]
    text = "".join(event.text for event in events)
    result = {"prompt": prompt, "text": text, "finish_reason": events[-1].finish_reason, "tokens": tokens}
    click.echo(json.dumps(result, indent=1))
