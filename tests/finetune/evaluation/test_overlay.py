import numpy as np
import pytest

from finetune.evaluation.overlay import error_picture, grey_picture, overlay, square, telling_slice, zoom_box
from finetune.evaluation.targets import targets_of
from resunet.data.cases import IGNORE, Case, LoadedCase
from resunet.data.perceptual import look
from resunet.pictures import COLOURS, label_picture, side_by_side
from resunet.runtime import percentile_intensity

TARGETS = targets_of({0: "background", 1: "one", 2: "two"})


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
    assert error_picture(grey(1, 8), truth, predicted, TARGETS)[0].tolist() == wanted


def test_labels_are_tinted_and_ignored_pixels_are_not():
    labels = np.array([[0, 1, 2, IGNORE]], np.uint8)
    plain, found = [100, 100, 100], tinted("found")
    assert label_picture(grey(1, 4), labels)[0].tolist() == [plain, found, found, plain]


def test_pictures_do_not_change_what_they_are_made_of():
    picture, labels = grey(2, 2), np.ones((2, 2), np.uint8)
    label_picture(picture, labels)
    error_picture(picture, labels, labels, TARGETS)
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


# Machado, Oliveira & Fernandes 2009, severity 1, on linear RGB
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    "no colours": [[0.2126, 0.7152, 0.0722]] * 3,
}


def lab(colour, blindness: str) -> np.ndarray:
    """CIE L*a*b* of an sRGB colour as somebody sees it."""
    value = np.asarray(colour, float) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.asarray(BLINDNESS[blindness]) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ seen
    f = np.cbrt(xyz / np.array([0.9505, 1, 1.089]))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_the_colour_blind_tell_the_colours_apart(blindness):
    """Over any grey, each from the other two; a difference of 2.3 in L*a*b* is just to be seen. Without colours: by lightness."""
    least = 8 if blindness == "no colours" else 20
    for value in (0, 60, 128, 200, 255):
        three = [lab(tinted(name, value), blindness) for name in COLOURS]
        assert min(np.linalg.norm(a - b) for i, a in enumerate(three) for b in three[:i]) > least, value


def test_a_square_stays_inside():
    size = (40, 30)
    assert square((slice(10, 12), slice(20, 22)), 8, size) == (slice(7, 15), slice(17, 25))
    assert square((slice(0, 2), slice(29, 30)), 8, size) == (slice(0, 8), slice(22, 30))
    assert square((slice(10, 12), slice(20, 22)), 100, size) == (slice(0, 40), slice(0, 30))


def test_what_is_tiny_is_enlarged():
    truth, predicted = np.zeros((2, 128, 100), np.uint8)
    assert zoom_box(truth, predicted) is None
    truth[60:62, 50:53] = 1
    box = zoom_box(truth, predicted)
    assert box == (slice(53, 69), slice(43, 59))  # 16 pixels around it
    row = overlay(grey(128, 100), truth, predicted, TARGETS)
    assert row.shape == (128, 3 * 100 + 128 + 3 * 4, 3)
    enlarged, third = row[:, -128:], row[:, 208:308]
    assert (enlarged[56:72, 56:80] == tinted("missed")).all() and (enlarged == tinted("missed")).all(axis=2).sum() == 6 * 64
    frame = (third == 255).all(axis=2)
    assert frame[52, 42:60].all() and frame[69, 42:60].all() and frame[52:70, 42].all() and frame[52:70, 59].all()
    assert frame.sum() == 4 * 17 and (overlay(grey(128, 100), truth, predicted, TARGETS)[:, :100] == 100).all()


def test_the_tiny_one_is_enlarged_where_the_others_lie_apart():
    truth, predicted = np.zeros((2, 100, 100), np.uint8)
    truth[5:25, 5:25] = predicted[90:95, 90:95] = 1
    assert zoom_box(truth, predicted) is None  # 400 pixels can be seen
    truth[70, 20] = 1
    rows, columns = zoom_box(truth, predicted)
    assert rows.start <= 70 < rows.stop and columns.start <= 20 < columns.stop and rows.stop - rows.start == 16
    truth[50:100] = IGNORE
    assert zoom_box(truth, predicted) == (slice(0, 30), slice(0, 30))  # what nobody labelled is nothing to be seen
    assert overlay(grey(30, 30), truth[:30, :30], predicted[:30, :30], TARGETS).shape == (30, 3 * 30 + 8, 3)


def test_a_frame_stays_in_the_picture():
    truth = np.zeros((64, 64), np.uint8)
    truth[0, 0] = 1
    third = overlay(grey(64, 64), truth, truth, TARGETS)[:, 136:200]
    frame = (third == 255).all(axis=2)
    assert frame[16, :17].all() and frame[:17, 16].all() and frame[0, 1:17].all() and frame[1:17, 0].all()


def test_pictures_of_two_widths_are_reduced_alike():
    assert side_by_side([grey(40, 20), grey(40, 40)], longest=10).shape == (10, 5 + 4 + 10, 3)
