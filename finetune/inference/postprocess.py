"""Post-processing that val chooses: only the largest object of a class, no objects that are smaller than any labelled one.

Only the largest: nnU-Net's rule (Isensee et al. 2021), tried where no labelled case holds two objects of the class. Smallest
sizes stay below the smallest labelled object, so that nothing as small as a target is removed. A rule is taken if mean
Dice on val rises and the share of lesions found does not fall.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune.evaluation.lesions import components_of, find_lesions
from finetune.evaluation.statistics import figure
from resunet.data.cases import IGNORE, LoadedCase
from resunet.decision import ClassRule, Postprocessing

SIZES = tuple(2**power for power in range(1, 13))  # voxels
_LEAST_GAIN = 1e-6  # of Dice: what rounding makes is none


@dataclass(frozen=True)
class PredictedObjects:
    """What rules decide of one class of one case, ignored voxels left out of all but `size`.

    size, counted, right: (n,) voxels of each predicted object; those of them that are evaluated; those that are right.
    finds: (m, 2) pairs of predicted and true object that share a voxel.
    truth, lesions: voxels and objects of the truth.
    """

    size: NDArray[np.int64]
    counted: NDArray[np.int64]
    right: NDArray[np.int64]
    finds: NDArray[np.int64]
    truth: int
    lesions: int

    def outcome(self, rule: ClassRule) -> tuple[float | None, int]:
        """Dice, None where neither side has a voxel, and lesions found, with the rule."""
        kept = self.size >= rule.smallest
        if rule.largest_only and len(kept):
            kept &= np.arange(len(kept)) == self.size.argmax()
        predicted, right = int(self.counted[kept].sum()), int(self.right[kept].sum())
        found = len(np.unique(self.finds[kept[self.finds[:, 0]], 1]))
        return (2 * right / (predicted + self.truth) if predicted + self.truth else None), found


@dataclass(frozen=True)
class ValCase:
    """A val case as rules see it: a PredictedObjects for every foreground class."""

    group: str
    classes: tuple[PredictedObjects, ...]


def predicted_objects(group: str, truth: NDArray[np.uint8], predicted: NDArray[np.uint8], num_classes: int) -> ValCase:
    """What is kept of a case's prediction."""
    evaluated = truth != IGNORE
    found = []
    for index in range(1, num_classes):
        in_prediction = components_of(predicted == index)
        in_truth = components_of(truth == index)
        count = int(in_prediction.max(initial=0))
        both = (in_prediction > 0) & (in_truth > 0)
        pairs = np.stack([in_prediction[both], in_truth[both]], axis=1).astype(np.int64) - 1

        def voxels(where: NDArray[np.bool_], components: NDArray = in_prediction, count: int = count) -> NDArray[np.int64]:
            return np.bincount(components[where], minlength=count + 1)[1:]

        found.append(
            PredictedObjects(
                size=voxels(in_prediction > 0),
                counted=voxels((in_prediction > 0) & evaluated),
                right=voxels(both),
                finds=np.unique(pairs, axis=0),
                truth=int(np.count_nonzero(in_truth)),
                lesions=int(in_truth.max(initial=0)),
            )
        )
    return ValCase(group, tuple(found))


def candidates(labelled: Sequence[LoadedCase], index: int, name: str) -> list[ClassRule]:
    """The rules that the labelled cases allow for a class, the mildest first; none where it is nowhere."""
    smallest, most = math.inf, 0
    for case in labelled:
        assert case.labels is not None
        mask = (case.labels == index).astype(np.uint8)
        sizes = find_lesions(mask, mask, with_widths=False).size
        most = max(most, len(sizes))
        smallest = min([smallest, *sizes.tolist()])
    if not most:
        return []
    sizes_below = [1, *(size for size in SIZES if size < smallest)]
    every = itertools.product((False, True) if most == 1 else (False,), sizes_below)
    return [ClassRule(name=name, largest_only=only, smallest=size) for only, size in every if only or size > 1]


def choose_postprocessing(labelled: Sequence[LoadedCase], val: Sequence[ValCase], names: Sequence[str]) -> Postprocessing:
    """Class by class the rule with the highest Dice on val, if that is above the Dice without and no lesion is lost.

    labelled: training and val cases. names: of the classes, background first.
    """
    chosen: dict[int, ClassRule] = {}
    before = best = _judged(val, chosen, names)
    for index, name in enumerate(names[1:], start=1):
        for rule in candidates(labelled, index, name):
            dice, recall = _judged(val, chosen | {index: rule}, names)
            rises = dice is not None and (best[0] is None or dice > best[0] + _LEAST_GAIN)
            if rises and (recall or 0.0) >= (before[1] or 0.0):
                chosen[index], best = rule, (dice, recall)
    return Postprocessing(
        rules=tuple(chosen.values()),
        val_groups=len({case.group for case in val}),
        val_dice=(before[0], best[0]),
        val_lesion_recall=(before[1], best[1]),
    )


def _judged(val: Sequence[ValCase], rules: Mapping[int, ClassRule], names: Sequence[str]) -> tuple[float | None, float | None]:
    """Mean Dice and share of lesions found, as evaluation counts them: macro over classes, over cases, over groups."""
    dice: dict[str, list[float]] = {}
    recall: dict[str, list[float]] = {}
    for case in val:
        outcomes = [
            its.outcome(rules.get(index, ClassRule(name=names[index]))) for index, its in enumerate(case.classes, start=1)
        ]
        defined = [value for value, _ in outcomes if value is not None]
        if defined:
            dice.setdefault(case.group, []).append(math.fsum(defined) / len(defined))
        if lesions := sum(its.lesions for its in case.classes):
            recall.setdefault(case.group, []).append(sum(found for _, found in outcomes) / lesions)
    return figure(dice)["mean"], figure(recall)["mean"]
