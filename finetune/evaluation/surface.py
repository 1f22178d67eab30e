"""Distances in mm between the surfaces of a truth and a prediction: HD95 and surface Dice.

By MONAI's definitions, on the distances themselves and not on distance maps, so that a large volume costs what its
surfaces cost. Apart from MONAI's stand misses, false alarms and ignored voxels: here they have values, see `compare_surfaces`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

TOLERANCE = 1.0  # mm, of surface Dice


@dataclass(frozen=True)
class SurfaceMeasures:
    """hd95 in mm, surface_dice in [0, 1]; None where they have no definition."""

    hd95: float | None
    surface_dice: float | None


_UNDEFINED = SurfaceMeasures(None, None)


def diagonal(shape: Sequence[int], spacing: Sequence[float]) -> float:
    """Of the whole image, in mm, from outer corner to outer corner: more than any two of its voxels are apart."""
    return math.hypot(*(size * step for size, step in zip(shape, spacing, strict=True)))


def compare_surfaces(
    truth: NDArray[np.bool_],
    prediction: NDArray[np.bool_],
    evaluated: NDArray[np.bool_] | None,
    spacing: Sequence[float],
    tolerance: float,
    missed: float,
) -> SurfaceMeasures:
    """HD95 and surface Dice of two masks, (y, x) or (z, y, x), which may be cut to where either is, and a voxel more.

    A surface is the voxels of a mask that share a face with a voxel that is known not to be in it, or with the outside
    of the array. hd95: the greater of two 95th percentiles (linear), that of the distances from every surface voxel of one
    to the nearest of the other. surface_dice: the share of the surface voxels of both that have one of the other within
    `tolerance` mm, the tolerance included.

    evaluated: False where nobody labelled: there both masks must be False, and beside it is no surface. None: all True.
    missed: the HD95 of a truth without a predicted surface, and of a prediction without truth; their surface Dice is 0.
    Undefined where neither mask has a voxel, and where the truth has voxels and no surface.
    """
    if not truth.any():
        return SurfaceMeasures(missed, 0.0) if prediction.any() else _UNDEFINED
    in_truth = _surface(truth, evaluated, spacing)
    if not len(in_truth):
        return _UNDEFINED
    in_prediction = _surface(prediction, evaluated, spacing)
    if not len(in_prediction):
        return SurfaceMeasures(missed, 0.0)
    to_prediction = KDTree(in_prediction).query(in_truth)[0]
    to_truth = KDTree(in_truth).query(in_prediction)[0]
    reach = tolerance * (1 + 1e-9)  # 7 × 0.1 mm less 4 × 0.1 mm is 0.3 mm
    near = int(np.count_nonzero(to_prediction <= reach) + np.count_nonzero(to_truth <= reach))
    return SurfaceMeasures(
        hd95=float(max(np.percentile(to_prediction, 95), np.percentile(to_truth, 95))),
        surface_dice=near / (len(to_prediction) + len(to_truth)),
    )


def _surface(mask: NDArray[np.bool_], evaluated: NDArray[np.bool_] | None, spacing: Sequence[float]) -> NDArray[np.float64]:
    """The surface voxels of a mask, in mm: (n, axes)."""
    inside = np.pad(mask if evaluated is None else mask | ~evaluated, 1)
    within = inside[(slice(1, -1),) * mask.ndim].copy()
    for axis in range(mask.ndim):
        for neighbour in (slice(None, -2), slice(2, None)):
            within &= inside[tuple(neighbour if i == axis else slice(1, -1) for i in range(mask.ndim))]
    return np.argwhere(mask & ~within).astype(np.float64) * np.asarray(spacing, dtype=np.float64)
