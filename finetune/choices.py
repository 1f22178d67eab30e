"""What val chooses once training is over: post-processing and the threshold of an operating point, each if the recipe asks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from finetune.evaluation.alarms import choose_threshold, is_without_target, refuse_val_without_clean
from finetune.evaluation.calibration import decide_by, foreground_of
from finetune.evaluation.evaluate import case_probabilities
from finetune.inference.postprocess import ValCase, choose_postprocessing, predicted_objects
from finetune.labelled import LabelledData
from finetune.recipe import FinetuneRecipe
from finetune.settings import PatchIntensities
from resunet.data.cases import IGNORE, LoadedCase
from resunet.decision import OperatingPoint, Postprocessing
from resunet.progress import progress, say


@dataclass(frozen=True)
class Choices:
    """None of what the recipe does not ask for."""

    postprocessing: Postprocessing | None = None
    operating_point: OperatingPoint | None = None


def refuse_impossible(recipe: FinetuneRecipe, data: LabelledData) -> None:
    """Raises InputError, before anything is trained, if val cannot choose what the recipe asks for."""
    if (budget := recipe.false_alarms_per_1000) is not None:
        refuse_val_without_clean(data.val, f"false_alarms_per_1000={budget:g}")


def tell_beforehand(recipe: FinetuneRecipe, data: LabelledData) -> None:
    """Say what is no fault and yet not what one expects, before anything is trained."""
    say(_labelled(recipe, data))
    for name in _never_seen(recipe, data.train):
        say(f"{name!r} is in none of the training cases: it cannot be learned. {recipe.data.remedy}.")
    if is_blind(data.val):
        say(
            f"val: none of its {len(data.val)} cases has a pixel of any class. Dice is not defined there, and tells no checkpoint "
            f"and no number of steps from another. {recipe.data.remedy}."
        )
    if is_blind(data.test):
        say(f"test: none of its {len(data.test)} cases has a pixel of any class: it judges false alarms only.")
    if recipe.unlabelled_share and not data.unlabelled:
        say("every scan of the pool is labelled in this draw: nothing is learned from unlabelled ones.")
    for key, why in idle_keys(recipe):
        say(f"{key}: does nothing here, {why}.")


def _labelled(recipe: FinetuneRecipe, data: LabelledData) -> str:
    """How many labels are used: a draw of few is not taken for all."""
    parts = {"train": data.train, "val": data.val, "test": data.test}
    counts = {name: (len({one.case.group_hmac for one in its}), len(its)) for name, its in parts.items() if its}
    pool = len({case.group_hmac for case in data.source.part("pool")})
    drawn = f"of the pool's {pool} " + (
        f"(data.labelled={recipe.data.labelled:g}) " if recipe.data.labelled is not None else ""
    )
    told = {"train": drawn, "val": "", "test": ""}
    return "labels: " + "; ".join(
        f"{name} {groups} groups {told[name]}({cases} cases)" for name, (groups, cases) in counts.items()
    )


def _never_seen(recipe: FinetuneRecipe, train: Sequence[LoadedCase]) -> list[str]:
    seen = set().union(*(np.unique(case.labels).tolist() for case in train if case.labels is not None))
    return [name for index, name in enumerate(recipe.data.classes.values()) if index and index not in seen]


def is_blind(val: Sequence[LoadedCase]) -> bool:
    """Whether val can tell no network from another, as nothing is to be found in it."""
    labels = [case.labels for case in val if case.labels is not None]
    return bool(labels) and not any(((one > 0) & (one != IGNORE)).any() for one in labels)


def idle_keys(recipe: FinetuneRecipe) -> list[tuple[str, str]]:
    """Keys that were set and have no effect beside the others, and why."""
    augment, usual = recipe.augment, PatchIntensities()
    changed = [name for name in type(usual).model_fields if getattr(augment.intensity, name) != getattr(usual, name)]
    of = {"blur_sigma": "blur", "noise_sigma": "noise"} | dict.fromkeys(
        ("intensity_scale", "intensity_shift", "gamma"), "intensity"
    )
    found = [
        (f"augment.intensity.{name}", f"as augment.intensity.{of[name]}, its probability, is 0")
        for name in changed
        if name in of and not getattr(augment.intensity, of[name])
    ]
    if recipe.model.name == "unet" and recipe.optimizer.encoder_lr_factor != 1:
        found.append(("optimizer.encoder_lr_factor", "as the plain U-Net has no encoder that could have a rate of its own"))
    if recipe.foreground_by == "object" and not recipe.foreground:
        found.append(("foreground_by", "as foreground, the share of patches that are centred on a class, is 0"))
    if augment.zoom != type(augment)().zoom and not augment.zoom_probability:
        found.append(("augment.zoom", "as augment.zoom_probability is 0"))
    if recipe.consistency is not None and not recipe.consistency.changes:
        found.append(("consistency", "or little, as network and average see the same intensities"))
    return found


def choose_on_val(
    model: nn.Module, data: LabelledData, recipe: FinetuneRecipe, accelerator: Accelerator, quiet: bool
) -> Choices:
    """One pass over val; each rank takes its share of the cases and all come to the same."""
    if recipe.postprocess == "none" and recipe.false_alarms_per_1000 is None:
        return Choices()
    names = list(recipe.data.classes.values())
    rank, ranks = accelerator.process_index, accelerator.num_processes
    share = range(rank, len(data.val), ranks)
    seen: list[tuple[int, ValCase, float | None]] = []  # with the greatest probability of a case without target
    for i in progress(share, len(share), "choose on val", quiet=quiet):
        case = data.val[i]
        assert case.labels is not None
        probabilities = case_probabilities(model, case, accelerator.device, recipe.precision_of_test)
        peak = float(foreground_of(probabilities)[case.labels == 0].max()) if is_without_target(case.labels) else None
        seen.append((i, predicted_objects(case.case.group, case.labels, decide_by(probabilities), len(names)), peak))
    if ranks > 1:
        seen = gather_object(seen)
    seen.sort(key=lambda one: one[0])
    postprocessing, point = None, None
    if recipe.postprocess == "validate":
        postprocessing = choose_postprocessing([*data.train, *data.val], [case for _, case, _ in seen], names)
    if recipe.false_alarms_per_1000 is not None:
        point = choose_threshold([peak for _, _, peak in seen if peak is not None], recipe.false_alarms_per_1000)
    return Choices(postprocessing, point)
