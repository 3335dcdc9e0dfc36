"""Small models for decoding tests: the same function as `logits`, `topk` and `sample` graphs, and a dense reference."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence, Set

import numpy as np
import torch
from torch import Tensor, nn

from export_vq import codespace
from export_vq.decoding import DecodingOptions
from export_vq.feeds import Feeds, HeadTables, Signature
from export_vq.head import VQHead, gather_scatter
from export_vq.load import LoadedModel
from export_vq.runners import TorchRunner


def head_tables(codes: Tensor, bias: Tensor | None) -> HeadTables:
    return HeadTables(codes.to(torch.int32).numpy(), None if bias is None else bias.detach().float().numpy())


def head_outputs(code_logits: Tensor, codes: Tensor, bias: Tensor | None, kind: str, k: int = 1) -> Feeds:
    """Outputs of a graph for code_logits [B, S, M*K]: kind 'logits', or 'topk' with its k best."""
    if kind == "logits":
        return {"logits": gather_scatter(code_logits, codes, bias).numpy()}
    found = codespace.top_k(code_logits, codes, bias, k)
    return {
        "values": found.values.float().numpy(),
        "ids": found.ids.numpy(),
        "logsumexp": found.logsumexp.float().numpy(),
        "code_logits": code_logits.numpy(),
    }


class TableRunner:
    """A language model without a backbone: the code logits depend on the last token alone, by a table [V, M*K]."""

    def __init__(
        self, table: Tensor, codes: Tensor, bias: Tensor | None, kind: str, k: int = 1, last_token: bool = True
    ) -> None:
        self.name = f"table as {kind}"
        self.signature = Signature((), False, output=kind, last_token=last_token)
        self.head = head_tables(codes, bias)
        self.calls: list[Feeds] = []
        self._table, self._codes, self._bias, self._kind, self._k = table, codes, bias, kind, k

    def infer(self, feeds: Feeds) -> Feeds:
        self.calls.append(feeds)
        code_logits = self._table[torch.from_numpy(feeds["input_ids"][:, -1:])]
        if self._kind != "sample":
            return head_outputs(code_logits, self._codes, self._bias, self._kind, self._k)
        uniform, temperature = torch.from_numpy(feeds["uniform"]), float(feeds["temperature"][0])
        if not self.signature.last_token:
            code_logits = self._table[torch.from_numpy(feeds["input_ids"])]
        assert uniform.shape == code_logits.shape[:-1]
        ids, logprob = codespace.sample(code_logits, self._codes, self._bias, uniform, temperature)
        return {"ids": ids.numpy(), "logprob": logprob.numpy()}


class TopKRunner:
    """A tiny transformer whose graph ends in VQTopK: the stand-in for `--output topk`, KV cache and all."""

    def __init__(self, loaded: LoadedModel, signature: Signature, k: int) -> None:
        assert loaded.head is not None
        bare = copy.copy(loaded)
        object.__setattr__(bare, "model", copy.deepcopy(loaded.model))
        bare.model.set_output_embeddings(_CodeLogits(loaded.head))  # type: ignore[operator]
        self.name = f"PyTorch with the {k} best"
        self.signature = signature
        self.head = head_tables(loaded.head.codes, loaded.head.bias)
        self._runner, self._head, self._k = TorchRunner(bare, signature), loaded.head, k

    def infer(self, feeds: Feeds) -> Feeds:
        outputs = self._runner.infer(feeds)
        code_logits = torch.from_numpy(outputs.pop("logits")[:, -1:])
        bias = None if self._head.bias is None else self._head.bias.detach()
        return outputs | head_outputs(code_logits, self._head.codes, bias, "topk", self._k)


class _CodeLogits(nn.Module):
    def __init__(self, head: VQHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head.code_logits(hidden)


def distribution(
    logits: Sequence[float],
    options: DecodingOptions,
    seen: Set[int],
    top_p: float | None = None,
    min_p: float | None = None,
) -> list[tuple[int, float]]:
    """(token, probability) of all tokens that may be drawn, best first: the definitions, in plain float64 Python.

    `top_p` and `min_p` replace those of the options. At temperature 0 the best token has probability 1.
    """
    top_p, min_p = options.top_p if top_p is None else top_p, options.min_p if min_p is None else min_p
    y = corrected(logits, options.logit_bias, options.repetition_penalty, seen)
    order = sorted(range(len(y)), key=lambda v: (-y[v], v))
    if options.temperature == 0:
        return [(order[0], 1.0)]
    if options.top_k:
        order = order[: options.top_k]
    best = y[order[0]]
    share = _shares([math.exp((y[v] - best) / options.temperature) for v in order])
    if top_p < 1:
        stay = next((n for n in range(1, len(order) + 1) if math.fsum(share[:n]) >= top_p), len(order))
        order, share = order[:stay], _shares(share[:stay])
    stay = sum(p >= min_p * share[0] for p in share)
    return list(zip(order[:stay], _shares(share[:stay]), strict=True))


def corrected(logits: Sequence[float], logit_bias: Mapping[int, float], penalty: float, seen: Set[int]) -> list[float]:
    """logit_bias, then repetition_penalty."""
    y = [value + logit_bias.get(v, 0.0) for v, value in enumerate(logits)]
    return [(value * penalty if value < 0 else value / penalty) if v in seen else value for v, value in enumerate(y)]


def _shares(weights: Sequence[float]) -> list[float]:
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def allowed(
    logits: Sequence[float], options: DecodingOptions, seen: Set[int], uniform: float, slack: float
) -> set[int]:
    """The tokens that a draw may give where every probability is known to `slack`: one, unless a boundary is that near."""
    tokens = set()
    for top_p in {options.top_p - slack, options.top_p, min(options.top_p + slack, 1)} if options.top_p < 1 else {1.0}:
        for min_p in {options.min_p * (1 - slack), options.min_p * (1 + slack)}:
            low = 0.0
            for token, share in distribution(logits, options, seen, top_p, min_p):
                if share > 0 and low - slack <= uniform < low + share + slack:
                    tokens.add(token)
                low += share
    return tokens


def numbers(random: torch.Generator, *shape: int, integers: bool) -> Tensor:
    """Normal float32 numbers of a few units, or small integers, of which many are equal and all sums exact."""
    if integers:
        return torch.randint(-2, 3, shape, generator=random).float()
    return 2 * torch.randn(shape, generator=random)


def empty_ids() -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.zeros(0, np.int64)
