"""The quality report: a dense model, its rivals in integers and any VQ heads on held-out texts, and what they write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from export_vq.compress.statistics import OutputLayer, hidden_states
from export_vq.errors import UserError
from export_vq.head import VQHead
from export_vq.load import LoadedModel
from export_vq.quality.judge import HeldOut, Rival, measure_heads
from export_vq.records import QualityReport, Sample

RIVALS = {"INT8, one scale a row": Rival(8), "INT4, groups of 64": Rival(4, 64)}


def quality_report(
    dense: LoadedModel,
    candidates: Mapping[str, VQHead | LoadedModel],
    texts: Mapping[str, Tensor],
    *,
    progress: Callable[[str, float], None] = lambda _step, _fraction: None,
) -> QualityReport:
    """Measure the dense model, its output layer in INT8 and INT4, and every candidate.

    A head among the candidates is judged on the dense model's own hidden states, for which the backbone runs once. A
    model runs its own backbone; an ordinary model is allowed, as the control that was tuned in the same way.

    Args:
        dense: an ordinary model, the reference.
        candidates: name -> head or model, over the same vocabulary.
        texts: text name -> token blocks int64 [N, S], one S for all, N >= 1 and S >= 2, that nothing was fitted to.
        progress: called with the step's name and the fraction done, 0 to 1.

    Returns:
        `heads` in this order: 'dense', the rivals of RIVALS, the candidates. How a head was made and how fast it is are
        not known here: fill `method`, `seed` and `head_ms` with dataclasses.replace.

    Raises:
        UserError: `dense` has a VQ head, a candidate has another vocabulary, a name is taken, texts do not fit, or
            ONNX Runtime, which quantises the rivals, is not installed.
    """
    if dense.head is not None:
        raise UserError(
            f"{dense.source}: this model has a VQ-Logits head, the ordinary model that it came from was expected"
        )
    layer = OutputLayer.of(dense)
    heads: dict[str, VQHead | Rival | OutputLayer] = {"dense": layer, **RIVALS}
    block = _check(dense, candidates, texts, len(layer.weight), taken=heads)
    models = {name: found for name, found in candidates.items() if isinstance(found, LoadedModel)}
    runs = {"dense": dense, **models}
    hidden: dict[str, dict[str, Tensor]] = {}
    for i, (name, model) in enumerate(runs.items()):
        hidden[name] = {}
        for j, (text, blocks) in enumerate(texts.items()):
            hidden[name][text] = hidden_states(model, blocks).unflatten(0, blocks.shape)
            progress("backbone", (i + (j + 1) / len(texts)) / len(runs))
    for name, found in candidates.items():
        heads[name] = found if isinstance(found, VQHead) else found.head or OutputLayer.of(found)
    held_out = {text: HeldOut(blocks, hidden["dense"][text]) for text, blocks in texts.items()}
    own = {name: hidden[name] for name in models}
    records = measure_heads(layer, held_out, heads, own_hidden=own, tell=lambda part: progress("heads", part))
    return QualityReport(dense=Path(dense.source).name, block=block, heads=records)


def continuations(models: Mapping[str, LoadedModel], prompts: Sequence[str], tokens: int = 40) -> tuple[Sample, ...]:
    """What each model writes after each prompt, greedily through the KV cache, for reading side by side.

    Args:
        models: name -> model, all with the first one's tokenizer and end of text.
        prompts: each at least one token long.
        tokens: at most so many; fewer where the model ends the text.

    Raises:
        UserError: the first model has no tokenizer, or a prompt leaves no position to write in.
    """
    from transformers import GenerationConfig

    first = next(iter(models.values()))
    tokenizer = first.tokenizer()
    end: int | list[int] | None = first.model.generation_config.eos_token_id  # type: ignore[union-attr,assignment]
    ends = end if isinstance(end, list) else [] if end is None else [end]
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0
    )
    samples = []
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"].long()
        room = first.max_positions - tokens
        if not 1 <= ids.shape[1] <= room:
            raise UserError(f"the prompt {prompt!r} has {ids.shape[1]} tokens, expected 1 to {room}; give another one")
        texts = {}
        for name, loaded in models.items():
            with torch.no_grad():
                written = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)  # type: ignore[operator]
            texts[name] = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        samples.append(Sample(prompt, texts))
    return tuple(samples)


def _check(
    dense: LoadedModel,
    candidates: Mapping[str, VQHead | LoadedModel],
    texts: Mapping[str, Tensor],
    v: int,
    taken: Mapping[str, object],
) -> int:
    """Hold everything against the dense model before hours are spent; returns S."""
    for name, found in candidates.items():
        if name in taken:
            raise UserError(f"a candidate is named {name!r}, which the report uses itself; give it another name")
        own = found.spec.vocab_size if isinstance(found, VQHead) else int(found.config["vocab_size"])
        if own != v:
            raise UserError(
                f"{name}: vocab_size is {own}, expected {v} as in {dense.source}; judge heads of the same model"
            )
        if isinstance(found, VQHead) and found.spec.hidden_size != OutputLayer.of(dense).weight.shape[1]:
            raise UserError(
                f"{name}: hidden_size is {found.spec.hidden_size}, expected {OutputLayer.of(dense).weight.shape[1]} "
                f"as in {dense.source}; judge heads of the same model"
            )
    widths = {blocks.shape[1] for blocks in texts.values()}
    if len(widths) != 1 or min(widths) < 2 or not all(len(blocks) for blocks in texts.values()):
        shapes = ", ".join(f"{name} {list(blocks.shape)}" for name, blocks in texts.items()) or "none"
        raise UserError(
            f"texts: found blocks of {shapes}, expected at least one block of two tokens each, all of one width"
        )
    for name, blocks in texts.items():
        if not 0 <= int(blocks.min()) <= int(blocks.max()) < v:
            raise UserError(
                f"{name}: found a token id of {int(blocks.max())}, expected ids from 0 to {v - 1}; use the model's own tokenizer"
            )
    return widths.pop()
