import json

import numpy as np
import pytest
from scipy import ndimage
from sklearn.calibration import calibration_curve

from finetune.evaluation.alarms import choose_threshold, notes_of, summarise_operating_point
from finetune.evaluation.calibration import BINS, Probabilities, pooled, summarise_calibration
from resunet.checkpoint import ModelConfig
from resunet.data.cases import IGNORE
from resunet.decision import OperatingPoint
from resunet.errors import InputError
from resunet.inference.threshold import requested_threshold
from resunet.model import ResUNet


def kept(truth, probability) -> Probabilities:
    record = Probabilities()
    record.add(np.asarray(truth, np.uint8), np.asarray(probability, np.float32))
    return record


def random_pair(seed: int, shape: tuple[int, ...] = (30, 20)) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    probability = random.beta(0.5, 1, shape).astype(np.float32)
    return (random.random(shape) < probability**2).astype(np.uint8), probability


def peak(value: float, *objects: float) -> Probabilities:
    return Probabilities(peak=value, peak_on_target=max(objects, default=-1.0), object_peaks=objects)


def test_the_curve_is_scikit_learns():
    truth, probability = random_pair(0, (80, 80))
    observed, mean = calibration_curve(truth.ravel(), probability.ravel(), n_bins=BINS)
    summary = summarise_calibration({"a": [kept(truth, probability)]})
    assert summary is not None and len(summary["bins"]) == BINS
    assert [one["observed"] for one in summary["bins"]] == pytest.approx(observed.tolist())
    assert [one["probability"] for one in summary["bins"]] == pytest.approx(mean.tolist(), rel=1e-5)
    assert sum(one["voxels"] for one in summary["bins"]) == truth.size
    assert json.loads(json.dumps(summary)) == summary


def test_ece_is_its_definition():
    for seed in range(4):
        truth, probability = random_pair(seed)
        for first in (0, 1):
            of = probability >= first / BINS
            expected = 0.0
            for i in range(first, BINS):
                here = of & (probability >= i / BINS) & ((probability < (i + 1) / BINS) | (i == BINS - 1))
                if here.any():
                    expected += here.sum() / of.sum() * abs(probability[here].mean() - truth[here].mean())
            assert kept(truth, probability).ece(first) == pytest.approx(expected, abs=1e-5)


def test_probabilities_that_mean_what_they_say_have_no_error():
    random = np.random.default_rng(0)
    probability = random.random(400_000, dtype=np.float32)
    truth = random.random(400_000) < probability
    assert kept(truth, probability).ece() < 0.005
    assert kept(truth, probability / 2).ece() == pytest.approx(0.25, abs=0.005)
    assert kept([0, 1], [0, 1]).ece() == 0 and kept([1, 0], [0, 1]).ece() == 1
    assert kept([0, 0], [0.01, 0.02]).ece(first=1) is None and Probabilities().ece() is None


def test_background_that_is_sure_hides_nothing_from_ece_foreground():
    truth, probability = np.zeros(10_000), np.zeros(10_000)
    probability[:10] = 0.9
    record = kept(truth, probability)
    assert record.ece() == pytest.approx(0.0009) and record.ece(first=1) == pytest.approx(0.9)


def test_ignored_voxels_are_left_out():
    truth, probability = random_pair(3)
    cut = truth.copy()
    cut[:10] = IGNORE
    probability[0, 0] = 1
    ours, expected = kept(cut, probability), kept(truth[10:], probability[10:])
    assert ours.ece() == expected.ece() and ours.peak == expected.peak < 1
    nothing = kept(np.full((2, 2), IGNORE), np.ones((2, 2)))
    assert nothing.ece() is None and nothing.peak == nothing.peak_on_target == -1


def test_parts_add_up_to_the_whole():
    truth, probability = random_pair(5)
    record = Probabilities()
    for rows in (slice(0, 7), slice(7, 30)):
        record.add(truth[rows], probability[rows])
    whole = kept(truth, probability)
    both = pooled([kept(truth[:7], probability[:7]), kept(truth[7:], probability[7:])])
    for one in (record, both):
        assert np.array_equal(one.voxels, whole.voxels) and np.array_equal(one.positive, whole.positive)
        assert one.summed == pytest.approx(whole.summed) and one.ece() == pytest.approx(whole.ece())
        assert (one.peak, one.peak_on_target) == (whole.peak, whole.peak_on_target)


def test_the_figure_is_over_groups_of_pooled_cases():
    a, b, c = (kept(*random_pair(seed)) for seed in range(3))
    summary = summarise_calibration({"x": [a, b], "y": [c]})
    assert summary["ece"] == {"mean": pytest.approx((pooled([a, b]).ece() + c.ece()) / 2), "ci95": None, "n": 2}
    assert summarise_calibration({}) is None


@pytest.mark.parametrize("budget, alarmed", [(1, 0), (99, 0), (100, 1), (299, 2), (300, 3), (999, 9)])
def test_the_threshold_is_the_lowest_within_the_budget(budget, alarmed):
    peaks = [i / 10 for i in range(10)]
    point = choose_threshold(peaks[::-1], budget)
    assert (point.alarmed, point.clean, point.budget) == (alarmed, 10, budget)
    assert sum(value > point.threshold for value in peaks) == alarmed
    if point.threshold > 0:
        assert sum(value > point.threshold - 0.05 for value in peaks) > budget / 100


def test_ties_do_not_break_the_budget():
    point = choose_threshold([0.9, 0.9, 0.9, 0.1], 500)
    assert (point.threshold, point.alarmed) == (0.9, 0)


def test_a_threshold_from_few_cases_says_so():
    assert "chosen on 10 val cases" in notes_of(choose_threshold([0.5] * 10, 20))[0]
    assert "fewer than 50 no alarm" in notes_of(choose_threshold([0.5] * 10, 20))[0]
    assert notes_of(choose_threshold([0.5] * 50, 20)) == []


def test_an_operating_point_on_other_cases():
    point = choose_threshold([0.2, 0.4], 100)
    cases = [("a", True, peak(0.5)), ("a", True, peak(0.4)), ("b", True, peak(0.1))]
    cases += [("a", False, peak(0.9, 0.8, 0.4, 0.41)), ("c", False, peak(0.9, 0.3))]
    cases += [("c", False, peak(-1.0))]  # all ignored
    summary = summarise_operating_point(point, cases)
    assert (summary["threshold"], summary["budget_per_1000"], summary["alarmed"]) == (0.4, 100, 1)
    assert summary["chosen_on"] == {"split": "val", "images_without_target": 2, "alarmed": 0}
    assert summary["false_alarms_per_1000"] == {"mean": 250, "ci95": None, "n": 2}
    assert summary["found"] == {"mean": 0.5, "ci95": None, "n": 2}  # what is above elsewhere finds no target
    assert summary["lesions_found"] == {"mean": pytest.approx((2 / 3 + 0) / 2), "ci95": None, "n": 2}


@pytest.mark.parametrize("shape", [(20, 24), (7, 9, 8)])
def test_the_peaks_of_objects_are_those_of_a_loop(shape):
    for seed in range(4):
        random = np.random.default_rng(seed)
        truth = (random.integers(1, 3, shape) * (random.random(shape) < 0.1)).astype(np.uint8)
        truth[random.random(shape) < 0.05] = IGNORE
        probability = random.random(shape, dtype=np.float32)
        record = Probabilities()
        record.add_objects(truth, probability)
        wanted = []
        for kind in (1, 2):
            components, count = ndimage.label(truth == kind, np.ones((3,) * len(shape)))
            wanted += [float(probability[components == number].max()) for number in range(1, count + 1)]
        assert sorted(record.object_peaks) == sorted(wanted) and len(wanted) > 5
    nothing = Probabilities()
    nothing.add_objects(np.zeros(shape, np.uint8), np.ones(shape, np.float32))
    assert nothing.object_peaks == ()


def test_what_a_prediction_is_decided_by():
    point = OperatingPoint(threshold=0.875, budget=20, clean=50, alarmed=1)
    two = ModelConfig(architecture=ResUNet(1, 2, (4, 8)).config.architecture, classes={0: "none", 1: "lesion"})
    with_point = two.model_copy(update={"operating_point": point})
    assert requested_threshold(two, None, False, False, False) is None is requested_threshold(two, 0.5, False, False, False)
    assert requested_threshold(two, 0.25, False, False, False) == 0.25
    assert requested_threshold(with_point, None, True, False, False) == 0.875
    assert requested_threshold(with_point, None, False, True, False) is None
    with pytest.raises(InputError, match=r"--operating-point: the model has none"):
        requested_threshold(two, None, True, False, False)
    with pytest.raises(InputError, match=r"--threshold 0\.25 and --operating-point"):
        requested_threshold(with_point, 0.25, True, False, False)
    with pytest.raises(InputError, match=r"--operating-point: decides masks, and --probabilities writes none"):
        requested_threshold(with_point, None, True, True, False)
    with pytest.raises(InputError, match=r"--operating-point: its threshold was chosen without --tta"):
        requested_threshold(with_point, None, True, False, True)
    assert requested_threshold(two, 0.25, False, False, True) == 0.25
    three = two.model_copy(update={"classes": {0: "none", 1: "lesion", 2: "oedema"}})
    with pytest.raises(InputError, match=r"--threshold 0\.25: is for models of one class; this one has lesion, oedema"):
        requested_threshold(three, 0.25, False, False, False)
