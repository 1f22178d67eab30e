import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from resunet.report import COLOURS, Picture, Section, curves, image, read_metrics, shown, write_page


class Page(HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def pixels_of(picture: Picture) -> np.ndarray:
    data = re.search(r'base64,([^"]+)"', picture.markup).group(1)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_a_page_holds_everything_and_asks_for_nothing(tmp_path):
    section = Section(
        "Results",
        lead=["It helped."],
        notes=["Simulated."],
        text=["Some words."],
        table=[["run", "Dice"], ["a", "0.9"], ["b", "0.8"]],
        pictures=[image(np.zeros((4, 5), np.uint8), "a slice"), curves({"loss": ([1, 2], [3, 4])}, "a curve", "step", "loss")],
    )
    write_page(tmp_path / "report.html", "The title", [section])
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    for words in ("The title", "Results", "It helped.", "Simulated.", "Some words.", "0.9", "a slice", "a curve"):
        assert words in page.text
    names = [tag for tag, _ in page.tags]
    assert (names.count("th"), names.count("td"), names.count("figure")) == (2, 4, 2)
    addresses = [
        value for tag, attributes in page.tags for key, value in attributes.items() if key in ("src", "href", "xlink:href")
    ]
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not {"script", "link", "iframe"} & set(names)


def test_text_from_outside_is_escaped(tmp_path):
    nasty = '<script>alert("1")</script>'
    pictures = [image(np.zeros((2, 2), np.uint8), nasty), curves({nasty: ([1], [1])}, nasty, nasty, "y")]
    write_page(tmp_path / "page.html", nasty, [Section(nasty, text=[nasty], table=[[nasty], [nasty]], pictures=pictures)])
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "script" not in [tag for tag, _ in page.tags]
    assert page.text.count(nasty) >= 6


def test_an_image_keeps_its_pixels():
    grey = np.arange(20, dtype=np.uint8).reshape(4, 5)
    np.testing.assert_array_equal(pixels_of(image(grey, "x")), grey)
    np.testing.assert_array_equal(pixels_of(image(grey, "x", scale=3)), np.kron(grey, np.ones((3, 3), np.uint8)))
    colour = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    np.testing.assert_array_equal(pixels_of(image(colour, "x")), colour)


def test_curves_are_the_same_every_time_and_differ_in_colour():
    series = {name: ([1, 2, 3], [1.0, 2.0, 4.0]) for name in "abc"}
    first = curves(series, "a caption", "step", "loss", from_zero=True)
    assert first == curves(series, "a caption", "step", "loss", from_zero=True)
    assert all(colour.lower() in first.markup.lower() for colour in COLOURS[:3])
    assert 'aria-label="a caption"' in first.markup and first.markup.startswith("<svg")


def test_a_line_alone_has_no_legend():
    assert "legend" not in curves({"alone": ([1, 2], [1, 2])}, "c", "x", "y").markup
    assert "legend" in curves({"one": ([1, 2], [1, 2]), "two": ([1, 2], [2, 1])}, "c", "x", "y").markup


def test_metrics_are_read_by_name(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0, "val": 0.5}\n')
    assert read_metrics(tmp_path) == {"loss": ([1, 2], [2.0, 1.0]), "val": ([2], [0.5])}


@pytest.mark.parametrize(
    "figure, text",
    [
        ({"mean": 0.81234, "ci95": [0.7, 0.9], "n": 12}, "0.812 [0.700, 0.900], n = 12"),
        ({"mean": 0.5, "ci95": None, "n": 3}, "0.500 (too few groups for an interval), n = 3"),
        ({"mean": None, "ci95": None, "n": 0}, "undefined"),
        ({"mean": 0.0, "ci95": [0.0, 0.0], "n": 5}, "0.000 [0.000, 0.000], n = 5"),
    ],
)
def test_a_figure_is_shown_with_interval_and_number(figure, text):
    assert shown(figure) == text
    assert shown(figure, why=False) == text.replace(" (too few groups for an interval)", " [–]")


def test_more_lines_than_colours_are_all_drawn():
    series = {f"line_{i}": ([1, 2], [i, i + 1]) for i in range(len(COLOURS) + 2)}
    markup = curves(series, "c", "x", "y").markup
    assert all(name in markup for name in series)


def test_a_page_in_a_browser(tmp_path, look_at):
    """Long words, wide pictures, a wide table and a legend: readable on a phone all the same."""
    table = [["Matter", "How it was treated"], ["a" * 12, "b" * 16], ["words", "more words " * 20]]
    wide = [
        ["", *(f"column {i}" for i in range(12))],
        *([f"row {r}", *["0.123 [0.100, 0.200], n = 12"] * 12] for r in range(3)),
    ]
    pictures = [image(np.zeros((40, 2000), np.uint8), "wide"), curves({"loss": ([1, 2], [3, 4])}, "a curve", "step", "loss")]
    section = Section(
        "Results", lead=["9" * 90], notes=["x" * 300], legend=[((1, 2, 3), "one")], table=table, pictures=pictures
    )
    write_page(tmp_path / "page.html", "Title", [section, Section("Wide", table=wide), Section("One", pictures=pictures[:1])])
    seen = look_at(tmp_path / "page.html")
    assert seen.headings == ["Title", "Results", "Wide", "One"]
    assert [one["name"] for one in seen.pictures] == ["wide", "a curve", "wide"]


@pytest.mark.parametrize(
    "fault, sign",
    [
        ("<img alt='x' src='http://127.0.0.1:9/x.png'>", "requests"),
        ("<script>console.error('no')</script>", "complaints"),
        ("<script>nothing()</script>", "complaints"),
        ("<div style='width: 800px'>wide</div>", "beyond"),
        ("<table><tr><td><div style='width: 500px'>x</div></td><td>y</td></tr></table>", "cut"),
    ],
)
def test_the_browser_sees_what_is_wrong(tmp_path, browser, look_at, fault, sign):
    write_page(tmp_path / "page.html", "Title", [Section("Heading", text=["words"])])
    look_at(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(page.replace("<footer>", f"<div>{fault}</div><footer>"), encoding="utf-8")
    assert getattr(browser.look(tmp_path / "page.html", (390, 844)), sign)
    with pytest.raises(AssertionError):
        look_at(tmp_path / "page.html")


@pytest.mark.parametrize("fault", ["<img src='data:,'>", "<img alt='broken' src='data:image/png;base64,AAAA'>"])
def test_a_picture_without_a_name_or_pixels_is_seen(tmp_path, look_at, fault):
    write_page(tmp_path / "page.html", "Title", [Section("Heading", text=["words"])])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(page.replace("<footer>", f"{fault}<footer>"), encoding="utf-8")
    with pytest.raises(AssertionError):
        look_at(tmp_path / "page.html")
