"""The loop of a tuning run: steps, held-out judgements, and its state on disk.

The order of the text follows from the seed and the step alone, so that a run goes on from its saved state as if it had
never stopped: on one machine, bit for bit on the CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from export_vq.errors import UserError
from export_vq.load import LoadedModel
from export_vq.resume import RunFolder
from export_vq.tuning.loss import cross_entropy, last_hidden, mixed_loss, softcap_of
from export_vq.tuning.options import CurvePoint, FinetuneOptions, FinetuneReport
from export_vq.tuning.parts import TrainedParts
from export_vq.tuning.teacher import Teacher

SAVE_SECONDS = 45.0
"""A state is this old at most, and one step: a run that is killed loses less than a minute."""
LONGEST_GRADIENT = 1.0
RISE = 0.05
LAST_RATE = 0.1


class _Objective(nn.Module):
    """Token ids [B, S] -> the loss to go down; a module, so that accelerate can spread it over processes."""

    def __init__(self, model: nn.Module, teacher: Teacher | None, options: FinetuneOptions) -> None:
        super().__init__()
        self.model = model
        self._teacher, self._alpha = teacher, options.alpha
        self._low = options.dtype == "bf16"

    def forward(self, ids: Tensor, with_teacher: bool = True) -> Tensor:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self._low):
            hidden = last_hidden(self.model, ids)[:, :-1]
            output: Any = self.model.get_output_embeddings()  # type: ignore[operator]
            cap = softcap_of(self.model)
            if self._teacher is None or not with_teacher:
                return cross_entropy(output, hidden, ids[:, 1:], softcap=cap)
            theirs = self._teacher.hidden(ids)[:, :-1]
            return mixed_loss(output, hidden, ids[:, 1:], self._teacher.layer, theirs, alpha=self._alpha, softcap=cap)


class FinetuneRun:
    """One run: its optimiser, what it has reached, and the way to disk and back."""

    def __init__(
        self,
        accelerator: Any,
        parts: TrainedParts,
        options: FinetuneOptions,
        blocks: Tensor,
        held_out: Tensor,
        teacher: LoadedModel | None,
        folder: RunFolder,
    ) -> None:
        self.accelerator, self.parts, self.options, self.folder = accelerator, parts, options, folder
        self.blocks, self.held_out = blocks, held_out
        device = accelerator.device
        parts.model.to(device)
        low = torch.bfloat16 if options.dtype == "bf16" else torch.float32
        self.teacher = None if teacher is None or options.alpha == 0 else Teacher(teacher, parts, device, low)
        rates = ((parts.backbone, options.learning_rate), (parts.head, options.head_learning_rate))
        groups = [{"params": params, "lr": rate, "initial_lr": rate} for params, rate in rates if params]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        self.objective, self.optimizer = accelerator.prepare(
            _Objective(parts.model, self.teacher, options).eval(), optimizer
        )
        self.step, self.losses, self.curve = 0, 0.0, list[CurvePoint]()
        self.best: dict[str, Tensor] = {}

    def close(self) -> None:
        if self.teacher is not None:
            self.teacher.close()

    def to_the_end(self, progress: Callable[[str, float], None]) -> FinetuneReport:
        """Train until the last step, or until the held-out loss stops falling; the best parameters are then in place."""
        options = self.options
        self._resume()
        saved = time.monotonic()
        if not self.curve:
            progress("judge", 0.0)
            self._judge(None)
            self._save()
        loss = self.curve[-1].training_loss or self.curve[-1].held_out_loss
        while self.step < options.steps and not self._stalled():
            progress(f"tune, loss {loss:.3f}", self.step / options.steps)
            loss = self._train()
            self.losses += loss
            self.step += 1
            if judged := self.step % options.eval_every == 0 or self.step == options.steps:
                progress("judge", self.step / options.steps)
                since = self.step - self.curve[-1].step
                self._judge(self.losses / since)
                self.losses = 0.0
            if judged or time.monotonic() - saved > SAVE_SECONDS:
                self._save()
                saved = time.monotonic()
        self._put(self.best)
        progress("tune", 1.0)
        return FinetuneReport(
            options=dataclasses.asdict(options),
            curve=tuple(self.curve),
            best_step=self._best_point().step,
            tokens=self.step * options.batch_size * self.blocks.shape[1],
            trained_numbers=sum(p.numel() for p in self.parts.named().values()),
            shared_layers=self.teacher.shared_layers if self.teacher else 0,
        )

    def _train(self) -> float:
        """One optimiser step; the mean loss over the whole batch."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate(self.step, self.options.steps)
        chosen = batch_rows(self.step, self.options.batch_size, len(self.blocks), self.options.seed)
        mine = chosen.chunk(self.accelerator.num_processes)[self.accelerator.process_index]
        micro = mine.split(self.options.micro_batch_size)
        total: Tensor = torch.zeros((), device=self.accelerator.device)
        for i, rows in enumerate(micro):
            last = i == len(micro) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.objective):
                loss = self.objective(self.blocks[rows].to(self.accelerator.device)) / len(micro)
                self.accelerator.backward(loss)
            total += loss.detach()
        self.accelerator.clip_grad_norm_([*self.parts.backbone, *self.parts.head], LONGEST_GRADIENT)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(self.accelerator.reduce(total, "mean"))

    def _judge(self, training_loss: float | None) -> None:
        """Take the held-out loss, each process on its share, and keep the parameters where it is the best so far."""
        share = self.held_out[self.accelerator.process_index :: self.accelerator.num_processes]
        sums = torch.zeros(2, dtype=torch.float64)
        objective = self.accelerator.unwrap_model(self.objective)
        with torch.no_grad():
            for ids in share.split(self.options.micro_batch_size):
                loss = objective(ids.to(self.accelerator.device), with_teacher=False)
                sums += torch.tensor([float(loss) * len(ids), len(ids)], dtype=torch.float64)
        total, count = self.accelerator.reduce(sums.to(self.accelerator.device), "sum").tolist()
        self.curve.append(CurvePoint(self.step, training_loss, total / count))
        if self._best_point() is self.curve[-1]:
            self.best = {name: p.detach().cpu().clone() for name, p in self.parts.named().items()}

    def _best_point(self) -> CurvePoint:
        return min(self.curve, key=lambda point: point.held_out_loss)

    def _stalled(self) -> bool:
        return len(self.curve) - 1 - self.curve.index(self._best_point()) >= self.options.patience

    def _put(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parts.named().items():
                parameter.copy_(values[name])

    def _save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        self.folder.save(
            {
                "step": self.step,
                "losses": self.losses,
                "curve": [point.to_json() for point in self.curve],
                "parameters": {name: p.detach() for name, p in self.parts.named().items()},
                "best": self.best,
                "optimizer": self.optimizer.state_dict(),
            }
        )

    def _resume(self) -> None:
        """Take over what the main process finds in the folder; other machines may not see it."""
        from accelerate.utils import broadcast_object_list

        found: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                found = [self.folder.load()]
            except UserError as error:
                found = [error]
        (state,) = broadcast_object_list(found)
        if isinstance(state, UserError):
            raise state
        if state is None:
            return
        self.step, self.losses, self.best = state["step"], state["losses"], state["best"]
        self.curve = [CurvePoint.from_json(point) for point in state["curve"]]
        self._put(state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])


def rate(step: int, steps: int) -> float:
    """The learning rate of a step as a part of the highest: a linear rise, then a cosine down to a tenth."""
    rise = max(1, round(RISE * steps))
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, steps - rise)
    return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * done)) / 2


def batch_rows(step: int, size: int, rows: int, seed: int) -> Tensor:
    """Which rows a step takes, int64 [size]: all rows in a new random order, again and again."""
    start, end = step * size, (step + 1) * size
    rounds = range(start // rows, (end - 1) // rows + 1)
    random = [torch.Generator().manual_seed(seed * 1_000_003 + turn) for turn in rounds]
    order = torch.cat([torch.randperm(rows, generator=generator) for generator in random])
    return order[start - rounds[0] * rows :][:size]
