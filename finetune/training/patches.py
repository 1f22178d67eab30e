"""Training patches: which slice or volume, which place, as a pure function of the seed, the batch and the place in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import cc3d
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resunet.data.cases import IGNORE, LoadedCase, refuse_images
from resunet.errors import InputError
from resunet.runtime import normalise

# Positions kept of a class in a case, as nnU-Net keeps them; shared by the slices of a volume, of which each keeps some.
_MOST, _LEAST = 10_000, 100

# In a label map: a pixel of a scan that nobody labelled. Classes are below it, IGNORE is above.
UNLABELLED = 254

Window = tuple[int, int]  # first and last + 1 on an axis


class Patches(NamedTuple):
    """images: (N, C, *patch) float32. labels: (N, *patch) uint8, IGNORE beyond the scan. spacing: (N, 2 or 3) float32, mm.

    Without masks the labels are UNLABELLED within the scan.
    """

    images: Tensor
    labels: Tensor
    spacing: Tensor


class Batches(Protocol):
    """Where batches come from: a `PatchSampler`, one that others are mixed into, or the one batch of a check."""

    def batch(self, size: int, entropy: Sequence[int]) -> Patches: ...


@dataclass(frozen=True)
class Unit:
    """What patches are cut from: a slice of a case, or with index None all of it.

    foreground: class index → positions (n, dimensions), where there are many a random part of them; empty without labels.
    """

    case: LoadedCase
    index: int | None
    foreground: Mapping[int, NDArray[np.int32]]

    @property
    def spacing(self) -> tuple[float, ...]:
        axis = None if self.index is None else self.case.axis
        return tuple(mm for i, mm in enumerate(self.case.spacing) if i != axis)


class PatchSampler:
    """Draws patches from labelled cases; a share of them centred on a pixel of a class.

    The class is drawn first, each alike, then a slice or volume that holds it, then its pixel: rare classes are seen as often
    as frequent ones. nnU-Net (Isensee et al. 2021, doi 10.1038/s41592-020-01008-z, supplementary note 2) draws the case first.
    By object, one of all connected objects of the class is drawn, each alike, and then its pixel: of two lesions in a slice, of
    5 and of 500 pixels, the small one is the centre as often as the large.

    Patches of two sides are cut from slices, of three from volumes, with replacement: a handful of labelled scans has no epochs
    worth the name. Slices without any contrast are left out.

    Raises:
        InputError: no slice has any; no pixel of any class, so that there is nothing to learn; an image, for patches of three.
    """

    def __init__(self, cases: Sequence[LoadedCase], patch: Sequence[int], foreground: float, by_object: bool = False) -> None:
        self.patch = tuple(patch)
        self.share = foreground
        refuse_images(cases, len(patch))
        self.units = [unit for case in cases for unit in units_of(case, whole=len(patch) == 3)]
        if not self.units:
            raise InputError("The labelled training cases hold no slice with any contrast. Check the images, or label others.")
        classes = sorted({index for one in self.units for index in one.foreground})
        self.holding = [
            [
                (one, positions)
                for one in self.units
                if index in one.foreground
                for positions in (_objects(one, index) if by_object else [one.foreground[index]])
            ]
            for index in classes
        ]
        if not classes:
            raise InputError(
                f"None of the {len(cases)} training cases has a pixel of any class: all is background or ignored, and there is "
                "nothing to learn. Check data.classes and the masks, or train on other cases (data.labelled, data.draw)."
            )

    def batch(self, size: int, entropy: Sequence[int]) -> Patches:
        """`size` patches; beyond the end of a slice or volume its edge goes on, with labels IGNORE."""
        rng = np.random.default_rng(list(entropy))
        images, labels, spacing = [], [], []
        for _ in range(size):
            place: NDArray[np.int32] | None = None
            if rng.random() < self.share:
                holding = self.holding[rng.integers(len(self.holding))]
                one, positions = holding[rng.integers(len(holding))]
                place = positions[rng.integers(len(positions))]
            else:
                one = self.units[rng.integers(len(self.units))]
            image, truth = cut_patch(one, place, self.patch, rng)
            images.append(image)
            labels.append(truth)
            spacing.append(one.spacing)
        return Patches(torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels)), torch.tensor(spacing))


def units_of(case: LoadedCase, whole: bool) -> list[Unit]:
    """A case's slices, or with `whole` all of it; what is without any contrast is left out."""
    if whole:
        constant = all(case.is_constant(index) for index in range(case.num_slices))
        return [] if constant else [Unit(case, None, {} if case.labels is None else _foreground(case.labels, _MOST))]
    most = max(_MOST // case.num_slices, _LEAST)
    return [
        Unit(case, index, {} if case.labels is None else _foreground(case.label_slice(index), most))
        for index in range(case.num_slices)
        if not case.is_constant(index)
    ]


def cut_patch(
    one: Unit, place: NDArray[np.int32] | None, patch: Sequence[int], rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """A patch somewhere, or around a place: the image normalised (C, *patch), and its labels (*patch)."""
    values, truth = _arrays(one)
    windows = [
        _window(n, side, None if place is None else int(place[axis]), rng)
        for axis, (n, side) in enumerate(zip(truth.shape, patch, strict=True))
    ]
    return normalise(_cut(values, windows, edge=True), one.case.intensities), _cut(truth, windows, edge=False)


def _foreground(labels: NDArray[np.uint8], most: int) -> dict[int, NDArray[np.int32]]:
    """Class index → its positions, `most` of them at random where there are more; the same every time."""
    found = {}
    for index in np.flatnonzero(np.bincount(labels.ravel(), minlength=1)):
        if index in (0, IGNORE):
            continue
        positions = np.flatnonzero(labels == index)
        if len(positions) > most:
            positions = np.sort(np.random.default_rng(int(index)).choice(positions, most, replace=False))
        found[int(index)] = np.stack(np.unravel_index(positions, labels.shape), axis=1).astype(np.int32)
    return found


def _objects(one: Unit, index: int) -> list[NDArray[np.int32]]:
    """The positions of every connected object of a class, `_MOST` at random of a larger one; the same every time."""
    labels = _arrays(one)[1]
    found = cc3d.connected_components(labels == index, connectivity=8 if labels.ndim == 2 else 26)
    positions = np.flatnonzero(found)
    objects = found.ravel()[positions]
    order = np.argsort(objects, kind="stable")
    each = np.split(positions[order], np.flatnonzero(np.diff(objects[order])) + 1)
    rng = np.random.default_rng(index)
    some = (one if len(one) <= _MOST else np.sort(rng.choice(one, _MOST, replace=False)) for one in each)
    return [np.stack(np.unravel_index(one, labels.shape), axis=1).astype(np.int32) for one in some]


def _arrays(one: Unit) -> tuple[NDArray, NDArray[np.uint8]]:
    """Views of values (C, *size), not normalised, and labels (*size)."""
    labels = one.case.labels
    if labels is None:
        labels = np.broadcast_to(np.uint8(UNLABELLED), one.case.size)
    if one.index is None or one.case.axis is None:
        return one.case.values, labels
    at = (slice(None),) * one.case.axis + (one.index,)
    return one.case.values[(slice(None), *at)], labels[at]


def _window(size: int, side: int, centre: int | None, rng: np.random.Generator) -> Window:
    """A window of `side` on an axis of `size`; it may reach out only where the axis is shorter."""
    if size <= side:
        start = -((side - size) // 2)
    elif centre is None:
        start = int(rng.integers(size - side + 1))
    else:  # the pixel lies anywhere in the middle half, so that lesions are not always in the centre
        offset = int(rng.integers(side // 4, side - side // 4))
        start = min(max(centre - offset, 0), size - side)
    return start, start + side


def _cut(values: NDArray, windows: Sequence[Window], edge: bool) -> NDArray:
    """values (…, *size) → the window; beyond the scan its edge goes on, or IGNORE stands."""
    size = values.shape[-len(windows) :]
    inside = values[(slice(None),) * (values.ndim - len(windows)) + tuple(slice(max(a, 0), b) for a, b in windows)]
    beyond = [(max(-first, 0), max(last - n, 0)) for (first, last), n in zip(windows, size, strict=True)]
    if not any(map(any, beyond)):
        return inside
    pad = [(0, 0)] * (values.ndim - len(windows)) + beyond
    return np.pad(inside, pad, mode="edge") if edge else np.pad(inside, pad, constant_values=IGNORE)
