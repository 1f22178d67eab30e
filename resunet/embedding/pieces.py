"""What of a scan an encoder is shown to embed it: its slices with content, or, of a volume for a 3D encoder, windows that tile it.

Normalised by the whole scan, as the encoder was trained. A slice is seen whole: one that is longer than a limit is shrunk by area
to it. A volume is never shrunk: one that is longer than the limit along an axis is cut there into equal windows. What is constant
once it is normalised, such as air outside the field of view, is left out.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from resunet.config import Normalisation
from resunet.data.cases import Case, intensities_of, read_case
from resunet.data.foreground import foreground_map
from resunet.runtime import Intensity, normalise, slice_axis

LONGEST = {2: 512, 3: 128}  # of a slice; of a volume's windows: what a laptop's memory holds
_BLOCK = 16  # pixels, of the foreground map, as pretraining has it


@dataclass(frozen=True)
class ReadScan:
    """A scan in memory as it was stored: (C, *size); axis: that a volume is sliced along."""

    values: NDArray
    axis: int | None
    intensities: list[Intensity]


@dataclass(frozen=True)
class Piece:
    """What goes through the encoder at once.

    values: (C, *size) float32, normalised.
    index: of the slice; None of an image or a window.
    position: of the slice in its volume, from 0 to 1; NaN where there is no such place.
    weight: its part in the scan's mean.
    """

    values: NDArray[np.float32]
    index: int | None = None
    position: float = math.nan
    weight: float = 1.0


def read_for_embedding(case: Case, channels: str | int, normalisation: Normalisation) -> ReadScan:
    """A case with its normalisation.

    Raises:
        InputError: unreadable, or another number of channels.
    """
    scan = read_case(case, channels)
    axis = slice_axis(scan.spacing) if scan.values.ndim == 4 else None
    return ReadScan(scan.values, axis, intensities_of(scan.values, normalisation))


def pieces_of(scan: ReadScan, spatial_dims: int, longest: int) -> Iterator[Piece]:
    """The pieces, one at a time; none where the scan has no content.

    Args:
        longest: pixels a side, of a slice or a window.
    """
    found = _slices(scan, longest) if spatial_dims == 2 else _windows(scan, longest)
    return (piece for piece in found if _has_contrast(piece.values))


def longest_side(scan: ReadScan, spatial_dims: int, longest: int) -> int:
    """Of its smallest piece."""
    size = [n for axis, n in enumerate(scan.values.shape[1:]) if spatial_dims == 3 or axis != scan.axis]
    smallest: int = min(max(size), longest) if spatial_dims == 2 else max(n // -(-n // longest) for n in size)
    return smallest


def shrink(values: NDArray[np.float32], longest: int) -> NDArray[np.float32]:
    """(C, y, x) at most `longest` a side, in proportion, every new pixel the mean of what it covers."""
    size = values.shape[1:]
    if max(size) <= longest:
        return values
    scale = longest / max(size)
    smaller = tuple(max(1, round(n * scale)) for n in size)
    shrunk: NDArray[np.float32] = F.interpolate(torch.from_numpy(values)[None], smaller, mode="area")[0].numpy()
    return shrunk


def _slices(scan: ReadScan, longest: int) -> Iterator[Piece]:
    if scan.axis is None:
        yield Piece(shrink(normalise(scan.values, scan.intensities), longest))
        return
    axis, size = scan.axis, scan.values.shape[1:]
    content = foreground_map(scan.values, tuple(1 if i == axis else _BLOCK for i in range(3)))
    for index in content.usable_slices(axis):
        values = normalise(scan.values.take(index, axis=axis + 1), scan.intensities)
        yield Piece(shrink(values, longest), int(index), index / (size[axis] - 1) if size[axis] > 1 else math.nan)


def _windows(scan: ReadScan, longest: int) -> Iterator[Piece]:
    for cut in itertools.product(*(_parts(n, longest) for n in scan.values.shape[1:])):
        values = normalise(scan.values[(slice(None), *cut)], scan.intensities)
        yield Piece(values, weight=values[0].size)


def _parts(n: int, longest: int) -> Sequence[slice]:
    """As few equal parts of an axis as are at most `longest`."""
    edges = np.linspace(0, n, -(-n // longest) + 1).round().astype(int).tolist()
    return [slice(first, last) for first, last in itertools.pairwise(edges)]


def _has_contrast(values: NDArray[np.float32]) -> bool:
    flat = values.reshape(len(values), -1)
    return bool((flat.min(axis=1) < flat.max(axis=1)).any())
