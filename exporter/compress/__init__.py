"""Make a VQ-Logits model out of any causal LM: run a text through it, give its output layer codes, tune them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from export_vq import contract
from export_vq.compress.additive import additive_head
from export_vq.compress.assign import METHODS, single_head
from export_vq.compress.mapping import LearnOptions, learn_single
from export_vq.compress.product import product_head
from export_vq.compress.stages import Stages
from export_vq.compress.statistics import OutputLayer, Statistics, hidden_states, quick_matmul, replace_output
from export_vq.compress.tune import tune_head
from export_vq.errors import UserError
from export_vq.head import VQHead
from export_vq.load import LoadedModel, tie_embedding
from export_vq.text import token_blocks
from export_vq.trim import trim_vocabulary

__all__ = ["CompressOptions", "compress_model", "default_num_codebooks", "make_head", "with_head"]

BLOCK = 256
"""Tokens that the model sees together; fewer where its positions end sooner."""
KINDS = ("product", "single", "additive")
NUM_CODES = {"product": 256, "single": 512, "additive": 256}
ADDITIVE_CODEBOOKS = 8

Tell = Callable[[str, float], None]


@dataclass(frozen=True)
class CompressOptions:
    """What to make.

    `kind` is 'product', 'single' or 'additive'; `num_codebooks` is M (None: the largest divisor of hidden_size up to a
    quarter of it for 'product', 8 for 'additive', 1 for 'single'); `num_codes` is K (None: 512 for 'single', else 256).
    `assign` is the map of a single head before it is learned, one of assign.METHODS, and `balanced` limits its codes to
    equally many tokens. `bias` gives every token one; `rotation` is for 'product' only. `seed` fixes clustering and tuning.
    `calibration_tokens` is how much of the text is run through the model, spread evenly, `tune_tokens` how many positions
    tuning looks at (0: no tuning, and no learned map). `keep_tokens` trims the vocabulary first (see trim_vocabulary);
    `tie_embedding` reads the input embedding from the head.
    """

    kind: str = "product"
    num_codebooks: int | None = None
    num_codes: int | None = None
    assign: str = "private"
    balanced: bool = False
    bias: bool = True
    rotation: bool = True
    seed: int = 0
    calibration_tokens: int = 131072
    tune_tokens: int = 393216
    keep_tokens: str | None = None
    tie_embedding: bool = False


def compress_model(
    dense: LoadedModel,
    text: str,
    options: CompressOptions | None = None,
    progress: Tell | None = None,
    *,
    unfinished: Path | None = None,
) -> LoadedModel:
    """Replace the output layer of an ordinary causal LM by a VQ head, calibrated and tuned on a text.

    The given model is left alone. The new one has its own copy of the backbone, the input embedding included, which stays
    dense unless it is tied; both fit in memory together, or drop the first afterwards. Same input, options and machine:
    the same tensors.

    Args:
        dense: from `load_dense`, with a tokenizer.
        text: like what the model will meet: a few ten thousand tokens, at least one block of 256.
        options: what to make; the defaults where None.
        progress: called with the step's name and the fraction done, 0 to 1.
        unfinished: a folder for what is done so far, so that a run that was stopped goes on from there; removed in the
            end. It must belong to this input and these options alone.

    Returns:
        A model ready to run and for `save_model`, equal to what `load_model` then reads.

    Raises:
        UserError: the model has a VQ head already, the options do not fit it, or the text is too short.
    """
    options = options or CompressOptions()
    tell = progress or (lambda _step, _fraction: None)
    if dense.head is not None:
        raise UserError(
            f"{dense.source}: this model has a VQ-Logits head already, an ordinary output layer was expected; "
            "give the model that it was made from"
        )
    if options.keep_tokens is not None:
        tell("trim", 0.0)
        dense = trim_vocabulary(dense, options.keep_tokens, text).model
    layer = OutputLayer.of(dense)
    _check(dense.source, options, *layer.weight.shape)
    stages = Stages(unfinished)
    hidden = stages.tensor("hidden", lambda: _hidden(dense, text, options, len(layer.weight), tell))
    with quick_matmul():
        stats = Statistics.of(layer, hidden, lambda part: tell("calibrate", 0.7 + 0.3 * part))
    head = make_head(layer, stats, options, tell, stages)
    model = with_head(dense, head)
    stages.done()
    return tie_embedding(model) if options.tie_embedding else model


def make_head(
    layer: OutputLayer,
    stats: Statistics,
    options: CompressOptions,
    tell: Tell = lambda _step, _fraction: None,
    stages: Stages | None = None,
) -> VQHead:
    """The head alone, from an output layer and what a text says of it: clustered, then tuned where the options say so.

    Args:
        layer: the dense output layer, weight [V, D].
        stats: of the text.
        options: checked against the layer; `keep_tokens`, `tie_embedding` and `calibration_tokens` do not count here.
        tell: called with the step's name and the fraction done.
        stages: where a stopped run goes on from.
    """
    stages = stages or Stages(None)
    m, k = _sizes(options, layer.weight.shape[1])
    seed, bias = options.seed, options.bias

    def clustering(part: float) -> None:
        tell("cluster", part)

    def clustered() -> VQHead:
        if options.kind == "single":
            method, balanced = options.assign, options.balanced
            return single_head(layer, stats, k, method=method, balanced=balanced, bias=bias, seed=seed)
        if options.kind == "additive":
            return additive_head(layer, stats, m, k, bias=bias, seed=seed, tell=clustering)
        return product_head(layer, stats, m, k, rotate=options.rotation, bias=bias, seed=seed, tell=clustering)

    head = stages.head("cluster", clustered)
    if options.tune_tokens == 0:
        return head
    if options.kind == "single" and bias and layer.softcap is None:
        return learn_single(head, layer, stats, LearnOptions(seed=seed), tell, stages.run("map"))
    return tune_head(
        head, layer, stats, positions=options.tune_tokens, seed=seed, tell=tell, keep=stages.run("tune")
    ).head


def default_num_codebooks(hidden_size: int) -> int:
    """The largest divisor of hidden_size up to a quarter of it: about two bits a weight at K = 256."""
    return max(m for m in range(1, max(hidden_size // 4, 1) + 1) if hidden_size % m == 0)


def _hidden(dense: LoadedModel, text: str, options: CompressOptions, vocab_size: int, tell: Tell) -> Tensor:
    block = min(BLOCK, dense.max_positions)
    tell("tokenise", 0.0)
    count = max(1, options.calibration_tokens // block)
    blocks = token_blocks(dense.tokenizer(), text, block, count, vocab_size=vocab_size)
    tell("tokenise", 1.0)
    with quick_matmul():
        return hidden_states(dense, blocks, lambda part: tell("calibrate", 0.7 * part))


def _sizes(options: CompressOptions, d: int) -> tuple[int, int]:
    """(M, K) with the defaults filled in."""
    k = options.num_codes if options.num_codes is not None else NUM_CODES[options.kind]
    if options.num_codebooks is not None:
        return options.num_codebooks, k
    return {"single": 1, "additive": ADDITIVE_CODEBOOKS, "product": default_num_codebooks(d)}[options.kind], k


def _check(source: str, options: CompressOptions, v: int, d: int) -> None:
    """Hold the options against the model."""
    kind = options.kind
    if kind not in KINDS:
        raise UserError(f"--kind is {kind!r}, expected one of {', '.join(KINDS)}")
    m, k = _sizes(options, d)
    if not 1 <= k <= v:
        raise UserError(f"--num-codes is {k}, expected 1 to {v}, the vocabulary of {source}; give a smaller number")
    for name, least in (("calibration_tokens", 1), ("tune_tokens", 0)):
        if getattr(options, name) < least:
            found = getattr(options, name)
            raise UserError(f"--{name.replace('_', '-')} is {found}, expected {least} or more; give a larger number")
    if options.assign not in METHODS:
        raise UserError(f"--assign is {options.assign!r}, expected one of {', '.join(METHODS)}")
    if kind == "single" and m != 1:
        raise UserError(f"--num-codebooks is {m}, expected 1 for --kind single; leave it out, or take --kind product")
    if m < 1:
        raise UserError(f"--num-codebooks is {m}, expected 1 or more; give a larger number")
    if kind == "product" and d % m:
        near = [n for n in range(1, d + 1) if d % n == 0]
        raise UserError(
            f"--num-codebooks is {m}, expected a divisor of {d}, the hidden size of {source}; "
            f"the nearest is {min(near, key=lambda n: (abs(n - m), n))}"
        )


def with_head(dense: LoadedModel, head: VQHead) -> LoadedModel:
    """The same model with another head, as `load_model` would build it."""
    model = replace_output(dense.model, head, share=False)
    model.set_attn_implementation("eager")
    return dataclasses.replace(
        dense, model=model.eval(), head=head, config={**dense.config, contract.CONFIG_SECTION: head.spec.section}
    )
