"""Tuning a head towards the dense layer's distribution on cached hidden states; the backbone does not run, codes stay.

The loss is KL(dense || head) over the whole vocabulary. V logits a position are not needed for its gradient: the
`FREQUENT` most probable tokens are always there, and of the others `DRAWN` are drawn anew in every step and stand for all
of them, each counted 1 / (chance of being drawn) times in both distributions (sampled softmax with importance weights,
Bengio and Senecal 2008; here the teacher is sampled with the student, so the gradient is 0 where the two agree).

What is tuned: codebooks, bias, and the rotation through a factor (1 + A) behind it. Adam moves every number by about its
step size, needed or not, so steps are a fixed part of the error that is there to mend: sqrt(2 KL) is the standard
deviation of the logit errors, to second order. A head that is nearly right would be shaken by larger ones.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from export_vq.compress.statistics import OutputLayer, Statistics, quick_matmul
from export_vq.head import VQHead
from export_vq.resume import RunFolder

FREQUENT = 8192
DRAWN = 4096
BATCH = 2048
CODEBOOK_RATE = 0.018
"""Of codebooks: times their root mean square, times the error."""
BIAS_RATE = 0.0055
ROTATION_RATE = 0.0003
WARM_UP = 5
HOLD_OUT_EVERY = 16
"""Of every so many runs of `RUN` positions one is held out."""
RUN = 256
HELD_OUT = 4096
"""Held-out positions that are measured on."""
CHECKS = 8
"""How often the held-out positions are measured."""
PATIENCE = 4
"""Measurements in a row without a new best that end the run. Less would not do: while steps are large, the KL may rise."""
SAVE_SECONDS = 30.0


@dataclass(frozen=True)
class Tuned:
    """A tuned head and the mean KL to the dense layer, in nats, on held-out positions: before, and of this head."""

    head: VQHead
    before: float
    after: float


def tune_head(
    head: VQHead,
    layer: OutputLayer,
    stats: Statistics,
    *,
    positions: int,
    seed: int = 0,
    tell: Callable[[str, float], None] = lambda _step, _fraction: None,
    keep: RunFolder | None = None,
) -> Tuned:
    """Adam with a falling step over cached hidden states, several times where they are fewer than `positions`.

    Args:
        head: any kind; left alone.
        layer: the dense output layer.
        stats: hidden states of the text, and which tokens are probable there.
        positions: how many to show altogether.
        seed: of the order of positions and the draw of tokens. Same input and machine: the same head.
        tell: called with what is done, the KL with it, and the fraction.
        keep: where the state is kept, at least every half a minute; a run that finds its state there goes on from it.

    Returns:
        The head of the best measurement on the held-out positions: never worse than the given one there.
    """
    with quick_matmul():
        return _Run(head, layer, stats, positions, seed).go(tell, keep)


class _Run:
    """The state of one tuning run."""

    def __init__(self, head: VQHead, layer: OutputLayer, stats: Statistics, positions: int, seed: int) -> None:
        self.layer, self.stats, self.start = layer, stats, head
        self.student = _Student(head)
        out = torch.arange(len(stats.hidden)) // RUN % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1
        if not bool(out.any()) or bool(out.all()):  # too short a text to keep a part of it apart
            out = torch.zeros(len(stats.hidden), dtype=torch.bool)
            out[-max(1, len(out) // HOLD_OUT_EVERY) :] = True
        held = out.nonzero()[:, 0]
        self.held = held[torch.linspace(0, len(held) - 1, min(HELD_OUT, len(held))).long()]
        self.rows = (~out).nonzero()[:, 0] if not bool(out.all()) else held
        self.steps = max(1, positions // BATCH)
        self.check_every = max(1, self.steps // CHECKS)
        order = stats.probability.argsort(descending=True, stable=True)
        self.frequent, self.others = order[:FREQUENT], order[FREQUENT:]
        self.random = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.int64)
        self.step = 0
        self.worse = 0
        self.before = self.lowest = self._measure()
        self.best = {name: value.clone() for name, value in self.student.state_dict().items()}
        error = math.sqrt(2 * self.lowest)
        size = float(head.codebook.detach().square().mean().sqrt())
        groups = [
            {"params": [self.student.codebook], "lr": CODEBOOK_RATE * size * error},
            {"params": [p for p in (self.student.bias,) if p is not None], "lr": BIAS_RATE * error},
            {"params": [p for p in (self.student.turn,) if p is not None], "lr": ROTATION_RATE * error},
        ]
        self.optimizer = torch.optim.Adam([group for group in groups if group["params"]], betas=(0.9, 0.98))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda i: min(1.0, (i + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * min(1.0, i / self.steps))),
        )

    def go(self, tell: Callable[[str, float], None], keep: RunFolder | None) -> Tuned:
        found = None if keep is None else keep.load()
        if found is not None:
            self._restore(found)
        saved = time.monotonic()
        while self.step < self.steps and self.worse < PATIENCE:
            tell(f"tune, KL {self.lowest:.4f} (was {self.before:.4f})", self.step / self.steps)
            self._one_step()
            if self.step % self.check_every == 0 or self.step == self.steps:
                self._check()
            if keep is not None and time.monotonic() - saved > SAVE_SECONDS:
                keep.save(self._state())
                saved = time.monotonic()
        tell(f"tune, KL {self.lowest:.4f} (was {self.before:.4f})", 1.0)
        self.student.load_state_dict(self.best)
        return Tuned(self.student.head(self.start), self.before, self.lowest)

    def _one_step(self) -> None:
        if len(self.order) < min(BATCH, len(self.rows)):
            self.order = self.rows[torch.randperm(len(self.rows), generator=self.random)]
        rows, self.order = self.order[:BATCH], self.order[BATCH:]
        tokens, weight = self._draw()
        hidden = self.stats.hidden[rows]
        bias = None if self.layer.bias is None else self.layer.bias[tokens]
        with torch.no_grad():
            wanted = nn.functional.linear(hidden, self.layer.weight[tokens], bias)
            wanted = (self.layer.capped(wanted) - self.stats.normaliser[rows, None] + weight).exp_()
        logits = self.layer.capped(self.student(hidden, tokens))
        with torch.no_grad():
            slope = ((logits + weight).softmax(-1) - wanted) / len(rows)
        self.optimizer.zero_grad()
        logits.backward(slope)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1

    def _draw(self) -> tuple[Tensor, Tensor]:
        """Tokens of a step, and ln(1 / chance of being drawn) of each."""
        if len(self.others) <= DRAWN:
            tokens = torch.cat([self.frequent, self.others])
            return tokens, torch.zeros(len(tokens))
        drawn = self.others[torch.randperm(len(self.others), generator=self.random)[:DRAWN]]
        weight = torch.zeros(len(self.frequent) + DRAWN)
        weight[len(self.frequent) :] = math.log(len(self.others) / DRAWN)
        return torch.cat([self.frequent, drawn]), weight

    def _check(self) -> None:
        found = self._measure()
        if found < self.lowest:
            self.lowest, self.worse = found, 0
            self.best = {name: value.clone() for name, value in self.student.state_dict().items()}
        else:
            self.worse += 1

    def _measure(self) -> float:
        """Mean KL over the held-out positions, over all V."""
        everything = torch.arange(len(self.layer.weight))
        total = 0.0
        with torch.no_grad():
            weight = self.student.token_rows(everything)
            for rows in self.held.split(256):
                hidden = self.stats.hidden[rows]
                log_p = self.layer.capped(nn.functional.linear(hidden, self.layer.weight, self.layer.bias)).log_softmax(
                    -1
                )
                turned = nn.functional.linear(self.student.turned(hidden), weight, self.student.bias)
                log_q = self.layer.capped(turned).log_softmax(-1)
                total += float((log_p.exp() * (log_p - log_q)).sum())
        return total / len(self.held)

    def _state(self) -> dict[str, object]:
        return {
            "student": self.student.state_dict(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": self.random.get_state(),
            "order": self.order,
            "numbers": [self.step, self.worse, self.before, self.lowest],
        }

    def _restore(self, state: dict[str, object]) -> None:
        self.student.load_state_dict(state["student"])  # type: ignore[arg-type]
        self.best = state["best"]  # type: ignore[assignment]
        self.optimizer.load_state_dict(state["optimizer"])  # type: ignore[arg-type]
        self.schedule.load_state_dict(state["schedule"])  # type: ignore[arg-type]
        self.random.set_state(state["random"])  # type: ignore[arg-type]
        self.order = state["order"]  # type: ignore[assignment]
        self.step, self.worse, self.before, self.lowest = state["numbers"]  # type: ignore[misc]


class _Student(nn.Module):
    """A head whose logits can be had for some tokens only, with its rotation as a fixed matrix times (1 + turn)."""

    def __init__(self, head: VQHead) -> None:
        super().__init__()
        self.kind, (self.m, self.k, self.width) = head.spec.kind, head.spec.codebook_shape
        self.codebook = nn.Parameter(head.codebook.detach().clone())
        self.bias = None if head.bias is None else nn.Parameter(head.bias.detach().clone())
        self.entries = head.codes.long() + self.k * torch.arange(self.m)  # [V, M]
        self.rotation = None if head.rotation is None else head.rotation.detach()
        self.turn = None if head.rotation is None else nn.Parameter(torch.zeros_like(head.rotation))

    def token_rows(self, tokens: Tensor) -> Tensor:
        """[n, D] in the coordinates of the codebooks."""
        table = self.codebook.reshape(self.m * self.k, self.width)
        picked = table.index_select(0, self.entries[tokens].flatten()).reshape(len(tokens), self.m, self.width)
        return picked.flatten(1) if self.kind == "product" else picked.sum(1)

    def turned(self, hidden: Tensor) -> Tensor:
        """Hidden states [n, D] in the coordinates of the codebooks."""
        if self.rotation is None or self.turn is None:
            return hidden
        hidden = hidden @ self.rotation
        return hidden + hidden @ self.turn

    def forward(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Logits of some tokens: [n, tokens]."""
        bias = None if self.bias is None else self.bias[tokens]
        return nn.functional.linear(self.turned(hidden), self.token_rows(tokens), bias)

    def head(self, like: VQHead) -> VQHead:
        rotation = self.rotation
        if rotation is not None and self.turn is not None:
            rotation = rotation @ (torch.eye(len(rotation)) + self.turn.detach())
        bias = None if self.bias is None else self.bias.detach()
        return VQHead.from_tensors(self.kind, self.codebook.detach(), like.codes, bias, rotation)
