"""Make a VQ-Logits model out of any causal LM: run a text through it, cluster its output layer, put the head in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from export_vq import contract
from export_vq.compress.assign import product_head, single_head
from export_vq.compress.statistics import OutputLayer, collect, replace_output
from export_vq.errors import UserError
from export_vq.head import VQHead
from export_vq.load import LoadedModel
from export_vq.text import token_blocks

__all__ = ["CompressOptions", "compress_model", "default_num_codebooks"]

BLOCK = 256
"""Tokens that the model sees together; fewer where its positions end sooner."""
SAMPLE = 4096
"""Calibration positions at which V logits are built, for token probabilities and the bias."""


@dataclass(frozen=True)
class CompressOptions:
    """What to make.

    `kind` is 'product' or 'single'; `num_codebooks` is M of a product head (None: the largest divisor of hidden_size up
    to a quarter of it) and 1 for 'single'; `num_codes` K; `bias` gives every token one; `rotation` is for 'product' only;
    `seed` fixes the clustering; `calibration_tokens` is how much of the text is run through the model, spread evenly.
    """

    kind: str = "product"
    num_codebooks: int | None = None
    num_codes: int = 256
    bias: bool = True
    rotation: bool = True
    seed: int = 0
    calibration_tokens: int = 32768


def compress_model(
    dense: LoadedModel,
    text: str,
    options: CompressOptions | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> LoadedModel:
    """Replace the output layer of an ordinary causal LM by a VQ head, calibrated on a text.

    The given model is left alone. The new one has its own copy of the backbone, the input embedding included, which stays
    dense; both fit in memory together, or drop the first afterwards. Same input, options and machine: the same tensors.

    Args:
        dense: from `load_dense`, with a tokenizer.
        text: like what the model will meet: a few ten thousand tokens, at least one block of 256.
        options: what to make; the defaults where None.
        progress: called with the step's name and the fraction done, 0 to 1.

    Returns:
        A model ready to run and for `save_model`, equal to what `load_model` then reads.

    Raises:
        UserError: the model has a VQ head already, the options do not fit it, or the text is too short.
    """
    options = options or CompressOptions()
    tell = progress or (lambda _step, _fraction: None)
    layer = _output_layer(dense)
    num_codebooks = _check(dense, options, *layer.weight.shape)
    block = min(BLOCK, dense.max_positions)
    tell("tokenise", 0.0)
    blocks = token_blocks(
        dense.tokenizer(), text, block, max(1, options.calibration_tokens // block), vocab_size=len(layer.weight)
    )
    tell("tokenise", 1.0)
    stats = collect(dense, blocks, SAMPLE, lambda part: tell("calibrate", part))

    def clustering(part: float) -> None:
        tell("cluster", part)

    if options.kind == "single":
        head = single_head(layer, stats, options.num_codes, bias=options.bias, seed=options.seed, tell=clustering)
    else:
        head = product_head(
            layer,
            stats,
            num_codebooks,
            options.num_codes,
            rotate=options.rotation,
            bias=options.bias,
            seed=options.seed,
            tell=clustering,
        )
    return _with_head(dense, head)


def default_num_codebooks(hidden_size: int) -> int:
    """The largest divisor of hidden_size up to a quarter of it: about two bits a weight at K = 256."""
    return max(m for m in range(1, max(hidden_size // 4, 1) + 1) if hidden_size % m == 0)


def _output_layer(dense: LoadedModel) -> OutputLayer:
    if dense.head is not None:
        raise UserError(
            f"{dense.source}: this model has a VQ-Logits head already, an ordinary output layer was expected; "
            "give the model that it was made from"
        )
    return OutputLayer.of(dense)


def _check(dense: LoadedModel, options: CompressOptions, v: int, d: int) -> int:
    """Hold the options against the model; returns M."""
    source, kind = dense.source, options.kind
    if kind not in ("product", "single"):
        raise UserError(f"--kind is {kind!r}, expected product or single; compress makes these two")
    if not 1 <= options.num_codes <= v:
        raise UserError(
            f"--num-codes is {options.num_codes}, expected 1 to {v}, the vocabulary of {source}; give a smaller number"
        )
    if options.calibration_tokens < 1:
        raise UserError(f"calibration_tokens is {options.calibration_tokens}, expected 1 or more; give a larger number")
    if kind == "single":
        if options.num_codebooks not in (None, 1):
            raise UserError(
                f"--num-codebooks is {options.num_codebooks}, expected 1 for --kind single; leave it out, or take --kind product"
            )
        return 1
    m = options.num_codebooks if options.num_codebooks is not None else default_num_codebooks(d)
    if m < 1 or d % m:
        near = [n for n in range(1, d + 1) if d % n == 0]
        raise UserError(
            f"--num-codebooks is {m}, expected a divisor of {d}, the hidden size of {source}; "
            f"the nearest is {min(near, key=lambda n: (abs(n - m), n))}"
        )
    return m


def _with_head(dense: LoadedModel, head: VQHead) -> LoadedModel:
    """The same model with another head, as `load_model` would build it."""
    model = replace_output(dense.model, head, share=False)
    # The head is untied by nature: the input embedding, tied in the original, is a parameter of its own.
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    model.set_attn_implementation("eager")
    spec = head.spec
    section = {name: getattr(spec, name) for name in ("kind", "num_codebooks", "num_codes", "has_bias", "has_rotation")}
    return dataclasses.replace(
        dense, model=model.eval(), head=head, config={**dense.config, contract.CONFIG_SECTION: section}
    )
