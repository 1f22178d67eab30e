"""Where a view is in its scan, and reading the scan there: in 2D and in 3D from one definition.

Crop, flip and rotation make a grid, and the scan is read once through it, from an averaging pyramid whose level fits the crop's
size, so that large crops do not alias. Lengths of volumes are in mm: a crop has the proportions of its view whatever the spacing,
and is turned without shear (`resunet.turn`).
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.recipe import ViewSettings
from resunet.draws import Draws
from resunet.turn import turn

_POOL = {2: F.avg_pool2d, 3: F.avg_pool3d}


class AffineMap(NamedTuple):
    """Where some views are in their scans: a place in a view, in [-1, 1] from border to border, → voxels of the scan.

    Both as grid_sample has them: (x, y) or (x, y, z); a whole number is the centre of a voxel.

    matrix: (N, dimensions, dimensions). offset: (N, dimensions), the centre of the view.
    """

    matrix: Tensor
    offset: Tensor

    def to_scan(self, places: Tensor) -> Tensor:
        """(N, points, dimensions) in the views → in the scans."""
        return places @ self.matrix.mT + self.offset[:, None]

    def to_view(self, positions: Tensor) -> Tensor:
        """The inverse of `to_scan`."""
        solved: Tensor = torch.linalg.solve(self.matrix, (positions - self.offset[:, None]).mT)
        return solved.mT


class Grid(NamedTuple):
    """Where the voxels of some views are in their scans.

    positions: (N, *view, dimensions) in voxels of the scan, (x, y) or (x, y, z), as grid_sample has them.
    zoom: (N, dimensions), scan voxels a view voxel, in array order.
    """

    positions: Tensor
    zoom: Tensor


def crop_grid(sizes: Tensor, anchors: Tensor, spacing: Tensor, settings: ViewSettings, draws: Draws) -> tuple[Grid, AffineMap]:
    """A random crop of every scan, flipped and turned about its centre; the map that its grid comes from.

    Args:
        sizes: (N, dimensions), of each scan without its padding, in array order.
        anchors: (N, dimensions), a voxel that the crop holds before it is turned.
        spacing: (N, dimensions) mm; of images 1, so that lengths are in pixels.
    """
    dims = sizes.shape[1]
    view = settings.sides(dims)
    extent = sizes.float().to(draws.device)
    length = _lengths(extent, spacing.to(extent), settings, draws)
    anchor = anchors.float().to(extent) + 0.5
    start = torch.stack([_start(anchor[:, i], length[:, i], extent[:, i], draws) for i in range(dims)], dim=1)
    flips = torch.where(draws.uniform((0, 1), dims) < settings.flip, -1.0, 1.0).flip(1)
    turns = _turns(spacing, settings.rotation, draws)
    centre = start + length / 2
    matrix = turns * (length / 2 * flips)[:, None]  # in array order
    place = AffineMap(matrix.flip(1, 2), (centre - 0.5).flip(1))
    zoom = length / torch.tensor(view, device=length.device)
    if dims == 2:
        zoom = zoom.amin(dim=1, keepdim=True).expand(-1, dims)
    return Grid(_positions(place, view), zoom), place


def _positions(place: AffineMap, view: tuple[int, ...]) -> Tensor:
    """The centres of a view's voxels in the scan: (N, *view, dimensions)."""
    dims = len(view)
    lines = []  # along each axis of the view, x first, broadcast over the others
    for axis, side in reversed(list(enumerate(view))):
        line = (torch.arange(side, device=place.offset.device) + 0.5) * 2 / side - 1
        lines.append(line.view(-1, *[1] * (dims - 1 - axis)))
    positions = []
    for row in range(dims):
        at = _by_scan(place.offset[:, row], dims)
        for axis, line in enumerate(lines):
            at = at + _by_scan(place.matrix[:, row, axis], dims) * line
        positions.append(at)
    return torch.stack(positions, dim=-1)


def _by_scan(values: Tensor, dims: int) -> Tensor:
    """(N,) to be broadcast over views without channels."""
    return values.view(-1, *[1] * dims)


def _lengths(extent: Tensor, spacing: Tensor, settings: ViewSettings, draws: Draws) -> Tensor:
    """(N, dimensions): how many voxels of the scan each side of a crop is long, at most all."""
    dims = extent.shape[1]
    unit = spacing if settings.voxels == "cubes" else torch.ones_like(spacing)
    volume = draws.uniform(settings.scale)
    for axis in range(dims):
        volume = volume * (extent[:, axis] * unit[:, axis])
    # of each side but the last: how often it goes into the last, were all sides of the view alike
    ratio = draws.uniform((np.log(settings.ratio[0]), np.log(settings.ratio[1])), dims - 1).exp()
    view = settings.sides(dims)
    mean = math.prod(side / view[-1] for side in view) ** (1 / dims)
    lengths = []
    for axis, side in enumerate(view):
        power = volume
        for other in range(dims - 1):
            power = power / ratio[:, other] ** (dims - 1) if other == axis else power * ratio[:, other]
        length = power ** (1 / dims) * (side / view[-1] / mean)
        lengths.append(torch.minimum(length / unit[:, axis], extent[:, axis]))
    return torch.stack(lengths, dim=1)


def _start(anchor: Tensor, length: Tensor, extent: Tensor, draws: Draws) -> Tensor:
    """(N,): where a crop begins, uniform over the places in [0, extent − length] that put the anchor into it."""
    low = (anchor - length).clamp_min(0)
    high = torch.minimum(anchor, extent - length)
    return low + draws.uniform((0, 1)) * (high - low)


def _turns(spacing: Tensor, limit: float, draws: Draws) -> Tensor:
    """A random rotation of coordinates in array order, in voxels, for every scan: (N, dimensions, dimensions)."""
    if spacing.shape[1] == 2:
        angle = torch.deg2rad(draws.uniform((-limit, limit)))
        cos, sin = angle.cos(), angle.sin()
        return torch.stack([torch.stack([cos, sin], dim=1), torch.stack([-sin, cos], dim=1)], dim=1)
    angles = torch.deg2rad(draws.uniform((-limit, limit), 3)).tolist()
    made = [turn(its, mm) for its, mm in zip(angles, spacing.tolist(), strict=True)]
    return torch.stack(made).to(draws.device, torch.float32)


def crop(scans: Tensor, grid: Grid, sizes: Tensor) -> Tensor:
    """Read scans at a grid's positions; outside a scan it is mirrored.

    Args:
        scans: (N, C, *size). Each axis is read from an averaging pyramid's level floor(log2(zoom)).
        sizes: (N, dimensions), of each scan without its padding.

    Returns:
        (N, C, *view).
    """
    out = scans.new_empty(*scans.shape[:2], *grid.positions.shape[1:-1])
    levels = grid.zoom.clamp_min(1).log2().floor().long()
    extent = sizes.to(grid.positions).flip(1)  # (x, y, …), as positions
    for level in levels.unique(dim=0):
        chosen = torch.nonzero((levels == level).all(dim=1)).squeeze(1)
        pooled = _averaged(scans[chosen], level.tolist())
        factor = (2.0**level).flip(0)
        its_extent = (extent[chosen] / factor).floor().clamp_min(1)
        inside = _mirror((grid.positions[chosen] + 0.5) / factor - 0.5, its_extent.view(-1, *[1] * len(level), len(level)))
        size = torch.tensor(pooled.shape[:1:-1], device=inside.device)
        out[chosen] = F.grid_sample(pooled, (2 * inside + 1) / size - 1, align_corners=False)
    return out


def _averaged(scans: Tensor, levels: list[int]) -> Tensor:
    """Halved so often along each axis, each time by the mean of two."""
    while any(levels):
        scans = _POOL[len(levels)](scans, [2 if level else 1 for level in levels], ceil_mode=True)
        levels = [max(level - 1, 0) for level in levels]
    return scans


def _mirror(positions: Tensor, extent: Tensor) -> Tensor:
    """Positions reflected into [0, extent − 1], about the centres of the outermost voxels."""
    last = extent - 1
    folded = positions.abs() % (2 * last).clamp_min(1e-6)
    return torch.minimum(torch.minimum(folded, 2 * last - folded).clamp_min(0), last)
