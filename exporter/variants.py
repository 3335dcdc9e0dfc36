"""What `--matrix` asks for: values of a few options, and a variant for each combination of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from export_vq.errors import UserError

EXPORTED = ("fp32", "fp16", "bf16")
QUANTISED = ("int8", "w8", "int4", "fp8")
"""Types that `calibrate` makes of an fp32 graph."""
AXES = {
    "dtype": (*EXPORTED, *QUANTISED),
    "output": ("logits", "topk", "sample"),
    "form": ("portable", "plain"),
}
"""Key -> values, as the options of these names have them."""


@dataclass(frozen=True)
class Variant:
    """One combination: values of AXES, and `last_token` as ExportOptions has it."""

    dtype: str
    output: str
    form: str = "portable"
    last_token: bool = False

    @property
    def name(self) -> str:
        """Of its folder: 'int8-topk', 'fp16-logits-plain'. The same in every matrix, so that each finds its own again."""
        unusual = [self.form] * (self.form != "portable") + ["last"] * self.last_token
        return "-".join([self.dtype, self.output, *unusual])

    @property
    def quantised(self) -> bool:
        return self.dtype in QUANTISED


def parse_matrix(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """`['dtype=fp16,int8', 'output=topk,logits']` -> the values of each key, each once, in the order given.

    Raises:
        UserError: a key or value is unknown, or a key is there twice.
    """
    axes: dict[str, tuple[str, ...]] = {}
    for text in texts:
        key, _, values = text.partition("=")
        if key not in AXES:
            raise UserError(f"--matrix has {text!r}, expected KEY=VALUE,.. with a key of {', '.join(AXES)}; correct it")
        if key in axes:
            raise UserError(f"--matrix has {key} twice, expected it once; put all its values behind one {key}=")
        for value in values.split(","):
            if value not in AXES[key]:
                raise UserError(f"--matrix has {key}={value}, expected one of {', '.join(AXES[key])}; correct it")
        axes[key] = tuple(dict.fromkeys(values.split(",")))
    return axes


def variants(axes: dict[str, tuple[str, ...]], dtype: str, output: str, last_token: bool) -> list[Variant]:
    """Every combination, the last key turning fastest; `dtype` and `output` where the matrix does not say."""
    whole = {"dtype": (dtype,), "output": (output,), **axes}
    combinations = itertools.product(*whole.values())
    return [Variant(**dict(zip(whole, values, strict=True)), last_token=last_token) for values in combinations]
