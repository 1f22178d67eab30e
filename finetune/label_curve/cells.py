"""The cells of a label curve: which there are, where they lie, and which one val chooses."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune.counted_labels import labels_beside, other_labels
from finetune.label_curve.recipe import LabelCurveRecipe
from finetune.labelled import choose_cases
from finetune.recipe import FinetuneRecipe
from resunet.checkpoint import model_folder
from resunet.errors import InputError
from resunet.runs import is_done

_MODELS = ("encoder/", "start/", "teacher/", "draw_encoder/")  # of the inputs that a run's record names


@dataclass(frozen=True)
class Cell:
    """One fine-tuning: an arm, a number of groups to train on, a draw, a number of steps."""

    recipe: FinetuneRecipe
    name: str

    @property
    def folder(self) -> Path:
        return self.recipe.out

    @property
    def steps(self) -> int:
        return self.recipe.steps

    @property
    def done(self) -> bool:
        return is_done(self.folder)

    @property
    def is_judged(self) -> bool:
        """Test was read for it."""
        return (self.folder / "evaluation" / "summary.json").is_file()

    @property
    def record(self) -> dict[str, Any]:
        """run.json of a finished cell."""
        record: dict[str, Any] = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        return record

    @property
    def models(self) -> dict[str, str]:
        """Of a finished cell, the sha256 of every file of an encoder, a start or a teacher."""
        return {name: digest for name, digest in self.record["inputs"].items() if name.startswith(_MODELS)}

    def file_of(self, model: str) -> Path | None:
        """Where a file of `models` lies; None if there is none any more."""
        kind, name = model.split("/")
        folder = self.recipe.data.draw_encoder if kind == "draw_encoder" else getattr(self.recipe, kind)
        file = model_folder(folder) / name if folder is not None and folder.exists() else None
        return file if file is not None and file.is_file() else None


@dataclass(frozen=True)
class Point:
    """An arm on one draw of so many groups: a cell for every number of steps, the fewest first."""

    arm: str
    labelled: int
    draw: int
    cells: tuple[Cell, ...]

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.labelled}-draw-{self.draw}"

    @cached_property
    def chosen(self) -> Cell:
        """The cell with the best Dice on val; all must be done. Of equals, where val has no target, the one that test was read for,
        else the one with the most steps."""
        return max(self.cells, key=lambda cell: (cell.record["best_val_dice"], cell.is_judged, cell.steps))

    @property
    def done(self) -> bool:
        """Its cells are, and the chosen one was evaluated on test."""
        return all(cell.done for cell in self.cells) and self.chosen.is_judged


def points_of(recipe: LabelCurveRecipe) -> list[Point]:
    """All points, the first draws first, so that a curve that was stopped has as many whole draws as possible.

    Raises:
        InputError: more groups than the pool has, no test cases, or whatever else is wrong with the source.
    """
    return [
        _point(recipe, arm, labelled, draw)
        for draw in range(recipe.draws)
        for labelled in numbers_of_groups(recipe)
        for arm in recipe.arms
    ]


def _point(recipe: LabelCurveRecipe, arm: str, labelled: int, draw: int) -> Point:
    folder = recipe.out / "cells" / arm / str(labelled) / f"draw-{draw}"
    cells = tuple(
        Cell(recipe.cell(arm, labelled, draw, steps, folder / f"steps-{steps}"), f"{arm}-{labelled}-draw-{draw}-steps-{steps}")
        for steps in recipe.steps
    )
    return Point(arm, labelled, draw, cells)


def numbers_of_groups(recipe: LabelCurveRecipe) -> list[int]:
    """The budgets as numbers of groups to train on, ascending, equal ones merged."""
    everything = _all_labelled(recipe)
    _, pool, _, test = choose_cases(everything)
    if not test:
        raise InputError(f"finetune.data.source={everything.data.source}: has no test cases, and a curve is of test Dice.")
    total = len({case.group_name for case in pool})
    numbers = set()
    for budget in recipe.budgets:
        # as data.labelled: n = max(1, round(share × groups))
        number = total if budget == "all" else max(1, round(budget * total)) if budget < 1 else int(budget)
        if number > total:
            raise InputError(
                f"budgets: {number} groups, but the pool has only {total}. Give at most that, shares below 1, or all."
            )
        numbers.add(number)
    return sorted(numbers)


def _all_labelled(recipe: LabelCurveRecipe) -> FinetuneRecipe:
    cell = recipe.cell(recipe.baseline, 1, 0, recipe.steps[0], recipe.out)
    return cell.model_copy(update={"data": cell.data.model_copy(update={"labelled": None}), "evaluate_test": True})


@dataclass(frozen=True)
class Budget:
    """What a number of groups comes to: groups to train on, groups to choose by, and images or volumes of both.

    images: in every draw of every way to draw.
    probe: arm → groups beside those that its encoder's probe or its teacher used, in the draw where they are most.
    """

    train: int
    val: int
    images: tuple[int, ...]
    probe: Mapping[str, int] = field(default_factory=dict)

    def labels_of(self, arm: str) -> int:
        """Groups that somebody has to label for an arm."""
        return self.labels + self.probe.get(arm, 0)

    @property
    def labels(self) -> int:
        """Groups that somebody has to label: val counts too."""
        return self.train + self.val

    @property
    def shown(self) -> str:
        return f"{self.labels} ({self.train} + {self.val})"


def count_labels(recipe: LabelCurveRecipe, points: Sequence[Point]) -> list[Budget]:
    """What every budget comes to, in the order of numbers of groups."""
    drawn_with = {arm: recipe.drawn_with(arm) for arm in recipe.arms}
    probes = {point.arm: other_labels(point.cells[0].recipe) for point in points}
    counted: dict[int, list[tuple[int, int]]] = {}
    beside: dict[int, dict[str, int]] = {}
    for point in points:
        if drawn_with[point.arm] == point.arm:
            source, train, val, _ = choose_cases(point.cells[0].recipe)
            counted.setdefault(point.labelled, []).append((len({case.group_name for case in val}), len(train) + len(val)))
            most = beside.setdefault(point.labelled, {})
            for arm, probe in probes.items():
                if drawn_with[arm] == point.arm and (more := labels_beside(probe, [*train, *val], source)):
                    most[arm] = max(more, most.get(arm, 0))
    return [
        Budget(train, its[0][0], tuple(images for _, images in its), beside[train]) for train, its in sorted(counted.items())
    ]
