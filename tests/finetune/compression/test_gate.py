import pytest

from finetune.compression.gate import Scores, judge, scores_of, smallest_size
from finetune.compression.recipe import GateSettings
from finetune.evaluation.metrics import measure_case
from resunet.errors import InputError

GATE = GateSettings(dice=0.02, recall=0.02)


def scores(dice: list[float], recall: dict[str, list[float]] | None = None) -> Scores:
    """A group a value."""
    by_group = {f"g{i}": [value] for i, value in enumerate(dice)}
    found = {size: {f"g{i}": [value] for i, value in enumerate(values)} for size, values in (recall or {}).items()}
    return Scores(dice=by_group, dice_of_targets=by_group, recall=found)


@pytest.mark.parametrize(("after", "accepted"), [(0.8, True), (0.785, True), (0.784, False), (0.7, False), (0.9, True)])
def test_dice_falls_by_less_than_two_percent_of_the_runs(after, accepted):
    verdict = judge(scores([0.8] * 6), scores([after] * 6), GATE)
    assert verdict.accepted == accepted and verdict.fall == pytest.approx(1 - after / 0.8)
    assert verdict.dice_difference["mean"] == pytest.approx(after - 0.8) and verdict.dice_difference["n"] == 6
    assert len(verdict.reasons) == (not accepted) and all("Dice on val" in reason for reason in verdict.reasons)


def test_the_recall_of_the_smallest_objects_holds():
    before = scores([0.8] * 6, {"<10": [1, 1], "10-49": [1, 1, 1, 0.5, 1, 1]})
    same = judge(before, scores([0.8] * 6, {"<10": [0, 0], "10-49": [1, 1, 1, 0.5, 1, 0.9]}), GATE)
    assert same.accepted and same.size == "10-49"  # two groups of smaller ones are too few
    lost = judge(before, scores([0.8] * 6, {"<10": [1, 1], "10-49": [1, 1, 1, 0.5, 1, 0.5]}), GATE)
    assert not lost.accepted and "objects of 10-49 voxels falls by 0.083" in lost.reasons[0]
    assert lost.recall_difference["mean"] == pytest.approx(-0.5 / 6) and lost.recall_difference["ci95"] is not None


def test_fewer_false_alarms_do_not_pay_for_lost_targets():
    targets, clean = {f"g{i}": [0.8] for i in range(6)}, {"clean": [0.0]}
    before = Scores(dice=targets | clean, dice_of_targets=targets, recall={})
    fewer = {f"g{i}": [0.75] for i in range(6)}
    verdict = judge(
        before, Scores(dice=fewer, dice_of_targets=fewer, recall={}), GATE
    )  # clean is left out: nothing is predicted
    assert verdict.fall < 0 and not verdict.accepted and "something to find falls by 6.3%" in verdict.reasons[0]


def test_a_class_that_vanishes_is_not_paid_for_by_its_false_alarms():
    """Dice of all cases rises: where the second class was seen and is not, its Dice of 0 leaves the mean."""
    first, second = {f"g{i}": [0.9] for i in range(20)}, {f"g{i}": [0.8] for i in range(4)}
    dice = {f"g{i}": [0.85 if i < 4 else 0.45 if i < 12 else 0.9] for i in range(20)}
    before = Scores(dice=dice, dice_of_targets=dice, recall={}, classes=(first, second))
    lost = {f"g{i}": [0.45 if i < 4 else 0.9] for i in range(20)}
    gone = Scores(dice=lost, dice_of_targets=lost, recall={}, classes=(first, {name: [0.0] for name in second}))
    verdict = judge(before, gone, GATE, ("inclusion", "scratch"))
    assert verdict.fall < 0 and not verdict.accepted
    assert verdict.reasons == ("Dice of scratch, in the cases that hold it, falls by 100.0% from 0.8000; the gate is 10.0%",)
    assert judge(before, gone, GATE.model_copy(update={"class_dice": 1.0}), ("inclusion", "scratch")).reasons
    little = gone.model_copy(update={"classes": (first, {name: [0.75] for name in second})})
    assert judge(before, little, GATE).accepted


def test_few_groups_of_small_objects_are_better_than_none():
    assert smallest_size(scores([1], {"<10": [], "10-49": [1, 1], "50-199": [0]})) == "10-49"
    assert smallest_size(scores([1], {"<10": []})) is None
    assert judge(scores([0.8]), scores([0.8]), GATE).recall is None


def test_nothing_cannot_be_compressed():
    with pytest.raises(InputError, match="Dice on val is 0"):
        judge(scores([0.0] * 6), scores([0.0] * 6), GATE)


def test_scores_are_evaluations():
    import numpy as np

    truth = np.zeros((12, 12), np.uint8)
    truth[1:3, 1:3], truth[5:11, 5:11] = 1, 1  # of 4 and of 36 pixels
    found = np.zeros_like(truth)
    found[5:11, 5:8] = 1
    nothing = np.zeros_like(truth)
    rows = [
        ("a", "one", measure_case(truth, found, 2, (1, 1))),
        ("b", "two", measure_case(nothing, found, 2, (1, 1))),  # a false alarm
        ("c", "two", measure_case(nothing, nothing, 2, (1, 1))),
    ]
    made = scores_of(rows)
    assert made.dice == {"one": [pytest.approx(36 / 58)], "two": [0.0]}
    assert set(made.dice_of_targets) == {"one"} and made.classes == ()
    second = truth.copy()
    second[truth == 1], second[1:3, 1:3] = 2, 1
    both = scores_of(
        [("a", "one", measure_case(second, found, 3, (1, 1))), ("b", "two", measure_case(truth, found, 3, (1, 1)))]
    )
    assert both.classes == ({"one": [0.0], "two": [pytest.approx(36 / 58)]}, {"one": [0.0]})  # "two" has none of the second
    assert made.recall["<10"] == {"one": [0.0]} and made.recall["10-49"] == {"one": [1.0]} and made.recall["50-199"] == {}
