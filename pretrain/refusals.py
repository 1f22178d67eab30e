"""What of a recipe only its archive can refuse, and keys that do nothing."""

from pretrain.archive import Archive
from pretrain.recipe import PretrainRecipe, ViewSettings
from resunet.errors import InputError
from resunet.intensity import idle_intensities
from resunet.progress import say


def refuse_impossible(recipe: PretrainRecipe, archive: Archive, speaks: bool) -> None:
    """What only the archive can tell of the recipe.

    Raises:
        InputError: a batch larger than the archive; same_group=ignore where all scans are of one group, so that nothing would be
            left to tell apart.
    """
    for key, why in idle_keys(recipe) if speaks else ():
        say(f"{key}: does nothing here, {why}.")
    scans = archive.scans
    if scans.num_items < recipe.batch:
        raise InputError(
            f"batch={recipe.batch}: the archive has only {scans.num_items} {scans.items} with any contrast. Set a smaller batch."
        )
    if recipe.objective.same_group == "ignore" and archive.num_groups == 1:
        raise InputError(
            "objective.same_group=ignore: all scans of the archive are of one group, so that no negatives are left. Set "
            "same_group=negative, or give the groups (groups.csv, or resunet index)."
        )
    if speaks and recipe.objective.same_group == "ignore" and archive.num_groups == scans.num_items:
        say(
            "objective.same_group=ignore: no two scans of this archive are known to be of one patient or item, so that it does "
            "nothing. Give the groups (groups.csv, or resunet index)."
        )
    bank = recipe.objective.memory_bank
    if speaks and bank is not None and 2 * bank > scans.num_items:
        say(
            f"objective.memory_bank={bank}: more than half of the {scans.num_items:,} {scans.items} of the archive; scans are then "
            "repelled by their own earlier projections, and such training has been unstable"
        )


def idle_keys(recipe: PretrainRecipe) -> list[tuple[str, str]]:
    """Keys that were set and have no effect beside the others, and why."""
    found = idle_intensities(recipe.views, ViewSettings(), "views")
    probe, fields = recipe.probe, type(recipe).model_fields
    if probe is not None and probe.kind == "prototype" and probe.neighbours != type(probe).model_fields["neighbours"].default:
        found.append(("probe.neighbours", "as probe.kind is prototype"))
    if not recipe.objective.weight:
        changed = [key for key in ("temperature", "head") if getattr(recipe, key) != fields[key].default]
        found += [(key, "as objective.weight is 0") for key in changed]
    return found
