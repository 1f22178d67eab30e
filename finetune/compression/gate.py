"""The gate: what a step costs on val, beside the network that came in, paired by group; and whether that is too much."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.compression.recipe import GateSettings
from finetune.evaluation.lesions import LESION_SIZES
from finetune.evaluation.metrics import Case, share, values_by_group
from finetune.evaluation.statistics import FEWEST_GROUPS, figure, group_means, paired_difference
from resunet.config import Frozen
from resunet.errors import InputError

ByGroup = dict[str, list[float]]


class Scores(Frozen):
    """What the gate needs of an evaluation, by group: values of its cases.

    dice: as evaluation counts it, false alarms too. dice_of_targets: of the cases that have something to find, the same whatever
    is predicted. recall: of truth lesions by range of voxels, of the cases that hold any. classes: of several, by place among them,
    Dice of the cases that hold the class; of one it is dice_of_targets.
    """

    dice: ByGroup
    dice_of_targets: ByGroup
    recall: dict[str, ByGroup]
    classes: tuple[ByGroup, ...] = ()

    def dice_figure(self) -> dict[str, Any]:
        return figure(self.dice, (0.0, 1.0))

    def recall_figure(self, size: str) -> dict[str, Any]:
        return figure(self.recall[size], (0.0, 1.0))


class Verdict(Frozen):
    """Of one step. fall: of Dice, relative. …_difference: step − start, paired by group. size: the smallest objects' voxels."""

    dice: dict[str, Any]
    fall: float
    dice_difference: dict[str, Any]
    size: str | None
    recall: dict[str, Any] | None
    recall_difference: dict[str, Any] | None
    reasons: tuple[str, ...]

    @property
    def accepted(self) -> bool:
        return not self.reasons


def failed(reason: str) -> Verdict:
    """Of a step that came to nothing: there are no figures."""
    nothing = paired_difference({}, {})
    return Verdict(
        dice=figure({}, (0.0, 1.0)),
        fall=1.0,
        dice_difference=nothing,
        size=None,
        recall=None,
        recall_difference=None,
        reasons=(reason,),
    )


def scores_of(rows: Sequence[Case]) -> Scores:
    """Of measured cases: (id, group, measures)."""
    with_target = [row for row in rows if any(one.truth_voxels for one in row[2].classes)]
    recall = {}
    for name, smallest, largest in LESION_SIZES:
        found = values_by_group(rows, lambda case, a=smallest, b=largest: share(case.lesions_found(a, b)))  # type: ignore[misc]
        recall[name] = {group: values for group, values in found.items() if values}
    dice = {group: values for group, values in values_by_group(rows, lambda case: case.macro("dice")).items() if values}
    of_targets = values_by_group(with_target, lambda case: case.macro("dice"))
    count = len(rows[0][2].classes) if rows else 0
    classes = tuple(_of_class(rows, index) for index in range(count)) if count > 1 else ()
    return Scores(dice=dice, dice_of_targets=of_targets, recall=recall, classes=classes)


def _of_class(rows: Sequence[Case], index: int) -> ByGroup:
    """Dice of the cases that hold a class."""
    return values_by_group([row for row in rows if row[2].classes[index].truth_voxels], lambda case: case.classes[index].dice)


def smallest_size(scores: Scores) -> str | None:
    """The range of the smallest lesions that are of enough groups for an interval; else of any; None where there are none."""
    sizes = {name: len(groups) for name, groups in scores.recall.items() if groups}
    return next((name for name, count in sizes.items() if count >= FEWEST_GROUPS), next(iter(sizes), None))


def judge(before: Scores, after: Scores, settings: GateSettings, names: Sequence[str] = ()) -> Verdict:
    """Whether a step may stay.

    Dice of all cases alone could be held by fewer false alarms, each of which counts as 0, while targets are lost: that of the
    cases that have something to find is judged as well. Of several classes one could be lost while the others hold the mean, or
    while its false alarms go: each is judged in the cases that hold it.

    Args:
        names: of the classes that `Scores` counts.

    Raises:
        InputError: val defines no Dice, or the network that came in has Dice 0, of which nothing can be lost.
    """
    found = difference_of(before, after)
    start, now = before.dice_figure()["mean"], found.dice["mean"] or 0.0
    if not start:
        raise InputError(f"run: its Dice on val is {start}; there is nothing to hold on to. Train it first.")
    reasons = []
    if not found.fall < settings.dice:
        reasons.append(f"Dice on val falls by {found.fall:.1%}, from {start:.4f} to {now:.4f}; the gate is {settings.dice:.1%}")
    elif (of_targets := figure(before.dice_of_targets, (0.0, 1.0))["mean"]) and (
        lost := -found.dice_difference["mean"] / of_targets
    ) >= settings.dice:
        reasons.append(f"Dice of the cases that have something to find falls by {lost:.1%}; the gate is {settings.dice:.1%}")
    both = before.classes and after.classes  # what an earlier version kept has none
    pairs = zip(before.classes, after.classes, strict=True) if both else ()
    for index, (its, left) in enumerate(pairs):
        had = figure(its, (0.0, 1.0))["mean"]
        if had and (lost := -_paired(left, its)["mean"] / had) >= settings.class_dice:
            named = names[index] if names else f"class {index + 1}"
            reasons.append(
                f"Dice of {named}, in the cases that hold it, falls by {lost:.1%} from {had:.4f}; the gate is "
                f"{settings.class_dice:.1%}"
            )
    if found.recall is not None and found.recall_difference is not None:
        fewer = -found.recall_difference["mean"]
        if fewer > settings.recall + 1e-12:
            reasons.append(
                f"recall of objects of {found.size} voxels falls by {fewer:.3f} to {found.recall['mean']:.3f}; the gate is "
                f"{settings.recall:g}"
            )
    return found.model_copy(update={"reasons": tuple(reasons)})


def difference_of(before: Scores, after: Scores) -> Verdict:
    """What there is between two networks, without a judgement; fall is 0 where there was nothing to lose."""
    start, now, size = before.dice_figure()["mean"], after.dice_figure(), smallest_size(before)
    return Verdict(
        dice=now,
        fall=1 - (now["mean"] or 0.0) / start if start else 0.0,
        dice_difference=_paired(after.dice_of_targets, before.dice_of_targets),
        size=size,
        recall=None if size is None else after.recall_figure(size),
        recall_difference=None if size is None else _paired(after.recall[size], before.recall[size]),
        reasons=(),
    )


def _paired(after: Mapping[str, Sequence[float]], before: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    assert all(math.isfinite(value) for values in after.values() for value in values)
    return paired_difference(group_means(after), group_means(before))
