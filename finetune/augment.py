"""Augmentation of a training batch on the device: image and mask through one grid, then contrast on the image.

Rotation, elastic deformation and flip make one displacement, so that the image is interpolated once. Every random
number comes from the generator that is handed in.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.recipe import AugmentSettings


def augment(
    images: Tensor, labels: Tensor, settings: AugmentSettings, generator: torch.Generator
) -> tuple[Tensor, Tensor, float]:
    """Augment a batch.

    Args:
        images: (N, C, Y, X) float.
        labels: (N, Y, X) class indices; read at the nearest pixel, so that no new value appears.

    Returns:
        images, labels, and the rms elastic displacement in pixels (0 where no patch was deformed).
    """
    count, _, height, width = images.shape
    displacement = elastic_displacement(count, height, width, settings.elastic.sigma, settings.elastic.alpha, generator)
    chosen = _uniform(0, 1, count, generator) < settings.elastic.probability
    displacement = displacement * chosen[:, None, None, None]
    angle = torch.deg2rad(_uniform(-settings.rotation, settings.rotation, count, generator))
    flip = torch.where(_uniform(0, 1, count, generator) < settings.flip, -1.0, 1.0)
    grid = _grid(height, width, angle, flip, displacement)
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    moved = F.grid_sample(labels[:, None].float(), grid, mode="nearest", padding_mode="border", align_corners=False)
    mean = images.mean(dim=(2, 3), keepdim=True)
    factor = _uniform(*settings.contrast, count, generator)[:, None, None, None]
    rms = float(displacement[chosen].square().sum(dim=1).mean().sqrt()) if bool(chosen.any()) else 0.0
    return (images - mean) * factor + mean, moved[:, 0].to(labels.dtype), rms


def elastic_displacement(count: int, height: int, width: int, sigma: float, alpha: float, generator: torch.Generator) -> Tensor:
    """Simard's elastic deformation: α · Gaussian_σ(uniform noise in [−1, 1]), (count, 2, height, width) in pixels (x, y).

    Simard, Steinkraus & Platt 2003, ICDAR, section 2: a random field convolved with a Gaussian of σ pixels and
    multiplied by α.
    """
    field = _uniform(-1, 1, (count, 2, height, width), generator)
    radius = int(4 * sigma + 0.5)  # as scipy.ndimage.gaussian_filter truncates
    offsets = torch.arange(-radius, radius + 1, device=field.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    flat = field.reshape(count * 2, 1, height, width)
    flat = F.conv2d(flat, kernel.view(1, 1, -1, 1), padding=(radius, 0))
    flat = F.conv2d(flat, kernel.view(1, 1, 1, -1), padding=(0, radius))
    return alpha * flat.reshape(field.shape)


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


def _uniform(low: float, high: float, shape: int | tuple[int, ...], generator: torch.Generator) -> Tensor:
    size = (shape,) if isinstance(shape, int) else shape
    return torch.rand(size, generator=generator, device=generator.device) * (high - low) + low
