import numpy as np
import pytest
from scipy import ndimage

from finetune.evaluation.lesions import find_lesions, is_thin, widths


def drawn(*rows: str) -> np.ndarray:
    return np.array([[0 if mark == "." else int(mark) for mark in row] for row in rows], np.uint8)


@pytest.mark.parametrize("shape", [(24, 20), (9, 10, 8)])
def test_components_are_those_of_scipy(shape):
    everything = np.ones((3,) * len(shape))
    for seed in range(6):
        random = np.random.default_rng(seed)
        labels, other = (random.integers(0, 3, shape) * (random.random(shape) < 0.3) for _ in range(2))
        ours = find_lesions(labels.astype(np.uint8), other.astype(np.uint8), with_widths=False)
        theirs = []
        for kind in (1, 2):
            components, count = ndimage.label(labels == kind, everything)
            for index in range(1, count + 1):
                voxels = components == index
                theirs.append((kind, voxels.sum(), bool((other[voxels] == kind).any())))
        assert sorted(zip(ours.kind, ours.size, ours.hit, strict=True)) == sorted(theirs) and len(theirs) > 5


def test_no_lesions():
    nothing = find_lesions(np.zeros((4, 4), np.uint8), np.ones((4, 4), np.uint8), with_widths=True)
    assert not len(nothing.kind) and not len(nothing.size) and not len(nothing.hit) and not len(nothing.width)


@pytest.mark.parametrize("width", range(1, 8))
@pytest.mark.parametrize("upright", [False, True])
def test_the_width_of_a_line_is_its_pixels(width, upright):
    line = np.zeros((12, 40), np.uint8)
    line[2 : 2 + width, 3:37] = 1
    assert widths(line.T if upright else line, 1) == [width]


def test_widths_are_of_each_object_alone():
    labels = drawn(
        "1.....222",
        ".1....222",
        "..1...222",
        "...1.....",
        "....1..11",
    )
    found = find_lesions(labels, labels, with_widths=True)
    assert sorted(zip(found.kind, found.size, found.width, strict=True)) == [(1, 2, 1.0), (1, 5, 1.0), (2, 9, 3.0)]


def test_a_disc_is_as_wide_as_it_is():
    y, x = np.mgrid[:64, :64]
    for radius in (3.0, 7.5, 20.0):
        disc = ((y - 31.5) ** 2 + (x - 31.5) ** 2 <= radius**2).astype(np.int32)
        assert widths(disc, 1)[0] == pytest.approx(2 * radius, abs=1.5)  # pixels at its rim stand out


def test_thin_is_at_least_four_times_as_long_as_wide():
    assert is_thin(4, 1.0) and is_thin(36, 3.0)
    assert not is_thin(3, 1.0) and not is_thin(35, 3.0) and not is_thin(1, 1.0)
