"""What `calibrate` is asked for, and the limits that its results are held to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from export_vq.errors import UserError

HALF = ("fp16", "bf16")
"""Precisions that are a type for everything, with islands of float32."""
PRECISIONS = (*HALF, "int8", "fp8", "w8", "int4")
WITH_RANGES = ("int8", "fp8")
"""Precisions that round activations too; 'w8' and 'int4' round weights alone."""
ROUNDINGS = ("gptq", "nearest")
METHODS = ("max", "percentile", "entropy", "mse")
RUNTIMES = ("onnxruntime", "tensorrt")
BLOCKS = (32, 64, 128)
NARROW_OPSET = 19
"""First opset whose Quantize- and DequantizeLinear know FP8, and scales in float16 and bfloat16."""
BLOCKS_OPSET = 21
"""First opset whose DequantizeLinear takes blocks and int4."""
ALLOWED_INCREASE = {"fp16": 0.01, "bf16": 0.01, "w8": 0.01, "int8": 0.01, "fp8": 0.01, "int4": 0.05}
"""Relative increase of perplexity. 8 and 16 bits are held to 99 % of the reference, as in MLPerf Inference; 4 bits to 95 %."""


@dataclass(frozen=True)
class CalibrationOptions:
    """How to quantise.

    Attributes:
        precision: one of PRECISIONS.
        text: UTF-8 text file or folder; `feeds` instead of it: an .npz file with `input_ids` int64 [N, S].
        held_out: another text to test on; None: an eighth of the documents of `text`.
        method: how a range is chosen from what was seen, one of METHODS.
        samples: blocks of tokens to calibrate on.
        width: tokens a block, at most.
        test_tokens: positions to test on.
        block: weights that share a scale ('int4', and 'w8' for ONNX Runtime), one of BLOCKS.
        rounding: of weights in 4 bits, one of ROUNDINGS: so that results on the calibration text change least, or each to
            the nearest number.
        runtime: what the graph is for, one of RUNTIMES; fp8 is the same for both.
        keep: layers to leave as they are: 'auto:N' for the N most sensitive, or names, with commas, or
            beginnings or ends of names: model.layers.0, down_proj.
        eight: layers that 'int4' gives 8 bits, said as in `keep`.
        quantise_head: also round the codebook of a VQ head, or the matrix of a dense one.
        smooth: SmoothQuant's alpha (int8): how much of the activations' outliers moves into the weights; 0 for none.
        limit: allowed relative increase of perplexity; None: that of ALLOWED_INCREASE.
        sensitivity: measure every layer alone, as 'auto:N' does anyway.
        threads: of ONNX Runtime; 0: its own choice.
    """

    precision: str
    text: Path | None = None
    feeds: Path | None = None
    held_out: Path | None = None
    method: str = "mse"
    samples: int = 32
    width: int = 256
    test_tokens: int = 4096
    block: int = 32
    rounding: str = "gptq"
    runtime: str = "onnxruntime"
    keep: str = ""
    eight: str = ""
    quantise_head: bool = False
    smooth: float = 0.5
    limit: float | None = None
    sensitivity: bool = False
    threads: int = 0

    def __post_init__(self) -> None:
        words = {
            "precision": PRECISIONS,
            "method": METHODS,
            "rounding": ROUNDINGS,
            "runtime": RUNTIMES,
            "block": BLOCKS,
        }
        for name, known in words.items():
            if getattr(self, name) not in known:
                raise UserError(
                    f"--{name} is {getattr(self, name)!r}, expected one of {', '.join(map(str, known))}; correct it"
                )
        if (self.text is None) == (self.feeds is None):
            raise UserError(
                "give what to calibrate on with --text FILE, or token ids with --feeds FILE.npz, one of them"
            )
        if not 0 <= self.smooth < 1:
            raise UserError(f"--smooth is {self.smooth}, expected 0 (none) to below 1; leave it out for 0.5")
        if self.limit is not None and not self.limit >= 0:
            raise UserError(f"--limit is {self.limit}, expected 0 or more; 0.01 allows one percent")
        if self.samples < 1 or self.test_tokens < 1:
            raise UserError("--samples and --test-tokens must be 1 or more")
        if self.precision in HALF and (self.keep or self.sensitivity):
            raise UserError(
                f"--keep-in-fp16 and --sensitivity are for products that are quantised, and {self.precision} is a type for "
                "everything; leave them out"
            )
        if self.eight and self.precision != "int4":
            raise UserError(f"--keep-in-int8 is for int4, the precision is {self.precision}; leave it out")
        _ = self.kept_most_sensitive, self.eight_most_sensitive  # what cannot be read is told now, not after an hour
        if self.quantise_head and self.precision not in WITH_RANGES:
            raise UserError(
                f"--head quantise is for {' and '.join(WITH_RANGES)}: a codebook in {self.precision} has no form that "
                "runtimes know; leave --head out"
            )

    @property
    def kept_most_sensitive(self) -> int:
        """N of `keep`'s 'auto:N', else 0."""
        return _most_sensitive("--keep-in-fp16", self.keep)

    @property
    def eight_most_sensitive(self) -> int:
        """N of `eight`'s 'auto:N', else 0."""
        return _most_sensitive("--keep-in-int8", self.eight)

    @property
    def kept_names(self) -> list[str]:
        """The names in `keep`."""
        return _names(self.keep)

    @property
    def eight_names(self) -> list[str]:
        """The names in `eight`."""
        return _names(self.eight)

    @property
    def alpha(self) -> float:
        """`smooth` where the precision moves outliers, else 0."""
        return self.smooth if self.precision == "int8" else 0.0

    @property
    def blockwise(self) -> bool:
        """Whether `block` counts."""
        return self.precision == "int4" or (self.precision == "w8" and self.runtime == "onnxruntime")

    @property
    def limits(self) -> dict[str, float]:
        """Largest perplexity increase, largest mean KL, smallest share of equal best tokens.

        On text that the reference itself would write, a mean KL of ln(1 + a) is an increase of a: one allowance, put in
        both ways. Two readers whose distributions are that far apart and who share their randomness choose different
        tokens at no more than sqrt(KL / 2) of the positions (Pinsker); greedy ones are held to the same.
        """
        allowed = ALLOWED_INCREASE[self.precision] if self.limit is None else self.limit
        kl = math.log1p(allowed)
        return {"perplexity_increase": allowed, "kl_mean": kl, "top1_agreement": max(0.0, 1 - math.sqrt(kl / 2))}


def _most_sensitive(option: str, said: str) -> int:
    if not said.startswith("auto:"):
        return 0
    number = said.removeprefix("auto:")
    if not number.isdecimal():
        raise UserError(f"{option} is {said!r}, expected auto:N with a number, or names of layers")
    return int(number)


def _names(said: str) -> list[str]:
    return [] if said.startswith("auto:") else [name for name in said.split(",") if name]
