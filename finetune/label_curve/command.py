"""`resunet label-curve RECIPE`: all cells, by one process or by many on the same folder, then what they say."""

from pathlib import Path
from typing import Any

from finetune.label_curve.cells import Point, points_of
from finetune.label_curve.page import write_report
from finetune.label_curve.recipe import LabelCurveRecipe
from finetune.label_curve.refusals import refuse_other_models, refuse_unequal_arms
from finetune.label_curve.result import (
    Curve,
    curve_text,
    read_curve,
    summarise,
    with_looks,
    write_cases,
)
from finetune.label_curve.verdict import grid_caution, verdicts
from finetune.label_curve.work import do_all, locked, look_for_leaks, work_alone
from resunet.errors import CheckFailed, InputError
from resunet.exits import is_main_rank
from resunet.files import refuse_taken, write_text
from resunet.progress import say
from resunet.runs import note_work

# Keys that may differ when a curve is continued.
_FREE_ON_RESUME = {"resume", "out"}


def label_curve(recipe: LabelCurveRecipe) -> Path:
    """Run a label curve, or this process's share of it; the folder.

    Several processes share the cells: started with `resume=true` on one `out`, on one machine or on several with one file
    system, or by a launcher. All end when everything is done; what a killed one had begun is continued by another.

    Raises:
        ResUNetError: input, environment, a leak, a loss that is not finite, or SIGTERM; cells that are done stay done.
    """
    main, locks = is_main_rank(), recipe.out / "locks"
    work_alone(recipe.resume)
    try:
        recipe = _in_its_group(recipe)
        points = points_of(recipe)
        _refuse_other_folder(recipe, locks)
        with locked(locks / "config.lock", wait=True):
            _refuse_other_recipe(recipe)
            refuse_other_models(points)
            refuse_unequal_arms(recipe, points)
            look_for_leaks(points, locks)
            _write_config(recipe)  # what was refused leaves no trace: the curve goes on without it
    except (InputError, CheckFailed) as error:  # which every process of a launcher finds
        error.known_to_all = not main
        raise
    do_all(points, locks)
    with locked(locks / "report.lock", wait=True):
        if _read_config(recipe) == recipe.model_copy(update={"resume": False}):  # another process may have a larger curve
            curve = _write(recipe, points)
            models = {f"{arm}/{name}": digest for arm, its in curve.models.items() for name, digest in its.items()}
            note_work(recipe.out, "label-curve", recipe.seed, "done", {"test": curve.test} | models)
    return recipe.out


def _read_config(recipe: LabelCurveRecipe) -> LabelCurveRecipe:
    """The recipe of what is in the folder."""
    found = LabelCurveRecipe.model_validate_json((recipe.out / "config.json").read_text(encoding="utf-8"))
    return found.model_copy(update={"out": recipe.out, "resume": False})


def _in_its_group(recipe: LabelCurveRecipe) -> LabelCurveRecipe:
    """With the W&B group that the curve began with, which it keeps when it grows."""
    if not recipe.resume or not (recipe.out / "config.json").is_file():
        return recipe.in_group(recipe.group)
    begun, given = _read_config(recipe).group, recipe.finetune.get("wandb", {}).get("group")
    if given not in (None, begun):
        raise InputError(
            f"finetune.wandb.group={given}: the curve in {recipe.out} began with {begun}, and keeps it. Leave it out."
        )
    return recipe.in_group(begun)


def _refuse_other_folder(recipe: LabelCurveRecipe, locks: Path) -> None:
    """Raises InputError unless the folder is new, or with `resume` a label curve."""
    if recipe.out.is_dir() and {child.name for child in recipe.out.iterdir()} <= {locks.name}:  # of one that was refused
        return
    if not recipe.resume or not recipe.out.exists():
        refuse_taken(recipe.out, "out=", otherwise="continue it with resume=true, or delete it")
    elif not (recipe.out / "config.json").is_file():
        raise InputError(f"out={recipe.out}: cannot be continued, it is not a label curve (no config.json).")


def _refuse_other_recipe(recipe: LabelCurveRecipe) -> None:
    """Raises InputError if the curve was begun with another recipe, of which this one is no more of the same."""
    if not (recipe.out / "config.json").is_file():
        return
    begun = _read_config(recipe)
    before = begun.in_group(begun.group).model_dump(exclude=_FREE_ON_RESUME)
    now = recipe.model_dump(exclude=_FREE_ON_RESUME)
    differing = [key for key in now if before[key] != now[key] and not _grown(key, before[key], now[key], recipe.out / "cells")]
    if differing:
        lines = "\n".join(f"  {key}: {before[key]} then, {now[key]} now" for key in differing)
        raise InputError(
            f"out={recipe.out}: was started with another recipe:\n{lines}\nName another out. A curve grows by draws, budgets and "
            f"arms only; an arm goes, or changes, once {recipe.out / 'cells'} has no folder of it."
        )


def _write_config(recipe: LabelCurveRecipe) -> None:
    write_text(recipe.out / "config.json", recipe.model_dump_json(indent=2, exclude={"resume"}) + "\n")
    note_work(recipe.out, "label-curve", recipe.seed, "running", {})


def _grown(key: str, before: Any, now: Any, cells: Path) -> bool:
    """More of what a curve may have more of. Not of steps: among them val chose what test was read for."""
    if key == "draws":
        return bool(now > before)
    if key == "budgets":
        return set(before) <= set(now)
    return key == "arms" and all(now.get(arm) == values or not (cells / arm).exists() for arm, values in before.items())


def _write(recipe: LabelCurveRecipe, points: list[Point]) -> Curve:
    curve = read_curve(recipe, points)
    record = with_looks(summarise(curve), recipe.out / "curve.json")
    write_cases(curve, points, recipe.out / "cases.parquet")
    write_text(recipe.out / "curve.json", curve_text(record))
    write_report(curve, record, recipe.out)
    for sentence in (*verdicts(record), *grid_caution(record)):
        say(sentence)
    return curve
