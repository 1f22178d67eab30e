"""Changes of a view's or patch's intensities: scale, shift and gamma, blur, noise; in 2D and in 3D from one definition."""

import math
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from resunet.config import Frozen, Probability, Range
from resunet.draws import Draws

_SMALLEST_RADIUS = 4  # pixels of a blur's kernel
_RADIUS = 8 / 3  # standard deviations of the widest blur that the kernel reaches at least


class IntensitySettings(Frozen):
    """In standard deviations of the scan."""

    intensity: Probability = Field(0.8, description="of scale, shift and gamma")
    intensity_scale: Range = (0.7, 1.3)
    intensity_shift: Range = (-0.3, 0.3)
    gamma: Range = (0.7, 1.5)
    blur: Probability = 0.3
    blur_sigma: Range = Field((0.3, 1.5), description="pixels; of volumes voxels, across thick slices too")
    noise: Probability = 0.5
    noise_sigma: Range = (0.0, 0.15)

    @property
    def changes(self) -> bool:
        """Whether any scan is changed."""
        return max(self.intensity, self.blur, self.noise) > 0

    @model_validator(mode="after")
    def _intensities_positive(self) -> Self:
        for name in ("gamma", "blur_sigma"):
            if getattr(self, name)[0] <= 0:
                raise ValueError(f"{name}={list(getattr(self, name))} must be above 0")
        return self


def idle_intensities(settings: IntensitySettings, usual: IntensitySettings, where: str) -> list[tuple[str, str]]:
    """Keys that were set and have no effect, as their probability is 0, and why. where: the key of the settings."""
    of = {"blur_sigma": "blur", "noise_sigma": "noise"} | dict.fromkeys(
        ("intensity_scale", "intensity_shift", "gamma"), "intensity"
    )
    return [
        (f"{where}.{name}", f"as {where}.{probability}, its probability, is 0")
        for name, probability in of.items()
        if not getattr(settings, probability) and getattr(settings, name) != getattr(usual, name)
    ]


def change_intensity(view: Tensor, settings: IntensitySettings, draws: Draws) -> Tensor:
    """(N, C, *size) → the same; each scan's own change, of all its channels alike."""
    each = (-1, *[1] * (view.ndim - 1))

    def sometimes(probability: float, changed: Tensor, unchanged: Tensor) -> Tensor:
        chosen = draws.uniform((0, 1)) < probability
        return torch.where(chosen.view(each), changed, unchanged)

    def per_scan(limits: Range) -> Tensor:
        return draws.uniform(limits).view(each)

    curved = _gamma(view, per_scan(settings.gamma))
    changed = curved * per_scan(settings.intensity_scale) + per_scan(settings.intensity_shift)
    view = sometimes(settings.intensity, changed, view)
    if settings.blur:
        blurred = _blur(view, per_scan(settings.blur_sigma).flatten(), settings.blur_sigma[1])
        view = sometimes(settings.blur, blurred, view)
    if settings.noise:
        noise = draws.normal(*view.shape[1:])
        view = sometimes(settings.noise, view + noise * per_scan(settings.noise_sigma), view)
    return view


def _gamma(view: Tensor, gamma: Tensor) -> Tensor:
    """A power of the intensity within each view's own range, which is kept (Isensee et al., batchgenerators)."""
    over = tuple(range(1, view.ndim))
    low, high = view.amin(dim=over, keepdim=True), view.amax(dim=over, keepdim=True)
    span = (high - low).clamp_min(1e-6)
    return ((view - low) / span).clamp_min(0) ** gamma * span + low


def _blur(view: Tensor, sigma: Tensor, widest: float) -> Tensor:
    """A Gaussian of each scan's own width, separable. view (N, C, *size), sigma (N,) in voxels, of which none is above `widest`."""
    *size, height, width = view.shape[1:]
    radius = min(max(_SMALLEST_RADIUS, math.ceil(_RADIUS * widest)), min(view.shape[2:]) - 1)  # what is mirrored is inside
    offsets = torch.arange(-radius, radius + 1, device=view.device)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    planes = math.prod(size)  # of a scan: channels, times the slices of a volume
    flat = F.pad(view.reshape(1, -1, height, width), [radius] * 4, mode="reflect")
    flat = _convolve(flat, kernel.repeat_interleave(planes, dim=0)[..., None])
    flat = _convolve(flat, kernel.repeat_interleave(planes, dim=0)[..., None, :])
    if view.ndim == 5:  # across the slices, as the rows of an image; faster than a convolution of volumes
        flat = F.pad(flat.reshape(1, -1, view.shape[2], height * width), [0, 0, radius, radius], mode="reflect")
        flat = _convolve(flat, kernel.repeat_interleave(view.shape[1], dim=0)[..., None])
    return flat.reshape(view.shape)


def _convolve(planes: Tensor, kernel: Tensor) -> Tensor:
    """(1, M, Y, X), each with its own kernel of (M, *size)."""
    return F.conv2d(planes, kernel.view(len(kernel), 1, *kernel.shape[-2:]), groups=planes.shape[1])
