"""A small output layer and hidden states that are easy to reason about, for every test of clustering and tuning."""

from __future__ import annotations

import torch
from torch import Tensor

from export_vq.compress.statistics import OutputLayer, Statistics
from export_vq.head import VQHead


def problem(
    v: int = 300, d: int = 16, n: int = 600, seed: int = 0, scale: float = 0.5, softcap: float | None = None
) -> tuple[OutputLayer, Statistics]:
    """A random layer, and hidden states with a mean and very unequal directions."""
    random = torch.Generator().manual_seed(seed)
    weight = scale * torch.randn(v, d, generator=random)
    mixing = torch.randn(d, d, generator=random) * torch.logspace(0, -1, d)
    hidden = torch.randn(n, d, generator=random) @ mixing.T + torch.randn(d, generator=random)
    layer = OutputLayer(weight, softcap=softcap)
    return layer, Statistics.of(layer, hidden)


def mean_kl(layer: OutputLayer, head: VQHead, hidden: Tensor) -> float:
    """KL(dense || head), float64, over all positions."""
    with torch.no_grad():
        p = layer.capped(torch.nn.functional.linear(hidden, layer.weight, layer.bias)).double().log_softmax(-1)
        q = layer.capped(head(hidden)).double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
