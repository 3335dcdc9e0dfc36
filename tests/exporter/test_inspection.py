"""Bytes of whole models: what is there is counted, once."""

import dataclasses

import pytest
from checkpoints import save_tiny

from export_vq.inspection import inspect_path
from export_vq.load import save_model


@pytest.mark.parametrize("original_tied", [True, False])
def test_a_tied_model_counts_no_embedding_and_its_dense_model_does(tmp_path, original_tied):
    found = {}
    for tied in (False, True):
        loaded = save_tiny(tmp_path / "model.pt", "llama", bias=False, tied=tied)
        config = {**loaded.config, "tie_word_embeddings": original_tied}
        save_model(dataclasses.replace(loaded, config=config), tmp_path / "model.pt")
        found[tied] = inspect_path(tmp_path / "model.pt")
    assert found[True].spec.tie_embedding
    assert found[False].model_bytes - found[True].model_bytes == 4 * 97 * 32
    assert found[False].dense_model_bytes == found[True].dense_model_bytes
    assert found[True].head_bytes == found[False].head_bytes


def test_codes_that_no_token_uses_are_counted(tmp_path):
    loaded = save_tiny(tmp_path / "model.pt", "llama")
    assert inspect_path(tmp_path / "model.pt").dead_codes == 0
    loaded.head.codes[:, 0] = 3
    save_model(loaded, tmp_path / "model.pt")
    assert inspect_path(tmp_path / "model.pt").dead_codes == loaded.head.spec.num_codes - 1
