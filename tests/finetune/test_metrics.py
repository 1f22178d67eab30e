import itertools
import json

import numpy as np
import pytest
from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score

from finetune.metrics import (
    METRICS,
    CaseMeasures,
    case_rows,
    measure_case,
    summarise,
    values_by_group,
)
from finetune.statistics import group_means
from resunet.data.cases import IGNORE
from resunet.errors import InputError

MARKS = {".": 0, "1": 1, "2": 2, "3": 3, "#": IGNORE}


def labels(*rows: str) -> np.ndarray:
    return np.array([[MARKS[mark] for mark in row] for row in rows], np.uint8)


def measure(truth: np.ndarray, prediction: np.ndarray, num_classes: int = 2) -> CaseMeasures:
    return measure_case(truth, prediction, num_classes, (1.0,) * truth.ndim)


def random_case(seed: int, shape: tuple[int, ...], num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Sparse blobs and noise; every third case lacks a class, every second has ignored voxels."""
    random = np.random.default_rng(seed)
    foreground = random.random(shape) < random.choice([0.05, 0.2, 0.5])
    truth = (foreground * random.integers(1, num_classes, shape)).astype(np.uint8)
    redrawn = random.random(shape) < random.choice([0.02, 0.3, 0.9])
    prediction = np.where(redrawn, random.integers(0, num_classes, shape), truth).astype(np.uint8)
    if seed % 3 == 0:
        (truth if seed % 2 else prediction)[...] %= num_classes - 1
    if seed % 2:
        truth[random.random(shape) < 0.1] = IGNORE
    return truth, prediction


SHAPES = [(12, 9), (5, 7, 6)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_classes", [2, 4])
def test_voxel_metrics_are_those_of_scikit_learn(shape, num_classes):
    for seed in range(12):
        truth, prediction = random_case(seed, shape, num_classes)
        kept = truth != IGNORE
        for index, measures in enumerate(measure(truth, prediction, num_classes).classes, start=1):
            binary = (truth[kept] == index).astype(int), (prediction[kept] == index).astype(int)
            assert (measures.truth_voxels, measures.predicted_voxels) == (binary[0].sum(), binary[1].sum())
            oracles = {"dice": f1_score, "iou": jaccard_score, "precision": precision_score, "recall": recall_score}
            defined = {
                "dice": binary[0].any() or binary[1].any(),
                "iou": binary[0].any() or binary[1].any(),
                "precision": binary[1].any(),
                "recall": binary[0].any(),
            }
            for metric, oracle in oracles.items():
                value = getattr(measures, metric)
                if defined[metric]:
                    assert value == pytest.approx(oracle(*binary, zero_division=0), abs=1e-12)
                else:
                    assert value is None


def test_dice_is_that_of_monai():
    import torch  # here, because MONAI takes seconds to import
    from monai.metrics import compute_dice

    for seed in range(0, 12, 2):  # MONAI knows no ignored voxels
        truth, prediction = random_case(seed, (5, 7, 6), 3)
        one_hot = [torch.from_numpy(np.stack([array == c for c in range(3)])[None]).float() for array in (prediction, truth)]
        theirs = compute_dice(*one_hot, include_background=False, ignore_empty=False)[0].tolist()
        for ours, value in zip(measure(truth, prediction, 3).classes, theirs, strict=True):
            assert (ours.dice if ours.dice is not None else 1.0) == pytest.approx(value, abs=1e-6)  # MONAI's empty pair is 1


def flood_fill(mask: np.ndarray) -> list[set[tuple[int, ...]]]:
    """Components by the definition: voxels that differ by at most 1 along every axis are neighbours."""
    left = {tuple(map(int, voxel)) for voxel in np.argwhere(mask)}
    components = []
    while left:
        component, front = set(), [left.pop()]
        while front:
            voxel = front.pop()
            component.add(voxel)
            for step in itertools.product((-1, 0, 1), repeat=mask.ndim):
                neighbour = tuple(a + b for a, b in zip(voxel, step, strict=True))
                if neighbour in left:
                    left.remove(neighbour)
                    front.append(neighbour)
        components.append(component)
    return components


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_classes", [2, 4])
def test_lesions_are_those_of_a_flood_fill(shape, num_classes):
    for seed in range(12):
        truth, prediction = random_case(seed, shape, num_classes)
        case = measure(truth, prediction, num_classes)
        for index, measures in enumerate(case.classes, start=1):
            predicted_mask = (prediction == index) & (truth != IGNORE)
            in_truth, in_prediction = flood_fill(truth == index), flood_fill(predicted_mask)
            found = sorted((len(lesion), any(predicted_mask[voxel] for voxel in lesion)) for lesion in in_truth)
            assert sorted(zip(measures.lesion_sizes, measures.lesion_found, strict=True)) == found
            assert measures.lesions_predicted == len(in_prediction)
            assert measures.lesions_false == sum(not any(truth[voxel] == index for voxel in lesion) for lesion in in_prediction)


# truth, prediction, (dice, iou, precision, recall), lesions found, predicted lesions, false ones, false alarm
EDGES = {
    "empty truth, empty prediction": (["....", "...."], ["....", "...."], (None,) * 4, [], 0, 0, False),
    "empty truth with a prediction": (["....", "...."], ["1..1", "...."], (0, 0, 0, None), [], 2, 2, True),
    "missed": (["11..", "...."], ["....", "...."], (0, 0, None, 0), [False], 0, 0, False),
    "beside the target": (["11..", "...."], ["...1", "...."], (0, 0, 0, 0), [False], 1, 1, False),
    "perfect": (["11..", "1..."], ["11..", "1..."], (1, 1, 1, 1), [True], 1, 0, False),
    "half": (["11..", "...."], [".11.", "...."], (1 / 2, 1 / 3, 1 / 2, 1 / 2), [True], 1, 0, False),
    "every voxel is target": (["11"], ["11"], (1, 1, 1, 1), [True], 1, 0, False),
    "ignored voxels hide a false alarm": (["##..", "...."], ["11..", "...."], (None,) * 4, [], 0, 0, False),
    "ignored voxels hide an error": (["1.##"], ["1.11"], (1, 1, 1, 1), [True], 1, 0, False),
    "error beside ignored voxels": (["1..#"], ["1.11"], (2 / 3, 1 / 2, 1 / 2, 1), [True], 2, 1, False),
    "all is ignored": (["####"], ["1111"], (None,) * 4, [], 0, 0, False),
    "diagonal voxels touch": (["1.", ".1"], ["1.", ".."], (2 / 3, 1 / 2, 1, 1 / 2), [True], 1, 0, False),
    "one prediction on two lesions": (["1.1"], ["111"], (4 / 5, 2 / 3, 2 / 3, 1), [True, True], 1, 0, False),
    "two predictions on one lesion": (["111"], ["1.1"], (4 / 5, 2 / 3, 1, 2 / 3), [True], 2, 0, False),
    "lesion cut by ignored voxels": (["1#1"], ["1.."], (2 / 3, 1 / 2, 1, 1 / 2), [True, False], 1, 0, False),
    "prediction cut by ignored voxels": (["1#."], ["111"], (2 / 3, 1 / 2, 1 / 2, 1), [True], 2, 1, False),
}


@pytest.mark.parametrize("truth, prediction, metrics, found, predicted, false, alarm", EDGES.values(), ids=EDGES.keys())
@pytest.mark.parametrize("as_volume", [False, True], ids=["2D", "3D"])
def test_edge_cases(as_volume, truth, prediction, metrics, found, predicted, false, alarm):
    pair = labels(*truth), labels(*prediction)
    case = measure(*(array[None] if as_volume else array for array in pair))
    (measures,) = case.classes
    assert [getattr(measures, metric) for metric in METRICS] == pytest.approx(list(metrics))
    assert sorted(measures.lesion_found) == sorted(found)
    assert (measures.lesions_predicted, measures.lesions_false) == (predicted, false)
    assert case.false_alarm is alarm


def test_a_case_ignored_altogether_is_not_one_without_target():
    assert measure(labels("..#"), labels("...")).without_target
    assert not measure(labels("###"), labels("...")).without_target


def test_corners_touch_in_3d():
    truth = np.zeros((3, 3, 3), np.uint8)
    truth[0, 0, 0] = truth[1, 1, 1] = truth[2, 0, 2] = 1
    (measures,) = measure(truth, truth).classes
    assert measures.lesion_sizes == (3,)


def test_classes_are_counted_apart():
    truth = labels("11.22", "11.22")
    prediction = labels("11.11", "12.11")
    one, two, three = measure(truth, prediction, 4).classes
    assert (one.true_positive, one.false_positive, one.false_negative) == (3, 4, 1)
    assert (two.true_positive, two.false_positive, two.false_negative) == (0, 1, 4)
    assert (one.lesion_found, one.lesions_predicted, one.lesions_false) == ((True,), 2, 1)
    assert (two.lesion_found, two.lesions_predicted, two.lesions_false) == ((False,), 1, 1)
    assert three.dice is None
    assert measure(truth, prediction, 4).macro("dice") == pytest.approx((6 / 11 + 0) / 2)  # class 3 is in neither


@pytest.mark.parametrize(
    "truth, prediction, precision, recall, f1",
    [
        (["1.1.1"], ["111.."], 1, 2 / 3, 0.8),  # 2TP/(2TP+FP+FN) would count TP as 1 or as 2
        (["111.."], ["1.1.1"], 2 / 3, 1, 0.8),
        (["1...."], ["....."], None, 0, 0),
        (["....."], ["1...."], 0, None, 0),
        (["1...."], ["....1"], 0, 0, 0),
        (["....."], ["....."], None, None, None),
    ],
)
def test_lesion_f1(truth, prediction, precision, recall, f1):
    case = measure(labels(*truth), labels(*prediction))
    assert [case.lesion_precision, case.lesion_recall(), case.lesion_f1] == pytest.approx([precision, recall, f1])


def test_inputs_are_not_changed():
    truth, prediction = random_case(1, (6, 6, 6), 3)
    before = truth.copy(), prediction.copy()
    truth.flags.writeable = prediction.flags.writeable = False
    measures = measure(truth, prediction, 3)
    assert np.array_equal(truth, before[0]) and np.array_equal(prediction, before[1])
    assert measure(np.asfortranarray(truth), prediction[::-1][::-1], 3).macro("dice") == measures.macro("dice")


def test_unequal_shapes_are_refused():
    with pytest.raises(InputError, match=r"\(4, 5\).*\(4, 6\)"):
        measure(np.zeros((4, 5), np.uint8), np.zeros((4, 6), np.uint8))


@pytest.mark.parametrize("truth, prediction, name", [(["1.3"], ["1.."], "truth"), (["1.."], ["1.#"], "prediction")])
def test_values_that_are_no_class_are_refused(truth, prediction, name):
    with pytest.raises(InputError, match=f"the {name} holds .* allowed are 0 to 1"):
        measure(labels(*truth), labels(*prediction))


def test_groups_weigh_the_same_whatever_their_number_of_cases():
    hit, miss = (measure(labels("1."), labels(text)) for text in ("1.", ".."))
    cases = [(f"a{i}", "a", hit) for i in range(9)] + [("b0", "b", miss)]
    assert summarise(cases, ["background", "lesion"])["dice"] == {"mean": 0.5, "ci95": None, "n": 2}


def made_cases() -> list[tuple[str, str, CaseMeasures]]:
    cases = []
    for seed in range(14):
        truth, prediction = random_case(seed, (16, 16), 3)
        if seed % 7 == 0:
            truth[...] = 0
        if seed == 7:
            prediction[...] = 0
        cases.append((f"case{seed}", f"group{seed % 6}", measure(truth, prediction, 3)))
    return cases


def test_the_summary_holds_to_the_contract():
    cases = made_cases()
    summary = summarise(cases, ["background", "edema", "tumour"])
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert list(summary) == [*METRICS, "classes", "lesions", "false_alarms", "policy"]
    assert list(summary["classes"]) == ["edema", "tumour"]
    assert all(list(of_class) == list(METRICS) for of_class in summary["classes"].values())
    assert list(summary["lesions"]) == ["precision", "recall", "f1", "by_size"]
    assert [row["range"] for row in summary["lesions"]["by_size"]] == ["<10", "10-49", "50-199", ">=200"]
    assert all(isinstance(sentence, str) for sentence in summary["policy"].values())
    assert summary["false_alarms"]["images_without_target"] == 2 and summary["false_alarms"]["alarmed"] == 1
    assert summary["false_alarms"]["rate"] == {"mean": 0.5, "ci95": None, "n": 2}
    sizes = [size for _, _, case in cases for measures in case.classes for size in measures.lesion_sizes]
    assert sum(row["n"] for row in summary["lesions"]["by_size"]) == len(sizes)


def test_the_summary_agrees_with_a_loop_over_the_rows():
    cases, names = made_cases(), ["background", "edema", "tumour"]
    summary, rows = summarise(cases, names), case_rows(cases, names)
    assert len(rows) == len(cases) * 2
    for metric in METRICS:
        for wanted, figures in [({"edema", "tumour"}, summary), *(({name}, summary["classes"][name]) for name in names[1:])]:
            of_groups = []
            for group in sorted({row["group"] for row in rows}):
                of_cases = []
                for case in sorted({row["id"] for row in rows if row["group"] == group}):
                    values = [row[metric] for row in rows if row["id"] == case and row["class"] in wanted and row[metric] != ""]
                    if values:
                        of_cases.append(sum(values) / len(values))
                if of_cases:
                    of_groups.append(sum(of_cases) / len(of_cases))
            assert figures[metric]["mean"] == pytest.approx(sum(of_groups) / len(of_groups))
            assert figures[metric]["n"] == len(of_groups)
    means = group_means(values_by_group(cases, lambda case: case.macro("dice")))
    assert summary["dice"]["mean"] == pytest.approx(sum(means.values()) / len(means))


def test_lesion_recall_by_size():
    truth = np.zeros((40, 40), np.uint8)
    truth[0, :9] = truth[2, :10] = truth[4:11, :7] = truth[12:22, :5] = truth[24:34, :20] = 1  # 9, 10, 49, 50, 200 voxels
    prediction = np.zeros_like(truth)
    prediction[2, 0] = prediction[24, 0] = prediction[39, 39] = 1
    summary = summarise([("a", "a", measure(truth, prediction))], ["background", "lesion"])
    by_size = [(row["recall"]["mean"], row["n"]) for row in summary["lesions"]["by_size"]]
    assert by_size == [(0, 1), (0.5, 2), (0, 1), (1, 1)]
    assert summary["lesions"]["recall"]["mean"] == pytest.approx(2 / 5)
    assert summary["lesions"]["precision"]["mean"] == pytest.approx(2 / 3)
    assert summary["lesions"]["f1"]["mean"] == pytest.approx(0.5)


def test_case_rows():
    case = measure(labels("11.", "...", "..1"), labels("1..", "...", "..."), 3)
    assert case_rows([("c", "g", case)], ["background", "one", "two"]) == [
        {
            "id": "c",
            "group": "g",
            "class": "one",
            "dice": 0.5,
            "iou": 1 / 3,
            "precision": 1.0,
            "recall": 1 / 3,
            "truth_voxels": 3,
            "predicted_voxels": 1,
            "lesions": 2,
            "lesions_found": 1,
            "lesions_false": 0,
        },
        {
            "id": "c",
            "group": "g",
            "class": "two",
            "dice": "",
            "iou": "",
            "precision": "",
            "recall": "",
            "truth_voxels": 0,
            "predicted_voxels": 0,
            "lesions": 0,
            "lesions_found": 0,
            "lesions_false": 0,
        },
    ]


def test_no_cases():
    summary = summarise([], ["background", "lesion"])
    assert summary["dice"] == {"mean": None, "ci95": None, "n": 0}
    assert summary["false_alarms"] == {"images_without_target": 0, "alarmed": 0, "rate": {"mean": None, "ci95": None, "n": 0}}
