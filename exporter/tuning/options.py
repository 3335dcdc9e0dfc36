"""What a tuning run is asked for, and what it tells afterwards."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from export_vq.records import Record


@dataclass(frozen=True)
class FinetuneOptions:
    """What to train and how long; the defaults suit a model of 135 M parameters on two CPU cores.

    `parts` is 'last-layers' (the head, the last `last_layers` decoder layers and the final norm; only the head where it
    is 0), 'lora' (the head, and additions of rank `lora_rank` to all linear layers) or 'all'. `steps` counts optimiser
    steps of `batch_size` blocks each, over all processes; a process runs `micro_batch_size` of them at a time.
    `learning_rate` is the backbone's, `head_learning_rate` the head's: both rise over the first steps and then fall along
    a cosine to a tenth. `alpha` is the teacher's share of the loss. Every `eval_every` steps the held-out loss is taken;
    the run ends early after `patience` times without a new best. `dtype` is 'fp32', or 'bf16' for products in bfloat16.
    """

    parts: str = "last-layers"
    last_layers: int = 2
    lora_rank: int = 16
    steps: int = 300
    batch_size: int = 8
    micro_batch_size: int = 8
    learning_rate: float = 1e-4
    head_learning_rate: float = 1e-3
    alpha: float = 0.5
    eval_every: int = 25
    patience: int = 4
    seed: int = 0
    dtype: str = "fp32"


@dataclass(frozen=True)
class CurvePoint(Record):
    """After `step` steps: mean training loss since the point before (None at 0), and the held-out cross-entropy, in nats."""

    step: int
    training_loss: float | None
    held_out_loss: float


@dataclass(frozen=True)
class FinetuneReport(Record):
    """What a tuning run did. `best_step` is the one whose parameters were kept, `trained_numbers` how many there are."""

    options: dict[str, Any]
    curve: tuple[CurvePoint, ...]
    best_step: int
    tokens: int
    trained_numbers: int
    shared_layers: int
    """Frozen layers that student and teacher ran together."""

    @property
    def perplexity_before(self) -> float:
        return math.exp(self.curve[0].held_out_loss)

    @property
    def perplexity_after(self) -> float:
        return math.exp(min(point.held_out_loss for point in self.curve))
