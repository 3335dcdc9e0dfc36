"""Tuning of a head on cached hidden states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from head_problem import mean_kl, problem
from torch import Tensor

from export_vq.compress import tune
from export_vq.compress.additive import additive_head
from export_vq.compress.assign import single_head
from export_vq.compress.product import product_head
from export_vq.compress.statistics import OutputLayer, Statistics
from export_vq.compress.tune import tune_head
from export_vq.head import VQHead
from export_vq.resume import RunFolder

POSITIONS = 2048 * 150


def start_of(kind: str, layer: OutputLayer, stats: Statistics, bias: bool = True) -> VQHead:
    if kind == "single":
        return single_head(layer, stats, 24, bias=bias)
    if kind == "additive":
        return additive_head(layer, stats, 2, 8, bias=bias)
    return product_head(layer, stats, 4, 8, bias=bias, rotate=kind == "rotated")


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["product", "rotated", "single", "additive"])
def test_divergence_falls_on_the_text_and_on_the_part_held_out(kind: str, bias: bool, softcap: float | None) -> None:
    layer, stats = problem(n=4096, softcap=softcap)
    head = start_of(kind, layer, stats, bias)
    before = mean_kl(layer, head, stats.hidden)
    tuned = tune_head(head, layer, stats, positions=POSITIONS)
    assert tuned.after < tuned.before
    assert mean_kl(layer, tuned.head, stats.hidden) < before
    assert torch.equal(tuned.head.codes, head.codes)
    assert mean_kl(layer, head, stats.hidden) == before  # the given head is left alone
    assert tuned.head.spec == head.spec


def test_what_is_told_is_the_divergence_over_the_whole_vocabulary() -> None:
    layer, stats = problem(n=512)
    head = start_of("rotated", layer, stats)
    tuned = tune_head(head, layer, stats, positions=1)
    held = stats.hidden[256:]  # the second of two runs: too few for a sixteenth
    if len(held):
        assert tuned.before == pytest.approx(mean_kl(layer, head, stats.hidden[-32:]), rel=1e-4)


def test_tokens_drawn_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a part of the tokens in every step the divergence falls as well, over all of them."""
    monkeypatch.setattr(tune, "FREQUENT", 50)
    monkeypatch.setattr(tune, "DRAWN", 60)
    layer, stats = problem(n=4096)
    head = start_of("rotated", layer, stats)
    tuned = tune_head(head, layer, stats, positions=POSITIONS)
    assert mean_kl(layer, tuned.head, stats.hidden) < mean_kl(layer, head, stats.hidden)


def test_a_head_that_is_right_already_stays() -> None:
    layer, stats = problem(v=40)
    tuned = tune_head(single_head(layer, stats, 40, method="kmeans"), layer, stats, positions=POSITIONS)
    assert tuned.after <= tuned.before
    assert mean_kl(layer, tuned.head, stats.hidden) < 1e-5


class Stopped(Exception):
    """The run was interrupted."""


def test_a_stopped_run_goes_on_to_the_same_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, stats = problem(n=4096)
    head = start_of("rotated", layer, stats)
    whole = tune_head(head, layer, stats, positions=POSITIONS, seed=1)
    monkeypatch.setattr(tune, "SAVE_SECONDS", 0.0)
    told: list[float] = []

    def stop(_: str, part: float) -> None:
        told.append(part)
        if part > 0.4:
            raise Stopped

    folder = RunFolder(tmp_path, {})
    with pytest.raises(Stopped):
        tune_head(head, layer, stats, positions=POSITIONS, seed=1, tell=stop, keep=folder)
    parts: list[float] = []
    again = tune_head(
        head, layer, stats, positions=POSITIONS, seed=1, tell=lambda _, part: parts.append(part), keep=folder
    )
    assert parts[0] > 0.35  # it did not start anew
    assert_equal(whole.head, again.head)
    assert (whole.before, whole.after) == (again.before, again.after)


def assert_equal(first: VQHead, second: VQHead) -> None:
    mine, theirs = first.state_dict(), second.state_dict()
    assert set(mine) == set(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_early_stop_when_nothing_improves(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, stats = problem(n=1024)
    head = start_of("rotated", layer, stats)
    monkeypatch.setattr(tune, "CODEBOOK_RATE", 1e3)  # every step makes it worse
    parts: list[float] = []
    tuned = tune_head(head, layer, stats, positions=2048 * 40, tell=lambda _, part: parts.append(part))
    assert parts[-2] < 0.6  # the last step that was made; then it says that it is done
    assert parts[-1] == 1.0
    assert tuned.after == tuned.before
    unchanged: Tensor = tuned.head.codebook
    torch.testing.assert_close(unchanged, head.codebook)
