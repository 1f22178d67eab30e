import numpy as np
import pytest

from finetune.overlay import COLOURS, error_picture, grey_picture, label_picture, side_by_side, telling_slice
from resunet.data.cases import IGNORE, Case, LoadedCase
from resunet.data.perceptual import look
from resunet.runtime import percentile_intensity


def grey(height: int, width: int, value: int = 100) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def tinted(colour: str, value: int = 100) -> list[int]:
    return [int(0.4 * value + 0.6 * c + 1e-3) for c in COLOURS[colour]]


def test_errors_have_their_colours():
    truth = np.array([[0, 1, 2, 1, 2, 0, IGNORE, IGNORE]], np.uint8)
    predicted = np.array([[0, 1, 2, 2, 0, 1, 1, 0]], np.uint8)
    plain = [100, 100, 100]
    found, false, missed = (tinted(name) for name in ("found", "false", "missed"))
    assert found != false != missed != plain
    wanted = [plain, found, found, false, missed, false, plain, plain]
    assert error_picture(grey(1, 8), truth, predicted)[0].tolist() == wanted


def test_labels_are_tinted_and_ignored_pixels_are_not():
    labels = np.array([[0, 1, 2, IGNORE]], np.uint8)
    plain, found = [100, 100, 100], tinted("found")
    assert label_picture(grey(1, 4), labels)[0].tolist() == [plain, found, found, plain]


def test_pictures_do_not_change_what_they_are_made_of():
    picture, labels = grey(2, 2), np.ones((2, 2), np.uint8)
    label_picture(picture, labels)
    error_picture(picture, labels, labels)
    assert (picture == 100).all() and (labels == 1).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_telling_slice_has_most_foreground(axis):
    truth = np.zeros((6, 6, 6), np.uint8)
    at = [slice(None)] * 3
    at[axis] = 4
    truth[tuple(at)][:3, :3] = 2
    at[axis] = 1
    truth[tuple(at)][...] = IGNORE
    assert telling_slice(truth, axis) == 4
    assert telling_slice(np.zeros((6, 8, 10), np.uint8), axis) == 3 + axis
    assert telling_slice(truth[0], None) == 0


def test_greys_are_between_the_percentiles_of_the_slice():
    values = np.linspace(0, 4000, 50 * 40).astype(np.uint16).reshape(1, 50, 40)
    case = LoadedCase(
        Case("a", "a", "a", "a", None, files=(), mask=None),
        values,
        (1, 1),
        percentile_intensity(values, 0, 100),
        None,
        "",
        "",
        look(values),
    )
    picture = grey_picture(case, 0)
    assert picture.shape == (50, 40, 3) and picture.dtype == np.uint8
    assert (picture[..., 0] == picture[..., 1]).all() and (picture[..., 0] == picture[..., 2]).all()
    low, high = np.percentile(values, [1, 99.5])
    wanted = np.clip((values[0] - low) / (high - low), 0, 1) * 255
    assert np.abs(picture[..., 0] - wanted).max() < 1.001
    assert (picture[0, :20] == 0).all() and (picture[-1, -10:] == 255).all()  # 1 % and 0.5 % of 2000
    assert (np.diff(picture[..., 0].astype(int).ravel()) >= 0).all() and len(np.unique(picture)) == 256


def test_pictures_side_by_side():
    row = side_by_side([grey(5, 7, 10), grey(5, 3, 20)])
    assert row.shape == (5, 7 + 4 + 3, 3)
    assert (row[:, :7] == 10).all() and (row[:, 7:11] == 255).all() and (row[:, 11:] == 20).all()
    assert side_by_side([grey(40, 20), grey(40, 20)], longest=10).shape == (10, 5 + 4 + 5, 3)
