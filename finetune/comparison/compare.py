"""Finished runs side by side: figures, paired differences by group, curves, and where they disagree most.

Runs are compared only on the same test cases. A difference is taken per group over the cases that have something to
find, where Dice is defined whatever was predicted; false alarms stand apart in the table.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from finetune.comparison.arms import (
    Arm,
    Scored,
    distinct_names,
    read_arm,
    recipe_differences,
    refuse_other_cases,
    with_groups_of,
)
from finetune.comparison.cost import cost_section, costs_of, record_of
from finetune.evaluation.overlay import error_picture, grey_picture, telling_slice
from finetune.evaluation.page import class_rows, figures_table
from finetune.evaluation.statistics import paired_difference
from finetune.evaluation.targets import targets_of
from finetune.inference.predict import predict_case
from finetune.start import origin_of
from resunet.data.cases import LoadedCase, load_cases, take_slice
from resunet.data.source import open_source
from resunet.errors import InputError
from resunet.files import folder_aside, refuse_taken
from resunet.model import load_model
from resunet.pictures import SWATCHES, label_picture, side_by_side
from resunet.progress import say
from resunet.report import COLOURS, Picture, Section, curves, drawing, image, read_metrics, shown, svg, write_page
from resunet.runtime import remove_objects

_OVERLAYS = 6
_HARDLY = 0.05  # Dice


def compare(
    runs: Sequence[Path],
    out: Path,
    names: Sequence[str] | None = None,
    title: str = "Comparison",
    preamble: Sequence[Section] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Compare finished fine-tuning runs; the first is measured against each of the others. Writes compare.json, report.html.

    Args:
        runs: run directories, two or more.
        out: a new folder.
        names: what to call the runs; their folders' names without it.

    Returns:
        out.

    Raises:
        InputError: fewer than two runs, one that is not finished or was not evaluated, other test cases, or `out` exists.
    """
    if len(runs) < 2:
        raise InputError(f"compare needs at least two runs, {len(runs)} given.")
    refuse_taken(out)
    arms = [read_arm(run, name) for run, name in zip(runs, names or distinct_names(runs), strict=True)]
    for other in arms[1:]:
        refuse_other_cases(arms[0], other)
    arms = [arms[0], *(with_groups_of(arms[0], other) for other in arms[1:])]
    differences = {other.name: paired_difference(arms[0].group_dice(), other.group_dice()) for other in arms[1:]}
    pictures, missing = _overlays(arms)
    costs = costs_of({arm.name: arm.folder for arm in arms})
    sections = [
        Section(
            lead=[verdict(arms[0].name, name, figure) for name, figure in differences.items()],
            notes=[*hardly_learned(arms), *notes, *missing],
        ),
        *preamble,
        Section(
            "On the test cases",
            table=[*figures_table({arm.name: arm.summary for arm in arms}), *class_rows([arm.summary for arm in arms])],
        ),
        *paired_section(arms, differences),
        Section("What differs", table=recipe_differences(arms)),
        Section("Learning", pictures=_learning(arms)),
        Section(
            "Where they differ most",
            text=[f"Scan, truth, {', '.join(arm.name for arm in arms)}."],
            legend=SWATCHES,
            pictures=pictures,
        ),
        cost_section(costs),
        Section("What came from pretraining", text=_receipts(arms)),
    ]
    record = {
        "schema_version": 1,
        "runs": [arm.name for arm in arms],
        "dice": {arm.name: arm.summary["dice"] for arm in arms},
        "paired_dice_difference": {f"{arms[0].name} - {name}": figure for name, figure in differences.items()},
        "cost": record_of(costs),
    }
    with folder_aside(out) as aside:
        (aside / "compare.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        write_page(aside / "report.html", title, sections)
    return out


def hardly_learned(arms: Sequence[Arm]) -> list[str]:
    """Of networks whose Dice is next to nothing: a difference of theirs may be sure, and yet says nothing of trained ones."""
    dice = {arm.name: arm.summary["dice"]["mean"] for arm in arms}
    low = [f"{name} (Dice {value:.3f})" for name, value in dice.items() if value is not None and value < _HARDLY]
    if not low:
        return []
    return [
        f"Hardly learned, with too few steps or too few labels: {', '.join(low)}. Their difference says nothing of trained ones."
    ]


def verdict(first: str, second: str, difference: Mapping[str, Any]) -> str:
    """What a paired difference of Dice says, in a sentence; 'no difference' and 'worse' are answers."""
    figure = f"{shown(difference)} groups; better in {difference['wins']}"
    interval = difference["ci95"]
    if interval is None:
        return f"{first} − {second}: Dice {figure}. Too few groups to say whether that is chance."
    if interval[0] > 0:
        return f"{first} is better than {second}: Dice difference {figure}."
    if interval[1] < 0:
        return f"{first} is worse than {second}: Dice difference {figure}."
    return f"No difference shown between {first} and {second}: the interval holds zero. Dice difference {figure}."


def _learning(arms: Sequence[Arm]) -> list[Picture]:
    metrics = {arm.name: read_metrics(arm.folder) for arm in arms}
    return [
        curves({name: its["loss"] for name, its in metrics.items()}, "Training loss by step", "step", "Focal + Dice"),
        curves({name: its["val_dice"] for name, its in metrics.items()}, "Dice of the val scans by step", "step", "Dice"),
    ]


def paired_section(runs: Sequence[Scored], differences: Mapping[str, Mapping[str, Any]]) -> list[Section]:
    """The first run beside each other one, group by group; nothing where no test case has a target."""
    if not runs[0].group_dice():
        return []
    return [Section("Paired", pictures=[_paired_picture(runs[0], other, differences[other.name]) for other in runs[1:]])]


def _paired_picture(first: Scored, other: Scored, difference: Mapping[str, Any]) -> Picture:
    mine, theirs = first.group_dice(), other.group_dice()
    groups, told = sorted(mine), "Each point a test group"
    with drawing():
        figure = Figure(figsize=(4.4, 4.2), layout="constrained")
        axes = figure.subplots()
        low, high = _around([*first.case_dice().values(), *other.case_dice().values()])
        axes.plot([low, high], [low, high], color="#9aa3ad", linewidth=1)
        if len(first.case_dice()) > len(groups):
            its, others = first.case_dice(), other.case_dice()
            axes.scatter([others[case] for case in its], list(its.values()), color="#9aa3ad", s=8, linewidth=0)
            told = "Each large point a test group, each small one a case"
        axes.scatter([theirs[g] for g in groups], [mine[g] for g in groups], color=COLOURS[0], alpha=0.75)
        axes.set(xlabel=f"Dice, {other.name}", ylabel=f"Dice, {first.name}", xlim=(low, high), ylim=(low, high), aspect="equal")
        axes.grid(alpha=0.3)
        better = f"above the line {first.name} is better ({difference['wins']} of {len(groups)} groups)"
        return svg(figure, f"{told}; {better}")


def _around(dice: Sequence[float]) -> tuple[float, float]:
    """The range of an axis: that of the values in steps of a tenth, so that they are not all in one corner."""
    return max(0.0, math.floor(10 * min(dice) - 0.2) / 10), min(1.0, math.ceil(10 * max(dice) + 0.2) / 10)


def _overlays(arms: Sequence[Arm]) -> tuple[list[Picture], list[str]]:
    """The cases in which the first two runs differ most, both ways; and a note where the images are not there any more."""
    first, second = arms[0].case_dice(), arms[1].case_dice()
    order = sorted(first, key=lambda case: first[case] - second[case])
    half = _OVERLAYS // 2
    ids = order if len(order) <= _OVERLAYS else order[:half] + order[-half:]
    try:
        by_arm = [_load(arm, ids) for arm in arms]
    except InputError as error:
        say(str(error))
        return [], ["Pictures are left out: the test images are no longer where they were."]
    models = [load_model(arm.folder) for arm in arms]
    pictures = []
    for own in zip(*by_arm, strict=True):  # one case, as each run reads it
        case = own[0]
        assert case.labels is not None
        index = telling_slice(case.labels, case.axis)
        grey, truth = grey_picture(case, index), case.label_slice(index)
        targets = targets_of(arms[0].recipe.data.classes, arms[0].recipe.data.regions)
        row = [grey, label_picture(grey, truth)]
        for model, mine in zip(models, own, strict=True):
            labels = predict_case(model, mine, next(model.parameters()).device, "fp32")
            labels = remove_objects(labels, model.config.object_rules())
            row.append(error_picture(grey, mine.label_slice(index), take_slice(labels, mine.axis, index), targets))
        dice = ", ".join(f"{arm.name} {arm.case_dice()[case.case.id]:.3f}" for arm in arms)
        scale = max(1, 288 // grey.shape[0])
        pictures.append(image(side_by_side(row), f"{case.case.id}, Dice: {dice}", scale))
    return pictures, []


def _load(arm: Arm, ids: Sequence[str]) -> list[LoadedCase]:
    """Cases by id, with the run's own channels, normalisation and classes."""
    recipe = arm.recipe
    assert recipe.normalisation is not None, "a finished run has a resolved recipe"
    by_id = {case.id: case for case in open_source(recipe.data, masks=True).cases}
    missing = [i for i in ids if i not in by_id]
    if missing:
        raise InputError(f"data.source={recipe.data.source}: no longer holds {len(missing)} of the test cases.")
    cases = [by_id[i] for i in ids]
    return load_cases(cases, recipe.data.channels, recipe.normalisation, recipe.data.classes, recipe.data.ignore)


def _receipts(arms: Sequence[Arm]) -> list[str]:
    return [f"{arm.name}: {origin_of(arm.recipe, arm.receipt)}" for arm in arms]
