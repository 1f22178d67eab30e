import re
from collections import Counter
from xml.etree import ElementTree

import numpy as np
import pytest

from resunet.data.describe import PERCENTILES
from resunet.data.summary import pooled_histogram, rejected, stairs, summary_lines, ticks, write_summary


def images():
    rng = np.random.default_rng(0)
    sizes = [(24, 24)] * 5 + [(24, 32)] * 2
    return {f"Quellbrunn{number}": rng.integers(0, 200, size, np.uint8) for number, size in enumerate(sizes)}


def test_lines_count_what_there_is(make_manifest):
    pictures = images() | {"copy": images()["Quellbrunn0"]}
    manifest = make_manifest(
        "m", pictures, groups=dict.fromkeys(pictures, "one") | {"copy": "two"}, rejects=["cut at 7", "cut at 9", "no"]
    )
    lines = summary_lines(manifest)
    assert lines[0] == "8 scans of 8 files: 8 images, 0 volumes"
    assert lines[1] == "2 groups, 0 with a mask, 1 of the same pixels as another"
    assert lines[2:5] == ["kinds: 8 PNG", "sizes: 6 24×24, 2 24×32", "spacings (mm): 8 1.00 × 1.00"]
    assert lines[5:] == ["3 files rejected:", "  2 × cut at 7", "  1 × no"]
    assert rejected(manifest.path) == [("cut at 7", 2), ("no", 1)]
    assert "(not of every scan did anybody say whose it is)" in summary_lines(make_manifest("n", pictures))[1]


def test_the_page_shows_and_counts_and_is_the_same_every_time(make_manifest):
    manifest = make_manifest("m", images(), rejects=["broken"])
    page = write_summary(manifest)
    text = page.read_text(encoding="utf-8")
    assert page.name == "m.html" and text == write_summary(manifest).read_text(encoding="utf-8")
    cells = Counter(re.findall(r"<td[^>]*>\s*([^<]*?)\s*</td>", text))
    assert cells["24×24"] == cells["24×32"] == cells["PNG, uint8"] == cells["broken"] == 1
    assert "Intensities" in text and "Contact sheet" in text and "7 of 7 scans" in text
    assert "Quellbrunn" not in text and 'src="http' not in text and "<script" not in text


def test_pooled_histogram_is_the_mean_of_the_densities():
    rng = np.random.default_rng(1)
    scans = [rng.normal(mean, 10, 200_000) for mean in (100, 105, 110)]
    edges, density = pooled_histogram(np.array([np.percentile(scan, PERCENTILES) for scan in scans]), bins=8)
    expected = np.mean([np.histogram(scan, edges)[0] / len(scan) for scan in scans], axis=0)
    assert np.abs(density - expected).max() < 0.02  # straight lines between 13 percentiles of a bell
    assert 0.97 < density.sum() <= 1


def test_a_constant_archive_has_a_histogram():
    edges, density = pooled_histogram(np.full((3, len(PERCENTILES)), 7.0))
    assert np.isfinite(edges).all() and np.isfinite(density).all() and (np.diff(edges) > 0).all()


@pytest.mark.parametrize(("low", "high"), [(0, 255), (0, 1), (-1024, 3071), (0.013, 0.0131), (3, 4e9), (-7e-9, -1e-9), (-2, 0)])
def test_ticks_are_few_round_and_inside(low, high):
    marks = ticks(low, high)
    assert 3 <= len(marks) <= 7 and low - 1e-9 * abs(low) <= marks[0] and marks[-1] <= high + 1e-9 * abs(high)
    step = marks[1] - marks[0]
    assert f"{step:.6e}"[0] in "125" and np.allclose(np.diff(marks), step)
    assert np.allclose(np.array(marks) / step, np.rint(np.array(marks) / step))


def test_a_histogram_has_a_stair_for_each_bin():
    drawn = ElementTree.fromstring(stairs(np.array([0.0, 1.0, 2.0]), np.array([0.25, 0.75]), "#123456", "a < b").markup)
    assert drawn.get("aria-label") == "a < b"
    outline = [tuple(map(float, point.split())) for point in re.split("[ML]", drawn[0].get("d").rstrip("Z"))[1:]]
    base, third = outline[0][1], (outline[0][1] - outline[3][1]) / 3
    assert [round((base - y) / third, 1) for _, y in outline] == [0, 1, 1, 3, 3, 0]
    assert [text.text for text in drawn.iter("text")] == ["0", "0.5", "1", "1.5", "2", "value in the file"]


def test_the_page_in_a_browser(make_manifest, look_at):
    seen = look_at(write_summary(make_manifest("m", images(), rejects=["broken"])))
    assert seen.pictures and "broken" in seen.text
