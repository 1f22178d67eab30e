"""The labelled scans of the probe: which groups, which slices of them, and which of their pixels.

Groups come from the pool, in the order of fine-tuning's own draws. Those in which every foreground class occurs are taken first;
where there are too few of them, those that together show most classes in two groups at least.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from pretrain.probe.segmentation import LabelledPixels
from pretrain.probe.settings import ProbeSettings
from pretrain.recipe import PretrainRecipe
from resunet.checkpoint import LabelledGroups
from resunet.config import Called
from resunet.data.cases import IGNORE, Case, LoadedCase, load_cases, refuse_images, source_digest
from resunet.data.evidence import Evidence
from resunet.data.images import read_mask
from resunet.data.leakage import evidence_of_cases
from resunet.data.source import Source, assign_parts, open_source
from resunet.data.splits import ordered
from resunet.data.strata import read_strata
from resunet.errors import InputError
from resunet.runtime import normalise

_CANDIDATES = 32  # groups whose masks are read to find those with every class
_SLICES = 6  # of a group, at most
_BLOCKS = 4  # of the slices of a single group
_PIXELS = 2**20  # that go through the encoder, about
_SIDE = {2: 512, 3: 64}  # of what is cut out of a larger slice or volume
_PLACES = 2**15  # pixels that are segmented, about


@dataclass(frozen=True)
class ProbeScan:
    """A slice, or with a 3D encoder a volume, or a part of either around what is labelled.

    values: (C, *size) float32, normalised with the whole scan's intensities.
    labels: (*size) class indices or IGNORE.
    fold: it is left out with the others of its fold.
    """

    values: NDArray[np.float32]
    labels: NDArray[np.uint8]
    fold: int

    def lattice(self, count: float) -> NDArray[np.int64]:
        """About `count` pixels at even distances, or all where there are fewer: (*grid, D), in array order."""
        step = max((self.labels.size / count) ** (1 / self.labels.ndim), 1.0)
        lines = []
        for n in self.labels.shape:
            number = max(round(n / step), 1)
            lines.append(((np.arange(number) + 0.5) * n / number).astype(np.int64))
        return np.stack(np.meshgrid(*lines, indexing="ij"), axis=-1)


@dataclass(frozen=True)
class ProbeScans:
    """What the probe looks at, and what others have to know of it.

    evidence: of the files, for the archive's record.
    digest: which images and labels these are.
    """

    scans: list[ProbeScan]
    num_classes: int
    labels: LabelledGroups
    evidence: Evidence
    digest: str

    def places(self) -> list[NDArray[np.int64]]:
        """The pixels of every scan that are segmented."""
        return [scan.lattice(_PLACES / len(self.scans)) for scan in self.scans]

    def pixels(self, places: Sequence[NDArray[np.int64]]) -> LabelledPixels:
        """The labels at these places, scan by scan."""
        labels = [scan.labels[tuple(its.reshape(-1, its.shape[-1]).T)] for scan, its in zip(self.scans, places, strict=True)]
        fold = [np.full(len(its), scan.fold) for scan, its in zip(self.scans, labels, strict=True)]
        return LabelledPixels(np.concatenate(labels), np.concatenate(fold), self.num_classes)

    def told_apart(self) -> list[int]:
        """Foreground classes that several folds show: the others have nothing to be recognised by, and are not counted."""
        return self.pixels(self.places()).told_apart()


def read_probe_scans(recipe: PretrainRecipe, settings: ProbeSettings, spatial_dims: int) -> ProbeScans:
    """The labelled scans of a recipe's probe.

    Raises:
        InputError: whatever is wrong with the source; too few groups or slices; no class to be recognised.
    """
    source = _open(recipe, settings)
    groups = _choose_groups(source, settings, recipe.data.stratify)
    cases = [case for group in groups for case in _choose_cases(group)]
    loaded = load_cases(cases, recipe.data.channels, recipe.normalisation, settings.classes, settings.ignore)
    refuse_images(loaded, spatial_dims)
    hmacs = tuple(sorted({case.group_hmac for case in cases}))
    evidence = evidence_of_cases(loaded, source.salt_fingerprint)
    found = ProbeScans(
        scans=_cut(loaded, hmacs, spatial_dims),
        num_classes=len(settings.classes),
        labels=LabelledGroups(groups=hmacs, salt_fingerprint=source.salt_fingerprint),
        evidence=replace(evidence, thumbnail=None),
        digest=source_digest(loaded),
    )
    if not found.told_apart():
        raise InputError(
            f"probe: no foreground class occurs in two of the {settings.groups} groups of draw {settings.draw} (of one group: in "
            "two blocks of its slices), so that none can be recognised. Set more probe.groups or another probe.draw."
        )
    return found


def _open(recipe: PretrainRecipe, settings: ProbeSettings) -> Source:
    """The pool of the probe's source, as fine-tuning would make it."""
    data, called = recipe.data, Called()
    if settings.source is not None:
        called = Called(source="probe.source=")
        data = data.model_copy(update={"source": settings.source, "splits": None})
    source = open_source(data, masks=True, classes=settings.classes, ignore=settings.ignore, called=called)
    return assign_parts(source, recipe.data.split_seed, recipe.data.stratify)


def _choose_groups(source: Source, settings: ProbeSettings, stratify: bool) -> list[list[tuple[Case, set[int]]]]:
    """The cases of each chosen group, with the foreground values in their masks."""
    by_group: dict[str, list[Case]] = {}
    for case in source.part("pool"):
        by_group.setdefault(case.group_name, []).append(case)
    if len(by_group) < settings.groups:
        raise InputError(f"probe.groups={settings.groups}: the pool of its source has {len(by_group)} labelled groups.")
    strata = read_strata([case for its in by_group.values() for case in its]) if stratify else None
    wanted = set(list(settings.classes)[1:])
    candidates: list[list[tuple[Case, set[int]]]] = []
    for group in ordered(by_group, settings.draw, strata)[:_CANDIDATES]:
        candidates.append([(case, _values(case) & wanted) for case in by_group[group]])
        complete = [its for its in candidates if set().union(*(values for _, values in its)) == wanted]
        if len(complete) == settings.groups:
            return complete
    return _showing_most(candidates, settings.groups)


def _values(case: Case) -> set[int]:
    assert case.mask is not None, "the source was opened with masks"
    return {int(value) for value in np.unique(read_mask(case.mask).values)}


def _showing_most(candidates: list[list[tuple[Case, set[int]]]], count: int) -> list[list[tuple[Case, set[int]]]]:
    """The groups with most classes in two of them (of one group: in it); of equals those that show most, and the first."""
    shown = [set[int]().union(*(values for _, values in its)) for its in candidates]

    def worth(chosen: tuple[int, ...]) -> tuple[int, int]:
        counts = Counter(value for i in chosen for value in shown[i])
        return sum(1 for n in counts.values() if n >= min(2, count)), counts.total()

    return [candidates[i] for i in max(combinations(range(len(candidates)), count), key=worth)]


def _choose_cases(group: Sequence[tuple[Case, set[int]]]) -> list[Case]:
    """Those of a group with most classes: a volume, or images, evenly spaced among those with anything labelled."""
    labelled = [one for one in group if one[1]] or list(group)
    first = max(labelled, key=lambda one: len(one[1]))[0]
    assert first.mask is not None
    if read_mask(first.mask).values.ndim == 3:
        return [first]
    return [labelled[i][0] for i in _spread(len(labelled), _SLICES)]


def _cut(loaded: Sequence[LoadedCase], groups: Sequence[str], spatial_dims: int) -> list[ProbeScan]:
    """The slices or volumes of all groups, each in its fold."""
    side = _SIDE[spatial_dims]
    size = max(int(np.prod(np.minimum(_extent(case, spatial_dims), side))) for case in loaded)
    each = max(min(_PIXELS // (size * len(groups)), _SLICES), 1)
    each = max(each, _BLOCKS) if len(groups) == 1 else each
    scans = []
    for fold, group in enumerate(groups):
        its = [(case, i) for case in loaded if case.case.group_hmac == group for i in _slices(case, spatial_dims)]
        for place, number in enumerate(chosen := _spread(len(its), each)):
            case, index = its[number]
            block = place * min(_BLOCKS, len(chosen)) // len(chosen)
            scans.append(_window(case, index, side, block if len(groups) == 1 else fold))
    if len({scan.fold for scan in scans}) < 2:
        raise InputError("probe.groups=1: its group is one image or volume, and nothing is left to label it by. Set 2 or 3.")
    return scans


def _extent(case: LoadedCase, spatial_dims: int) -> tuple[int, ...]:
    return case.size if case.axis is None or spatial_dims == 3 else tuple(np.delete(case.size, case.axis))


def _slices(case: LoadedCase, spatial_dims: int) -> list[int]:
    """Those of a case with foreground; all where there is none; of a whole volume (−1)."""
    assert case.labels is not None
    if spatial_dims == 3:
        return [-1]
    labelled = [i for i in range(case.num_slices) if _is_foreground(case.label_slice(i)).any()]
    return labelled or list(range(case.num_slices))


def _window(case: LoadedCase, index: int, side: int, fold: int) -> ProbeScan:
    """A slice (−1: the volume), or of a larger one what is around the middle of its foreground."""
    assert case.labels is not None
    whole = index < 0
    labels = case.labels if whole else case.label_slice(index)
    marked = np.argwhere(_is_foreground(labels))
    middle = np.median(marked, axis=0).astype(int) if len(marked) else np.array(labels.shape) // 2
    starts = np.clip(middle - side // 2, 0, np.maximum(np.array(labels.shape) - side, 0))
    box = tuple(slice(start, start + side) for start in starts.tolist())
    values = normalise(case.values, case.intensities) if whole else case.image_slice(index)
    return ProbeScan(np.ascontiguousarray(values[:, *box]), np.ascontiguousarray(labels[box]), fold)


def _is_foreground(labels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = (labels != 0) & (labels != IGNORE)
    return found


def _spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of 0 … count − 1, evenly spaced."""
    wanted = min(count, wanted)
    return [int((i + 0.5) * count / wanted) for i in range(wanted)]
