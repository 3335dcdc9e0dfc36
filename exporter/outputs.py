"""What a graph gives at its end: V logits, the k best tokens, or one drawn token; which op that is, and its tensors."""

from __future__ import annotations

from typing import Final

from export_vq import contract

OPS: Final = {"logits": contract.GATHER_SCATTER, "topk": contract.TOP_K, "sample": contract.SAMPLE}
"""The word of `--output` -> the op that the head ends in."""
DEFAULT_TOP_K: Final = 50
"""Tokens that a 'topk' graph gives unless told otherwise."""
TENSORS: Final = {
    contract.GATHER_SCATTER: (contract.GATHER_SCATTER_INPUTS, contract.GATHER_SCATTER_OUTPUTS),
    contract.TOP_K: (contract.TOP_K_INPUTS, contract.TOP_K_OUTPUTS),
    contract.SAMPLE: (contract.SAMPLE_INPUTS, contract.SAMPLE_OUTPUTS),
}
"""Names of each op's inputs and outputs, in order."""


def output_of(names: tuple[str, ...]) -> str:
    """The word for a graph with these outputs."""
    return next(word for word, op in OPS.items() if set(TENSORS[op][1]) <= set(names))
