"""What `resunet finetune RECIPE` does with --plan, --find-lr and --overfit: text for standard output, and files if asked for."""

import math
from pathlib import Path
from typing import Literal

from accelerate import Accelerator

from finetune.distillation.teacher import load_teacher
from finetune.labelled import LabelledData, read_labelled, resolve, sampler_of
from finetune.planning.checks import OVERFIT_STEPS, RATES, SWEEP_STEPS, Sweep, find_rate, overfit, overfit_limit
from finetune.planning.page import page, refuse_file, write_recipe
from finetune.planning.plan import make_plan
from finetune.recipe import FinetuneRecipe
from finetune.step import begins_trained, build
from resunet.errors import CheckFailed, InputError
from resunet.exits import is_main_rank
from resunet.layout import place
from resunet.model import Segmenter
from resunet.report import Section, curves, write_page
from resunet.training import start_ranks
from resunet.transfer import Receipt

Mode = Literal["plan", "find-lr", "overfit"]
_APART = 0.2  # of Dice, between the two modes of norms


def before_training(recipe: FinetuneRecipe, mode: Mode, write: Path | None) -> str:
    """Look, measure or try before training; the text to show. Nothing is written but `write`, and `out` may exist.

    Args:
        write: plan: the recipe; find-lr: the page with the curve.

    Raises:
        ResUNetError: whatever would stop the run; CheckFailed where one batch could not be learned.
    """
    if mode == "plan":
        if write is not None:
            refuse_file(write)
        made = make_plan(recipe)
        if write is None:
            return page(made)
        write_recipe(made, write)
        return f"{page(made)}\n\n{write}"
    if mode == "find-lr":
        return _find_rate(recipe, write)
    if write is not None:
        raise InputError(f"--write {write}: --overfit writes nothing. Leave it out.")
    return _overfit(recipe)


def _find_rate(recipe: FinetuneRecipe, write: Path | None) -> str:
    if write is not None and (write.suffix != ".html" or write.exists()):
        raise InputError(f"--write {write}: --find-lr writes a page with its curve. Name a new .html file.")
    recipe, data, model, receipt, accelerator = _prepare(recipe)
    sampler, teacher = sampler_of(recipe, data), load_teacher(recipe, accelerator.device)
    sweep = find_rate(
        recipe, model, sampler, accelerator, begins_trained(recipe), SWEEP_STEPS, teacher=teacher, receipt=receipt
    )
    text = _told(sweep, recipe.optimizer.lr)
    if write is None:
        return "\n".join(text)
    series = {"as measured": (_log(sweep.rates), sweep.losses), "smoothed": (_log(sweep.rates), sweep.smoothed)}
    picture = curves(series, "Loss by learning rate", "log10 of the learning rate", "loss")
    write.parent.mkdir(parents=True, exist_ok=True)
    write_page(write, "Learning rate", [Section(lead=text[:1], text=text[1:], pictures=[picture])])
    return "\n".join([*text, str(write)])


def _told(sweep: Sweep, now: float) -> list[str]:
    ends = f"{sweep.rates[0]:.0e} to {sweep.rates[-1]:.2g} in {len(sweep.rates)} steps"
    fell = f"the loss went from {sweep.smoothed[0]:.3g} to {min(sweep.smoothed):.3g}, its lowest at {sweep.lowest:.2g}"
    if sweep.steepest is None:
        return [
            f"No learning rate from {RATES[0]:g} to {RATES[1]:g} lowered the loss.",
            f"{ends}: {fell}. Try resunet finetune RECIPE --overfit, and see "
            '"Before training, and when it goes wrong" in the README.',
        ]
    place = "about that" if 1 / 3 <= now / sweep.steepest <= 3 else ("above it" if now > sweep.steepest else "below it")
    return [
        f"optimizer.lr={sweep.steepest:.2g}: where the loss falls fastest. The recipe has {now:g}, {place}.",
        f"The cautious rule, a tenth of the rate of the lowest loss, says {sweep.lowest / 10:.2g}.",
        f"{ends}: {fell}.",
    ]


def _overfit(recipe: FinetuneRecipe) -> str:
    recipe, data, model, receipt, accelerator = _prepare(recipe)
    done = overfit(recipe, model, data.train, accelerator, begins_trained(recipe), OVERFIT_STEPS, receipt=receipt)
    figures = (
        f"loss {done.first_loss:.3g} → {done.last_loss:.3g} in {done.steps} steps at lr {recipe.optimizer.lr:g} on one batch of "
        f"{recipe.batch} patches; Dice of the batch {done.dice_training:.3f} in training mode, {done.dice_evaluation:.3f} in "
        "evaluation mode"
    )
    if not done.passed:
        raise CheckFailed(f"overfit: FAILED: {figures}.\n{_what_to_check(recipe)}")
    lines = [f"overfit: passed: {figures}."]
    if done.dice_training - done.dice_evaluation > _APART:
        lines.append(
            f"The two modes differ: the running statistics of model.norm={recipe.model.norm} have not settled. It fades with "
            "steps; if val stays bad while the loss is good, use a larger batch or model.norm=group."
        )
    return "\n".join(lines)


def _what_to_check(recipe: FinetuneRecipe) -> str:
    return "\n".join(
        [
            f"A network that cannot learn {recipe.batch} patches by heart (loss below {overfit_limit(recipe):g}) will not "
            "learn the rest. Check in order:",
            "  1. masks: resunet finetune RECIPE --plan compares their geometry with the images', and counts classes and objects;",
            "     data.classes must name what the masks' values mean",
            f"  2. learning rate: resunet finetune RECIPE --find-lr (now {recipe.optimizer.lr:g})",
            "  3. normalisation: objects brighter than the clip vanish (--plan says how many pixels lie beyond it)",
            f"  4. capacity: wider model.channels (now {list(recipe.model.channels or ())}), objects of a few pixels, "
            "labels that contradict each other",
        ]
    )


def _prepare(recipe: FinetuneRecipe) -> tuple[FinetuneRecipe, LabelledData, Segmenter, Receipt | None, Accelerator]:
    """One process, the recipe's own start, labelled patches and no test cases."""
    recipe = resolve(recipe).model_copy(update={"processes": 1, "evaluate_test": False, "consistency": None})
    accelerator = start_ranks(recipe, recipe.batch, "patches")
    model, receipt = build(recipe)
    data = read_labelled(recipe, quiet=not is_main_rank())
    return recipe, data, place(model, accelerator.device), receipt, accelerator


def _log(rates: tuple[float, ...]) -> list[float]:
    return [math.log10(rate) for rate in rates]
