from dataclasses import replace

import numpy as np
import pytest

from finetune.evaluation.metrics import measure_case
from finetune.evaluation.objects import SHOWN, caption_of, largest_wrong, wrong_objects
from finetune.evaluation.targets import targets_of
from finetune.evaluation.wrong import wrong_lesions
from resunet.data.cases import IGNORE, Case, LoadedCase
from resunet.data.perceptual import look
from resunet.pictures import COLOURS
from resunet.runtime import percentile_intensity

TARGETS = targets_of({0: "background", 1: "one", 2: "two"})


def loaded(labels: np.ndarray, name: str = "a", spacing=None) -> LoadedCase:
    values = np.random.default_rng(0).integers(0, 90, labels.shape).astype(np.uint8)[None]
    case = Case(name, name, name, name, None, files=(), mask=None)
    spacing = spacing or (1.0,) * labels.ndim
    return LoadedCase(case, values, spacing, percentile_intensity(values, 0, 100), labels, "", "", look(values))


def measured(truth: np.ndarray, predicted: np.ndarray, spacing=None):
    return measure_case(truth, predicted, 3, spacing or (1.0,) * truth.ndim)


def coloured(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (picture == np.array(colour)).all(axis=2)


def random_pair(seed: int, shape=(30, 26)) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    truth, predicted = ((random.integers(1, 3, shape) * (random.random(shape) < 0.1)).astype(np.uint8) for _ in range(2))
    truth[random.random(shape) < 0.05] = IGNORE
    return truth, predicted


@pytest.mark.parametrize("shown", [1, 5, 40])
def test_the_largest_of_all_cases_are_shown(shown):
    pairs = [random_pair(seed) for seed in range(5)]
    wanted = largest_wrong([measured(*pair) for pair in pairs], shown)
    for kind in ("missed", "false"):
        every = sorted((one.voxels for pair in pairs for one in wrong_lesions(*pair, None) if one.kind == kind), reverse=True)
        got = [
            one
            for i, its in wanted.items()
            for one in wrong_objects(loaded(pairs[i][0], str(i)), pairs[i][1], 1.0, its, TARGETS)
            if one.kind == kind
        ]
        assert sorted((one.size for one in got), reverse=True) == every[:shown] and len(every) > 40
        assert all(one.target in (0, 1) and one.picture.ndim == 3 for one in got)
    assert largest_wrong([measured(truth, np.where(truth == IGNORE, 0, truth)) for truth, _ in pairs], SHOWN) == {}


def test_a_missed_object_is_outlined_in_the_truth_and_a_false_one_in_the_prediction():
    truth, predicted = np.zeros((2, 60, 50), np.uint8)
    truth[10:12, 20:23] = 1  # 6 pixels, missed
    truth[40:46, 40:46] = predicted[40:46, 40:46] = 1
    predicted[50:55, 5:10] = 2
    wanted = largest_wrong([measured(truth, predicted)])
    missed, false = wrong_objects(loaded(truth), predicted, 0.5, wanted[0], TARGETS)
    assert (missed.kind, missed.size, missed.volume, missed.target, missed.index) == ("missed", 6, 3.0, 0, None)
    assert (false.kind, false.size, false.target) == ("false", 25, 1)
    assert caption_of(missed, TARGETS) == "one: 6 pixels, 3 mm²; a"
    unknown = wrong_objects(replace(loaded(truth), in_mm=False), predicted, 1.0, wanted[0], TARGETS)
    assert caption_of(unknown[0], TARGETS) == "one: 6 pixels; a"
    for one, colour, panel in ((missed, COLOURS["missed"], 1), (false, COLOURS["false"], 2)):
        height, width = one.picture.shape[:2]
        side = (width - 8) // 3
        assert height == side == 112  # 28 pixels, four times as large
        line = coloured(one.picture, colour)
        assert line.any() and not line[:, : panel * (side + 4)].any() and not line[:, panel * (side + 4) + side :].any()
    rows, columns = np.nonzero(coloured(missed.picture, COLOURS["missed"]))
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (8, 12)  # 2 × 3 pixels
    assert 40 < rows.mean() < 72 and 116 + 40 < columns.mean() < 116 + 72  # in the middle of its part


def test_others_are_white_and_ignored_pixels_have_no_outline():
    truth, predicted = np.zeros((2, 40, 40), np.uint8)
    truth[10:14, 10:14] = 1
    truth[16:19, 10:14] = 2
    predicted[16:19, 10:14] = 2
    truth[20:23, 10:14] = IGNORE
    predicted[20:22, 10:14] = 1
    (one,) = wrong_objects(loaded(truth), predicted, 1.0, largest_wrong([measured(truth, predicted)])[0], TARGETS)
    scan, in_truth, guess = (coloured(one.picture, (255, 255, 255))[:, start : start + 112] for start in (0, 116, 232))
    in_truth, guess = in_truth & ~scan, guess & ~scan  # the scan has white pixels, too
    in_truth &= ~coloured(one.picture, COLOURS["missed"])[:, 116:228]
    assert in_truth.any() and np.array_equal(in_truth, guess)  # nothing but the object of class 2
    rows = np.nonzero(guess)[0]
    assert np.ptp(rows) + 1 == 12


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_volume_shows_the_slice_with_most_of_the_object(axis):
    truth = np.zeros((9, 9, 9), np.uint8)
    at = [slice(3, 5)] * 3
    at[axis] = slice(5, 7)
    truth[tuple(at)] = 1
    at = [slice(3, 6)] * 3
    at[axis] = slice(7, 8)
    truth[tuple(at)] = 1
    spacing = tuple(4.0 if i == axis else 0.5 for i in range(3))
    case, predicted = loaded(truth, spacing=spacing), np.zeros_like(truth)
    (one,) = wrong_objects(case, predicted, 1.0, largest_wrong([measured(truth, predicted, spacing)])[0], TARGETS)
    assert case.axis == axis and (one.index, one.size) == (7, 17)
    assert caption_of(one, TARGETS) == "one: 17 voxels, 17 mm³; a, slice 7"
    line = coloured(one.picture, COLOURS["missed"])
    rows, columns = np.nonzero(line)
    scale = 112 / 9
    assert abs(np.ptp(rows) + 1 - 3 * scale) <= 2 and abs(np.ptp(columns) + 1 - 3 * scale) <= 2


def test_large_objects_are_reduced():
    truth = np.zeros((400, 600), np.uint8)
    truth[50:350, 100:500] = 1
    predicted = np.zeros_like(truth)
    (one,) = wrong_objects(loaded(truth), predicted, 1.0, largest_wrong([measured(truth, predicted)])[0], TARGETS)
    assert one.picture.shape == (75, 3 * 112 + 8, 3) and coloured(one.picture, COLOURS["missed"]).any()
