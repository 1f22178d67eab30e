"""What the cells of a label curve say together: curve.json and cases.parquet."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from finetune.comparison.arms import read_arm
from finetune.evaluation.summary import COUNTS
from finetune.label_curve.cells import Budget, Cell, Point, count_labels
from finetune.label_curve.cost import Cost, cost_of
from finetune.label_curve.recipe import LabelCurveRecipe
from finetune.label_curve.refusals import refuse_other_models
from finetune.label_curve.statistics import LEVEL, difference, holm, labels_needed, score
from resunet.errors import InputError
from resunet.files import file_aside

SCHEMA_VERSION = 1
Scores = NDArray[np.float64]  # (B budgets, P groups, D draws)


@dataclass(frozen=True)
class Curve:
    """A finished curve.

    scores: arm → Dice of the test groups. steps, val: arm → what val chose, (B, D), and its Dice there.
    models: arm → the sha256 of every file that its networks begin with or learn from. test: of all test files.
    """

    recipe: LabelCurveRecipe
    budgets: list[Budget]
    groups: list[str]
    scores: dict[str, Scores]
    steps: dict[str, NDArray[np.int64]]
    val: dict[str, Scores]
    cost: dict[str, Cost]
    models: dict[str, dict[str, str]]
    test: str


def read_curve(recipe: LabelCurveRecipe, points: Sequence[Point]) -> Curve:
    """The chosen runs of all points, which are done.

    Raises:
        InputError: they were trained on other cases than their draw has elsewhere, or evaluated on different test cases.
    """
    budgets = count_labels(recipe, points)
    place = {budget.train: index for index, budget in enumerate(budgets)}
    _refuse_other_draws(recipe, points)
    refuse_other_models(points)
    groups: list[str] = []
    scores: dict[str, Scores] = {}
    shape = len(budgets), recipe.draws
    steps = {arm: np.zeros(shape, np.int64) for arm in recipe.arms}
    val = {arm: np.zeros(shape) for arm in recipe.arms}
    for point in points:
        run = point.chosen
        dice = read_arm(run.folder, point.arm).group_dice()
        groups = groups or sorted(dice)
        if sorted(dice) != groups or run.record["inputs"]["test"] != points[0].chosen.record["inputs"]["test"]:
            raise InputError(
                f"{run.folder}: was evaluated on other test cases than {points[0].chosen.folder}. The source has changed while the "
                "curve ran: restore it, or start again in another out."
            )
        where = place[point.labelled], point.draw
        scores.setdefault(point.arm, np.zeros((len(budgets), len(groups), recipe.draws)))[where[0], :, where[1]] = [
            dice[group] for group in groups
        ]
        steps[point.arm][where], val[point.arm][where] = run.steps, run.record["best_val_dice"]
    cost = {arm: cost_of([point for point in points if point.arm == arm]) for arm in recipe.arms}
    models = {point.arm: point.cells[0].models for point in points}
    return Curve(recipe, budgets, groups, scores, steps, val, cost, models, points[0].chosen.record["inputs"]["test"])


def _refuse_other_draws(recipe: LabelCurveRecipe, points: Sequence[Point]) -> None:
    """Raise InputError if cells of one draw had different cases: the source changed, or machines embed it differently."""
    seen: dict[tuple[str, int, int], Cell] = {}
    for point in points:
        for cell in point.cells:
            first = seen.setdefault((recipe.drawn_with(point.arm), point.labelled, point.draw), cell)
            own, theirs = ({part: one.record["inputs"][part] for part in ("train", "val")} for one in (cell, first))
            if own != theirs:
                raise InputError(
                    f"{cell.folder}: was trained on or chosen by other cases than {first.folder}, of the same draw. The source has "
                    "changed while the curve ran (with data.draw_by: or machines that share it round differently). Delete one of "
                    "the two, and continue with resume=true on one machine."
                )


def summarise(curve: Curve) -> dict[str, Any]:
    """curve.json."""
    others = curve.recipe.others()
    differences = {arm: _differences(curve, arm) for arm in others}
    _adjust([figure for figures in differences.values() for figure in figures])
    return {
        "schema_version": SCHEMA_VERSION,
        "arms": list(curve.recipe.arms),
        "baseline": curve.recipe.baseline,
        "test_groups": len(curve.groups),
        "test_sha256": curve.test,
        "models_sha256": curve.models,
        "draws": curve.recipe.draws,
        "steps": list(curve.recipe.steps),
        "labels": [
            {
                "labels": one.labels,
                "train": one.train,
                "val": one.val,
                "images": list(one.images),
                "probe": {arm: one.probe.get(arm, 0) for arm in curve.recipe.arms},
            }
            for one in curve.budgets
        ],
        "draw_by": {arm: curve.recipe.draw_of(arm)[0] for arm in curve.recipe.arms},
        "dice": {arm: _levels(curve, arm) for arm in curve.recipe.arms},
        "differences": differences,
        "labels_saved": {arm: _saved(curve, arm) for arm in others},
        "cost": {arm: cost.record() for arm, cost in curve.cost.items()},
    }


def _levels(curve: Curve, arm: str) -> list[dict[str, Any]]:
    """An arm's figure at every budget, with what each draw gave."""
    return [
        {
            "labels": budget.labels_of(arm),
            **score(curve.scores[arm][index]),
            "by_draw": curve.scores[arm][index].mean(axis=0).tolist(),
            "steps": curve.steps[arm][index].tolist(),
            "val_dice": curve.val[arm][index].tolist(),
        }
        for index, budget in enumerate(curve.budgets)
    ]


def _differences(curve: Curve, arm: str) -> list[dict[str, Any]]:
    values = curve.scores[arm] - curve.scores[curve.recipe.baseline]
    return [
        {"labels": budget.labels_of(arm), **difference(its), "by_draw": its.mean(axis=0).tolist()}
        for budget, its in zip(curve.budgets, values, strict=True)
    ]


def _adjust(figures: Sequence[dict[str, Any]]) -> None:
    """Holm over the whole family: every arm beside the baseline at every budget."""
    tested = [figure for figure in figures if figure["p"] is not None]
    for figure, adjusted in zip(tested, holm([figure["p"] for figure in tested]), strict=True):
        figure["p_holm"] = adjusted
    for figure in figures:
        figure.setdefault("p_holm", None)
        figure["verdict"] = _verdict(figure)


def _verdict(figure: Mapping[str, Any]) -> str:
    if figure["p_holm"] is None:
        return "unknown"
    if figure["p_holm"] > LEVEL:
        return "no difference"
    return "better" if figure["mean"] > 0 else "worse"


def _saved(curve: Curve, arm: str) -> list[dict[str, Any]]:
    baseline = curve.scores[curve.recipe.baseline]
    labels = [budget.labels_of(curve.recipe.baseline) for budget in curve.budgets]
    rows = []
    for budget, target in zip(curve.budgets, curve.scores[arm], strict=True):
        needed = labels_needed(target, baseline, labels)
        interval = None if needed.interval is None else [end.record() for end in needed.interval]
        rows.append({"labels": budget.labels_of(arm), "baseline_needs": needed.labels.record(), "ci95": interval})
    return rows


def write_cases(curve: Curve, points: Sequence[Point], path: Path) -> None:
    """cases.parquet: a row for every point, test case and class, with the columns of cases.csv; what is undefined is null."""
    by_train = {budget.train: budget for budget in curve.budgets}
    columns: dict[str, list[Any]] = {}
    for point in points:
        budget = by_train[point.labelled]
        with open(point.chosen.folder / "evaluation" / "cases.csv", newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                own = {"arm": point.arm, "labels": budget.labels_of(point.arm)}
                own |= {"train_groups": budget.train, "val_groups": budget.val}
                own |= {"draw": point.draw, "steps": point.chosen.steps, "case": row.pop("id")}
                names = {name: row.pop(name) for name in ("group", "class")}
                for name, value in (own | names | {name: _number(name, text) for name, text in row.items()}).items():
                    columns.setdefault(name, []).append(value)
    with file_aside(path) as aside:
        pq.write_table(pa.table(columns), aside)


def _number(column: str, text: str) -> float | None:
    if column in COUNTS:
        return int(text)
    return float(text) if text else None


def with_looks(record: dict[str, Any], path: Path) -> dict[str, Any]:
    """A record that knows how large its curve was whenever it was read before, which an earlier curve.json says."""
    before: list[dict[str, Any]] = []
    if path.is_file():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        before = earlier.get("looks", [_look(earlier)])  # a curve.json of an earlier version is one look, too
    look = _look(record)
    return record | {"looks": [*(one for one in before if one != look), look]}


def _look(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"draws": record["draws"], "arms": len(record["arms"]), "labels": [one["labels"] for one in record["labels"]]}


def curve_text(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=2) + "\n"
