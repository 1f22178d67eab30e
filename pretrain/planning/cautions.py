"""What a person should know before pretraining: each with its numbers and what to do."""

import numpy as np

from pretrain.archive import Archive
from pretrain.planning.facts import ArchiveFacts
from pretrain.planning.timing import Cost
from pretrain.recipe import PretrainRecipe
from resunet.config import Precision
from resunet.plain import duration

_WAITING = 0.1  # of a step's time
_SHRUNK = 4.0  # times: what is 8 pixels wide becomes 2
_MAGNIFIED = 0.25  # of a view's side: a crop of fewer pixels is mostly interpolation
_LOST = 1800  # seconds of work that a kill may cost
_VARIES = 1.5  # coarsest spacing over finest
_OWN = 0.5  # others of its own group that a scan meets in a set


def cautions_of(recipe: PretrainRecipe, archive: Archive, facts: ArchiveFacts, cost: Cost, fastest: Precision) -> list[str]:
    """All cautions of a plan; `fastest` of the precisions on this machine."""
    return [
        *_leaks(recipe, archive),
        *_groups(recipe, archive, cost),
        *_crops(recipe, facts),
        *_spacing(recipe, facts),
        *_time(recipe, archive, cost, fastest),
        *_ranks(recipe),
    ]


def _leaks(recipe: PretrainRecipe, archive: Archive) -> list[str]:
    then = (
        "the recipe allows it, and models and reports will say so"
        if "leak" in recipe.allow
        else "the run will stop and list them"
    )
    return [f"{one}: {then}." if one.startswith("leak") else one for one in archive.allowed]


def _groups(recipe: PretrainRecipe, archive: Archive, cost: Cost) -> list[str]:
    if not recipe.objective.weight or recipe.objective.same_group == "ignore":
        return []  # where that finds nothing to ignore, `refuse_impossible` has said it
    share = recipe.batch // recipe.processes
    own = cost.own_group * (recipe.batch - 1) / max(1, share - 1)
    found = []
    if recipe.batch > archive.num_groups:
        found.append(
            f"batch={recipe.batch} is larger than the number of groups, {archive.num_groups:,}: every set holds several "
            f"{archive.scans.items} of a patient or item, which are contrasted as if they had nothing in common. Set "
            "objective.same_group=ignore, or a smaller batch."
        )
    if own >= _OWN:
        found.append(
            f"A scan meets {own:.2g} others of its own group in a set of {recipe.batch}, on average, and "
            "objective.same_group=negative repels them; neighbouring slices of a volume are near-copies. Set "
            "objective.same_group=ignore."
        )
    return found


def _crops(recipe: PretrainRecipe, facts: ArchiveFacts) -> list[str]:
    dims = recipe.model.spatial_dims
    sizes = [one.size if dims == 3 else one.plane for one in facts.scans if dims == 2 or len(one.size) == 3]
    if not sizes:
        return []
    window, side = np.array(recipe.views.sides_of_window(dims)), np.array(recipe.views.sides(dims))
    read = np.minimum(np.array(sizes), window)  # (n, dims)
    smallest, largest = (share ** (1 / dims) * read for share in recipe.views.scale)
    found = []
    larger = (np.array(sizes) > window).any(axis=1)
    if larger.any():
        found.append(
            f"{larger.mean():.0%} of the scans are larger than views.window={_plain(window)}: views.scale is of a window around "
            "content, never of the whole scan. That keeps small objects large; for whole scans set a larger window."
        )
    small = float(np.median(smallest / side))
    if small < _MAGNIFIED:
        found.append(
            f"The smallest crops (views.scale {recipe.views.scale[0]:g}) are {_plain(np.median(smallest, axis=0))} pixels of the "
            f"median scan, magnified to {_plain(side)}: most of them hold no whole object. Raise views.scale, or set a "
            "smaller views.size."
        )
    shrunk = float(np.median(largest / side))
    if shrunk > _SHRUNK:
        found.append(
            f"The largest crops are shrunk {shrunk:.2g} times to {_plain(side)}: an object {2 * shrunk:.0f} pixels wide is 2 "
            "pixels in them. If objects are that small, set a smaller views.window or a larger views.size."
        )
    return found


def _spacing(recipe: PretrainRecipe, facts: ArchiveFacts) -> list[str]:
    widths = [float(np.mean(one.spacing)) for one in facts.scans if any(mm != 1 for mm in one.spacing)]
    if recipe.model.spatial_dims == 3 or not widths or max(widths) <= _VARIES * min(widths):
        return []
    return [
        f"Mean spacing goes from {min(widths):.3g} to {max(widths):.3g} mm. Slices are not resampled: crops of one number of "
        f"pixels show up to {max(widths) / min(widths):.1f} times as much of one scan as of another."
    ]


def _time(recipe: PretrainRecipe, archive: Archive, cost: Cost, fastest: Precision) -> list[str]:
    found = []
    if recipe.data.workers == 0 or cost.waited > _WAITING * cost.step:
        needed = int(np.ceil(cost.read * recipe.accumulate / max(1e-9, cost.step - cost.waited)))
        found.append(
            f"The network waits for scans {cost.waited / cost.step:.0%} of the time: one process reads a rank's share in "
            f"{duration(cost.read)}, the network needs {duration(cost.step - cost.waited)} a step. About {needed} reading "
            f"processes would keep up (data.workers={recipe.data.workers} now), if there are as many cores for them."
        )
    between = recipe.checkpoint_every * cost.step
    if between > _LOST:
        found.append(
            f"checkpoint_every={recipe.checkpoint_every} is {duration(between)}: a kill costs up to as much. Set "
            f"checkpoint_every={max(1, int(_LOST / cost.step))}."
        )
    epochs = recipe.steps * recipe.batch * recipe.accumulate / archive.scans.num_items
    if epochs < 1:
        found.append(f"The run ends before every scan was seen once ({epochs:.2g} epochs): more steps use the archive.")
    if recipe.precision == "fp32" and fastest != "fp32":
        found.append(f"precision=fp32: {fastest} is faster on this machine, measured on a small network.")
    return found


def _ranks(recipe: PretrainRecipe) -> list[str]:
    if recipe.processes == 1 or not recipe.batch_statistics:
        return []
    return [
        f"batch norm over {recipe.processes} ranks is synchronised on GPUs only: on CPUs each has the statistics of its own "
        f"{recipe.batch // recipe.processes} scans. Exact are model.norm=group head.batch_norm=false."
    ]


def _plain(sides: np.ndarray) -> str:
    return " × ".join(f"{side:.0f}" for side in sides)
