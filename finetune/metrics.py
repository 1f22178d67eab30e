"""What a segmentation got right: voxels and lesions of one case, figures over groups of cases.

Nothing is forgiven: an empty truth with a prediction scores Dice 0, a missed class scores Dice 0, and no object is dropped
for being small. A value that has no definition is None and leaves its mean; which values those are is written in POLICY,
which `summarise` puts beside the figures.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cc3d
import numpy as np
from numpy.typing import NDArray

from finetune.statistics import FEWEST_GROUPS, figure
from resunet.data.cases import IGNORE
from resunet.errors import InputError

METRICS = ("dice", "iou", "precision", "recall")
LESION_SIZES: tuple[tuple[str, int, float], ...] = (  # name, smallest, largest number of voxels
    ("<10", 1, 9),
    ("10-49", 10, 49),
    ("50-199", 50, 199),
    (">=200", 200, math.inf),
)

POLICY = {
    "ignored": f"Voxels that the truth marks {IGNORE} are left out of every count: they are neither truth nor "
    "prediction, and a lesion that they cut in two counts as two.",
    "empty": "A class absent from truth and prediction is left out of Dice, IoU, precision and recall. A class absent "
    "from the truth but predicted has Dice, IoU and precision 0, and no recall.",
    "missed": "A class present in the truth and not predicted has Dice, IoU and recall 0, and no precision.",
    "macro": "Dice, IoU, precision and recall of a case are the mean over its foreground classes where defined.",
    "averaging": "A figure is the mean over groups of the group's mean over its cases; n counts groups with a value.",
    "interval": "95 % Student-t interval over the groups' means, cut to [0, 1]; Clopper-Pearson where every group's "
    f"mean is exactly 0 or 1; null below {FEWEST_GROUPS} groups.",
    "connectivity": "Lesions are connected components of one class: 8-connected in 2D, 26-connected in 3D. No dilation, "
    "and no smallest size.",
    "matching": "A truth lesion is found if at least one of its voxels is predicted as its class. A predicted lesion is "
    "false if it holds no truth voxel of its class. Matching is many-to-many: one predicted lesion may find several "
    "truth lesions, and several predicted lesions on one truth lesion are all true.",
    "lesions": "Of a case, all classes together: recall = found / truth lesions, precision = predicted lesions that are "
    "not false / predicted lesions, f1 = 2PR/(P+R) of these two, 0 if only one side has lesions, left out if neither "
    "has.",
    "by_size": "Recall of the truth lesions of that many voxels, ignored voxels not counted; n beside it counts truth "
    "lesions, n inside the figure counts groups.",
    "false_alarms": "images_without_target counts the cases whose truth has no foreground and is not ignored "
    "altogether, alarmed those of them with any predicted foreground; rate is a figure, averaged over groups as all "
    "figures are, so it need not be their quotient.",
}

Value = Callable[["CaseMeasures"], float | None]


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None


@dataclass(frozen=True)
class ClassMeasures:
    """One foreground class of one case: its voxels and its lesions, ignored voxels left out.

    With T the truth and P the prediction: dice 2|T∩P|/(|T|+|P|), iou |T∩P|/|T∪P|, precision |T∩P|/|P|, recall |T∩P|/|T|;
    None where the denominator is 0.
    """

    true_positive: int  # voxels
    false_positive: int
    false_negative: int
    lesion_sizes: tuple[int, ...]  # voxels of each truth lesion
    lesion_found: tuple[bool, ...]  # in the order of lesion_sizes
    lesions_predicted: int
    lesions_false: int  # of lesions_predicted

    @property
    def truth_voxels(self) -> int:
        return self.true_positive + self.false_negative

    @property
    def predicted_voxels(self) -> int:
        return self.true_positive + self.false_positive

    @property
    def dice(self) -> float | None:
        return _ratio(2 * self.true_positive, self.truth_voxels + self.predicted_voxels)

    @property
    def iou(self) -> float | None:
        return _ratio(self.true_positive, self.true_positive + self.false_positive + self.false_negative)

    @property
    def precision(self) -> float | None:
        return _ratio(self.true_positive, self.predicted_voxels)

    @property
    def recall(self) -> float | None:
        return _ratio(self.true_positive, self.truth_voxels)


@dataclass(frozen=True)
class CaseMeasures:
    """One case. `classes[i]` is class index i + 1: background has no measures."""

    classes: tuple[ClassMeasures, ...]
    spacing: tuple[float, ...]  # mm, in the order of the array's axes
    evaluated_voxels: int  # not ignored

    def macro(self, metric: str) -> float | None:
        """The mean of one of METRICS over the foreground classes where it is defined; None where it is nowhere."""
        assert metric in METRICS, metric
        defined = [value for measures in self.classes if (value := getattr(measures, metric)) is not None]
        return _ratio(math.fsum(defined), len(defined))

    @property
    def without_target(self) -> bool:
        return self.evaluated_voxels > 0 and not any(measures.truth_voxels for measures in self.classes)

    @property
    def false_alarm(self) -> bool:
        return self.without_target and any(measures.predicted_voxels for measures in self.classes)

    @property
    def lesion_precision(self) -> float | None:
        """The share of predicted lesions, of all classes, that touch truth of their class; None if nothing is predicted."""
        predicted = sum(measures.lesions_predicted for measures in self.classes)
        return _ratio(predicted - sum(measures.lesions_false for measures in self.classes), predicted)

    @property
    def lesion_f1(self) -> float | None:
        """2PR/(P+R) of lesion precision and recall: 0 if only one side has lesions, None if neither has.

        Not 2TP/(2TP+FP+FN): matching is many-to-many, so the true lesions of the two sides differ in number.
        """
        precision, recall = self.lesion_precision, self.lesion_recall()
        if precision is None and recall is None:
            return None
        if not precision or not recall:
            return 0.0
        return 2 * precision * recall / (precision + recall)

    def lesions_found(self, smallest: float = 1, largest: float = math.inf) -> list[bool]:
        """Found or not, for the truth lesions of all classes with smallest <= voxels <= largest."""
        sizes = [size for measures in self.classes for size in measures.lesion_sizes]
        found = [one for measures in self.classes for one in measures.lesion_found]
        return [one for size, one in zip(sizes, found, strict=True) if smallest <= size <= largest]

    def lesion_recall(self, smallest: float = 1, largest: float = math.inf) -> float | None:
        """The share of those lesions that are found; None if there are none."""
        lesions = self.lesions_found(smallest, largest)
        return _ratio(sum(lesions), len(lesions))


Case = tuple[str, str, CaseMeasures]  # id, group, measures


def measure_case(
    truth: NDArray[np.integer], prediction: NDArray[np.integer], num_classes: int, spacing: Sequence[float]
) -> CaseMeasures:
    """Count voxels and lesions of every foreground class.

    truth, prediction: class indices of equal shape, (y, x) or (z, y, x): 0 background, 1..num_classes-1, and in the truth
    IGNORE; what the prediction says there does not matter. spacing: mm, one for each axis. Raises InputError for unequal
    shapes and for values that are no class.
    """
    if truth.shape != prediction.shape:
        raise InputError(
            f"truth has shape {truth.shape} and the prediction has shape {prediction.shape}: they must be equal. "
            "Resample the prediction to the truth's grid first."
        )
    if truth.ndim not in (2, 3):
        raise InputError(f"a label map has axes (y, x) or (z, y, x); this one has shape {truth.shape}")
    assert len(spacing) == truth.ndim and all(step > 0 for step in spacing), (spacing, truth.shape)

    evaluated = truth != IGNORE
    truth = np.where(evaluated, truth, 0)
    prediction = np.where(evaluated, prediction, 0)
    for name, labels in (("truth", truth), ("prediction", prediction)):
        if labels.size and (labels.min() < 0 or labels.max() >= num_classes):
            strange = [int(value) for value in np.unique(labels) if not 0 <= value < num_classes]
            raise InputError(
                f"the {name} holds {strange}, which are no class indices: allowed are 0 to {num_classes - 1}, and in the "
                f"truth {IGNORE} for voxels to ignore. Name the missing values in data.classes."
            )
    # background on both sides is most of a scan and enters no count
    somewhere = (truth > 0) | (prediction > 0)
    pairs = truth[somewhere].astype(np.intp) * num_classes + prediction[somewhere]
    confusion = np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)  # truth, prediction

    truth_class, truth_size, truth_hit = _components(truth, prediction)
    predicted_class, _, predicted_hit = _components(prediction, truth)
    classes = []
    for index in range(1, num_classes):
        true_positive = int(confusion[index, index])
        in_truth, in_prediction = truth_class == index, predicted_class == index
        classes.append(
            ClassMeasures(
                true_positive=true_positive,
                false_positive=int(confusion[:, index].sum()) - true_positive,
                false_negative=int(confusion[index].sum()) - true_positive,
                lesion_sizes=tuple(truth_size[in_truth].tolist()),
                lesion_found=tuple(truth_hit[in_truth].tolist()),
                lesions_predicted=int(in_prediction.sum()),
                lesions_false=int((in_prediction & ~predicted_hit).sum()),
            )
        )
    return CaseMeasures(tuple(classes), tuple(float(step) for step in spacing), int(evaluated.sum()))


def _components(
    labels: NDArray[np.integer], other: NDArray[np.integer]
) -> tuple[NDArray[np.integer], NDArray[np.integer], NDArray[np.bool_]]:
    """Class, size and "shares a voxel of its class with `other`" of every connected component of one class in `labels`."""
    foreground = labels > 0
    # of a label map with several values cc3d gives the components of each value
    component = cc3d.connected_components(labels, connectivity=8 if labels.ndim == 2 else 26)[foreground]
    value = labels[foreground]
    size = np.bincount(component)
    kind = np.zeros(size.shape, dtype=labels.dtype)
    kind[component] = value
    hit = np.bincount(component[other[foreground] == value], minlength=len(size)) > 0
    return kind[1:], size[1:], hit[1:]  # component 0 is the background


def values_by_group(cases: Sequence[Case], value: Value) -> dict[str, list[float]]:
    """The defined values of the cases of every group; a group may have none."""
    values: dict[str, list[float]] = {}
    for _, group, measures in cases:
        of_group = values.setdefault(group, [])
        if (one := value(measures)) is not None:
            of_group.append(one)
    return values


def summarise(cases: Sequence[Case], class_names: Sequence[str]) -> dict[str, Any]:
    """summary.json's figures of voxels, classes, lesions and false alarms, and the policy behind them.

    class_names: one for every class index, the background first.
    """
    _check_names(cases, class_names)

    def over_groups(value: Value) -> dict[str, Any]:
        return figure(values_by_group(cases, value), bounded=True)

    def macro(metric: str) -> dict[str, Any]:
        return over_groups(lambda case: case.macro(metric))

    def of_class(index: int, metric: str) -> dict[str, Any]:
        return over_groups(lambda case: getattr(case.classes[index], metric))

    def of_size(name: str, smallest: float, largest: float) -> dict[str, Any]:
        lesions = sum(len(measures.lesions_found(smallest, largest)) for _, _, measures in cases)
        return {"range": name, "recall": over_groups(lambda case: case.lesion_recall(smallest, largest)), "n": lesions}

    clean = [case for case in cases if case[2].without_target]
    return {
        **{metric: macro(metric) for metric in METRICS},
        "classes": {
            name: {metric: of_class(index, metric) for metric in METRICS} for index, name in enumerate(class_names[1:])
        },
        "lesions": {
            "precision": over_groups(lambda case: case.lesion_precision),
            "recall": over_groups(lambda case: case.lesion_recall()),
            "f1": over_groups(lambda case: case.lesion_f1),
            "by_size": [of_size(*sizes) for sizes in LESION_SIZES],
        },
        "false_alarms": {
            "images_without_target": len(clean),
            "alarmed": sum(measures.false_alarm for _, _, measures in clean),
            "rate": over_groups(lambda case: float(case.false_alarm) if case.without_target else None),
        },
        "policy": dict(POLICY),
    }


def case_rows(cases: Sequence[Case], class_names: Sequence[str]) -> list[dict[str, str | int | float]]:
    """cases.csv: a row for every case and foreground class; what is undefined is an empty string."""
    _check_names(cases, class_names)
    rows: list[dict[str, str | int | float]] = []
    for case_id, group, case in cases:
        for name, measures in zip(class_names[1:], case.classes, strict=True):
            metrics = {metric: getattr(measures, metric) for metric in METRICS}
            rows.append(
                {
                    "id": case_id,
                    "group": group,
                    "class": name,
                    **{metric: "" if value is None else value for metric, value in metrics.items()},
                    "truth_voxels": measures.truth_voxels,
                    "predicted_voxels": measures.predicted_voxels,
                    "lesions": len(measures.lesion_sizes),
                    "lesions_found": sum(measures.lesion_found),
                    "lesions_false": measures.lesions_false,
                }
            )
    return rows


def _check_names(cases: Sequence[Case], class_names: Sequence[str]) -> None:
    assert len(set(class_names)) == len(class_names), class_names
    assert all(len(case.classes) == len(class_names) - 1 for _, _, case in cases), "a name for every class, background first"
