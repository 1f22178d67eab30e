"""The scans of an archive as training reads them: windows of slices or of volumes, normalised by the whole scan, where there is
content.

2D images in a fast format are read whole, as they are. Everything else is decoded once into a store, from which only the chunks
of a window are read. For a network of volumes, images and single slices are left out. What is held in memory is a few numbers a
scan. Imports no torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from resunet.config import Normalisation
from resunet.data.cases import Case, intensities_of, read_case
from resunet.data.foreground import ForegroundMap, foreground_corner, foreground_map
from resunet.data.preparing import BLOCK, Prepared
from resunet.data.store import Absent, Store, StoredScan
from resunet.errors import EnvironmentFault
from resunet.runtime import Intensity, normalise


@dataclass(frozen=True)
class Window:
    """Part of a slice or of a volume, and where it is from.

    values: (C, y, x) or (C, z, y, x) float32, normalised.
    anchors: (2, dimensions), a place with content for each view, in array order.
    scan: index of the scan among the cases.
    spacing: mm in array order, of a volume; the pixels of slices and images are taken as they are: 1.
    axis: of the volume, in LPS, that it is sliced along; None for an image and for a volume as it is.
    position: of the slice along that axis, from 0 for the first slice to 1 for the last; of an image, and of a volume of one
        slice, what its case says; NaN where there is no such place.
    """

    values: NDArray[np.float32]
    anchors: NDArray[np.int64]
    scan: int
    spacing: tuple[float, ...] = (1.0, 1.0)
    axis: int | None = None
    position: float = math.nan


class Scans:
    """The scans of some cases, once prepared; may be pickled and forked.

    Args:
        prepared: of each case, in their order.
        spatial_dims: 2: an item is an image or a slice of a volume; 3: a volume as it is, and there are no others.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        prepared: Sequence[Prepared],
        channels: str | int,
        normalisation: Normalisation,
        store: Store,
        spatial_dims: int = 2,
    ) -> None:
        self.cases = cases
        self.spatial_dims = spatial_dims
        self._keys = np.array([one.key for one in prepared], "S64")
        self._ends = np.cumsum([_num_items(one, spatial_dims) for one in prepared], dtype=np.int64)
        self._channels, self._normalisation, self._store = channels, normalisation, store

    @property
    def num_items(self) -> int:
        """How many slices have content, over all scans; of `spatial_dims` 3 how many volumes."""
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def items(self) -> str:
        """What they are called."""
        return "slices" if self.spatial_dims == 2 else "volumes"

    def window(self, item: int, size: int | Sequence[int], rng: np.random.Generator) -> Window:
        """A window of at most `size` of the `item`-th slice or volume, around content.

        Args:
            size: voxels, of every side, or one a side.

        Raises:
            InputError: the image cannot be read any more.
            EnvironmentFault: the store lost the scan.
        """
        assert 0 <= item < self.num_items, item
        sides = (size,) * self.spatial_dims if isinstance(size, int) else tuple(size)
        scan = int(np.searchsorted(self._ends, item, side="right"))
        key = self._keys[scan].decode()
        if not key:
            return self._from_image(scan, sides, rng)
        return self._from_store(scan, key, item - int(self._ends[scan - 1] if scan else 0), sides, rng)

    def _from_image(self, index: int, size: tuple[int, ...], rng: np.random.Generator) -> Window:
        values = read_case(self.cases[index], self._channels).values
        content = foreground_map(values, BLOCK)
        place = _place(content, size, rng)
        cut = normalise(values[(slice(None), *place)], intensities_of(values, self._normalisation))
        return Window(cut, _anchors(content, place, rng), index, position=self._said(index))

    def _from_store(self, scan_index: int, key: str, number: int, size: tuple[int, ...], rng: np.random.Generator) -> Window:
        """Of the `number`-th slice with content, or of the whole volume."""
        try:
            scan = self._store.open(key)
            axis, content, intensities = _facts(scan)
            if self.spatial_dims == 3:
                axis = None
            index = scan.facts["slices"][number]
            if axis is not None:
                content = content.slice(axis, index)
            place = _place(content, size, rng)
            where = [slice(None), *place]
            if axis is not None:
                where.insert(1 + axis, slice(index, index + 1))
            cut = scan.crop(tuple(where))
        except Absent as error:
            raise EnvironmentFault(
                f"{self._store.folder}: a decoded scan is missing or damaged. resume=true decodes it again and goes on."
            ) from error
        values, anchors = normalise(cut, intensities), _anchors(content, place, rng)
        if self.spatial_dims == 3:
            return Window(values, anchors, scan_index, tuple(scan.facts["spacing"]))
        if axis is None:
            return Window(values, anchors, scan_index, position=self._said(scan_index))
        last = scan.shape[1 + axis] - 1
        position = index / last if last else self._said(scan_index)
        return Window(values.squeeze(1 + axis), anchors, scan_index, axis=axis, position=position)

    def _said(self, scan: int) -> float:
        position = self.cases[scan].position
        return math.nan if position is None else position


def _num_items(prepared: Prepared, spatial_dims: int) -> int:
    return prepared.num_slices if spatial_dims == 2 else int(prepared.is_volume and prepared.num_slices > 0)


def _facts(scan: StoredScan) -> tuple[int | None, ForegroundMap, list[Intensity]]:
    facts = scan.facts
    return facts["axis"], ForegroundMap.from_facts(facts["foreground"]), [Intensity(**one) for one in facts["intensities"]]


def _place(content: ForegroundMap, size: Sequence[int], rng: np.random.Generator) -> tuple[slice, ...]:
    """A window of `size`, or of the whole axis where that is shorter, centred on content: a slice an axis."""
    corner = foreground_corner(rng, content, size)
    return tuple(slice(first, min(first + side, n)) for first, side, n in zip(corner, size, content.size, strict=True))


def _anchors(content: ForegroundMap, place: Sequence[slice], rng: np.random.Generator) -> NDArray[np.int64]:
    """Two places with content within a window, relative to it."""
    starts, stops = np.array([one.start for one in place]), np.array([one.stop for one in place])
    edges = np.array(content.block)
    first, last = starts // edges, -(-stops // edges)
    mask = content.mask[tuple(slice(*bounds) for bounds in zip(first, last, strict=True))]
    blocks = np.argwhere(mask if mask.any() else np.ones_like(mask)) + first
    chosen = blocks[rng.integers(len(blocks), size=2)]
    places = rng.integers(np.maximum(chosen * edges, starts), np.minimum((chosen + 1) * edges, stops))
    anchors: NDArray[np.int64] = places - starts
    return anchors
