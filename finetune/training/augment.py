"""Augmentation of a training batch on the device: image and mask through one grid, then contrast on the image.

Rotation, elastic deformation, flip, zoom and shift make one displacement, so that the image is interpolated once. Every random
number comes from the generator that is handed in.

Patches of volumes are turned in mm. Where slices are thick, they are turned and deformed within themselves, alike in each
(`resunet.turn`).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.settings import AugmentSettings
from resunet.draws import Draws
from resunet.intensity import change_intensity
from resunet.turn import thick_axis, turn


def augment(
    images: Tensor, labels: Tensor, settings: AugmentSettings, generator: torch.Generator, spacing: Tensor | None = None
) -> tuple[Tensor, Tensor, float]:
    """Augment a batch.

    Args:
        images: (N, C, Y, X) or (N, C, Z, Y, X) float.
        labels: (N, *size) class indices; read at the nearest pixel, so that no new value appears.
        spacing: (N, 3) mm, of volumes; images are turned in pixels.

    Returns:
        images, labels, and the rms elastic displacement in pixels (0 where no patch was deformed).
    """
    if images.ndim == 5:
        assert spacing is not None
        grid, rms = _volume_grids(images, settings, generator, spacing)
    else:
        grid, rms = _image_grids(images, settings, generator)
    grid = _zoomed_and_shifted(grid, settings, generator, spacing)
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    moved = F.grid_sample(labels[:, None].float(), grid, mode="nearest", padding_mode="border", align_corners=False)
    over = tuple(range(2, images.ndim))
    mean = images.mean(dim=over, keepdim=True)
    factor = _uniform(*settings.contrast, len(images), generator).view(-1, *[1] * (images.ndim - 1))
    images = (images - mean) * factor + mean
    if settings.intensity.changes:
        images = change_intensity(images, settings.intensity, Draws(generator, range(len(images)), len(images)))
    return images, moved[:, 0].to(labels.dtype), rms


def _zoomed_and_shifted(grid: Tensor, settings: AugmentSettings, generator: torch.Generator, spacing: Tensor | None) -> Tensor:
    """(N, *size, dimensions), x first, as grid_sample reads it: about the centre a side is 2 long."""
    count, dims = len(grid), grid.shape[-1]
    each = (count, *[1] * dims, dims)
    within = torch.ones(count, dims, device=grid.device)  # 0 across thick slices
    for patch, mm in enumerate(spacing.tolist() if dims == 3 and spacing is not None else ()):
        if (thick := thick_axis(mm)) is not None:
            within[patch, 2 - thick] = 0
    if settings.zoom_probability:
        low, high = (math.log(factor) for factor in settings.zoom)
        zoom = torch.exp(_uniform(low, high, count, generator))
        zoom = torch.where(_uniform(0, 1, count, generator) < settings.zoom_probability, zoom, torch.ones_like(zoom))
        grid = grid / (zoom[:, None] ** within).view(each)
    if settings.shift:
        grid = grid + 2 * (_uniform(-settings.shift, settings.shift, (count, dims), generator) * within).view(each)
    return grid


def _image_grids(images: Tensor, settings: AugmentSettings, generator: torch.Generator) -> tuple[Tensor, float]:
    count, _, height, width = images.shape
    noise = _uniform(-1, 1, (count, 2, height, width), generator)
    chosen = _uniform(0, 1, count, generator) < settings.elastic.probability
    displacement = torch.zeros_like(noise)
    if bool(chosen.any()):  # smoothing is most of what augmentation costs
        displacement[chosen] = settings.elastic.alpha * _smoothed(noise[chosen], settings.elastic.sigma, (2, 3))
    angle = torch.deg2rad(_uniform(-settings.rotation, settings.rotation, count, generator))
    flip = torch.where(_uniform(0, 1, count, generator) < settings.flip, -1.0, 1.0)
    rms = float(displacement[chosen].square().sum(dim=1).mean().sqrt()) if bool(chosen.any()) else 0.0
    return _grid(height, width, angle, flip, displacement), rms


def _volume_grids(
    images: Tensor, settings: AugmentSettings, generator: torch.Generator, spacing: Tensor
) -> tuple[Tensor, float]:
    """Patch by patch: which axes take part depends on the spacing of each."""
    size, elastic = images.shape[2:], settings.elastic
    grids, squares = [], []
    for mm in spacing.tolist():
        thick = thick_axis(mm)
        angles = torch.deg2rad(_uniform(-settings.rotation, settings.rotation, 3, generator)).tolist()
        flip = bool(_uniform(0, 1, 1, generator) < settings.flip)
        displacement = None
        if bool(_uniform(0, 1, 1, generator) < elastic.probability):
            displacement = volume_displacement(size, elastic.sigma, elastic.alpha, thick, generator)
            squares.append(float(displacement.square().sum(dim=0).mean()))
        grids.append(_volume_grid(size, mm, angles, flip, displacement, generator.device))
    return torch.stack(grids), math.sqrt(sum(squares) / len(squares)) if squares else 0.0


def volume_displacement(
    size: Sequence[int], sigma: float, alpha: float, thick: int | None, generator: torch.Generator
) -> Tensor:
    """Simard's deformation of a volume: (3, *size) voxels along z, y, x; with `thick` the same in every slice, and none across.

    Smoothed along a third axis, noise would be weaker by √(2σ√π): that is made good, so that α means the same in 2D and in 3D.
    """
    axes = [axis for axis in range(3) if axis != thick]
    shape = [1 if axis == thick else n for axis, n in enumerate(size)]
    field = _uniform(-1, 1, (len(axes), *shape), generator)
    field = _smoothed(field, sigma, [1 + axis for axis in axes])
    if thick is None:
        field = field * math.sqrt(2 * sigma * math.sqrt(math.pi))
    moved = field.new_zeros(3, *size)
    moved[axes] = alpha * field.expand(-1, *size)
    return moved


def _volume_grid(
    size: Sequence[int],
    spacing: Sequence[float],
    angles: Sequence[float],
    flip: bool,
    displacement: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Where each voxel is read: (Z, Y, X, 3) for grid_sample. Rotation is about the centre, by an angle about each axis, in mm."""
    axes = [torch.arange(n, device=device) - (n - 1) / 2 for n in size]
    if flip:
        axes[2] = -axes[2]
    at = torch.stack(torch.meshgrid(*axes, indexing="ij"))  # (3, Z, Y, X): z, y, x in voxels
    source = torch.einsum("ij,jzyx->izyx", turn(angles, spacing).to(at), at)
    if displacement is not None:
        source = source + displacement
    scale = 2 / torch.tensor(tuple(size), device=device, dtype=at.dtype)
    return (source * scale.view(3, 1, 1, 1)).flip(0).movedim(0, -1)  # grid_sample wants x, y, z


def elastic_displacement(count: int, height: int, width: int, sigma: float, alpha: float, generator: torch.Generator) -> Tensor:
    """Simard's elastic deformation: α · Gaussian_σ(uniform noise in [−1, 1]), (count, 2, height, width) in pixels (x, y).

    Simard, Steinkraus & Platt 2003, ICDAR, section 2: a random field convolved with a Gaussian of σ pixels and
    multiplied by α.
    """
    return alpha * _smoothed(_uniform(-1, 1, (count, 2, height, width), generator), sigma, (2, 3))


def _smoothed(field: Tensor, sigma: float, axes: Sequence[int]) -> Tensor:
    """Convolved with a Gaussian along some axes, zeros beyond; as matrices, faster than kernels longer than a patch."""
    kernel = _gaussian(sigma, field.device)
    for axis in axes:
        offset = torch.arange(field.shape[axis], device=field.device)
        offset = offset[:, None] - offset + len(kernel) // 2
        inside = (offset >= 0) & (offset < len(kernel))
        smoothing = kernel[offset.clamp(0, len(kernel) - 1)] * inside
        field = (field.movedim(axis, -1) @ smoothing).movedim(-1, axis)
    return field


def _grid(height: int, width: int, angle: Tensor, flip: Tensor, displacement: Tensor) -> Tensor:
    """Where each pixel is read: (N, Y, X, 2) for grid_sample. Rotation is about the centre, in pixels."""
    device = angle.device
    y = torch.arange(height, device=device) - (height - 1) / 2
    x = torch.arange(width, device=device) - (width - 1) / 2
    y, x = torch.meshgrid(y, x, indexing="ij")
    x = x * flip[:, None, None]
    y = y.expand_as(x)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    source_x = cos * x - sin * y + displacement[:, 0]
    source_y = sin * x + cos * y + displacement[:, 1]
    return torch.stack([source_x * 2 / width, source_y * 2 / height], dim=-1)


def _gaussian(sigma: float, device: torch.device) -> Tensor:
    """Weights from −4σ to 4σ, where scipy.ndimage.gaussian_filter truncates; their sum is 1."""
    radius = int(4 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, device=device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    return kernel / kernel.sum()


def _uniform(low: float, high: float, shape: int | tuple[int, ...], generator: torch.Generator) -> Tensor:
    size = (shape,) if isinstance(shape, int) else shape
    return torch.rand(size, generator=generator, device=generator.device) * (high - low) + low
