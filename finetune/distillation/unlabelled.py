"""The pool's scans that a draw did not label, and batches of which they are a share."""

from collections.abc import Sequence

import numpy as np
import torch

from finetune.recipe import FinetuneRecipe
from finetune.training.patches import Batches, Patches, cut_patch, units_of
from resunet.data.cases import Case, LoadedCase, load_cases, refuse_images
from resunet.data.manifest_source import ManifestCases
from resunet.data.source import Source, assign_parts, open_source
from resunet.progress import progress


def unlabelled_cases(recipe: FinetuneRecipe, source: Source, train: Sequence[Case], val: Sequence[Case]) -> list[Case]:
    """The pool's cases but those to train on, and those of groups to choose by; of a manifest those without a mask, too.

    Empty where the recipe learns from labelled ones only.

    Args:
        source: with its parts, before the draw.
    """
    if not recipe.unlabelled_share:
        return []
    if isinstance(source.cases, ManifestCases):  # opened with masks, it is its labelled scans only
        settings = recipe.data
        source = assign_parts(open_source(settings, masks=False), settings.split_seed, settings.stratify)
    labelled, groups = {case.id for case in train}, {case.group_hmac for case in val}
    return [case for case in source.part("pool") if case.id not in labelled and case.group_hmac not in groups]


def load_unlabelled(recipe: FinetuneRecipe, cases: Sequence[Case], quiet: bool) -> list[LoadedCase]:
    """Read scans without their masks.

    Raises:
        InputError: the first file at fault.
    """
    if not cases:
        return []
    assert recipe.normalisation is not None, "resolve() comes first"
    loaded = load_cases(
        cases,
        recipe.data.channels,
        recipe.normalisation,
        progress=lambda items, total: progress(items, total, "read unlabelled", quiet=quiet),
    )
    refuse_images(loaded, recipe.model.spatial_dims)
    return loaded


class MixedSampler:
    """Batches of labelled patches, a share of them replaced by patches of unlabelled scans, whose labels are UNLABELLED.

    Which places of a batch these are is the same in every batch, and spread evenly, so that every rank has its share of both. At
    least one patch of a batch is labelled.

    Args:
        unlabelled: scans; slices without any contrast are left out.
        share: of a batch.
        size: patches in a batch, over all ranks.
    """

    def __init__(
        self, labelled: Batches, unlabelled: Sequence[LoadedCase], patch: Sequence[int], share: float, size: int
    ) -> None:
        self.labelled, self.patch = labelled, tuple(patch)
        self.units = [unit for case in unlabelled for unit in units_of(case, whole=len(patch) == 3)]
        count = min(round(share * size), size - 1) if self.units else 0
        self.places = {place for place in range(size) if (place + 1) * count // size > place * count // size}

    def batch(self, size: int, entropy: Sequence[int]) -> Patches:
        """One patch, of the place that the last number names, as `finetune.step` asks for the patches of a batch."""
        assert size == 1
        if entropy[-1] not in self.places:
            return self.labelled.batch(size, entropy)
        rng = np.random.default_rng(list(entropy))
        one = self.units[rng.integers(len(self.units))]
        image, labels = cut_patch(one, None, self.patch, rng)
        return Patches(torch.from_numpy(image[None]), torch.from_numpy(labels[None].copy()), torch.tensor([one.spacing]))
