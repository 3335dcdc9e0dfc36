"""Text in, blocks of token ids out."""

import json

import pytest
import torch
from checkpoints import tiny_model

from export_vq.errors import UserError
from export_vq.text import read_text, token_blocks


def test_blocks_hold_the_text_in_order_and_drop_the_rest():
    tokenizer = tiny_model().tokenizer()
    ids = tokenizer("abcdefghijk")["input_ids"]
    blocks = token_blocks(tokenizer, "abcdefghijk", 4, vocab_size=97)
    assert blocks.tolist() == [ids[:4], ids[4:8]]


def test_a_limit_spreads_blocks_over_the_whole_text():
    tokenizer = tiny_model().tokenizer()
    everything = token_blocks(tokenizer, "0123456789" * 10, 10, vocab_size=97)
    some = token_blocks(tokenizer, "0123456789" * 10, 10, 3, vocab_size=97)
    assert torch.equal(some, everything[[0, 4, 9]])


def test_short_text_is_refused():
    with pytest.raises(UserError, match="the text has 3 tokens, at least 8 were expected"):
        token_blocks(tiny_model().tokenizer(), "abc", 8, vocab_size=97)


def test_an_added_token_beyond_the_vocabulary_is_refused_only_where_a_text_holds_it(tmp_path):
    """Gemma 3's text models come with an image token whose id is vocab_size."""
    from checkpoints import save_tiny

    from export_vq.load import load_model, save_model

    loaded = save_tiny(tmp_path / "plain.pt")
    settings = json.loads(loaded.tokenizer_files["tokenizer.json"])
    settings["added_tokens"].append({**settings["added_tokens"][0], "id": 97, "content": "<image>"})
    loaded.tokenizer_files["tokenizer.json"] = json.dumps(settings)
    save_model(loaded, tmp_path / "model.pt")
    tokenizer = load_model(tmp_path / "model.pt").tokenizer()
    assert len(token_blocks(tokenizer, "some plain text", 4, vocab_size=97))
    with pytest.raises(UserError, match="holds the token '<image>' with id 97, expected ids below vocab_size 97"):
        token_blocks(tokenizer, "some <image> text", 4, vocab_size=97)


def test_a_folder_of_texts_is_read_in_the_order_of_names(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    assert read_text(tmp_path) == "text a\n\ntext b"


@pytest.mark.parametrize(
    ("content", "words"), [(None, "cannot be read"), (b"", "holds no text"), (b"\xff\xfe\x00a", "not UTF-8 text")]
)
def test_unreadable_text_is_named(tmp_path, content, words):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words) as refused:
        read_text(path)
    assert "text.txt" in str(refused.value)
