"""Turning volumes in mm, so that nothing is sheared where voxels are no cubes.

Where slices are thick, a turn across them would make up what was never measured: they are turned within themselves (as in nnU-Net:
Isensee et al. 2021, doi 10.1038/s41592-020-01008-z, supplementary note 4).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_THICK = 3.0  # times the finest spacing, nnU-Net's limit


def thick_axis(spacing: Sequence[float]) -> int | None:
    """The axis across the slices of a volume whose voxels are more than three times as long as wide; else None."""
    coarsest = max(range(3), key=lambda axis: spacing[axis])
    return coarsest if spacing[coarsest] > _THICK * min(spacing) else None


def rotation(angles: Sequence[float]) -> Tensor:
    """The product of rotations (3, 3) about z, y and x in that order, of coordinates (z, y, x); float64."""
    made = torch.eye(3, dtype=torch.float64)
    for axis, angle in enumerate(angles):
        first, second = [other for other in range(3) if other != axis]
        about = torch.eye(3, dtype=torch.float64)
        about[first, first] = about[second, second] = math.cos(angle)
        about[first, second], about[second, first] = -math.sin(angle), math.sin(angle)
        made = made @ about
    return made


def turn(angles: Sequence[float], spacing: Sequence[float]) -> Tensor:
    """Of coordinates (z, y, x) in voxels, the rotation in mm by an angle about each axis: (3, 3), float64.

    Of thick slices only the angle about the axis across them counts.
    """
    thick = thick_axis(spacing)
    if thick is not None:
        angles = [angle if axis == thick else 0.0 for axis, angle in enumerate(angles)]
    mm = torch.tensor(spacing, dtype=torch.float64)
    return rotation(angles) * mm / mm[:, None]  # voxels → mm, turned, mm → voxels
