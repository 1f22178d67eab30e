"""What a person should know before training: the plan's warnings, each with its numbers and what to do."""

import itertools
from collections.abc import Sequence

import numpy as np

from finetune.evaluation.targets import targets_of
from finetune.planning.facts import CaseFacts, PartFacts
from finetune.planning.geometry import Mismatch
from finetune.recipe import FinetuneRecipe
from resunet.config import PercentileZScore
from resunet.errors import InputError

_LISTED = 5
_CLIPPED = 0.25  # of a class's pixels
_FEW_PIXELS = 10  # an object of fewer: its border is most of it
_UNEQUAL = 3.0  # times the share of another part
_ENOUGH_CASES = 5  # to compare shares
_SPACING_VARIES = 1.1  # coarsest over finest
_SMALLEST_NORM_BATCH = {2: 4, 3: 2}  # a patch of a volume has the positions of many
_THICK = 3.0  # times the finest spacing: where nnU-Net treats slices as slices


def refuse_other_sizes(mismatches: Sequence[Mismatch]) -> None:
    """Stop on masks of another size than their image, with all of them: nothing can be read as it is.

    Raises:
        InputError: there are any.
    """
    sizes = [one for one in mismatches if "size" in one.what]
    if sizes:
        raise InputError(
            f"{len(sizes)} masks have another size than their image:\n{_listed(sizes)}\nResample each mask to its image's grid."
        )


def geometry_warnings(mismatches: Sequence[Mismatch]) -> list[str]:
    """Masks whose spacing, origin or direction are not their image's."""
    others = [one for one in mismatches if "size" not in one.what]
    if not others:
        return []
    return [
        f"{len(others)} masks do not lie where their image lies, by the two headers. Training goes by the arrays alone, each "
        f"turned to LPS by its own header: look at some in a viewer, and correct the headers or resample.\n{_listed(others)}"
    ]


def warnings_of(recipe: FinetuneRecipe, has_groups: bool, parts: Sequence[PartFacts], names: Sequence[str]) -> list[str]:
    """All warnings that follow from the recipe and the facts of train, val and test."""
    train, *held_out = parts
    found = []
    if not has_groups:
        found.append(
            "There are no groups: each image counts as its own, so that images of one patient or item may be on both sides, and "
            "the figures be too good. Write groups.csv (stem,group)."
        )
    found += _absent_classes(parts, names, recipe.data.remedy)
    found += [
        f"The classes {its} are of the same data.regions: nothing teaches the network to tell them apart, and in its "
        "masks either may stand for both. Add a region that holds one of them, if that matters."
        for its in targets_of(recipe.data.classes, recipe.data.regions).alike()
    ]
    found += _unequal_shares(train, [part for part in held_out if part.cases], names)
    found += _small_objects(train, names)
    found += _lost_in_coarse_scans(parts, names, whole=recipe.model.spatial_dims == 3)
    found += _uneven_volumes(recipe, train)
    found += _clipped_by_what_is_fixed(recipe, train, names)
    share = recipe.batch // recipe.processes
    if recipe.model.norm == "batch" and share < _SMALLEST_NORM_BATCH[recipe.model.spatial_dims]:
        found.append(
            f"batch={recipe.batch} over {recipe.processes} ranks gives batch norm {share} patches: its statistics are noise. Use a "
            "larger batch, or model.norm=group."
        )
    return found


def _absent_classes(parts: Sequence[PartFacts], names: Sequence[str], remedy: str) -> list[str]:
    consequence = {
        "train": "it cannot be learned",
        "val": "val says nothing of it",
        "test": "it cannot be judged",
    }
    return [
        f"Class {name!r} is in none of the {len(part.cases)} {part.name} cases: {consequence[part.name]}. {remedy}."
        for part in parts
        if part.cases
        for index, name in enumerate(names)
        if not part.cases_with(index)
    ]


def _unequal_shares(train: PartFacts, held_out: Sequence[PartFacts], names: Sequence[str]) -> list[str]:
    found = []
    for part, (index, name) in itertools.product(held_out, enumerate(names)):
        here, there = train.share(index), part.share(index)
        enough = min(train.cases_with(index), part.cases_with(index)) >= _ENOUGH_CASES
        if enough and max(here, there) > _UNEQUAL * min(here, there):
            found.append(
                f"Class {name!r} is {here:.2%} of the pixels of train and {there:.2%} of {part.name}: the two are not alike. "
                "Choose another split (resunet split --stratify)."
            )
    return found


def _small_objects(train: PartFacts, names: Sequence[str]) -> list[str]:
    found = []
    for index, name in enumerate(names):
        pixels = train.object_pixels(index)
        small = int((pixels < _FEW_PIXELS).sum())
        if small:
            found.append(
                f"{small} of {len(pixels)} objects of {name!r} have fewer than {_FEW_PIXELS} pixels, the smallest {pixels[0]}: "
                "specks of a careless mask (clean it), or targets (then judge by lesion recall, not by Dice)."
            )
    return found


def _lost_in_coarse_scans(parts: Sequence[PartFacts], names: Sequence[str], whole: bool) -> list[str]:
    """Nothing is resampled in this project: a network sees each scan at the file's own spacing."""
    cases = [case for part in parts for case in part.cases if case.in_mm]
    if not cases:
        return []
    widths = [float(np.mean(case.spacing if whole else case.plane_spacing)) for case in cases]
    finest, coarsest = min(widths), max(widths)
    if coarsest <= _SPACING_VARIES * finest:
        return []
    found = [
        f"{'Mean' if whole else 'In-plane'} spacing goes from {finest:.3g} to {coarsest:.3g} mm. Scans are not resampled: the "
        f"network sees each at its own spacing, so that one object is up to {coarsest / finest:.1f} times as wide in pixels in "
        "one scan as in another. Resample the scans to one spacing beforehand if that is more than objects differ anyway."
    ]
    for index, name in enumerate(names):
        smallest = min((_width(case, index) for case in cases if len(case.classes[index].objects)), default=None)
        if smallest is not None and smallest < coarsest:
            found.append(
                f"The smallest object of {name!r} is about {smallest:.3g} mm wide, less than a pixel of {coarsest:.3g} mm: in the "
                "coarsest scans, and after resampling to them, objects of its size are lost."
            )
    return found


def _uneven_volumes(recipe: FinetuneRecipe, train: PartFacts) -> list[str]:
    """What a 3D network makes of thick slices, and of few: it halves all axes alike at every level."""
    if recipe.model.spatial_dims == 2 or not train.cases:
        return []
    stride, found = recipe.model.stride, []
    size = np.median([case.size for case in train.cases], axis=0)
    spacing = np.median([case.spacing for case in train.cases], axis=0)
    if train.in_mm and spacing.max() > _THICK * spacing.min():
        found.append(
            f"Voxels are {spacing.max():.3g} mm across the slices and {spacing.min():.3g} mm within them. The network halves all "
            f"axes alike: its coarsest level has positions of {' × '.join(f'{stride * mm:.3g}' for mm in spacing)} mm (z × y × x), "
            "and the training data are turned and deformed within the slices only. Nothing is resampled. A network of slices "
            "(model.spatial_dims=2) may do as well for less: compare them on val."
        )
    if size.min() < 2 * stride:
        found.append(
            f"The median volume has {size.min():g} voxels along its shortest axis, less than two positions of the coarsest level "
            f"(1/{stride} of the size): much there is beyond the edge. Use fewer levels in model.channels, or model.spatial_dims=2."
        )
    return found


def _width(case: CaseFacts, index: int) -> float:
    """mm, of a disc or ball as large as the smallest object of the class."""
    volume = float(case.classes[index].objects[0]) * case.voxel
    return float(2 * np.sqrt(volume / np.pi) if len(case.size) == 2 else (6 * volume / np.pi) ** (1 / 3))


def _clipped_by_what_is_fixed(recipe: FinetuneRecipe, train: PartFacts, names: Sequence[str]) -> list[str]:
    """Where the plan may not choose: the encoder's or the teacher's normalisation, or constants that the user set."""
    if recipe.encoder is not None:
        whose, remedy = "the encoder's normalisation", "pretrain again with wider ones"
    elif recipe.teacher is not None:
        whose, remedy = "the teacher's normalisation", "train the teacher again with wider ones"
    elif isinstance(recipe.normalisation, PercentileZScore):
        return []
    else:
        whose, remedy = "the recipe's constants", "widen normalisation.low and high"
    return [
        f"{train.beyond(index, 'clipped'):.0%} of the pixels of {name!r} lie beyond the limits of {whose}, and lose their "
        f"contrast: {remedy}."
        for index, name in enumerate(names)
        if train.beyond(index, "clipped") > _CLIPPED
    ]


def _listed(mismatches: Sequence[Mismatch]) -> str:
    lines = [f"  {one.case.mask}: {one.message}" for one in mismatches[:_LISTED]]
    if len(mismatches) > _LISTED:
        lines.append(f"  … and {len(mismatches) - _LISTED} more")
    return "\n".join(lines)
