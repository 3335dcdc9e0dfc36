"""The VQ-Logits head in plain torch: the one definition of the answer.

A token v owns M code ids `codes[v, m] in [0, K)`. From the hidden state h the head computes code logits `s [.., M, K]`,
and the logit of v is

    y[v] = sum_m s[m, codes[v, m]] + bias[v]

Kinds differ only in how s comes from h (single: arXiv 2505.10202; product: product quantisation, optionally in rotated
coordinates; additive: additive quantisation, AQLM, arXiv 2401.06118):

    single    codebook [1, K, D]      s = h C^T
    product   codebook [M, K, D/M]    s[m] = (h R)[m-th slice] C[m]^T        rotation R [D, D] optional
    additive  codebook [M, K, D]      s[m] = h C[m]^T
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export_vq.records import HeadSpec

ROWS = 256
"""Rows that the op takes together: the tables of so many fit a CPU's last cache, at M * K up to 100,000."""
_TOKENS_AT_ONCE = 2048
"""Rows of the dense twin that are summed in float64 at a time: what they take does not show beside the matrix itself."""


def gather_scatter(code_logits: Tensor, codes: Tensor, bias: Tensor | None = None) -> Tensor:
    """The op `VQGatherScatter` (contract.py) in torch.

    Args:
        code_logits: T [.., M*K].
        codes: integer [V, M], ids in [0, K).
        bias: T [V] or None.

    Returns:
        T [.., V]. Sums accumulate in float32 (float64 for float64 input) and are rounded to T once.
    """
    m = codes.shape[1]
    lead, k = code_logits.shape[:-1], code_logits.shape[-1] // m
    rows = code_logits.reshape(lead.numel(), m * k).to(_accumulator(code_logits.dtype))
    # All rows of one table entry lie together, so that a token's sum is M additions of contiguous vectors.
    entries = codes.to(torch.int32) + k * torch.arange(m, dtype=torch.int32, device=codes.device)  # [V, M]
    logits = torch.cat([_sums(part, entries) for part in rows.split(ROWS)])  # [rows, V]
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    return logits.to(code_logits.dtype).reshape(*lead, codes.shape[0])


def _sums(rows: Tensor, entries: Tensor) -> Tensor:
    """Table rows [n, M*K], entries [V, M] into them -> sums [n, V]."""
    n = rows.shape[0]
    if n == 0:
        return rows.new_empty(0, entries.shape[0])
    # A few zero rows more: torch takes vectors of one float twenty times slower than vectors of eight.
    padded = F.pad(rows, (0, 0, 0, -n % 8))
    return F.embedding_bag(entries, padded.T.contiguous(), mode="sum").T[:n]


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class VQHead(nn.Module):
    """An output layer of M codebooks with K codes each; stands where `nn.Linear(D, V)` stood.

    Attributes:
        spec: sizes and kind.
        codebook: parameter [M, K, D] or [M, K, D/M].
        codes: buffer int32 [V, M].
        bias: parameter [V] or None.
        rotation: parameter [D, D] or None.
    """

    codebook: nn.Parameter
    codes: Tensor
    bias: nn.Parameter | None
    rotation: nn.Parameter | None

    def __init__(self, spec: HeadSpec, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.spec = spec
        self.codebook = nn.Parameter(torch.zeros(spec.codebook_shape, dtype=dtype))
        self.register_buffer("codes", torch.zeros(spec.vocab_size, spec.num_codebooks, dtype=torch.int32))
        self.bias = nn.Parameter(torch.zeros(spec.vocab_size, dtype=dtype)) if spec.has_bias else None
        d = spec.hidden_size
        self.rotation = nn.Parameter(torch.eye(d, dtype=dtype)) if spec.has_rotation else None

    @classmethod
    def from_tensors(
        cls,
        kind: str,
        codebook: Tensor,
        codes: Tensor,
        bias: Tensor | None = None,
        rotation: Tensor | None = None,
    ) -> VQHead:
        """A head around existing tensors; shapes as in the class docstring, trusted to be valid (load.py validates)."""
        m, k, width = codebook.shape
        spec = HeadSpec(
            kind=kind,
            hidden_size=m * width if kind == "product" else width,
            vocab_size=codes.shape[0],
            num_codebooks=m,
            num_codes=k,
            has_bias=bias is not None,
            has_rotation=rotation is not None,
        )
        head = cls(spec, codebook.dtype)
        with torch.no_grad():
            head.codebook.copy_(codebook)
            head.codes.copy_(codes)
            if head.bias is not None and bias is not None:
                head.bias.copy_(bias)
            if head.rotation is not None and rotation is not None:
                head.rotation.copy_(rotation)
        return head

    @property
    def tensors(self) -> dict[str, Any]:
        """What `from_tensors` takes to make an equal head; the tensors are shared and carry no gradient."""
        parameters = {"codebook": self.codebook, "bias": self.bias, "rotation": self.rotation}
        plain = {name: None if value is None else value.detach() for name, value in parameters.items()}
        return {"kind": self.spec.kind, "codes": self.codes, **plain}

    @property
    def weight(self) -> Tensor:
        """The codebook, under the name by which callers ask an output layer for its dtype and device."""
        return self.codebook

    @property
    def dead_codes(self) -> int:
        """How many of the M * K codes no token uses."""
        used = sum(len(ids.unique()) for ids in self.codes.T)
        return self.spec.num_codebooks * self.spec.num_codes - used

    def code_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [.., D] -> code logits [.., M*K], in the head's dtype."""
        m, k, width = self.spec.codebook_shape
        if self.spec.kind != "product":
            return hidden @ self.codebook.reshape(m * k, width).T  # [.., M*K]
        if self.rotation is not None:
            hidden = hidden @ self.rotation  # [.., D]
        slices = hidden.reshape(-1, m, width).transpose(0, 1)  # [M, rows, D/M]
        scores = slices @ self.codebook.transpose(1, 2)  # [M, rows, K]
        return scores.transpose(0, 1).reshape(*hidden.shape[:-1], m * k)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [.., D] -> logits [.., V]."""
        return gather_scatter(self.code_logits(hidden), self.codes, self.bias)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [..] -> the dense twin's rows [.., D], in the head's dtype; gradients reach codebook and rotation."""
        return self._vectors(self.codes[tokens], torch.float64).to(self.codebook.dtype)

    @torch.no_grad()
    def token_vectors(self, tokens: Tensor | slice = slice(None), dtype: torch.dtype = torch.float64) -> Tensor:
        """Rows of the dense twin's weight for some tokens: [n, D] in `dtype`, summed in `dtype`, without gradient."""
        return self._vectors(self.codes[tokens], dtype)

    def _vectors(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Code ids [.., M] -> the vectors [.., D] that they stand for, summed in `dtype`."""
        m, k, width = self.spec.codebook_shape
        entries = codes + k * torch.arange(m, dtype=codes.dtype, device=codes.device)  # [.., M]
        table = self.codebook.reshape(m * k, width).to(dtype)
        if self.spec.kind == "additive":
            rows = F.embedding_bag(entries.reshape(-1, m), table, mode="sum")
            return rows.reshape(*codes.shape[:-1], width)
        rows = F.embedding(entries, table).flatten(-2)
        # y = (h R) . c = h . (R c): the twin's rows are turned back by R.
        return rows if self.rotation is None else rows @ self.rotation.to(dtype).T

    def dense_twin(self) -> nn.Linear:
        """The ordinary full-softmax layer that is the same function, in the head's dtype (rows summed in float64)."""
        spec = self.spec
        twin = nn.Linear(spec.hidden_size, spec.vocab_size, bias=spec.has_bias, dtype=self.codebook.dtype)
        with torch.no_grad():
            for rows in torch.arange(spec.vocab_size).split(_TOKENS_AT_ONCE):
                twin.weight[rows] = self.token_vectors(rows).to(twin.weight.dtype)
            if self.bias is not None:
                twin.bias.copy_(self.bias)
        return twin


def oracle_logits(head: VQHead, hidden: Tensor) -> Tensor:
    """The answer in float64, by the dense route that shares no step with the code route.

    Args:
        hidden: [.., D].

    Returns:
        float64 [.., V].
    """
    rows = hidden.double()
    parts = [
        rows @ head.token_vectors(tokens).T for tokens in torch.arange(head.spec.vocab_size).split(_TOKENS_AT_ONCE)
    ]
    logits = torch.cat(parts, dim=-1)
    return logits if head.bias is None else logits + head.bias.detach().double()
