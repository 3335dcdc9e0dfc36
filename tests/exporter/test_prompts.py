"""Files of prompts: lines and JSON lines, and what is wrong with one, by its line."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export_vq.errors import UserError
from export_vq.prompts import read_prompts


def written(folder, name, content):
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def test_lines_keep_their_numbers_their_spaces_and_lose_their_ends(tmp_path):
    file = written(tmp_path, "prompts.txt", "\ufeffone\r\n\n  two \n\t\nthree\u2028still three")
    found = [(prompt.id, prompt.text, prompt.where) for prompt in read_prompts(file)]
    assert found == [
        (1, "one", f"{file} line 1"),
        (3, "  two ", f"{file} line 3"),
        (5, "three\u2028still three", f"{file} line 5"),
    ]


@given(st.lists(st.tuples(st.text(), st.none() | st.text() | st.integers()), min_size=1, max_size=6), st.booleans())
def test_any_text_comes_back_from_json_lines(tmp_path_factory, given_prompts, ascii_only):
    lines = [
        json.dumps({"prompt": text} | ({} if name is None else {"id": name}), ensure_ascii=ascii_only)
        for text, name in given_prompts
        if text.isprintable() or ascii_only  # a bare surrogate has no UTF-8
    ]
    if not lines:
        return
    file = written(tmp_path_factory.mktemp("prompts"), "prompts.jsonl", "\n".join(lines))
    expected = [json.loads(line) for line in lines]
    found = read_prompts(file)
    assert [prompt.text for prompt in found] == [one["prompt"] for one in expected]
    assert [prompt.id for prompt in found] == [one.get("id", i) for i, one in enumerate(expected, start=1)]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", "\n \n", "holds no prompt, expected one a line"),
        ("p.txt", b"\xff\xfe", "not UTF-8 text"),
        ("p.jsonl", '{"prompt": "a"}\nb', r"line 2: not a JSON object with a prompt \(JSONDecodeError\)"),
        ("p.jsonl", '["prompt"]', r"line 1: not a JSON object with a prompt \(TypeError\)"),
        ("p.jsonl", '{"text": "a"}', r"line 1: not a JSON object with a prompt \(KeyError\)"),
        ("p.jsonl", '{"prompt": 3}', "line 1: prompt is a int and id a int"),
        ("p.jsonl", '{"prompt": "a", "id": true}', "line 1: prompt is a str and id a bool"),
    ],
)
def test_what_is_no_prompt_is_named_by_its_line(tmp_path, name, content, words):
    with pytest.raises(UserError, match=words):
        read_prompts(written(tmp_path, name, content))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.txt: cannot be read"):
        read_prompts(tmp_path / "none.txt")
