"""Every Markdown file: it renders, its links, anchors and pictures are there, and its commands are ones that the tool takes."""

import itertools
import re
import xml.etree.ElementTree as ET
from urllib.parse import unquote, urlsplit

import click
import documents
import pytest
from documents import DOCUMENTS, MARKDOWN, ROOT

every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def _links(path):
    return [str(token.attrs["href"]) for token in documents.inline(path) if token.type == "link_open"]


def _images(path):
    return [token for token in documents.inline(path) if token.type == "image"]


@every_document
def test_it_renders_with_one_title_and_nothing_left_raw(path):
    html = MARKDOWN.render(path.read_text(encoding="utf-8"))
    assert html.count("<h1>") == 1
    assert documents.headings(path)[0][0] == 1
    raw = [
        t.content for t in documents.inline(path) if t.type == "text" and re.search(r"^\||\]\(|\]\[|^```", t.content)
    ]
    assert not raw  # a table, a link or a block that Markdown did not see as one


@every_document
def test_headings_go_down_one_level_at_a_time(path):
    levels = [level for level, _ in documents.headings(path)]
    assert all(below - above <= 1 for above, below in itertools.pairwise(levels))


@every_document
def test_relative_links_lead_somewhere(path):
    for href in _links(path):
        parts = urlsplit(href)
        if parts.scheme:
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        assert target.is_relative_to(ROOT), href
        assert target.exists(), href
        if parts.fragment:
            assert target.suffix == ".md", href
            assert parts.fragment in documents.anchors(target), href


@every_document
def test_external_links_are_whole_https_addresses(path):
    for href in _links(path):
        parts = urlsplit(href)
        if parts.scheme:
            assert parts.scheme == "https", href
            assert re.fullmatch(r"([\w-]+\.)+[a-z]{2,}", parts.netloc), href


@every_document
def test_images_are_there_and_described(path):
    for image in _images(path):
        target = (path.parent / unquote(str(image.attrs["src"]))).resolve()
        assert target.is_relative_to(ROOT)
        assert target.is_file(), image.attrs["src"]
        assert image.content.strip(), f"{image.attrs['src']} has no description"
        if target.suffix == ".svg":
            assert ET.parse(target).getroot().tag == "{http://www.w3.org/2000/svg}svg"


@every_document
def test_calls_in_code_blocks_are_ones_that_the_tool_takes(path):
    for block in documents.shell_blocks(path):
        for call in documents.commands(block):
            try:
                documents.check_call(call)
            except click.UsageError as error:
                pytest.fail(f"export-vq {' '.join(call)}: {error.format_message()}")


@every_document
def test_options_named_in_running_text_are_those_of_the_command(path):
    for token in documents.inline(path):
        if token.type != "code_inline" or not token.content.startswith("export-vq "):
            continue
        for call in documents.commands(token.content):
            context, words = documents.command_of(call)
            known = {name for p in context.command.get_params(context) for name in (*p.opts, *p.secondary_opts)}
            assert {word for word in words if word.startswith("-")} <= known | {"--debug"}, token.content


def test_the_check_of_calls_refuses_what_the_tool_refuses():
    documents.check_call(["model.pt", "-o", "out", "--dtype", "fp16"])
    documents.check_call(["plugins", "build", "--cuda-architectures", "87"])
    for wrong in ("model.pt --form", "model.pt --form plain", "export model.pt --dtype fp17", "check model.pt",
                  "export a.pt b.pt", "plugins make", "plugins", "calibrate out --text a", "export m --opset new"):  # fmt: skip
        with pytest.raises(click.UsageError):
            documents.check_call(wrong.split())


def test_calls_are_found_in_shell():
    shell = "export-vq run m.pt \\\n  -o out   # not: export-vq x\ncd out && .venv/bin/export-vq inspect . | tee log\n"
    assert documents.commands(shell) == [["run", "m.pt", "-o", "out"], ["inspect", "."]]


def test_the_index_names_every_document_and_the_readme_names_the_index():
    index = ROOT / "docs" / "README.md"
    named = {(index.parent / urlsplit(href).path).resolve() for href in _links(index) if not urlsplit(href).scheme}
    assert {path for path in DOCUMENTS if path != index} <= named
    assert "docs/README.md" in {urlsplit(href).path for href in _links(ROOT / "README.md")}
