import numpy as np

from finetune.evaluation.calibration import Probabilities, summarise_calibration
from finetune.evaluation.metrics import measure_case
from finetune.evaluation.objects import SHOWN, WrongObject
from finetune.evaluation.page import (
    calibration_section,
    class_rows,
    classes_section,
    doubling,
    operating_point_section,
    policy_section,
    reliability,
    size_histogram,
    size_section,
    telling_section,
    wrong_section,
)
from finetune.evaluation.summary import summarise
from finetune.evaluation.surface import TOLERANCE
from finetune.evaluation.targets import targets_of
from resunet.pictures import COLOURS

TARGETS = targets_of({0: "background", 1: "lesion"})


def objects(*sizes: int) -> np.ndarray:
    labels = np.zeros((2 * len(sizes), max(sizes)), np.uint8)
    for row, size in enumerate(sizes):
        labels[2 * row, :size] = 1
    return labels


def test_true_objects_are_counted_by_size():
    truth = objects(1, 3, 3, 9, 40)
    predicted = objects(1, 3, 3, 9, 40)
    predicted[[2, 6]] = 0  # one of 3, and that of 9
    case = measure_case(truth, predicted, 2, (1, 1))
    (section,) = size_section([case, case])
    assert section.text == ["10 true objects, 6 found, 4 missed."]
    assert "(1 to 64 pixels)" in section.pictures[0].caption
    assert size_section([measure_case(truth * 0, truth, 2, (1, 1))]) == []
    volume = measure_case(truth[None], truth[None], 2, (1, 1, 1))
    assert "voxels" in size_section([volume])[0].pictures[0].caption


def test_the_page_tells_objects_and_alarms_of_every_class():
    truth, predicted = np.zeros((2, 20, 40), np.uint8)
    truth[2:5, 2:35] = 2  # thin, 3 wide
    predicted[3, 3], predicted[10:12, 5] = 2, 1
    several = targets_of({0: "background", 1: "inclusion", 2: "scratch"})
    summary = summarise([("a", "a", measure_case(truth, predicted, 3, (1, 1)))], several, TOLERANCE)
    section, thin = classes_section(summary)
    found = "1.000 [–]"
    dice = f"{summary['classes']['scratch']['dice']['mean']:.3f} [–]"
    assert section.table[1:] == [
        ["inclusion", "0.000 [–]", "undefined", "0.000 [–]", "1 of 1"],
        ["scratch", dice, found, found, "0 of 0"],
    ]
    assert thin.table[1:] == [["scratch", "2-4", "1", f"{found}, n = 1"]]
    assert class_rows([summary, summary]) == [
        ["Objects found, inclusion", *2 * ["undefined"]],
        ["False alarms, inclusion in 1 cases without it", "1", "1"],
        ["Objects found, scratch", *2 * [f"{found}, n = 1"]],
        ["False alarms, scratch in 0 cases without it", "0", "0"],
    ]
    kept = {
        name: {key: its[key] for key in its if key not in ("lesions", "false_alarms")}
        for name, its in summary["classes"].items()
    }
    assert class_rows([summary | {"classes": kept}]) == []  # of an earlier version
    one = summarise([("a", "a", measure_case(truth // 2, predicted // 2, 2, (1, 1)))], TARGETS, TOLERANCE)
    assert classes_section(one) == class_rows([one]) == []  # said of all objects already


def test_bars_double():
    edges, (found, missed) = doubling([1, 2, 3, 3, 100], [3, 8, 15, 16])
    assert edges == [1, 2, 4, 8, 16, 32, 64, 128]
    assert found.tolist() == [1, 3, 0, 0, 0, 0, 1] and missed.tolist() == [0, 1, 0, 2, 1, 0, 0]
    assert doubling([1], [])[0] == [1, 2] and [one.tolist() for one in doubling([1], [])[1]] == [[1], [0]]
    sizes = np.random.default_rng(0).integers(1, 5000, 300).tolist()
    edges, (counts,) = doubling(sizes)
    assert counts.tolist() == np.histogram(sizes, edges)[0].tolist() and counts.sum() == 300


def test_found_and_missed_are_drawn_in_the_colours_of_the_overlays():
    markup = size_histogram([1, 2, 3, 3, 100], [3, 8, 8], "pixels").markup
    assert all(f"#{red:02x}{green:02x}{blue:02x}" in markup for red, green, blue in (COLOURS["found"], COLOURS["missed"]))


def test_the_rest_is_counted():
    truth = objects(*range(1, SHOWN + 4))
    case = measure_case(truth, truth * 0, 2, (1, 1))
    picture = np.zeros((4, 4, 3), np.uint8)
    shown = [WrongObject("missed", "c", 0, size, float(size), False, None, picture) for size in range(4, SHOWN + 4)]
    (section,) = wrong_section("missed", shown, [case], TARGETS)
    assert section.heading == "Missed objects" and section.text[0].startswith(
        "15 in all. The 12 largest; 3 more are not shown."
    )
    assert [one.caption for one in section.pictures][:2] == ["lesion: 15 pixels, 15 mm²; c", "lesion: 14 pixels, 14 mm²; c"]
    assert 'alt="Scan, truth and prediction around a missed object: lesion: 15 pixels' in section.pictures[0].markup
    assert wrong_section("false", shown, [case], TARGETS) == []
    (section,) = wrong_section("false", [], [measure_case(truth * 0, truth, 2, (1, 1))], TARGETS)
    assert section.heading == "False alarms" and "15 in all. The 12 largest; 3 more" in section.text[0]
    (section,) = wrong_section("false", [], [measure_case(objects(3) * 0, objects(3), 2, (1, 1))], TARGETS)
    assert "more are not shown" not in section.text[0]


def test_calibration_is_shown_where_there_are_probabilities():
    record = Probabilities()
    random = np.random.default_rng(0)
    probability = random.random((60, 60), dtype=np.float32)
    record.add((random.random((60, 60)) < probability).astype(np.uint8), probability)
    summary = {"calibration": summarise_calibration({"g": [record]})}
    (section,) = calibration_section(summary)
    assert "ECE 0.0" in section.text[0] and "Reliability" in section.pictures[0].caption
    assert calibration_section({"calibration": None}) == []
    empty = [{"voxels": 0, "probability": None, "observed": None}]
    assert "Reliability" in reliability(empty).caption


def test_the_operating_point_has_a_table():
    figure = {"mean": 0.75, "ci95": None, "n": 4}
    point = {
        "threshold": 0.625,
        "chosen_on": {"split": "val", "images_without_target": 40, "alarmed": 1},
        "budget_per_1000": 30,
        "alarmed": 2,
        "false_alarms_per_1000": {"mean": 25.0, "ci95": None, "n": 4},
        "found": figure,
        "lesions_found": figure | {"mean": 0.5},
        "policy": "how",
    }
    (section,) = operating_point_section({"false_alarms": {"images_without_target": 80, "operating_point": point}})
    cells = dict(tuple(row) for row in section.table)
    assert cells["Threshold of the probability"] == "0.625" and cells["False alarms here"] == "2 in 80 cases without target"
    assert cells["Cases with a target that are detected"].startswith("0.750") and cells["Objects found"].startswith("0.500")
    assert operating_point_section({"false_alarms": {}}) == []


def test_telling_cases_have_captions():
    assert telling_section([]) == []
    (section,) = telling_section([("worst-1", 0.25, "c1", np.zeros((24, 10, 3), np.uint8))])
    assert section.pictures[0].caption == "worst 1: Dice 0.250 (c1)" and len(section.legend) == 3
    assert policy_section({"policy": {"empty": "left out"}}).table[1] == ["empty", "left out"]
