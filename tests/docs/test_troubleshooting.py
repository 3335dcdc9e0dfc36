"""docs/troubleshooting.md quotes messages that there are: ours from the sources, ONNX Runtime's from ONNX Runtime."""

import ast
import re
import shutil

import bundles
import documents
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from export_vq import forms

PAGE = documents.ROOT / "docs" / "troubleshooting.md"
GAP = "…"
"""Stands for what a message fills in, here and on the page."""
PYTHON = [path for folder in ("exporter", "calibration", "plugins") for path in (documents.ROOT / folder).rglob("*.py")]
NATIVE = [path for path in (documents.ROOT / "plugins").rglob("*.cpp") if path.is_file()]


def _quoted():
    """Section -> the messages that its headings quote."""
    sections, section = {}, ""
    for level, text in documents.headings(PAGE):
        if level == 2:
            section = text
        elif level == 3:
            sections.setdefault(section, []).append(text)
    return sections


QUOTED = _quoted()
OURS = [message for section, messages in QUOTED.items() if section.startswith("export-vq: ") for message in messages]


def _template(node):
    """A string of the sources, with gaps where it fills something in; None for what is no string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
    return None


def _templates():
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            template = _template(node)
            if template is not None:
                yield template
    for path in NATIVE:
        # Neighbouring literals are one, and what is added between two of them is filled in.
        text = re.sub(r'"\s*\+[^";]*\+\s*"', GAP, re.sub(r'"\s*"', "", path.read_text(encoding="utf-8")))
        text = re.sub(r'"\s*\)\s*\+[^";]*"?', GAP, text)
        yield from re.findall(r'"((?:[^"\\]|\\.)*)', text)


TEMPLATES = tuple(_templates())


def _holds(template, pieces):
    """Whether the pieces stand in a text in their order."""
    place = 0
    for piece in pieces:
        place = template.find(piece, place)
        if place < 0:
            return False
        place += len(piece)
    return True


def occurs(message):
    """Whether some string of the sources is the message, whatever fills its gaps."""
    pieces = [piece.strip() for piece in message.split(GAP) if piece.strip()]
    return any(_holds(template, pieces) for template in TEMPLATES)


@pytest.mark.parametrize("message", OURS)
def test_a_message_of_ours_is_in_the_sources(message):
    assert max(len(piece.split()) for piece in message.split(GAP)) >= 3, "too little of it is quoted to be found"
    assert occurs(message)


def test_what_is_in_no_source_is_not_found():
    assert not occurs("this model has an ordinary output layer, a VQ-Logits head was not expected")
    assert not occurs("expected a VQ-Logits model.pt … no such file or folder")  # the wrong way round


def test_every_message_has_its_answer():
    parsed = documents.tokens(PAGE)
    for i, token in enumerate(parsed):
        if token.type == "heading_open" and token.tag == "h3":
            assert parsed[i + 3].type == "paragraph_open", parsed[i + 1].content


def _plugin_form(folder):
    model = ir.load(bundles.exported() / "model.onnx")
    forms.convert(model, "plugin")
    ir.save(model, folder / "model.onnx")
    ort.InferenceSession(folder / "model.onnx")


def _without_its_data(folder):
    shutil.copy(bundles.exported() / "model.onnx", folder)
    ort.InferenceSession(folder / "model.onnx")


def _run(**changed):
    session = ort.InferenceSession(bundles.exported() / "model.onnx")
    ids = np.array([[5, 9]])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(2)[None]}
    for tensor in session.get_inputs():
        if tensor.name.startswith("past_key_values."):
            feeds[tensor.name] = np.zeros((1, tensor.shape[1], 0, tensor.shape[3]), np.float32)
    return session.run(None, {name: array for name, array in {**feeds, **changed}.items() if array is not None})


PROVOKED = {
    "is not a registered function/op": _plugin_form,
    "External data path does not exist": _without_its_data,
    "are missing from input feed": lambda _: _run(position_ids=None),
    "Unexpected input data type": lambda _: _run(input_ids=np.array([[5, 9]], np.int32)),
    "indices element out of data bounds": lambda _: _run(input_ids=np.array([[5, 97]])),
}


@pytest.mark.parametrize("words", PROVOKED)
def test_onnx_runtime_says_what_the_page_quotes(words, tmp_path):
    (message,) = (message for message in QUOTED["ONNX Runtime says"] if words in message)
    with pytest.raises(Exception, match=".*".join(map(re.escape, message.split(GAP)))):  # its errors share no base
        PROVOKED[words](tmp_path)


def test_onnxruntime_genai_says_what_the_page_quotes(tmp_path):
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime_genai is in the extra 'dev'")
    from export_vq import manifest

    folder = tmp_path / "out"
    shutil.copytree(bundles.exported("topk"), folder)
    manifest.seal(folder)
    (message,) = QUOTED["onnxruntime-genai says"]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        genai.Model(str(folder))
