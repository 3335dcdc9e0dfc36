import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from export_vq.calibration.documents import documents, read_material
from export_vq.calibration.options import CalibrationOptions
from export_vq.errors import UserError

VOCAB = 50


@pytest.fixture(scope="module")
def tokenizer():
    found = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    found.pre_tokenizer = Whitespace()
    return found


def document(word, length=700):
    """Above the least length; all of one word, so its tokens tell it apart."""
    return " ".join([f"w{word}"] * length)


def options(**chosen):
    return CalibrationOptions("int8", **chosen)


def write(path, *words):
    path.write_text("\n\n".join(document(word) for word in words))
    return path


def test_no_document_is_calibrated_on_and_tested_on(tmp_path, tokenizer):
    text = write(tmp_path / "text.txt", *range(1, 41))
    found = read_material(options(text=text, samples=10**6, test_tokens=10**6), tokenizer, VOCAB, 7)
    assert found.documents == (35, 5)
    assert not set(found.calibration.ravel()) & set(found.test.ravel())
    assert len(set(found.calibration.ravel()) | set(found.test.ravel())) == 40


def test_equal_documents_are_one(tmp_path, tokenizer):
    text = write(tmp_path / "text.txt", *([1, 2, 3, 4] * 20))
    found = read_material(options(text=text, samples=10**6, test_tokens=10**6), tokenizer, VOCAB, 7)
    assert found.documents == (3, 1)
    assert not set(found.calibration.ravel()) & set(found.test.ravel())


def test_documents_of_a_held_out_text_are_not_calibrated_on(tmp_path, tokenizer):
    text, held = write(tmp_path / "text.txt", 1, 2, 3, 4, 5), write(tmp_path / "held.txt", 4, 9)
    found = read_material(options(text=text, held_out=held, samples=10**6), tokenizer, VOCAB, 7)
    assert set(found.calibration.ravel()) == {1, 2, 3, 5}
    assert set(found.test.ravel()) == {4, 9}


def test_a_shifted_copy_of_a_held_out_text_is_not_calibrated_on(tmp_path, tokenizer):
    """Its paragraphs gather to other documents than the held-out text's, so that no document is equal to one."""
    random = np.random.default_rng(0)
    paragraphs = [" ".join(f"w{w}" for w in random.integers(1, VOCAB, 60)) for _ in range(60)]
    text, held = tmp_path / "text.txt", tmp_path / "held.txt"
    text.write_text("\n\n".join(paragraphs))
    held.write_text("\n\n* * *\n\n".join(paragraphs[25:35]))
    found = read_material(options(text=text, held_out=held, samples=10**6, test_tokens=10**6), tokenizer, VOCAB, 5)
    calibrated = {tuple(row) for row in np.lib.stride_tricks.sliding_window_view(found.calibration.ravel(), 5)}
    assert not calibrated & {tuple(row) for row in found.test}
    assert found.calibration.size > 30 * 60  # a separator alone makes no copy


def test_the_split_does_not_hang_on_the_order_of_the_text(tmp_path, tokenizer):
    one, other = write(tmp_path / "one.txt", *range(1, 20)), write(tmp_path / "other.txt", *range(19, 0, -1))
    tested = [
        set(read_material(options(text=t, test_tokens=10**6), tokenizer, VOCAB, 7).test.ravel()) for t in (one, other)
    ]
    assert tested[0] == tested[1]


@given(st.lists(st.text(alphabet="ab \n", max_size=900), max_size=12))
@settings(deadline=None)
def test_documents_lose_no_words(paragraphs):
    text = "\n\n".join(paragraphs)
    assert "".join(documents(text)).split() == text.split()


def test_rows_of_feeds_are_documents(tmp_path, tokenizer):
    rows = np.repeat(np.arange(16), 12).reshape(16, 12)
    np.savez(tmp_path / "feeds.npz", input_ids=rows)
    found = read_material(options(feeds=tmp_path / "feeds.npz"), tokenizer, VOCAB, 12)
    assert found.documents == (14, 2)
    assert sorted([*found.calibration[:, 0], *found.test[:, 0]]) == list(range(16))


def test_what_cannot_be_read_is_refused(tmp_path, tokenizer):
    empty, short, one = tmp_path / "empty.txt", tmp_path / "short.txt", write(tmp_path / "one.txt", 1)
    empty.write_text(" \n")
    short.write_text(document(1) + "\n\nw2\n")
    np.savez(tmp_path / "other.npz", ids=np.zeros((2, 2)))
    np.savez(tmp_path / "none.npz", input_ids=np.zeros((0, 20), np.int64))
    np.savez(tmp_path / "objects.npz", input_ids=np.array([[1, 2], [3]], object))
    np.savez(tmp_path / "few.npz", input_ids=np.arange(12).reshape(4, 3))
    np.save(tmp_path / "array.npy", np.zeros((2, 2)))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "other.npz").read_bytes()[:40])
    cases = [
        (options(text=tmp_path / "missing.txt"), VOCAB, "cannot be read"),
        (options(text=empty), VOCAB, "holds no text"),
        (options(text=one), VOCAB, "none is left to calibrate on"),
        (options(text=short), VOCAB, "at least 20 were expected"),
        (options(text=write(tmp_path / "text.txt", *range(9))), 5, "expected ids from 0 to 4"),
        (options(feeds=tmp_path / "none.npz"), VOCAB, "N and S above 0"),
        (options(feeds=tmp_path / "few.npz"), VOCAB, "at least 20 were expected"),
    ]
    bad = ("other.npz", "objects.npz", "cut.npz", "array.npy", "empty.txt", "missing.npz")
    cases += [(options(feeds=tmp_path / name), VOCAB, "not an .npz file with input_ids") for name in bad]
    for asked, vocab, says in cases:
        with pytest.raises(UserError, match=says):
            read_material(asked, tokenizer, vocab, 20)
