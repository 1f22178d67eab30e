"""Finished runs as they are compared: their recipes, what they cost, and their Dice by test case and group."""

import csv
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune.evaluation.statistics import group_means
from finetune.evaluation.targets import targets_of
from finetune.recipe import FinetuneRecipe
from resunet.errors import InputError
from resunet.mirror import without_paths
from resunet.runs import is_done, stage_of
from resunet.transfer import Receipt

_NEEDED = ("config.json", "run.json", "evaluation/summary.json", "evaluation/cases.csv")


@dataclass(frozen=True)
class Scored:
    """Test cases of a run. scores: (case, class) → Dice, of classes that the truth has; groups: case → group."""

    name: str
    scores: dict[tuple[str, str], float]
    groups: dict[str, str]

    def case_dice(self) -> dict[str, float]:
        """Dice of every case that has something to find: the mean over the classes that its truth has."""
        by_case: dict[str, list[float]] = {}
        for (case, _), dice in self.scores.items():
            by_case.setdefault(case, []).append(dice)
        return {case: float(np.mean(values)) for case, values in by_case.items()}

    def group_dice(self) -> dict[str, float]:
        """The mean over the cases of each group."""
        by_group: dict[str, list[float]] = {}
        for case, dice in self.case_dice().items():
            by_group.setdefault(self.groups[case], []).append(dice)
        return group_means(by_group)


@dataclass(frozen=True)
class Arm(Scored):
    """One finished fine-tuning run."""

    folder: Path
    recipe: FinetuneRecipe
    record: Mapping[str, Any]
    summary: dict[str, Any]
    receipt: Receipt | None

    @property
    def test_digest(self) -> str:
        """sha256 over the files that it was evaluated on."""
        # of a run that did not read test itself, its own is of nothing; evaluations of earlier versions say none
        return str(self.summary.get("cases_sha256", self.record["inputs"]["test"]))


def read_arm(folder: Path, name: str) -> Arm:
    """A finished run.

    Raises:
        InputError: it is not one, or it has no evaluation.
    """
    if (folder / "run.json").is_file() and stage_of(folder) != "finetune":
        raise InputError(f"{folder}: is a run of {stage_of(folder)}, and what is compared are fine-tuning runs. Leave it out.")
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if missing == list(_NEEDED[2:]) and is_done(folder):
        raise InputError(
            f"{folder}: was not evaluated on test (evaluate_test=false, or no test cases). Do that first: resunet evaluate "
            f"{folder} --data SOURCE --out {folder / 'evaluation'}"
        )
    if missing:
        what = (
            f"its run is not finished: {', '.join(missing)} is not there" if len(missing) < len(_NEEDED) else "no run directory"
        )
        raise InputError(f"{folder}: {what}. Compare finished fine-tuning runs: go on with it by resume=true, or leave it out.")
    try:
        recipe = FinetuneRecipe.model_validate_json((folder / "config.json").read_text(encoding="utf-8"))
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        summary = json.loads((folder / "evaluation" / "summary.json").read_text(encoding="utf-8"))
        with open(folder / "evaluation" / "cases.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        if len({(row["id"], row["class"]) for row in rows}) < len(rows):
            raise ValueError("its cases.csv has a case twice; with data.names=keep every case needs a name of its own")
        receipt = folder / "receipt.json"
        return Arm(
            name=name,
            folder=folder,
            recipe=recipe,
            record=record,
            summary=summary,
            scores={(row["id"], row["class"]): float(row["dice"]) for row in rows if int(row["truth_voxels"])},
            groups={row["id"]: row["group"] for row in rows},
            receipt=Receipt.model_validate_json(receipt.read_text(encoding="utf-8")) if receipt.exists() else None,
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{folder}: is not a fine-tuning run as this version writes it: {error}. Evaluate its model again, or leave it out."
        ) from error


def refuse_other_cases(first: Arm, other: Arm) -> None:
    judged = [_judged_by(arm.recipe) for arm in (first, other)]
    if judged[0] != judged[1]:
        raise InputError(
            f"{first.folder} is judged by {judged[0]}, {other.folder} by {judged[1]}. Compare runs of the same data.classes and "
            "data.regions."
        )
    mine, theirs = set(first.groups), set(other.groups)
    if mine != theirs or first.scores.keys() != other.scores.keys():
        only = {first.folder: sorted(mine - theirs), other.folder: sorted(theirs - mine)}
        lines = [f"  only {folder}: {_some(ids)}" for folder, ids in only.items() if ids] or ["  in the classes they hold"]
        raise InputError(
            f"{first.folder} and {other.folder} were evaluated on different test cases:\n" + "\n".join(lines) + "\n"
            "Evaluate both on the same split of the same source, with the same data.names."
        )
    digests = [arm.test_digest[:12] for arm in (first, other)]
    if digests[0] != digests[1]:
        raise InputError(
            f"{first.folder} and {other.folder} were evaluated on other images or masks of the same names: sha256 {digests[0]} and "
            f"{digests[1]}. Evaluate both on the same split of the same source."
        )


def with_groups_of(first: Arm, other: Arm) -> Arm:
    """Another arm on the same cases under the first's names of groups: where nobody named them they are called after a path.

    Raises:
        InputError: the cases are grouped otherwise.
    """
    names = {theirs: first.groups[case] for case, theirs in other.groups.items()}
    alike = all(first.groups[case] == names[theirs] for case, theirs in other.groups.items())
    if not alike or len(set(names.values())) < len(names):
        raise InputError(
            f"{first.folder} and {other.folder} group the same test cases otherwise, and what is paired are groups. Give both "
            "sources the same groups.csv, and evaluate both again."
        )
    return replace(other, groups={case: names[theirs] for case, theirs in other.groups.items()})


def _some(ids: Sequence[str]) -> str:
    return f"{len(ids)}: {', '.join(ids[:20])}" + (", …" if len(ids) > 20 else "")


def _judged_by(recipe: FinetuneRecipe) -> str:
    targets = targets_of(recipe.data.classes, recipe.data.regions)
    return ", ".join(sorted(targets.names)) if recipe.data.regions is None else targets.described()


def recipe_differences(arms: Sequence[Arm]) -> list[list[str]]:
    """The recipe keys and the files in which the runs differ, and what each cost."""
    recipes = {arm.name: without_paths(json.loads(arm.recipe.model_dump_json(exclude={"steps"}))) for arm in arms}
    rows = differing_values(recipes)
    rows.append(["begins", *(arm.recipe.begins for arm in arms)])
    inputs = {arm.name: {f"sha256 of {name}": digest[:12] for name, digest in arm.record["inputs"].items()} for arm in arms}
    rows += differing_values(inputs)[1:]
    rows.append(["steps", *(str(arm.recipe.steps) for arm in arms)])
    rows.append(["step of the model", *(str(arm.record.get("best_step")) for arm in arms)])
    rows.append(["seconds of training", *(str(arm.record.get("seconds")) for arm in arms)])
    return rows


def differing_values(recipes: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A header, and a row for every key in which recipes, name → values, differ."""
    flat = [_flat(recipe) for recipe in recipes.values()]
    rows = [["Recipe key", *recipes]]
    for key in sorted({key for recipe in flat for key in recipe}):
        values = [str(recipe.get(key)) for recipe in flat]
        if len(set(values)) > 1:
            rows.append([key, *values])
    return rows


def distinct_names(runs: Sequence[Path]) -> list[str]:
    """The folders' names; those that occur twice are numbered."""
    return numbered([run.resolve().name for run in runs])


def numbered(names: Sequence[str]) -> list[str]:
    """Names, all different: of equal ones all but the first have a number that none has yet."""
    found: list[str] = []
    for name in names:
        tried = (f"{name}-{number}" for number in itertools.count(2))
        found.append(name if name not in found else next(one for one in tried if one not in found and one not in names))
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
