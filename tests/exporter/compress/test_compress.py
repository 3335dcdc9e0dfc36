"""compress_model on tiny models of every architecture."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from checkpoints import save_dense, tiny_model

from export_vq.compress import CompressOptions, compress_model, default_num_codebooks, tune
from export_vq.compress.statistics import OutputLayer, Statistics, hidden_states
from export_vq.errors import UserError
from export_vq.load import TESTED_MODEL_TYPES, LoadedModel, load_dense, load_model, save_model
from export_vq.text import token_blocks

TEXT = "The quick brown fox jumps over the lazy dog; and then it rests a while in the shade of other trees. " * 30
OPTIONS = CompressOptions(num_codes=16, calibration_tokens=1024, tune_tokens=2048 * 8)


def dense_model(folder: Path, model_type: str = "llama", tied: bool = False) -> LoadedModel:
    save_dense(folder, model_type, tied=tied)
    return load_dense(folder)


def logits(loaded: LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return loaded.model(input_ids=ids).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", TESTED_MODEL_TYPES)
def test_saved_model_comes_back_and_computes_the_same(model_type: str, tied: bool, tmp_path: Path) -> None:
    dense = dense_model(tmp_path / "dense", model_type, tied)
    ids = token_blocks(dense.tokenizer(), TEXT, 24, 2, vocab_size=dense.config["vocab_size"])
    before = logits(dense, ids)
    state = {name: value.clone() for name, value in dense.model.state_dict().items()}
    vq = compress_model(dense, TEXT, OPTIONS)
    # The caller's model is as it was.
    assert dense.head is None
    assert set(state) == set(dense.model.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in dense.model.state_dict().items())
    assert torch.equal(before, logits(dense, ids))
    # The new one is what a reader of its file gets.
    save_model(vq, tmp_path / "model.pt")
    back = load_model(tmp_path / "model.pt")
    torch.testing.assert_close(logits(back, ids), logits(vq, ids), atol=1e-5, rtol=1e-5)
    assert back.tied_embedding is tied
    assert vq.tied_embedding is tied
    assert vq.config["vq_logits"] == back.config["vq_logits"]
    # Input embedding: the dense one's values, its own storage.
    mine, theirs = vq.model.get_input_embeddings().weight, dense.model.get_input_embeddings().weight
    assert torch.equal(mine, theirs)
    assert mine.data_ptr() != theirs.data_ptr()


@pytest.mark.parametrize("model_type", ["llama", "opt", "gemma3_text"])
def test_statistics_are_of_what_enters_the_output_layer(model_type: str, tmp_path: Path) -> None:
    dense = dense_model(tmp_path, model_type)
    blocks = token_blocks(dense.tokenizer(), TEXT, 32, 5, vocab_size=dense.config["vocab_size"])
    seen: list[torch.Tensor] = []
    layer = dense.model.get_output_embeddings()
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1).double()))
    probability = logits(dense, blocks).softmax(-1).double().mean((0, 1))
    hook.remove()
    stats = Statistics.of(OutputLayer.of(dense), hidden_states(dense, blocks))
    torch.testing.assert_close(stats.mean, seen[0].mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.covariance, seen[0].T.cov(correction=0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(stats.probability, probability, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(stats.hidden.double(), seen[0])
    wanted = logits(dense, blocks).flatten(0, 1).logsumexp(-1)
    torch.testing.assert_close(stats.normaliser, wanted, atol=1e-4, rtol=1e-5)
    assert stats.sample(7).tolist()[0] == 0
    assert stats.sample(7).tolist()[-1] == len(stats.hidden) - 1


@pytest.mark.parametrize("kind", ["product", "single", "additive"])
def test_same_seed_same_checkpoint(kind: str, tmp_path: Path) -> None:
    dense = dense_model(tmp_path)
    options = dataclasses.replace(OPTIONS, kind=kind, num_codebooks=None if kind != "additive" else 2)
    first, again = (compress_model(dense, TEXT, options).model.state_dict() for _ in range(2))
    assert set(first) == set(again)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_enough_codes_give_the_dense_model_back(tmp_path: Path) -> None:
    dense = dense_model(tmp_path, tied=True)
    vq = compress_model(dense, TEXT, dataclasses.replace(OPTIONS, kind="single", num_codes=97))
    ids = token_blocks(dense.tokenizer(), TEXT, 24, 2, vocab_size=dense.config["vocab_size"])
    torch.testing.assert_close(logits(vq, ids).softmax(-1), logits(dense, ids).softmax(-1), atol=1e-5, rtol=1e-4)


def test_training_the_copy_leaves_the_original_alone(tmp_path: Path) -> None:
    dense = dense_model(tmp_path, tied=True)
    state = copy.deepcopy(dense.model.state_dict())
    vq = compress_model(dense, TEXT, OPTIONS)
    with torch.no_grad():
        for value in vq.model.parameters():
            value.zero_()
    assert all(torch.equal(value, state[name]) for name, value in dense.model.state_dict().items())
    assert dense.model.config.tie_word_embeddings is True


def test_progress_names_steps_and_ends_at_one(tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    compress_model(dense_model(tmp_path), TEXT, OPTIONS, lambda step, part: told.append((step, part)))
    steps = list(dict.fromkeys(step for step, _ in told))
    assert [step.split(",")[0] for step in steps[:4]] == ["tokenise", "calibrate", "cluster", "tune"]
    for step in ("tokenise", "calibrate", "cluster", "tune"):
        parts = [part for name, part in told if name.split(",")[0] == step]
        assert parts == sorted(parts)
        assert parts[-1] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (CompressOptions(kind="vector"), "--kind is 'vector', expected one of product, single, additive"),
        (CompressOptions(kind="single", num_codes=8, assign="best"), "--assign is 'best', expected one of random"),
        (CompressOptions(num_codes=98), "--num-codes is 98, expected 1 to 97"),
        (CompressOptions(num_codes=0), "--num-codes is 0, expected 1 to 97"),
        (CompressOptions(num_codes=8, num_codebooks=5), "expected a divisor of 32.*nearest is 4"),
        (CompressOptions(num_codes=8, num_codebooks=0), "--num-codebooks is 0, expected 1 or more"),
        (CompressOptions(kind="single", num_codes=8, num_codebooks=2), "expected 1 for --kind single"),
        (CompressOptions(num_codes=8, calibration_tokens=0), "--calibration-tokens is 0"),
        (CompressOptions(num_codes=8, tune_tokens=-1), "--tune-tokens is -1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: CompressOptions, says: str, tmp_path: Path) -> None:
    dense = dense_model(tmp_path)
    with pytest.raises(UserError, match=says):
        compress_model(dense, TEXT, options)


def test_short_text_and_compressed_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give a longer text"):
        compress_model(dense_model(tmp_path), "Too short.", OPTIONS)
    with pytest.raises(UserError, match="has a VQ-Logits head already"):
        compress_model(tiny_model(), TEXT, OPTIONS)


@pytest.mark.parametrize(("width", "codebooks"), [(576, 144), (32, 8), (24, 6), (7, 1), (1, 1), (50, 10)])
def test_default_number_of_codebooks(width: int, codebooks: int) -> None:
    assert default_num_codebooks(width) == codebooks


class Stopped(Exception):
    """The run was interrupted."""


def test_a_stopped_run_goes_on_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was calibrated and clustered before is not done again."""
    monkeypatch.setattr(tune, "SAVE_SECONDS", 0.0)
    dense = dense_model(tmp_path / "dense")
    whole = compress_model(dense, TEXT, OPTIONS)
    folder = tmp_path / "unfinished"

    def stop(step: str, part: float) -> None:
        if step.startswith("tune") and part > 0.2:
            raise Stopped

    with pytest.raises(Stopped):
        compress_model(dense, TEXT, OPTIONS, stop, unfinished=folder)
    told: list[str] = []
    again = compress_model(dense, TEXT, OPTIONS, lambda step, _: told.append(step), unfinished=folder)
    assert "cluster" not in told
    assert "tokenise" not in told
    mine, theirs = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert not folder.exists()


def test_options_that_combine(tmp_path: Path) -> None:
    """A trimmed vocabulary, a single head with a learned map, and its rows as input embedding."""
    dense = dense_model(tmp_path / "dense", tied=True)
    options = dataclasses.replace(OPTIONS, kind="single", num_codes=20, keep_tokens="60", tie_embedding=True)
    vq = compress_model(dense, TEXT, options)
    assert "trimmed" in vq.notes[0]  # this tokenizer is an alphabet: all of it has to stay
    assert vq.spec.tie_embedding
    save_model(vq, tmp_path / "model.pt")
    back = load_model(tmp_path / "model.pt")
    ids = token_blocks(back.tokenizer(), TEXT, 24, 2, vocab_size=back.spec.vocab_size)
    torch.testing.assert_close(logits(back, ids), logits(vq, ids), atol=1e-5, rtol=1e-5)
