"""The mapping of a single head, learned from the text: which tokens share a code.

With one codebook the head is a class-based language model (Brown et al. 1992): p(v | h) = q(c(v) | h) pi(v | c(v)), where
q is a softmax over codes and pi comes from the bias alone. Both sides of

    KL = sum_v p(v | h) ln p(v | h) - sum_v p(v | h) [ln q(c(v) | h) + ln pi(v | c(v))],    averaged over the text,

are then improved in turn, as in classification EM (Celeux and Govaert 1992):

- codes by gradient: the teacher's probability of each code, [n, K], is all that training needs of it, so that a step
  costs O(K) a position;
- tokens by expected loss: the sum over the text of p(v | h) ln q(c | h) says what token v would lose under every code c,
  and n(v) ln(n(v) / mass(c)) what sharing it costs. Every token goes where the sum is best.

pi(v | c) = p(v) / mass(c) is the best one, in closed form. In the end ln q and ln pi become codebook and bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from export_vq.codespace import code_mass
from export_vq.compress.statistics import OutputLayer, Statistics, quick_matmul
from export_vq.head import VQHead
from export_vq.resume import RunFolder

ROUNDS = 4
STEPS = 100
LAST_STEPS = 300
"""Steps of Adam in a round: cheap beside the round's two looks at the teacher."""
BATCH = 4096
BOOK_RATE = 0.02
"""Step size of Adam on code vectors, in units of their root mean square."""
INTERCEPT_RATE = 0.015
SWEEPS = 6
POSITIONS = 65536
"""Positions of the text that are used: each costs a product with the dense layer in every round."""
ROWS = 2048
"""Positions whose V probabilities are held together: 400 MB at V = 49152."""


@dataclass(frozen=True)
class LearnOptions:
    """`rounds` of tuning and re-assignment; 1 tunes under the given mapping. `seed` orders positions and moves."""

    rounds: int = ROUNDS
    seed: int = 0


def learn_single(
    head: VQHead,
    layer: OutputLayer,
    stats: Statistics,
    options: LearnOptions,
    tell: Callable[[str, float], None] = lambda _step, _fraction: None,
    keep: RunFolder | None = None,
) -> VQHead:
    """Tune a single head in code space, and learn its mapping on the way.

    Args:
        head: kind single, the start; its bias is replaced by the best one.
        layer: the dense output layer, without a softcap.
        stats: of the text.
        options: see LearnOptions.
        tell: called with what is done (the loss in nats with it) and the fraction.
        keep: where the state is kept after every round, about a minute each; a run that finds its state goes on from it.

    Returns:
        A head of the same sizes, with a bias; the given one where learning did not improve on it.

    Raises:
        ValueError: the head is of another kind, or the layer has a softcap, under which codes do not separate.
    """
    if head.spec.kind != "single" or layer.softcap is not None:
        raise ValueError("learn_single takes a head of kind single and a layer without a softcap")
    with quick_matmul():
        return _Learner(head, layer, stats, options.seed).run(options.rounds, tell, keep)


class _Learner:
    """Codebook [K, D], intercepts [K] and codes [V] of a class model, and the teacher that it learns from."""

    def __init__(self, head: VQHead, layer: OutputLayer, stats: Statistics, seed: int) -> None:
        rows = stats.sample(POSITIONS)
        self.hidden = stats.hidden[rows]
        self.start, self.layer, self.k = head, layer, head.spec.num_codes
        self.codes = head.codes[:, 0].long()
        self.book = head.codebook.detach()[0].clone()
        self.chance = (stats.probability / stats.probability.sum()).clamp(min=1e-12).float()
        # A code's logit stands for all its tokens at first: their number raises it.
        self.intercept = torch.bincount(self.codes, minlength=self.k).float().clamp(min=1).log()
        self.random = torch.Generator().manual_seed(seed)

    def run(self, rounds: int, tell: Callable[[str, float], None], keep: RunFolder | None) -> VQHead:
        found = None if keep is None else keep.load()
        first, before = 0, math.nan
        if found is not None:
            first, before = found["round"], found["before"]
            self.codes, self.book, self.intercept = (found[name] for name in ("codes", "book", "intercept"))
            self.random.set_state(found["random"])
        loss, name = before, "map"
        for step in range(first, rounds):
            targets = self._targets(partial(_part_of, tell, name, step, rounds))
            if step == 0:
                before = self._loss(self.start, targets)
            self._fit(targets, LAST_STEPS if step == rounds - 1 else STEPS)
            loss = self._loss(self._head(), targets)
            name = f"map, loss {loss:.3f} (was {before:.3f})"
            if step < rounds - 1:
                self._move(self._affinity(partial(_part_of, tell, name, step + 0.5, rounds)))
                if keep is not None:
                    tensors = {"codes": self.codes, "book": self.book, "intercept": self.intercept}
                    keep.save({**tensors, "random": self.random.get_state(), "round": step + 1, "before": before})
        tell(name, 1.0)
        return self._head() if loss < before else self.start

    def _loss(self, head: VQHead, targets: Tensor) -> float:
        """Mean cross-entropy of a head with the present codes against the teacher, in nats."""
        bias = torch.zeros(len(self.codes)) if head.bias is None else head.bias.detach()
        mass = code_mass(self.codes, bias, self.k)
        loss = -float(self.chance @ (bias - mass[self.codes]))
        for rows, wanted in zip(self.hidden.split(BATCH), targets.split(BATCH), strict=True):
            log_q = torch.log_softmax(rows @ head.codebook.detach()[0].T + mass, -1)
            loss -= float((wanted * log_q.clamp(min=-1e4)).sum()) / len(self.hidden)
        return loss

    def _teacher(self, tell: Callable[[float], None]) -> Iterator[tuple[slice, Tensor]]:
        """Parts of the positions, with the dense layer's probabilities [rows, V] there; they last until the next part."""
        room = torch.empty(min(ROWS, len(self.hidden)), len(self.codes))
        for start in range(0, len(self.hidden), ROWS):
            part = slice(start, start + ROWS)
            yield part, self.layer.chances(self.hidden[part], room)[0]
            tell(min(1.0, part.stop / len(self.hidden)))

    def _targets(self, tell: Callable[[float], None]) -> Tensor:
        """The teacher's probability of every code, [n, K]."""
        member = torch.zeros(len(self.codes), self.k)
        member[torch.arange(len(self.codes)), self.codes] = 1
        found = torch.empty(len(self.hidden), self.k)
        for part, chances in self._teacher(tell):
            found[part] = chances @ member
        return found

    def _affinity(self, tell: Callable[[float], None]) -> Tensor:
        """Mean over the text of p(v | h) ln q(c | h): [V, K]."""
        total = torch.zeros(len(self.codes), self.k)
        for part, chances in self._teacher(tell):
            total.addmm_(chances.T, self._log_q(self.hidden[part]))
        return total / len(self.hidden)

    def _log_q(self, hidden: Tensor) -> Tensor:
        return torch.log_softmax(hidden @ self.book.T + self.intercept, -1)

    def _fit(self, targets: Tensor, steps: int) -> None:
        """Cross-entropy of the codes' probabilities, by Adam with a falling step."""
        book, intercept = self.book.requires_grad_(), self.intercept.requires_grad_()
        size = float(book.detach().square().mean().sqrt())
        groups = [{"params": [book], "lr": BOOK_RATE * size}, {"params": [intercept], "lr": INTERCEPT_RATE}]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5 * (1 + math.cos(math.pi * i / steps)))
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            if not len(order):
                order = torch.randperm(len(targets), generator=self.random)
            rows, order = order[:BATCH], order[BATCH:]
            log_q = torch.log_softmax(self.hidden[rows] @ book.T + intercept, -1)
            loss = -(targets[rows] * log_q).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        self.book, self.intercept = book.detach(), intercept.detach()

    def _move(self, affinity: Tensor) -> None:
        """Give every token its best code; half of those that want to move do so at a time, as masses change with them."""
        own = torch.arange(len(self.codes))
        share = self.chance
        for _ in range(SWEEPS):
            mass = torch.zeros(self.k).index_add(0, self.codes, share)
            gain = affinity - share[:, None] * (mass + share[:, None]).log()
            # A token's own mass is in its own code already.
            gain[own, self.codes] = affinity[own, self.codes] - share * mass[self.codes].log()
            better = gain.argmax(-1)
            moves = (better != self.codes) & (torch.rand(len(own), generator=self.random) < 0.5)
            self.codes = torch.where(moves, better, self.codes)

    def _head(self) -> VQHead:
        """y[v] = s[c(v)] + intercept[c(v)] + ln pi(v | c(v)): the intercept is part of the bias."""
        mass = torch.zeros(self.k).index_add(0, self.codes, self.chance)
        bias = (self.chance / mass[self.codes]).log() + self.intercept[self.codes]
        return VQHead.from_tensors("single", self.book[None], self.codes[:, None], bias)


def _part_of(tell: Callable[[str, float], None], name: str, start: float, rounds: int, part: float) -> None:
    """Half of a round, from `start` rounds on."""
    tell(name, (start + part / 2) / rounds)
