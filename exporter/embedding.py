"""The input embedding of a model whose rows are read from the head's own codes and codebooks.

A tied model has one matrix at both ends. Its VQ twin keeps that: row v of the embedding is row v of the head's dense
twin, so the dense [V, D] matrix is neither on the disk nor in memory.
"""

from __future__ import annotations

from torch import Tensor, nn

from export_vq.head import VQHead


class VQEmbedding(nn.Module):
    """Stands where `nn.Embedding(V, D)` stood; holds no parameters and saves none.

    Attributes:
        head: the model's output layer, whose rows these are. Not a submodule: it is registered, saved and counted under
            its own name only, and a copy of the whole model ties the two copies.
        scale: float [] that every row is multiplied by, or None; not saved.
    """

    head: VQHead
    scale: Tensor | None

    def __init__(self, head: VQHead, scale: Tensor | None = None) -> None:
        super().__init__()
        self.__dict__["head"] = head  # past nn.Module's own assignment, which would register it
        self.register_buffer("scale", scale, persistent=False)

    def rows(self, tokens: Tensor) -> Tensor:
        """Token ids [B, S] -> rows [B, S, D] without the scale."""
        return self.head.embed(tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids int [B, S] -> rows [B, S, D] in the head's dtype; gradients reach its codebook and rotation."""
        rows = self.rows(tokens)
        # Rounded first, as the architecture's own embedding does it.
        return rows if self.scale is None else rows * self.scale.to(rows.dtype)
