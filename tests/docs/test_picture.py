"""docs/walk.svg stands alone and reads on light and on dark pages."""

import xml.etree.ElementTree as ET

import documents
import pytest

SVG = "{http://www.w3.org/2000/svg}"
ROOT = ET.parse(documents.ROOT / "docs" / "walk.svg").getroot()
PAGES = {"light": "#ffffff", "dark": "#0d1117"}
"""GitHub's own backgrounds."""
TEXT, GRAPHICS = 4.5, 3.0
"""The contrasts that WCAG 2.2 asks of text (1.4.3) and of graphics (1.4.11)."""


def _elements(element=ROOT, given=None):
    """(element, attributes with those that groups hand down)."""
    given = {**(given or {}), **element.attrib}
    yield element, given
    for child in element:
        yield from _elements(child, given)


def _luminance(colour):
    def linear(channel):
        return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4

    red, green, blue = (linear(int(colour[i : i + 2], 16) / 255) for i in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _contrast(one, other):
    darker, lighter = sorted((_luminance(one), _luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def _boxes():
    for element, given in _elements():
        if element.tag == f"{SVG}rect":
            x, y, width, height = (float(given[name]) for name in ("x", "y", "width", "height"))
            yield x, y, x + width, y + height, given["fill"]


def test_contrast_is_that_of_the_definition():
    assert _contrast("#000000", "#ffffff") == pytest.approx(21)
    assert _contrast("#777777", "#777777") == 1


def test_every_text_stands_on_a_box_that_it_reads_on():
    texts = [given | {"text": element.text} for element, given in _elements() if element.tag == f"{SVG}text"]
    assert texts
    for text in texts:
        x, y = float(text["x"]), float(text["y"])
        (fill,) = [fill for left, top, right, bottom, fill in _boxes() if left < x < right and top < y < bottom]
        assert _contrast(text["fill"], fill) >= TEXT, text["text"]


@pytest.mark.parametrize("page", PAGES)
def test_lines_and_edges_show_on_the_page(page):
    strokes = {
        given["stroke"]
        for element, given in _elements()
        if element.tag in (f"{SVG}path", f"{SVG}rect") and "stroke" in given
    }
    tips = {given["fill"] for element, given in _elements() if element.tag == f"{SVG}path" and "stroke" not in given}
    for colour in strokes | tips:
        assert _contrast(colour, PAGES[page]) >= GRAPHICS, colour


def test_it_is_described_and_asks_for_nothing_outside():
    labels = ROOT.attrib["aria-labelledby"].split()
    described = {
        element.attrib.get("id"): element.text for element in ROOT if element.tag in (f"{SVG}title", f"{SVG}desc")
    }
    assert all(described[label].strip() for label in labels)
    for element, _ in _elements():
        assert element.tag.removeprefix(SVG) in {"svg", "title", "desc", "defs", "marker", "g", "path", "rect", "text"}
        assert not [name for name in element.attrib if name.endswith("href") or name.startswith("on")]
