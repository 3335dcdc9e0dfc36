"""The commands that make VQ-Logits models: out of ordinary ones, and better ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from export_vq.terminal import Steps


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    required=True,
    help="UTF-8 text, or a folder of .txt files, like what the model will meet.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("model.pt"),
    show_default=True,
    help="model.pt, or a folder for Hugging Face form.",
)
@click.option(
    "--kind",
    type=click.Choice(["product", "single", "additive"]),
    default="product",
    show_default=True,
    help="Head kind.",
)
@click.option(
    "--num-codebooks",
    type=click.IntRange(1),
    help="M: code ids a token; default: the largest divisor of hidden_size up to a quarter of it, 8 for additive.",
)
@click.option("--num-codes", type=click.IntRange(1, 65536), help="K, codes per codebook; default: 256, 512 for single.")
@click.option(
    "--assign",
    type=click.Choice(["random", "contiguous", "frequency", "kmeans", "weighted", "activation", "private"]),
    default="private",
    show_default=True,
    help="Map of a single head that tuning starts from.",
)
@click.option("--balanced", is_flag=True, help="Single heads: no code has more than its share of tokens.")
@click.option("--bias/--no-bias", default=True, show_default=True, help="A bias per token.")
@click.option("--rotation/--no-rotation", default=True, show_default=True, help="Product heads: rotated coordinates.")
@click.option(
    "--calibration-tokens",
    type=click.IntRange(256),
    default=131072,
    show_default=True,
    help="How much of the text to run through the model.",
)
@click.option(
    "--tune-tokens",
    type=click.IntRange(0),
    default=393216,
    show_default=True,
    help="Positions that tuning looks at, the same ones several times where the text is shorter; 0: no tuning.",
)
@click.option(
    "--keep-tokens",
    metavar="N|script:NAME|FILE",
    help="Trim the vocabulary first: the N most frequent tokens of the text, those of a script such as script:latin, or "
    "those that a file lists.",
)
@click.option("--tie-embedding", is_flag=True, help="Read the input embedding from the head: smaller on disk.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of clustering and tuning.")
def compress(model: Path, text: Path, output: Path, **chosen: Any) -> None:
    """Make a VQ-Logits model out of MODEL, a causal language model as a Hugging Face folder or a GGUF file."""
    from export_vq.compress import CompressOptions
    from export_vq.steps import compress_step

    spec = compress_step(model, text, output, CompressOptions(**chosen), Steps())
    click.echo(
        f"{output}: {spec.kind} head, M={spec.num_codebooks}, K={spec.num_codes}, {spec.head_bytes() / 2**20:.1f} MiB in fp16, "
        f"{spec.head_bytes() / spec.dense_bytes():.1%} of the dense head's {spec.dense_bytes() / 2**20:.1f} MiB"
    )


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--teacher",
    type=click.Path(path_type=Path),
    required=True,
    help="The dense original, as a folder or GGUF file.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    required=True,
    help="UTF-8 text, or a folder of .txt files, to tune on; a sixteenth of it is held out to judge by.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("tuned.pt"), show_default=True, help="The result."
)
@click.option(
    "--parts",
    type=click.Choice(["last-layers", "lora", "all"]),
    default="last-layers",
    show_default=True,
    help="What is tuned besides the head.",
)
@click.option("--last-layers", type=click.IntRange(0), default=2, show_default=True, help="Decoder layers to tune.")
@click.option("--lora-rank", type=click.IntRange(1), default=16, show_default=True, help="Rank of LoRA's additions.")
@click.option("--steps", type=click.IntRange(1), default=300, show_default=True, help="Optimiser steps.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Blocks of 256 tokens a step.")
@click.option("--learning-rate", type=float, default=1e-4, show_default=True, help="Of the backbone.")
@click.option("--head-learning-rate", type=float, default=1e-3, show_default=True, help="Of the head.")
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "bf16"]),
    default="fp32",
    show_default=True,
    help="bf16: products in bfloat16, for GPUs and CPUs that have units for it.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the order of the text.")
def tune(model: Path, teacher: Path, text: Path, output: Path, **chosen: Any) -> None:
    """Tune the VQ-Logits MODEL end to end towards its dense original; a run that was stopped goes on when repeated.

    Several GPUs: accelerate launch -m export_vq.cli tune ...
    """
    from export_vq.steps import tune_step
    from export_vq.tuning.options import FinetuneOptions

    options = FinetuneOptions(**chosen, micro_batch_size=min(8, chosen["batch_size"]))
    report = tune_step(model, teacher, text, output, options, Steps())
    click.echo(
        f"{output}: perplexity {report.perplexity_before:.2f} -> {report.perplexity_after:.2f} on the held-out part, "
        f"{report.trained_numbers:,} numbers trained on {report.tokens:,} tokens"
    )
