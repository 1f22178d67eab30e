"""What a segmentation got right: voxels, surfaces and lesions of one case.

Nothing is forgiven: an empty truth with a prediction scores Dice 0, a missed class scores Dice 0 and the image's diagonal as
HD95, and no object is dropped for being small. A value that has no definition is None and leaves its mean; which values
those are is written in `finetune.evaluation.summary.policy`, which stands beside the figures.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from finetune.evaluation.lesions import find_lesions, is_thin
from finetune.evaluation.surface import TOLERANCE, SurfaceMeasures, compare_surfaces, diagonal
from finetune.evaluation.targets import Targets
from resunet.data.cases import IGNORE
from resunet.errors import InputError

METRICS = ("dice", "iou", "precision", "recall", "hd95", "surface_dice")

Value = Callable[["CaseMeasures"], float | None]


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None


@dataclass(frozen=True)
class ClassMeasures:
    """One foreground class, or one region, of one case: its voxels, surface and lesions, ignored voxels left out.

    With T the truth and P the prediction: dice 2|T∩P|/(|T|+|P|), iou |T∩P|/|T∪P|, precision |T∩P|/|P|, recall |T∩P|/|T|;
    None where the denominator is 0. Surfaces: see `finetune.evaluation.surface`.
    """

    true_positive: int  # voxels
    false_positive: int
    false_negative: int
    voxel: float  # mm² of an image's pixel, mm³ of a volume's voxel
    surface: SurfaceMeasures
    lesion_sizes: tuple[int, ...]  # voxels of each truth lesion
    lesion_found: tuple[bool, ...]  # in the order of lesion_sizes
    lesion_widths: tuple[float, ...]  # in that order, pixels; of an image only
    lesions_predicted: int
    false_sizes: tuple[int, ...]  # voxels of each of them that is false

    @property
    def lesions_false(self) -> int:
        return len(self.false_sizes)

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

    @property
    def hd95(self) -> float | None:
        return self.surface.hd95

    @property
    def surface_dice(self) -> float | None:
        return self.surface.surface_dice

    @property
    def volume_bias(self) -> float | None:
        """Predicted less true, in mm² or mm³; None if both are empty."""
        if not self.truth_voxels and not self.predicted_voxels:
            return None
        return (self.predicted_voxels - self.truth_voxels) * self.voxel

    @property
    def volume_error(self) -> float | None:
        """The same without its sign."""
        return None if self.volume_bias is None else abs(self.volume_bias)

    @property
    def relative_volume_error(self) -> float | None:
        """|P − T| / T; None without truth."""
        return _ratio(abs(self.predicted_voxels - self.truth_voxels), self.truth_voxels)


@dataclass(frozen=True)
class CaseMeasures:
    """One case. `classes[i]` is of target i, without regions class index i + 1: background has no measures."""

    classes: tuple[ClassMeasures, ...]
    spacing: tuple[float, ...]  # mm, in the order of the array's axes
    diagonal: float  # mm, of the whole image
    tolerance: float  # mm, of surface Dice
    evaluated_voxels: int  # not ignored

    @property
    def is_volume(self) -> bool:
        return len(self.spacing) == 3

    def macro(self, metric: str) -> float | None:
        """The mean of a property of ClassMeasures over the foreground classes where it is defined; None where it is nowhere."""
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
        return [found for _, size, found in self._lesions() if smallest <= size <= largest]

    def lesions_found_by_volume(self, start: float, stop: float) -> list[bool]:
        """The same for start <= volume < stop in mm³, of an image area in mm²."""
        return [found for measures, size, found in self._lesions() if start <= size * measures.voxel < stop]

    def thin_found_by_width(self, start: float, stop: float) -> list[bool]:
        """The same for the thin objects of an image with start <= width < stop in pixels; none of a volume."""
        if self.is_volume:
            return []
        return [
            found
            for measures in self.classes
            for size, width, found in zip(measures.lesion_sizes, measures.lesion_widths, measures.lesion_found, strict=True)
            if is_thin(size, width) and start <= width < stop
        ]

    def lesion_recall(self) -> float | None:
        """The share of the truth lesions that are found; None if there are none."""
        return share(self.lesions_found())

    def _lesions(self) -> list[tuple[ClassMeasures, int, bool]]:
        return [
            (measures, size, found)
            for measures in self.classes
            for size, found in zip(measures.lesion_sizes, measures.lesion_found, strict=True)
        ]


Case = tuple[str, str, CaseMeasures]  # id, group, measures


def share(found: Sequence[bool]) -> float | None:
    """How many of them are True; None of none."""
    return _ratio(sum(found), len(found))


def measure_targets(
    truth: NDArray[np.integer],
    prediction: NDArray[np.integer],
    targets: Targets,
    spacing: Sequence[float],
    tolerance: float = TOLERANCE,
) -> CaseMeasures:
    """`measure_case` for the targets: of regions each by itself, as a map of what it is and what it is not."""
    if targets.are_classes:
        return measure_case(truth, prediction, targets.num_classes, spacing, tolerance)
    _refuse_strange(truth, prediction, targets.num_classes)
    found = [
        measure_case(targets.mask(truth, i), targets.mask(prediction, i), 2, spacing, tolerance)
        for i in range(len(targets.names))
    ]
    return replace(found[0], classes=tuple(one.classes[0] for one in found))


def measure_case(
    truth: NDArray[np.integer],
    prediction: NDArray[np.integer],
    num_classes: int,
    spacing: Sequence[float],
    tolerance: float = TOLERANCE,
) -> CaseMeasures:
    """Count voxels and lesions of every foreground class, and compare its surfaces.

    truth, prediction: class indices of equal shape, (y, x) or (z, y, x): 0 background, 1..num_classes-1, and in the truth
    IGNORE; what the prediction says there does not matter. spacing: mm, one for each axis. tolerance: mm, of surface Dice.
    Raises InputError for unequal shapes and for values that are no class.
    """
    _refuse_strange(truth, prediction, num_classes)
    assert len(spacing) == truth.ndim and all(step > 0 for step in spacing), (spacing, truth.shape)

    evaluated = truth != IGNORE
    truth = np.where(evaluated, truth, 0)
    prediction = np.where(evaluated, prediction, 0)
    overlaps = _overlaps(truth, prediction, num_classes)
    in_truth = find_lesions(truth, prediction, with_widths=truth.ndim == 2)
    in_prediction = find_lesions(prediction, truth, with_widths=False)
    surfaces = _surfaces(truth, prediction, evaluated, num_classes, spacing, tolerance)
    classes = []
    for index, (true_positive, false_positive, false_negative) in enumerate(overlaps, 1):
        its, predicted = in_truth.kind == index, in_prediction.kind == index
        classes.append(
            ClassMeasures(
                true_positive=true_positive,
                false_positive=false_positive,
                false_negative=false_negative,
                voxel=math.prod(spacing),
                surface=surfaces[index - 1],
                lesion_sizes=tuple(in_truth.size[its].tolist()),
                lesion_found=tuple(in_truth.hit[its].tolist()),
                lesion_widths=tuple(in_truth.width[its].tolist()) if truth.ndim == 2 else (),
                lesions_predicted=int(predicted.sum()),
                false_sizes=tuple(in_prediction.size[predicted & ~in_prediction.hit].tolist()),
            )
        )
    steps = tuple(float(step) for step in spacing)
    return CaseMeasures(tuple(classes), steps, diagonal(truth.shape, spacing), tolerance, int(evaluated.sum()))


def case_dice(truth: NDArray[np.integer], prediction: NDArray[np.integer], targets: Targets) -> float | None:
    """`CaseMeasures.macro("dice")` of `measure_targets`, without what that looks for beside it; arguments as there."""
    if not targets.are_classes:
        maps = [(targets.mask(truth, i), targets.mask(prediction, i)) for i in range(len(targets.names))]
        overlaps = [_overlaps(its, np.where(its == IGNORE, 0, found), 2)[0] for its, found in maps]
    else:
        overlaps = _overlaps(truth, np.where(truth == IGNORE, 0, prediction), targets.num_classes)
    dice = [_ratio(2 * hit, 2 * hit + false + missed) for hit, false, missed in overlaps]
    defined = [one for one in dice if one is not None]
    return _ratio(math.fsum(defined), len(defined))


def _overlaps(truth: NDArray[np.integer], prediction: NDArray[np.integer], num_classes: int) -> list[tuple[int, int, int]]:
    """Of every foreground class the voxels that are true positive, false positive and false negative."""
    # background on both sides is most of a scan and enters no count
    somewhere = (truth > 0) & (truth != IGNORE) | (prediction > 0)
    pairs = truth[somewhere].astype(np.intp) * num_classes + prediction[somewhere]
    confusion = np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)  # truth, prediction
    hits = confusion.diagonal()
    columns = zip(hits, confusion.sum(axis=0) - hits, confusion.sum(axis=1) - hits, strict=True)
    return [(int(hit), int(false), int(missed)) for hit, false, missed in columns][1:]


def _refuse_strange(truth: NDArray[np.integer], prediction: NDArray[np.integer], num_classes: int) -> None:
    if truth.shape != prediction.shape:
        raise InputError(
            f"truth has shape {truth.shape} and the prediction has shape {prediction.shape}: they must be equal. "
            "Resample the prediction to the truth's grid first."
        )
    if truth.ndim not in (2, 3):
        raise InputError(f"a label map has axes (y, x) or (z, y, x); this one has shape {truth.shape}")
    evaluated = truth != IGNORE
    for name, labels in (("truth", truth), ("prediction", prediction)):
        known = labels[evaluated]
        if known.size and (known.min() < 0 or known.max() >= num_classes):
            strange = [int(value) for value in np.unique(known) if not 0 <= value < num_classes]
            raise InputError(
                f"the {name} holds {strange}, which are no class indices: allowed are 0 to {num_classes - 1}, and in the "
                f"truth {IGNORE} for voxels to ignore. Name the missing values in data.classes."
            )


def _surfaces(
    truth: NDArray[np.integer],
    prediction: NDArray[np.integer],
    evaluated: NDArray[np.bool_],
    num_classes: int,
    spacing: Sequence[float],
    tolerance: float,
) -> list[SurfaceMeasures]:
    """Of classes 1 … num_classes − 1, each within the box that holds it and a voxel more."""
    boxes = [ndimage.find_objects(labels, max_label=num_classes - 1) for labels in (truth, prediction)]
    complete = bool(evaluated.all())
    missed = diagonal(truth.shape, spacing)
    measured = []
    for index, pair in enumerate(zip(*boxes, strict=True), start=1):
        held = [box for box in pair if box is not None]
        if not held:
            measured.append(SurfaceMeasures(None, None))
            continue
        box = tuple(
            slice(max(0, min(one.start for one in axis) - 1), max(one.stop for one in axis) + 1)
            for axis in zip(*held, strict=True)
        )
        known = None if complete else evaluated[box]
        measured.append(compare_surfaces(truth[box] == index, prediction[box] == index, known, spacing, tolerance, missed))
    return measured


def values_by_group(cases: Sequence[Case], value: Value) -> dict[str, list[float]]:
    """The defined values of the cases of every group; a group may have none."""
    values: dict[str, list[float]] = {}
    for _, group, measures in cases:
        of_group = values.setdefault(group, [])
        if (one := value(measures)) is not None:
            of_group.append(one)
    return values
