"""An operating point: the threshold that keeps false alarms on val within a budget, and what it does on other cases."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.evaluation.calibration import Probabilities
from finetune.evaluation.statistics import figure
from finetune.evaluation.summary import per_1000
from resunet.data.cases import IGNORE, LoadedCase
from resunet.decision import OperatingPoint
from resunet.errors import InputError


def notes_of(point: OperatingPoint) -> list[str]:
    """What a reader has to know of how the threshold was chosen."""
    if point.clean * point.budget >= 1000:
        return []
    return [
        f"The threshold for {point.budget:g} false alarms per 1,000 was chosen on {point.clean} val cases without target: "
        f"from fewer than {math.ceil(1000 / point.budget):,} no alarm at all is allowed, and the rate is hardly known."
    ]


def is_without_target(labels: NDArray[np.uint8]) -> bool:
    """Whether a case has voxels that somebody labelled, and all of them are background."""
    evaluated = labels[labels != IGNORE]
    return bool(evaluated.size) and not evaluated.any()


def refuse_val_without_clean(val: Sequence[LoadedCase], named: str) -> None:
    """Raises InputError if there is nothing to choose a threshold on. named: the option with its value."""
    if not any(case.labels is not None and is_without_target(case.labels) for case in val):
        raise InputError(
            f"{named}: val has no case without target, on which a threshold could be chosen. Add images without target to val, "
            "or leave it out."
        )


def choose_threshold(peaks: Sequence[float], budget: float) -> OperatingPoint:
    """The lowest threshold at which at most `budget` of 1,000 cases without target raise an alarm.

    peaks: the greatest foreground probability of every val case without target, one at least.
    """
    assert peaks, "refuse_val_without_clean() comes first"
    falling = sorted(peaks, reverse=True)
    allowed = math.floor(budget * len(peaks) / 1000 + 1e-9)
    threshold = falling[allowed] if allowed < len(falling) else 0.0
    alarmed = sum(peak > threshold for peak in peaks)
    return OperatingPoint(threshold=threshold, budget=budget, clean=len(peaks), alarmed=alarmed)


def point_on_val(
    budget: float,
    split: str,
    has_splits: bool,
    read_val: Callable[[], Sequence[LoadedCase]],
    peaks: Callable[[Sequence[LoadedCase]], list[float]],
) -> OperatingPoint:
    """`choose_threshold` on the val part of a source, of which `split` is to be evaluated.

    Args:
        read_val: its cases. peaks: the greatest foreground probability of each without target.

    Raises:
        InputError: val is what is evaluated, or has no case without target.
    """
    named = f"--false-alarms-per-1000 {budget:g}"
    if not has_splits or split == "val":
        raise InputError(
            f"{named}: its threshold is chosen on the val part, and --split {split} of this source is not evaluated apart from it. "
            "Give the source a splits.json, and evaluate test."
        )
    val = read_val()
    refuse_val_without_clean(val, named)
    return choose_threshold(peaks(val), budget)


def summarise_operating_point(point: OperatingPoint, cases: Sequence[tuple[str, bool, Probabilities]]) -> dict[str, Any]:
    """What the threshold does on evaluated cases: (group, without target, probabilities).

    false_alarms_per_1000 is of the cases without target; found, of those with one, the share in which a voxel of the
    target is above the threshold; lesions_found, the same of the objects of each.
    """
    clean: dict[str, list[float]] = {}
    found: dict[str, list[float]] = {}
    lesions: dict[str, list[float]] = {}
    for group, without_target, its in cases:
        if without_target:
            clean.setdefault(group, []).append(float(its.peak > point.threshold))
        elif its.peak_on_target >= 0:
            found.setdefault(group, []).append(float(its.peak_on_target > point.threshold))
            above = [peak > point.threshold for peak in its.object_peaks]
            lesions.setdefault(group, []).append(sum(above) / len(above))
    return {
        "threshold": point.threshold,
        "chosen_on": {"split": "val", "images_without_target": point.clean, "alarmed": point.alarmed},
        "budget_per_1000": point.budget,
        "alarmed": int(sum(map(sum, clean.values()))),
        "false_alarms_per_1000": per_1000(figure(clean, (0.0, 1.0))),
        "found": figure(found, (0.0, 1.0)),
        "lesions_found": figure(lesions, (0.0, 1.0)),
        "policy": "A case raises an alarm if a voxel's foreground probability is above the threshold: the lowest that on the "
        "val cases without target stays within the budget. found: of the cases with a target, those where a voxel of it is "
        "above; lesions_found: of their lesions, those of which a voxel is. Nothing is post-processed here. Every other figure is "
        "of the usual decision, the likelier of background and class.",
    }
