"""Text as it comes: pieces that join to the whole, whole characters, stop strings wherever tokens are cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export_vq.detokenize import TextStream


def decode_bytes(ids):
    """A tokenizer whose tokens are single bytes."""
    return bytes(ids).decode("utf-8", errors="replace")


def run(stream, tokens):
    """(pieces, whether a stop string ended it) of a whole request."""
    pieces = []
    for token in tokens:
        piece, stopped = stream.push(token)
        pieces.append(piece)
        if stopped:
            return pieces, True
    rest, stopped = stream.finish()
    return [*pieces, rest], stopped


@settings(max_examples=200)
@given(st.text("aé☃🙂\n"), st.text("aé☃🙂\n"))
def test_bytes_join_to_the_text_and_no_piece_holds_half_a_character(prompt, text):
    pieces, stopped = run(TextStream(decode_bytes, prompt.encode(), ()), text.encode())
    assert "".join(pieces) == text
    assert not stopped
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_never_become_a_character_do_not_hold_up_what_follows():
    pieces, _ = run(TextStream(decode_bytes, b"x", ()), b"a\xff\xc3b")
    assert pieces == ["a", "", "", "\ufffd\ufffdb", ""]
    assert "".join(run(TextStream(decode_bytes, b"x", ()), "ab☃".encode()[:-1])[0]) == "ab"


def first_stop(text, stops):
    """The text before the stop string that is complete first, read character by character; None without one."""
    for end in range(len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)]
    return None


@settings(max_examples=400)
@given(st.lists(st.text("ab☃", min_size=1, max_size=4), max_size=3), st.lists(st.text("ab☃", max_size=4), max_size=12))
def test_a_stop_string_is_found_across_tokens_and_nothing_of_it_is_shown(stops, vocabulary_text):
    """Tokens are whole strings here, so that a stop string may begin and end inside of them."""
    stream = TextStream(lambda ids: "".join(vocabulary_text[i] for i in ids), [], stops)
    pieces, stopped = run(stream, range(len(vocabulary_text)))
    text = "".join(vocabulary_text)
    before = first_stop(text, stops)
    assert stopped == (before is not None)
    assert "".join(pieces) == (text if before is None else before)


def test_text_is_held_back_only_while_it_may_begin_a_stop_string():
    stream = TextStream(decode_bytes, b"", ("\n\nQ:", "END"))
    shown = [stream.push(byte)[0] for byte in b"a\n\nb EN"]
    assert shown == ["a", "", "", "\n\nb", " ", "", ""]
    assert stream.push(ord("D")) == ("", True)


@pytest.mark.parametrize(("tokens", "text"), [(b"xEND\xe2", "x"), (b"xEN\xe2", "xEN")])
def test_a_stop_string_before_half_a_character_is_found_at_the_end(tokens, text):
    vocabulary = {0: tokens}
    stream = TextStream(lambda ids: b"".join(vocabulary[i] for i in ids).decode("utf-8", "replace"), [], ("END",))
    assert run(stream, [0]) == (["", text], text == "x")


def test_the_first_word_keeps_its_space():
    """SentencePiece decoders drop the space before the first word of what they are given."""
    words = ["▁The", "▁capital", "▁is", "▁Paris", "."]
    stream = TextStream(lambda ids: "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" "), [0, 1, 2], ())
    assert [stream.push(i)[0] for i in (3, 4)] == [" Paris", "."]
