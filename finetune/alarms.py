"""An operating point: the threshold that keeps false alarms on val within a budget, and what it does on other cases."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.calibration import Probabilities
from finetune.statistics import figure
from finetune.summary import per_1000
from resunet.errors import InputError


@dataclass(frozen=True)
class OperatingPoint:
    """A case raises an alarm if its greatest foreground probability is above `threshold`.

    budget: false alarms per 1,000 cases without target that were allowed. clean, alarmed: such val cases, and those of them
    that raise an alarm.
    """

    threshold: float
    budget: float
    clean: int
    alarmed: int

    def notes(self) -> list[str]:
        """What a reader has to know of how the threshold was chosen."""
        if self.clean * self.budget >= 1000:
            return []
        return [
            f"The threshold for {self.budget:g} false alarms per 1,000 was chosen on {self.clean} val cases without target: "
            f"from fewer than {math.ceil(1000 / self.budget):,} no alarm at all is allowed, and the rate is hardly known."
        ]


def choose_threshold(peaks: Sequence[float], budget: float) -> OperatingPoint:
    """The lowest threshold at which at most `budget` of 1,000 cases without target raise an alarm.

    peaks: the greatest foreground probability of every val case without target. Raises InputError if there is none.
    """
    if not peaks:
        raise InputError(
            f"--false-alarms-per-1000 {budget:g}: val has no case without target, on which a threshold could be chosen. "
            "Add images without target to val, or leave the option out."
        )
    falling = sorted(peaks, reverse=True)
    allowed = math.floor(budget * len(peaks) / 1000 + 1e-9)
    threshold = falling[allowed] if allowed < len(falling) else 0.0
    return OperatingPoint(threshold, budget, len(peaks), sum(peak > threshold for peak in peaks))


def summarise_operating_point(point: OperatingPoint, cases: Sequence[tuple[str, bool, Probabilities]]) -> dict[str, Any]:
    """What the threshold does on evaluated cases: (group, without target, probabilities).

    false_alarms_per_1000 is of the cases without target; found, of those with one, the share in which a voxel of the
    target is above the threshold.
    """
    clean: dict[str, list[float]] = {}
    found: dict[str, list[float]] = {}
    for group, without_target, its in cases:
        if without_target:
            clean.setdefault(group, []).append(float(its.peak > point.threshold))
        elif its.peak_on_target >= 0:
            found.setdefault(group, []).append(float(its.peak_on_target > point.threshold))
    return {
        "threshold": point.threshold,
        "chosen_on": {"split": "val", "images_without_target": point.clean, "alarmed": point.alarmed},
        "budget_per_1000": point.budget,
        "alarmed": int(sum(map(sum, clean.values()))),
        "false_alarms_per_1000": per_1000(figure(clean, (0.0, 1.0))),
        "found": figure(found, (0.0, 1.0)),
        "policy": "A case raises an alarm if a voxel's foreground probability is above the threshold: the lowest that on the "
        "val cases without target stays within the budget. found: of the cases with a target, those where a voxel of it is "
        "above. Every other figure is of the usual decision, the likelier of background and class.",
    }
