import itertools
import json
import math

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score

from finetune.evaluation.metrics import METRICS, CaseMeasures, measure_case, values_by_group
from finetune.evaluation.statistics import group_means
from finetune.evaluation.summary import case_rows, policy, summarise
from finetune.evaluation.surface import TOLERANCE
from finetune.evaluation.targets import Targets, targets_of
from resunet.data.cases import IGNORE
from resunet.errors import InputError

MARKS = {".": 0, "1": 1, "2": 2, "3": 3, "#": IGNORE}


def labels(*rows: str) -> np.ndarray:
    return np.array([[MARKS[mark] for mark in row] for row in rows], np.uint8)


def named(names: list[str]) -> Targets:
    return targets_of(dict(enumerate(names)))


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


MISSED = -1  # stands for the image's diagonal
ROOT2 = math.sqrt(2)

# truth, prediction, (dice, iou, precision, recall, hd95, surface dice), lesions found, predicted lesions, false ones, false alarm
EDGES = {
    "empty truth, empty prediction": (["....", "...."], ["....", "...."], (None,) * 6, [], 0, 0, False),
    "empty truth with a prediction": (["....", "...."], ["1..1", "...."], (0, 0, 0, None, MISSED, 0), [], 2, 2, True),
    "missed": (["11..", "...."], ["....", "...."], (0, 0, None, 0, MISSED, 0), [False], 0, 0, False),
    "beside the target": (["11..", "...."], ["...1", "...."], (0, 0, 0, 0, 2.95, 0), [False], 1, 1, False),
    "perfect": (["11..", "1..."], ["11..", "1..."], (1, 1, 1, 1, 0, 1), [True], 1, 0, False),
    "half": (["11..", "...."], [".11.", "...."], (1 / 2, 1 / 3, 1 / 2, 1 / 2, 0.95, 1), [True], 1, 0, False),
    "every voxel is target": (["11"], ["11"], (1, 1, 1, 1, 0, 1), [True], 1, 0, False),
    "one voxel, beside it": (["...", ".1.", "..."], ["...", "..1", "..."], (0, 0, 0, 0, 1, 1), [False], 1, 1, False),
    "one voxel in the corner": (["1...", "...."], ["...1", "...1"], (0, 0, 0, 0, 3.1542, 0), [False], 1, 1, False),
    "ignored voxels hide a false alarm": (["##..", "...."], ["11..", "...."], (None,) * 6, [], 0, 0, False),
    "ignored voxels hide an error": (["1.##"], ["1.11"], (1, 1, 1, 1, 0, 1), [True], 1, 0, False),
    "error beside ignored voxels": (["1..#"], ["1.11"], (2 / 3, 1 / 2, 1 / 2, 1, 1.9, 2 / 3), [True], 2, 1, False),
    "all is ignored": (["####"], ["1111"], (None,) * 6, [], 0, 0, False),
    "diagonal voxels touch": (["1.", ".1"], ["1.", ".."], (2 / 3, 1 / 2, 1, 1 / 2, 0.95 * ROOT2, 2 / 3), [True], 1, 0, False),
    "touching lesions are one": (
        ["11..", "..11"],
        ["11..", "...."],
        (2 / 3, 1 / 2, 1, 1 / 2, 2.1128, 2 / 3),
        [True],
        1,
        0,
        False,
    ),
    "one prediction on two lesions": (["1.1"], ["111"], (4 / 5, 2 / 3, 2 / 3, 1, 0.9, 1), [True, True], 1, 0, False),
    "two predictions on one lesion": (["111"], ["1.1"], (4 / 5, 2 / 3, 1, 2 / 3, 0.9, 1), [True], 2, 0, False),
    "lesion cut by ignored voxels": (["1#1"], ["1.."], (2 / 3, 1 / 2, 1, 1 / 2, 1.9, 2 / 3), [True, False], 1, 0, False),
    "prediction cut by ignored voxels": (["1#."], ["111"], (2 / 3, 1 / 2, 1 / 2, 1, 1.9, 2 / 3), [True], 2, 1, False),
}


@pytest.mark.parametrize("truth, prediction, metrics, found, predicted, false, alarm", EDGES.values(), ids=EDGES.keys())
@pytest.mark.parametrize("as_volume", [False, True], ids=["2D", "3D"])
def test_edge_cases(as_volume, truth, prediction, metrics, found, predicted, false, alarm):
    pair = labels(*truth), labels(*prediction)
    case = measure(*(array[None] if as_volume else array for array in pair))
    (measures,) = case.classes
    size = (*pair[0].shape, 1) if as_volume else pair[0].shape
    expected = [math.hypot(*size) if value == MISSED else value for value in metrics]
    assert [getattr(measures, metric) for metric in METRICS] == pytest.approx(expected, abs=1e-4)
    assert sorted(measures.lesion_found) == sorted(found)
    assert (measures.lesions_predicted, measures.lesions_false) == (predicted, false)
    assert case.false_alarm is alarm


# What MONAI makes of the edge cases in which it differs: Dice, IoU, precision, recall, HD95, surface Dice. NaN is undefined, None
# with us, and leaves the means: a false alarm costs nothing but surface Dice and precision, and a miss no HD95.
NAN = math.nan
MONAI = {
    "empty truth with a prediction": (NAN, NAN, 0, NAN, NAN, 0),
    "missed": (0, 0, NAN, 0, NAN, 0),
}


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning", "ignore:.*may result in nan:UserWarning")
@pytest.mark.parametrize("name", [name for name, (truth, *_) in EDGES.items() if "#" not in "".join(truth)])
@pytest.mark.parametrize("as_volume", [False, True], ids=["2D", "3D"])
def test_edge_cases_are_those_of_monai_but_for_a_table(as_volume, name):
    import torch
    from monai.metrics import (
        compute_confusion_matrix_metric,
        compute_dice,
        compute_hausdorff_distance,
        compute_iou,
        compute_surface_dice,
        get_confusion_matrix,
    )

    truth, prediction, ours, *_ = EDGES[name]
    pair = [torch.from_numpy(labels(*rows) == 1)[None, None] for rows in (prediction, truth)]
    if as_volume:
        pair = [one[:, :, None] for one in pair]
    confusion = get_confusion_matrix(*(one.float() for one in pair))
    theirs = [
        float(one[0, 0])
        for one in (
            compute_dice(*pair),
            compute_iou(*pair),
            compute_confusion_matrix_metric("precision", confusion),
            compute_confusion_matrix_metric("sensitivity", confusion),
            compute_hausdorff_distance(*pair, include_background=True, percentile=95),
            compute_surface_dice(*pair, [1.0], include_background=True),
        )
    ]
    expected = MONAI.get(name, [NAN if value is None else value for value in ours])
    assert theirs == pytest.approx(expected, abs=1e-4, nan_ok=True) and (MISSED in ours) == (name in MONAI)


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("spacing", [(0.5, 3.0), (4.0, 0.5, 3.0)], ids=["2D", "3D"])
def test_volumes_and_lesions_of_edge_cases_are_those_of_scipy(spacing, name):
    """Volume errors in mm² and mm³ from sums, lesions from scipy's labels; what an empty truth makes of them is written out."""
    truth, prediction = (labels(*rows) for rows in EDGES[name][:2])
    if len(spacing) == 3:
        truth, prediction = truth[None], prediction[None]
    (measures,) = measure_case(truth, prediction, 2, spacing).classes
    true, predicted = truth == 1, (prediction == 1) & (truth != IGNORE)
    voxel = float(np.prod(spacing))
    bias = (float(ndimage.sum_labels(predicted)) - float(ndimage.sum_labels(true))) * voxel
    nothing = not true.any() and not predicted.any()
    assert measures.volume_bias == (None if nothing else pytest.approx(bias))
    assert measures.volume_error == (None if nothing else pytest.approx(abs(bias)))
    assert measures.relative_volume_error == (pytest.approx(abs(bias) / (true.sum() * voxel)) if true.any() else None)
    everything = np.ones((3,) * truth.ndim)
    for mask, other, sizes, right in (
        (true, predicted, measures.lesion_sizes, sum(measures.lesion_found)),
        (predicted, true, None, measures.lesions_predicted - measures.lesions_false),
    ):
        components, count = ndimage.label(mask, everything)
        theirs = [int(one) for one in ndimage.sum_labels(mask, components, range(1, count + 1))]
        hit = ndimage.sum_labels(other, components, range(1, count + 1)) if count else np.zeros(0)
        assert sorted(measures.false_sizes if sizes is None else sizes) == sorted(
            size for size, touched in zip(theirs, hit, strict=True) if sizes is not None or not touched
        )
        assert right == int((np.asarray(hit) > 0).sum())


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning", "ignore:.*may result in nan:UserWarning")
def test_surfaces_of_classes_are_those_of_monai_and_misses_are_not():
    """Four classes in voxels of 3 × 1 × 0.5 mm: one absent, one missed, one everywhere. MONAI drops the missed one."""
    import torch
    from monai.metrics import compute_hausdorff_distance

    spacing = (3.0, 1.0, 0.5)
    truth, prediction = random_case(4, (5, 9, 8), 3)
    truth[0, 0, :2] = 4  # class 3 is in neither
    one_hot = [torch.from_numpy(np.stack([array == c for c in range(5)])[None]).float() for array in (prediction, truth)]
    theirs = compute_hausdorff_distance(*one_hot, percentile=95, spacing=list(spacing))[0].tolist()
    case = measure_case(truth, prediction, 5, spacing)
    one, two, absent, missed = (measures.hd95 for measures in case.classes)
    assert [one, two] == pytest.approx(theirs[:2], rel=1e-5) and one > 0
    assert absent is None and not math.isfinite(theirs[2]) and not math.isfinite(theirs[3])
    assert missed == case.diagonal == math.hypot(15, 9, 4)
    assert case.macro("hd95") == pytest.approx((one + two + missed) / 3)
    assert case.classes[3].surface_dice == 0 and case.classes[2].surface_dice is None


def test_the_box_that_surfaces_are_compared_in_changes_nothing():
    truth, prediction, far = np.zeros((3, 30, 30), np.uint8)
    truth[4, 5] = prediction[20, 17] = 1
    assert measure(truth, prediction).classes[0].hd95 == pytest.approx(math.hypot(16, 12))
    far[28, 1] = 2
    assert measure(truth, prediction | far, 3).classes[0] == measure(truth, prediction, 3).classes[0]
    block = np.zeros((9, 9), np.uint8)
    block[2:7, 2:6] = 1
    block[2:7, 6] = IGNORE  # the voxel beside the box is what makes column 5 no surface
    shorter = block.copy()
    shorter[2:7, 5] = 0
    # truth: rows 2 and 6 and column 2 but no other of column 5: 5 + 2 × 3; prediction: rows 2 and 6, columns 2 and 4: 5 + 2 + 5
    measures = measure_case(block, shorter, 2, (1, 1), tolerance=0.5).classes[0]
    assert measures.surface_dice == pytest.approx((9 + 9) / (11 + 12))
    assert measure_case(block[::-1, ::-1], shorter[::-1, ::-1], 2, (1, 1), tolerance=0.5).classes[0].surface == measures.surface


def test_volume_errors():
    truth, prediction = np.zeros((2, 4, 5, 6), np.uint8)
    truth[:2] = 1  # 60 voxels of 10 mm³
    prediction[:3, :, :5] = 1  # 75
    case = measure_case(truth, prediction, 3, (5, 2, 1))
    one, two = case.classes
    assert (one.voxel, one.volume_bias, one.volume_error) == (10, 150, 150) and one.relative_volume_error == 0.25
    assert (two.volume_bias, two.volume_error, two.relative_volume_error) == (None, None, None)
    assert measure_case(prediction, truth, 2, (5, 2, 1)).classes[0].volume_bias == -150
    false = measure_case(np.zeros_like(truth), truth, 2, (5, 2, 1)).classes[0]
    assert (false.volume_error, false.relative_volume_error) == (600, None)
    summary = summarise([("a", "a", case)], named(["background", "one", "two"]), TOLERANCE)
    assert {name: one if isinstance(one, str) else one["mean"] for name, one in summary["volume_error"].items()} == {
        "relative": 0.25, "absolute": 0.15, "bias": 0.15, "unit": "ml"
    }  # fmt: skip
    image = measure_case(truth[0], prediction[0] * 0, 2, (2, 1)).classes[0]
    assert (image.voxel, image.volume_bias, image.relative_volume_error) == (2, -60, 1)


def test_volume_errors_have_no_interval_and_are_of_volumes_where_there_are_some():
    image, volume = np.ones((5, 6), np.uint8), np.ones((2, 5, 6), np.uint8)
    cases = [(f"v{i}", f"v{i}", measure(volume, volume * 0)) for i in range(5)]
    cases += [(f"i{i}", f"i{i}", measure(image, image * 0)) for i in range(5)]
    errors = summarise(cases, named(["background", "lesion"]), TOLERANCE)["volume_error"]
    assert errors["relative"] == {"mean": 1, "ci95": None, "n": 10} and errors["unit"] == "ml"
    assert errors["absolute"] == {"mean": pytest.approx(0.06), "ci95": None, "n": 5}
    errors = summarise(cases[5:], named(["background", "lesion"]), TOLERANCE)["volume_error"]
    assert errors["bias"] == {"mean": -30, "ci95": None, "n": 5} and errors["unit"] == "mm²"


def test_lesion_recall_by_volume_and_by_width():
    truth = np.zeros((60, 60), np.uint8)
    truth[0, :40] = 1  # a scratch, 1 pixel wide, found
    truth[5, :20] = 1  # another, missed
    truth[10:13, :50] = 1  # 3 pixels wide, found
    truth[30:40, :10] = 1  # as wide as long
    prediction = np.zeros_like(truth)
    prediction[0, 39] = prediction[12, 3] = prediction[35, 5] = 1
    lesions = summarise([("a", "a", measure_case(truth, prediction, 2, (0.5, 2)))], named(["background", "x"]), TOLERANCE)[
        "lesions"
    ]
    wide = [(row["range"], row["unit"], row["recall"]["mean"], row["n"]) for row in lesions["by_width"]]
    assert wide == [("<2", "pixels", 0.5, 2), ("2-4", "pixels", 1, 1), ("4-8", "pixels", None, 0), (">=8", "pixels", None, 0)]
    large = [(row["range"], row["unit"], row["recall"]["mean"], row["n"]) for row in lesions["by_volume"]]
    assert large == [("<10", "mm²", None, 0), ("10-50", "mm²", 0.5, 2), ("50-200", "mm²", 1, 2), (">=200", "mm²", None, 0)]
    dots = labels("11111", ".....", "1111.")  # 10 mm² and 8 mm²
    by_volume = summarise([("a", "a", measure_case(dots, dots, 2, (2, 1)))], named(["background", "x"]), TOLERANCE)["lesions"][
        "by_volume"
    ]
    assert [row["n"] for row in by_volume] == [1, 1, 0, 0]
    volume = measure_case(truth[None], prediction[None], 2, (4, 0.5, 0.5))
    lesions = summarise([("a", "a", volume)], named(["background", "x"]), TOLERANCE)["lesions"]
    assert lesions["by_width"] is None
    assert [(row["unit"], row["n"]) for row in lesions["by_volume"]] == [("mm³", n) for n in (0, 2, 2, 0)]


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
    assert summarise(cases, named(["background", "lesion"]), TOLERANCE)["dice"] == {"mean": 0.5, "ci95": None, "n": 2}


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
    summary = summarise(cases, named(["background", "edema", "tumour"]), TOLERANCE)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert list(summary) == ["surface_tolerance_mm", *METRICS, "volume_error", "classes", "lesions", "false_alarms", "policy"]
    assert list(summary["classes"]) == ["edema", "tumour"]
    assert all(
        list(of_class) == [*METRICS, "volume_error", "lesions", "false_alarms"] for of_class in summary["classes"].values()
    )
    assert list(summary["lesions"]) == ["precision", "recall", "f1", "by_size", "by_volume", "by_width"]
    assert [row["range"] for row in summary["lesions"]["by_size"]] == ["<10", "10-49", "50-199", ">=200"]
    assert summary["policy"] == policy(TOLERANCE) and all(isinstance(text, str) for text in summary["policy"].values())
    assert summary["false_alarms"]["images_without_target"] == 2 and summary["false_alarms"]["alarmed"] == 1
    assert summary["false_alarms"]["rate"] == {"mean": 0.5, "ci95": None, "n": 2}
    assert summary["false_alarms"]["per_1000"] == {"mean": 500, "ci95": None, "n": 2}
    sizes = [size for _, _, case in cases for measures in case.classes for size in measures.lesion_sizes]
    assert sum(row["n"] for row in summary["lesions"]["by_size"]) == len(sizes)


def test_the_summary_agrees_with_a_loop_over_the_rows():
    cases, names = made_cases(), ["background", "edema", "tumour"]
    summary, rows = summarise(cases, named(names), TOLERANCE), case_rows(cases, named(names))
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
    summary = summarise([("a", "a", measure(truth, prediction))], named(["background", "lesion"]), TOLERANCE)
    by_size = [(row["recall"]["mean"], row["n"]) for row in summary["lesions"]["by_size"]]
    assert by_size == [(0, 1), (0.5, 2), (0, 1), (1, 1)]
    assert summary["lesions"]["recall"]["mean"] == pytest.approx(2 / 5)
    assert summary["lesions"]["precision"]["mean"] == pytest.approx(2 / 3)
    assert summary["lesions"]["f1"]["mean"] == pytest.approx(0.5)


def test_objects_and_false_alarms_of_each_class():
    """A class is alarmed where the image lacks it, whatever else it shows; its objects are its own."""
    both = measure(labels("11....", "......", "22222.", "....2."), labels("1.....", "......", "......", "......"), 3)
    alarmed = measure(labels("11....", "......", "......", "......"), labels("11....", "......", "2.2...", "......"), 3)
    clean = measure(labels("......", "......", "......", "......"), labels("......", "......", "......", "......"), 3)
    cases = [("a", "a", both), ("b", "b", alarmed), ("c", "c", clean)]
    summary = summarise(cases, named(["background", "one", "two"]), TOLERANCE)
    one, two = summary["classes"]["one"], summary["classes"]["two"]
    assert one["lesions"]["recall"] == {"mean": 1.0, "ci95": None, "n": 2} and two["lesions"]["recall"]["mean"] == 0
    assert one["lesions"]["precision"]["mean"] == 1 and two["lesions"]["precision"]["mean"] == 0
    assert [row["n"] for row in two["lesions"]["by_size"]] == [1, 0, 0, 0]
    counted = [(its["images_without_target"], its["alarmed"]) for its in (one["false_alarms"], two["false_alarms"])]
    assert counted == [(1, 0), (2, 1)]
    assert two["false_alarms"]["rate"]["mean"] == 0.5 and two["false_alarms"]["per_1000"]["mean"] == 500
    everything = summary["false_alarms"]
    assert (everything["images_without_target"], everything["alarmed"]) == (1, 0)


def test_case_rows():
    case = measure(labels("11.", "...", "..1"), labels("1..", "...", "..."), 3)
    assert case_rows([("c", "g", case)], named(["background", "one", "two"])) == [
        {
            "id": "c",
            "group": "g",
            "class": "one",
            "dice": 0.5,
            "iou": 1 / 3,
            "precision": 1.0,
            "recall": 1 / 3,
            "hd95": pytest.approx(1 + 0.9 * (2 * ROOT2 - 1)),
            "surface_dice": 3 / 4,
            "truth_voxels": 3,
            "predicted_voxels": 1,
            "truth_volume": 3.0,
            "predicted_volume": 1.0,
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
            "hd95": "",
            "surface_dice": "",
            "truth_voxels": 0,
            "predicted_voxels": 0,
            "truth_volume": 0.0,
            "predicted_volume": 0.0,
            "lesions": 0,
            "lesions_found": 0,
            "lesions_false": 0,
        },
    ]


def test_no_cases():
    none = {"mean": None, "ci95": None, "n": 0}
    summary = summarise([], named(["background", "lesion"]), TOLERANCE)
    assert summary["dice"] == {"mean": None, "ci95": None, "n": 0}
    assert summary["false_alarms"] == {"images_without_target": 0, "alarmed": 0, "rate": none, "per_1000": none}
