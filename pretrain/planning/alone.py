"""What looking before training has in common: one process in the place of the recipe's, and what stops a run stops it too."""

import os

from accelerate import Accelerator

from pretrain.recipe import PretrainRecipe
from resunet.errors import InputError
from resunet.training import start_ranks


def before_training(recipe: PretrainRecipe, batch: int | None = None) -> tuple[PretrainRecipe, Accelerator]:
    """The recipe for this one process, of which a leak is said and not refused, and its accelerator.

    Args:
        batch: a rank's share, to do what one of several ranks would; without it the whole set.

    Raises:
        InputError: several ranks were started, or the recipe's do not divide its batch.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "--plan and --show-views run in one process, and speak for the recipe's `processes`: start them without accelerate "
            "launch or torchrun."
        )
    if recipe.batch % recipe.processes:
        raise InputError(
            f"batch={recipe.batch}: {recipe.processes} ranks do not divide it exactly. Set a multiple of {recipe.processes}."
        )
    allow = tuple(dict.fromkeys((*recipe.allow, "leak")))
    alone = recipe.model_copy(update={"processes": 1, "batch": batch or recipe.batch, "allow": allow})
    return alone, start_ranks(alone, alone.batch, "scans")
