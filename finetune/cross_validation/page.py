"""The report of a cross-validation: folds beside each other, cases that they have not seen, and the ensemble on test."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune.evaluation.outputs import Measured, Predict, sections_of
from finetune.evaluation.page import policy_section
from finetune.evaluation.targets import targets_of
from finetune.labelled import FoldedData
from finetune.recipe import FinetuneRecipe
from finetune.start import origin_of
from resunet.data.cases import LoadedCase
from resunet.report import Picture, Section, curves, read_metrics, shown, write_page
from resunet.transfer import Receipt


@dataclass(frozen=True)
class Fold:
    """One fold. training, val: cases and groups; dice: the figure of its val cases, as its network predicts them."""

    training: tuple[int, int]
    val: tuple[int, int]
    best_step: int
    dice: dict[str, Any]


@dataclass(frozen=True)
class Evaluated:
    """An evaluation that was written into OUT/folder: its summary.json, the cases, and how they are predicted."""

    folder: str
    summary: dict[str, Any]
    measured: Sequence[Measured]
    predict: Predict


def write_folds_page(
    recipe: FinetuneRecipe,
    data: FoldedData,
    folds: Sequence[Fold],
    left_out: Evaluated,
    tested: Evaluated | None,
    notes: Sequence[str],
    chosen: Sequence[str],
) -> None:
    """report.html of a finished cross-validation.

    Args:
        left_out: out of fold. tested: the ensemble on test, None where there are no test cases.
        notes: what a reader has to know. chosen: what else was chosen out of fold.
    """
    receipt = recipe.out / "receipt.json"
    origin = origin_of(recipe, Receipt.model_validate_json(receipt.read_text(encoding="utf-8")) if receipt.is_file() else None)
    lead = [
        "Not evaluated on test: there are no test cases, or the recipe says evaluate_test=false."
        if tested is None
        else f"Ensemble of {len(folds)}: test Dice {shown(tested.summary['dice'])} groups.",
        f"Out of fold: Dice {shown(left_out.summary['dice'])} groups.",
    ]
    (cases, groups), (test_cases, test_groups) = counted(data.cases), counted(data.test)
    counts = f"{cases} cases of {groups} groups in {len(folds)} folds, {test_cases} test cases of {test_groups} groups."
    sections = [
        Section(lead=lead, notes=notes, text=[f"{counts} {recipe.steps} steps a fold.", origin, *chosen]),
        Section("Folds", table=_table(folds), pictures=_learning(recipe, len(folds))),
    ]
    for name, one in (("Test, the ensemble", tested), ("Out of fold, each network", left_out)):
        if one is not None:
            targets = targets_of(recipe.data.classes, recipe.data.regions)
            overlays = recipe.out / one.folder / "overlays"
            found = sections_of(one.summary, one.measured, targets, overlays, one.predict)
            sections += [replace(section, heading=f"{name}: {section.heading}") for section in found]
    sections.append(policy_section((tested or left_out).summary))
    write_page(recipe.out / "report.html", "Cross-validation", sections)


def counted(cases: Sequence[LoadedCase]) -> tuple[int, int]:
    """Loaded cases, and their groups."""
    return len(cases), len({case.case.group for case in cases})


def _table(folds: Sequence[Fold]) -> list[list[str]]:
    rows = [["Fold", "Training cases (groups)", "Val cases (groups)", "Step chosen", "Val Dice [95 % interval], groups"]]
    for number, fold in enumerate(folds):
        counts = [f"{cases} ({groups})" for cases, groups in (fold.training, fold.val)]
        rows.append([str(number), *counts, str(fold.best_step), shown(fold.dice)])
    return rows


def _learning(recipe: FinetuneRecipe, folds: int) -> list[Picture]:
    metrics = {f"fold {fold}": read_metrics(recipe.out / f"fold-{fold}") for fold in range(folds)}
    return [
        curves({name: its["loss"] for name, its in metrics.items()}, "Training loss by step", "step", "loss"),
        curves(
            {name: its["val_dice"] for name, its in metrics.items()}, "Dice of each fold's val scans by step", "step", "Dice"
        ),
    ]
