"""What a person is told of data and recipe before a fine-tuning begins: no fault, and yet not what one expects."""

from collections.abc import Sequence

import numpy as np

from finetune.inference.window import footprint
from finetune.labelled import LabelledData
from finetune.recipe import FinetuneRecipe
from finetune.settings import PatchIntensities
from resunet.data.cases import IGNORE, LoadedCase
from resunet.data.images import channel_count
from resunet.errors import InputError
from resunet.inference.window import plan_scan
from resunet.intensity import idle_intensities
from resunet.model import Segmenter
from resunet.plain import number_of
from resunet.progress import say


def tell_beforehand(recipe: FinetuneRecipe, data: LabelledData, ranks: int = 1) -> None:
    """Say it, on the terminal. ranks: that share a batch."""
    say(_labelled(recipe, data))
    if colour := sum(case.colour_lost for case in data.train):
        say(
            f"data.channels=grey: {colour} of {len(data.train)} training scans are in colour; the network sees their luminance. "
            "data.channels=rgb keeps the colours."
        )
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
    if not _pairs_alike(recipe, ranks):
        say(
            f"consistency.cutmix: {ranks} ranks have not each an even number of a batch's unlabelled patches: boxes come "
            "from others than on one rank. The run is sound, and not that of one rank; batch and consistency.unlabelled decide it."
        )
    for key, why in idle_keys(recipe, ranks):
        say(f"{key}: does nothing here, {why}.")


def tell_windows(recipe: FinetuneRecipe, model: Segmenter, data: LabelledData, quiet: bool = False) -> None:
    """Say it, if whole scans will be seen through windows that are smaller than the patches of training.

    Raises:
        InputError: a scan of val or test does not fit into the memory by the smallest of windows.
    """
    training = model.training
    found = footprint(model.eval(), channel_count(recipe.data.channels), next(model.parameters()).device)
    model.train(training)
    whole = recipe.model.spatial_dims == 3
    windows = set()
    for case in {(one.values.shape, one.values.dtype, one.axis): one for one in (*data.val, *data.test)}.values():
        try:
            plan = plan_scan(found, case.values, None if whole else case.axis, recipe.inference)
        except InputError as error:
            raise InputError(
                f"{case.case.where()}: {error}".replace("Set at least --memory ", "Set at least memory=")
            ) from error
        windows |= set() if plan.at_once else {plan.window}
    if windows and min(windows) < max(recipe.patch) and not quiet:
        say(
            f"memory={recipe.memory:g} GiB: large scans of val and test are seen through windows of {min(windows)} a side, less "
            f"than the patches of {max(recipe.patch)} that the network learns from; figures may be lower for it. Raise memory if "
            "there is more."
        )


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
        f"{name} {number_of(groups, 'group')} {told[name]}({number_of(cases, 'case')})"
        for name, (groups, cases) in counts.items()
    )


def _never_seen(recipe: FinetuneRecipe, train: Sequence[LoadedCase]) -> list[str]:
    seen = set().union(*(np.unique(case.labels).tolist() for case in train if case.labels is not None))
    return [name for index, name in enumerate(recipe.data.classes.values()) if index and index not in seen]


def is_blind(cases: Sequence[LoadedCase]) -> bool:
    """Whether these cases can tell no network from another, as nothing is to be found in them."""
    labels = [case.labels for case in cases if case.labels is not None]
    return bool(labels) and not any(((one > 0) & (one != IGNORE)).any() for one in labels)


def _pairs_alike(recipe: FinetuneRecipe, ranks: int) -> bool:
    """Whether unlabelled patches paste boxes of the same ones on any number of ranks: pairs are made within a rank."""
    if ranks == 1 or recipe.consistency is None or not recipe.consistency.cutmix:
        return True
    return min(round(recipe.consistency.unlabelled * recipe.batch), recipe.batch - 1) % (2 * ranks) == 0


def idle_keys(recipe: FinetuneRecipe, ranks: int = 1) -> list[tuple[str, str]]:
    """Keys that were set and have no effect beside the others, and why. ranks: that share a batch."""
    augment, loss = recipe.augment, recipe.loss
    found = idle_intensities(augment.intensity, PatchIntensities(), "augment.intensity")
    if loss.class_weights is not None and not (loss.focal_weight or loss.dice_weight):
        found.append(("loss.class_weights", "as loss.focal_weight and loss.dice_weight are 0"))
    if loss.gamma != type(loss)().gamma and not loss.focal_weight:
        found.append(("loss.gamma", "as loss.focal_weight is 0"))
    if recipe.model.statistics != "precise" and recipe.model.statistics_batches != type(recipe.model)().statistics_batches:
        found.append(("model.statistics_batches", "as model.statistics is not precise"))
    if recipe.model.name == "unet" and recipe.optimizer.encoder_lr_factor != 1:
        found.append(("optimizer.encoder_lr_factor", "as the plain U-Net has no encoder that could have a rate of its own"))
    if recipe.foreground_by == "object" and not recipe.foreground:
        found.append(("foreground_by", "as foreground, the share of patches that are centred on a class, is 0"))
    if augment.zoom != type(augment)().zoom and not augment.zoom_probability:
        found.append(("augment.zoom", "as augment.zoom_probability is 0"))
    if (steady := recipe.consistency) is not None:
        if not steady.changes and not steady.cutmix:
            found.append(("consistency", "or little, as network and average see the same patches"))
        if not steady.cutmix and steady.cutmix_area != type(steady)().cutmix_area:
            found.append(("consistency.cutmix_area", "as consistency.cutmix, its probability, is 0"))
        patches = min(round(steady.unlabelled * recipe.batch), recipe.batch - 1)
        if steady.cutmix and patches < 2 * ranks:
            share = "a batch" if ranks == 1 else "a rank's share of a batch"
            found.append(
                ("consistency.cutmix", f"or not everywhere, as {share} has one unlabelled patch, and a box comes from another")
            )
    return found
