"""`resunet finetune RECIPE --plan`: what the data are, what the recipe should say and why, and what it will cost.

The rules are stated where they are; each gives its reason with the numbers it went by. Nothing is chosen behind the user's
back: `--write` puts the values into a recipe as plain text, to be edited.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from finetune.labelled import LabelledData, choose_cases, read_labelled, resolve
from finetune.planning.cautions import geometry_warnings, refuse_other_sizes, warnings_of
from finetune.planning.facts import PartFacts, part_facts
from finetune.planning.geometry import Mismatch, compare_geometry
from finetune.planning.timing import Cost, measure_cost
from finetune.recipe import FinetuneRecipe
from finetune.training.patches import PatchSampler
from resunet.config import PercentileZScore, Precision, validate
from resunet.data.cases import IGNORE
from resunet.doctor import fastest_precision
from resunet.light_settings import LIGHT
from resunet.training import start_ranks

# Largest side of a patch and pixels of a batch, of slices and of volumes. On a CPU 8 patches of 128² train the half-width network
# in about 0.15 s. On a GPU nnU-Net takes 128³, two at a time: a patch of a volume has the statistics of many of slices.
_SIDE = {"cpu": {2: 256, 3: 64}, "cuda": {2: 512, 3: 128}}
_BATCH_PIXELS = {"cpu": {2: 2**17, 3: 2**18}, "cuda": {2: 2**20, 3: 2**22}}
_FEWEST, _MOST = {2: 4, 3: 2}, {2: 32, 3: 8}  # patches: fewer make batch statistics noisy, more gain little
_CLIPPED = 0.25  # of a class's pixels beyond a percentile: from here on its contrast goes with the clip
_RARE = 1 / 3  # of random patches with any foreground: below it, half of all patches are centred on some
_TRIES = 200  # random patches
_VALIDATIONS = 20  # a run
_VAL_SHARE = 0.2  # of a run's time that validation may take


@dataclass(frozen=True)
class Choice:
    """A key of the recipe, what it should be, what it was, and why."""

    key: str
    value: Any
    before: Any
    reason: str

    @property
    def changed(self) -> bool:
        return bool(self.value != self.before)


@dataclass(frozen=True)
class Plan:
    """All that the page says. recipe: with the choices made. random_foreground: share of random patches that hold a class."""

    given: FinetuneRecipe
    recipe: FinetuneRecipe
    parts: tuple[PartFacts, ...]
    choices: tuple[Choice, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    compared: int
    random_foreground: float
    read_seconds: float
    cost: Cost

    def validation_seconds(self, part: PartFacts) -> float:
        """Of one evaluation of a part."""
        return self.cost.case_slice * sum(case.slices for case in part.cases)

    def seconds(self) -> dict[str, float]:
        """What the whole run will take: reading, steps, validations, test."""
        _, val, test = self.parts
        times = -(-self.recipe.steps // self.recipe.validate_every)
        return {
            "reading": self.read_seconds,
            "steps": self.cost.step * self.recipe.steps,
            "validation": (self.cost.statistics + self.validation_seconds(val)) * times,
            "test": self.validation_seconds(test),
        }


def make_plan(recipe: FinetuneRecipe) -> Plan:
    """Read the data that the recipe would use, decide, and measure a few steps of what was decided. One process; nothing is
    written, and `out` may exist.

    Raises:
        ResUNetError: whatever would stop the run as well, but a leak, which is a warning here.
    """
    given = resolve(recipe)
    _, *chosen = choose_cases(given)
    mismatches, compared = compare_geometry([case for part in chosen for case in part])
    refuse_other_sizes(mismatches)
    started = time.perf_counter()
    allow = tuple(dict.fromkeys((*given.allow, "leak")))
    data = read_labelled(given.model_copy(update={"allow": allow}), quiet=False)
    read_seconds = time.perf_counter() - started
    names = list(given.data.classes.values())[1:]
    train, val, test = (
        part_facts(name, cases, len(names) + 1)
        for name, cases in (("train", data.train), ("val", data.val), ("test", data.test))
    )
    parts = (train, val, test)
    random_foreground = foreground_of_random_patches(data, given.patch)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    choices = recommend(given, train, names, random_foreground, device, _fastest(given, device))
    decided = apply(given, choices)
    # a rank's share in one process: what each of several ranks would do
    alone = decided.model_copy(update={"processes": 1, "batch": max(1, decided.batch // decided.processes)})
    cost = measure_cost(alone, data, start_ranks(alone, alone.batch, "patches"))
    plan = Plan(given, decided, parts, tuple(choices), (), data.about(), compared, random_foreground, read_seconds, cost)
    validating = choose_validate_every(given, cost, cost.statistics + plan.validation_seconds(val))
    choices.append(validating)
    return replace(
        plan,
        recipe=apply(given, choices),
        choices=tuple(choices),
        warnings=tuple(_warnings(decided, data, parts, names, mismatches)),
    )


def _warnings(
    decided: FinetuneRecipe,
    data: LabelledData,
    parts: Sequence[PartFacts],
    names: Sequence[str],
    mismatches: Sequence[Mismatch],
) -> list[str]:
    leaks = [one for one in data.allowed if one.startswith("leak:")]
    consequence = (
        "the recipe allows it, and reports will say so" if "leak" in decided.allow else "training will stop and list them"
    )
    found = [f"{one}, by patient or by the image itself: {consequence}." for one in leaks]
    found += geometry_warnings(mismatches)
    if (folds := decided.data.folds) is not None:
        found.append(f"Sizes, time and memory are those of one fold of {folds}; all of them take {folds} times as long.")
    return found + warnings_of(decided, data.source.has_groups, parts, names)


def recommend(
    recipe: FinetuneRecipe, train: PartFacts, names: Sequence[str], random_foreground: float, device: str, fastest: Precision
) -> list[Choice]:
    """The choices that need no timing of the recipe itself; `fastest` of the precisions on this machine."""
    stride, dims = recipe.model.stride, recipe.model.spatial_dims
    patch = _choose_patch(recipe, train, stride, _SIDE[device][dims])
    return [
        patch,
        _choose_batch(recipe, patch.value, _BATCH_PIXELS[device][dims]),
        *_choose_clip(recipe, train, names),
        _choose_foreground(recipe, random_foreground),
        _choose_precision(recipe, fastest),
    ]


def _choose_patch(recipe: FinetuneRecipe, train: PartFacts, stride: int, largest: int) -> Choice:
    volumes = recipe.model.spatial_dims == 3
    median = np.median([case.size if volumes else case.plane for case in train.cases], axis=0)
    sides = tuple(_to_multiple(min(float(side), largest), stride) for side in median)
    shown = " × ".join(f"{side:g}" for side in median)
    reason = (
        f"the median {'volume' if volumes else 'slice'} is {shown} {'voxels' if volumes else 'pixels'}; the nearest multiple "
    )
    reason += f"of {stride}, the coarsest stride"
    if max(median) > largest:
        reason += f", of at most {largest} a side, so that several fit into a batch"
    if volumes and train.in_mm:
        spacing = np.median([case.spacing for case in train.cases], axis=0)
        extent = " × ".join(f"{side * mm:.3g}" for side, mm in zip(sides, spacing, strict=True))
        reason += f"; that is {extent} mm at the median spacing"
    return Choice("patch", sides, recipe.patch, reason)


def _choose_batch(recipe: FinetuneRecipe, patch: Sequence[int], pixels: int) -> Choice:
    ranks, fewest, most = recipe.processes, _FEWEST[len(patch)], _MOST[len(patch)]
    wanted = min(most, max(fewest, pixels // int(np.prod(patch))))
    value = max(1, round(wanted / ranks)) * ranks
    what = "pixels" if len(patch) == 2 else "voxels"
    reason = f"about {pixels:,} {what} a step, but {fewest} patches at least (batch statistics) and {most} at most"
    return Choice("batch", value, recipe.batch, reason + (f", divided by {ranks} ranks" if ranks > 1 else ""))


def _choose_clip(recipe: FinetuneRecipe, train: PartFacts, names: Sequence[str]) -> list[Choice]:
    normalisation = recipe.normalisation
    if not isinstance(normalisation, PercentileZScore) or recipe.encoder is not None or recipe.teacher is not None:
        return []  # fixed constants, and an encoder's or a teacher's own normalisation, are the user's: see the warnings
    choices = []
    for key, side, kept in (("high", "above", 100.0), ("low", "below", 0.0)):
        worst = max(range(len(names)), key=lambda i, side=side: train.beyond(i, side))  # type: ignore[misc]
        share, before = train.beyond(worst, side), getattr(normalisation, key)
        percentile = 99.5 if key == "high" else 0.5
        beyond = f"{share:.0%} of the pixels of {names[worst]!r} lie {side} their scan's {percentile}th percentile"
        if share > _CLIPPED:
            choices.append(Choice(f"normalisation.{key}", kept, before, f"{beyond}: clipping there would take their contrast"))
        else:
            choices.append(
                Choice(f"normalisation.{key}", before, before, f"only {beyond}; above {_CLIPPED:.0%} it would be {kept:g}")
            )
    return choices


def _choose_foreground(recipe: FinetuneRecipe, random_foreground: float) -> Choice:
    value = max(recipe.foreground, 0.5) if random_foreground < _RARE else recipe.foreground
    rule = f"below {_RARE:.0%} half of all patches are centred on some"
    return Choice(
        "foreground", value, recipe.foreground, f"{random_foreground:.0%} of patches drawn at random hold any class; {rule}"
    )


def _choose_precision(recipe: FinetuneRecipe, fastest: Precision) -> Choice:
    if recipe.precision == "fp16":
        return Choice("precision", "fp16", "fp16", "as the recipe says")
    reason = "the faster of fp32 and bf16 here, measured on a small network"
    if recipe.model.name == LIGHT and fastest == "fp32":
        reason = "depthwise convolutions are slower in bf16 on CPUs"
    return Choice("precision", fastest, recipe.precision, reason)


def _fastest(recipe: FinetuneRecipe, device: str) -> Precision:
    return "fp32" if recipe.model.name == LIGHT and device == "cpu" else fastest_precision()


def choose_validate_every(recipe: FinetuneRecipe, cost: Cost, validation: float) -> Choice:
    """Often enough to catch the best step, and not for more than a share of the time."""
    often = max(1, recipe.steps // _VALIDATIONS)
    affordable = int(np.ceil(validation / cost.step * (1 - _VAL_SHARE) / _VAL_SHARE))
    value = min(recipe.steps, max(often, affordable))
    reason = (
        f"{_VALIDATIONS} times a run, or less often so that it takes at most {_VAL_SHARE:.0%} of the time: one validation takes "
        f"{validation:.2g} s, a step {cost.step:.2g} s"
    )
    return Choice("validate_every", value, recipe.validate_every, reason)


def foreground_of_random_patches(data: LabelledData, patch: Sequence[int]) -> float:
    """The share of patches that hold a labelled pixel of any class when nothing is centred on one."""
    sampler = PatchSampler(data.train, patch, 0.0)
    hold = 0
    for number in range(_TRIES):
        labels = sampler.batch(1, (0, number)).labels
        hold += bool(((labels != 0) & (labels != IGNORE)).any())
    return hold / _TRIES


def apply(recipe: FinetuneRecipe, choices: Sequence[Choice]) -> FinetuneRecipe:
    """The recipe with the choices made."""
    values = recipe.model_dump(mode="json")
    for choice in choices:
        at: dict[str, Any] = values
        *parents, key = choice.key.split(".")
        for parent in parents:
            at = at[parent]
        at[key] = list(choice.value) if isinstance(choice.value, tuple) else choice.value
    return validate(FinetuneRecipe, values, "the planned recipe")


def reasons(plan: Plan) -> Mapping[str, str]:
    """Key → why, for the written recipe."""
    return {
        choice.key: choice.reason + (f" (was {_plain(choice.before)})" if choice.changed else "") for choice in plan.choices
    }


def _plain(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _to_multiple(size: float, stride: int) -> int:
    """The nearest multiple, two at least: norms need more than one position at the coarsest level. Recipes want 8 at least."""
    return max(2, int(size / stride + 0.5), -(-8 // stride)) * stride
