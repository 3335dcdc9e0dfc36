"""The token loop over any runner."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from export_vq import feeds as fd


def generate(
    runner: fd.Runner, prompt: list[int], max_new_tokens: int, eos_ids: frozenset[int] = frozenset()
) -> Iterator[int]:
    """Greedy decoding: yields token ids as they come, at most `max_new_tokens`, ending before any of `eos_ids`.

    Equal logits give the lower token id.
    """
    ids, mask = fd.left_pad([prompt])
    outputs = runner.infer(fd.prefill(runner.signature, ids, mask))
    for made in range(1, max_new_tokens + 1):
        # A graph that chooses gives the best first; argmax takes the first of equals.
        token = int(outputs["ids"][0, -1, 0] if "ids" in outputs else np.argmax(outputs["logits"][0, -1]))
        if token in eos_ids:
            return
        yield token
        if made < max_new_tokens:
            mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
            outputs = runner.infer(fd.step(runner.signature, np.array([[token]]), mask, outputs))
