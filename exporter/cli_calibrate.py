"""The command `calibrate`: quantise an exported model and measure what that costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from export_vq.errors import CheckFailed
from export_vq.terminal import Steps, console, mib, plain


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--precision",
    type=click.Choice(["fp16", "bf16", "int8", "fp8", "w8", "int4"]),
    required=True,
    help="fp16, bf16: all, but for what overflows. int8, fp8: weights and activations. w8, int4: weights alone.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="UTF-8 text, or a folder of .txt files, like what the model will meet.",
)
@click.option("--feeds", type=click.Path(path_type=Path), help="Instead of a text: .npz with input_ids [N, S].")
@click.option(
    "--held-out",
    type=click.Path(path_type=Path),
    help="Text to test on.  [default: an eighth of the documents of --text]",
)
@click.option(
    "--method",
    type=click.Choice(["max", "percentile", "entropy", "mse"]),
    default="mse",
    show_default=True,
    help="How the range of an activation is chosen.",
)
@click.option("--samples", type=click.IntRange(1), default=32, show_default=True, help="Blocks to calibrate on.")
@click.option(
    "--width",
    type=click.IntRange(2),
    default=256,
    show_default=True,
    help="Tokens a block, at most: no more than the model has positions.",
)
@click.option("--test-tokens", type=click.IntRange(1), default=4096, show_default=True, help="Positions to test on.")
@click.option(
    "--block",
    type=click.Choice(["32", "64", "128"]),
    default="32",
    show_default=True,
    help="Weights that share a scale (int4, and w8 for ONNX Runtime).",
)
@click.option(
    "--runtime",
    type=click.Choice(["onnxruntime", "tensorrt"]),
    default="onnxruntime",
    show_default=True,
    help="What int8, w8 and int4 are for: uint8 inputs and MatMulNBits, or int8 inputs and DequantizeLinear.",
)
@click.option(
    "--keep-in-fp16",
    "keep",
    default="",
    metavar="auto:N|NAMES",
    help="Leave layers in the type of the graph: the N most sensitive, or names with commas (model.layers.0 or down_proj for all of these).",
)
@click.option(
    "--keep-in-int8",
    "eight",
    default="",
    metavar="auto:N|NAMES",
    help="Give layers 8 bits where --precision is int4, said in the same way.",
)
@click.option(
    "--rounding",
    type=click.Choice(["gptq", "nearest"]),
    default="gptq",
    show_default=True,
    help="How weights become 4 bits: so that results on the text change least, or each to the nearest.",
)
@click.option(
    "--head",
    type=click.Choice(["keep", "quantise"]),
    default="keep",
    show_default=True,
    help="Whether the VQ head's codebook is quantised too (int8, fp8).",
)
@click.option("--smooth", type=float, default=0.5, show_default=True, help="SmoothQuant's alpha (int8); 0 for none.")
@click.option("--sensitivity", is_flag=True, help="Measure what every layer costs alone, as auto:N does anyway.")
@click.option(
    "--limit",
    type=click.FloatRange(0),
    help="Allowed relative increase of perplexity.  [default: 0.05 for int4, 0.01 for the others]",
)
@click.option("--threads", type=click.IntRange(0), default=0, help="Threads of ONNX Runtime; 0 lets it choose.")
@click.option("--json", "as_json", is_flag=True, help="Print the full report.")
def calibrate(folder: Path, head: str, block: str, as_json: bool, **chosen: Any) -> None:
    """Quantise the model in FOLDER, into FOLDER/PRECISION. Exit code 1 when that costs more than is allowed.

    It is tested on documents that it was not calibrated on. Ranges that were counted stay in FOLDER/ranges and are used
    again, for other precisions and methods too; a run that was stopped goes on when repeated.
    """
    from export_vq.calibrated import refresh_report
    from export_vq.calibration import CalibrationOptions
    from export_vq.calibration import calibrate as quantised
    from export_vq.manifest import FILE as MANIFEST
    from export_vq.manifest import seal

    options = CalibrationOptions(**chosen, block=int(block), quantise_head=head == "quantise")
    report = quantised(folder, options, Steps())
    seal(folder / options.precision)
    if refresh_report(folder):
        console.print(f"report: {folder / 'report.html'}")
    if (folder / MANIFEST).is_file():
        seal(folder)
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=1))
    else:
        total = report.total
        click.echo(
            f"{folder / report.precision / report.path}: {report.quantised} layers in {report.precision}, {len(report.kept)} kept as "
            f"they are, {mib(report.num_bytes)} against {mib(report.source_bytes)}"
        )
        click.echo(
            f"{'PASS' if report else 'FAIL'}  perplexity {total.perplexity_candidate:.4f} against "
            f"{total.perplexity_reference:.4f} ({report.perplexity_increase:+.2%}), mean KL {total.kl_mean:.5f} nats, same best "
            f"token at {total.top1_agreement:.2%} of {total.positions} positions of {report.documents[1]} held-out documents"
        )
        for cost in report.sensitivity[:8]:
            click.echo(f"  {cost.kl:.6f} nats  {cost.name}{', kept' if cost.kept else ''}")
        for note in report.notes:
            console.print(f"note: {plain(Exception(note))}", soft_wrap=True)
    if not report:
        raise CheckFailed("; ".join(report.failures))
