"""The bias of a VQ head: what of its error one number per token can take away.

E_h[KL(p || p_hat)] is convex in b and smallest where the mean probabilities agree for every token. Generalised
iterative scaling (Darroch and Ratcliff 1972), b[v] += ln(mean p[v] / mean p_hat[v]), goes there, each step downhill. For
tokens that share all codes it gives their shares in one step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from export_vq.compress.statistics import OutputLayer, Statistics
from export_vq.head import VQHead

BIAS_STEPS = 3
SAMPLE = 4096
"""Positions that a bias is fitted on."""
ROWS = 256
"""Positions whose V logits are held together: 50 MB at V = 49152."""


def with_bias(head: VQHead, layer: OutputLayer, stats: Statistics) -> VQHead:
    """The same head with a bias float32 [V]: first so that no logit is wrong on average, then so that mean probabilities agree."""
    twin = head.token_vectors(dtype=torch.float32)
    start = mean_error_bias(layer, twin, stats.mean)
    bias = matched_bias(layer, twin, start, stats.hidden[stats.sample(SAMPLE)])
    return VQHead.from_tensors(**{**head.tensors, "bias": bias})


def mean_error_bias(layer: OutputLayer, twin: Tensor, mean: Tensor) -> Tensor:
    """b[v] = mean . (W[v] - W_hat[v]) (+ the dense bias), float32 [V]: no logit is wrong on average."""
    bias = (layer.weight - twin) @ mean.to(twin.dtype)
    return bias if layer.bias is None else bias + layer.bias


def matched_bias(layer: OutputLayer, twin: Tensor, bias: Tensor, sample: Tensor) -> Tensor:
    """Move a bias [V] towards equal mean probabilities of both layers over the sample [n, D], token by token."""
    wanted = torch.zeros(len(bias), dtype=torch.float64)
    for step in range(BIAS_STEPS):
        found = torch.zeros_like(wanted)
        for rows in sample.split(ROWS):
            if step == 0:
                wanted += layer.probabilities(rows).sum(0)
            found += layer.softmax(torch.nn.functional.linear(rows, twin, bias)).sum(0)
        # One thousandth of a token on both sides: what hardly ever occurs says nothing.
        bias = bias + ((wanted + 1e-3) / (found + 1e-3)).log().float()
    return bias
