"""Training patches: which slice, which place, as a pure function of (seed, step, rank)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resunet.data.cases import IGNORE, LoadedCase
from resunet.errors import InputError


@dataclass(frozen=True)
class Labelled:
    """One labelled slice: where it is, and where its foreground is, as (n, 2) positions (y, x)."""

    case: LoadedCase
    index: int
    foreground: NDArray[np.int32]


class PatchSampler:
    """Draws patches from labelled cases; a share of them centred on a pixel of a class (nnU-Net's oversampling).

    Slices are drawn with replacement: a handful of labelled slices has no epochs worth the name. Slices without any
    contrast are left out.

    Raises:
        InputError: no slice has any.
    """

    def __init__(self, cases: Sequence[LoadedCase], patch: tuple[int, int], foreground: float) -> None:
        self.patch = patch
        self.share = foreground
        self.slices = [
            Labelled(case, i, _foreground(case.label_slice(i)))
            for case in cases
            for i in range(case.num_slices)
            if not case.is_constant(i)
        ]
        if not self.slices:
            raise InputError("The labelled training cases hold no slice with any contrast. Check the images, or label others.")
        self.with_foreground = [one for one in self.slices if len(one.foreground)]

    def batch(self, size: int, entropy: Sequence[int]) -> tuple[Tensor, Tensor]:
        """images (size, C, *patch) float32 and labels (size, *patch) uint8; where a slice ends, labels are IGNORE."""
        rng = np.random.default_rng(list(entropy))
        images, labels = [], []
        for _ in range(size):
            centred = bool(self.with_foreground) and rng.random() < self.share
            one = (self.with_foreground if centred else self.slices)[
                rng.integers(len(self.with_foreground if centred else self.slices))
            ]
            place = one.foreground[rng.integers(len(one.foreground))] if centred else None
            image, label = one.case.image_slice(one.index), one.case.label_slice(one.index)
            rows, columns = (
                _window(n, side, None if place is None else int(place[axis]), rng)
                for axis, (n, side) in enumerate(zip(label.shape, self.patch, strict=True))
            )
            images.append(_cut(image, rows, columns, edge=True))
            labels.append(_cut(label, rows, columns, edge=False))
        return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels))


def _foreground(labels: NDArray[np.uint8]) -> NDArray[np.int32]:
    return np.argwhere((labels != 0) & (labels != IGNORE)).astype(np.int32)


def _window(size: int, side: int, centre: int | None, rng: np.random.Generator) -> tuple[int, int]:
    """First and last + 1 of a window of `side` on an axis of `size`; it may reach out only where the axis is shorter."""
    if size <= side:
        start = -((side - size) // 2)
    elif centre is None:
        start = int(rng.integers(size - side + 1))
    else:  # the pixel lies anywhere in the middle half, so that lesions are not always in the centre
        offset = int(rng.integers(side // 4, side - side // 4))
        start = min(max(centre - offset, 0), size - side)
    return start, start + side


def _cut(values: NDArray, rows: tuple[int, int], columns: tuple[int, int], edge: bool) -> NDArray:
    """values (…, Y, X) → the window; beyond the image its edge goes on, or IGNORE stands."""
    height, width = values.shape[-2:]
    inside = values[..., max(rows[0], 0) : rows[1], max(columns[0], 0) : columns[1]]
    pad = [(0, 0)] * (values.ndim - 2) + [
        (max(-rows[0], 0), max(rows[1] - height, 0)),
        (max(-columns[0], 0), max(columns[1] - width, 0)),
    ]
    if not any(any(p) for p in pad):
        return inside
    return np.pad(inside, pad, mode="edge") if edge else np.pad(inside, pad, constant_values=IGNORE)
