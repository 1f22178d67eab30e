"""The two views of a scan: batched float tensors on the device, one or many channels, never through 8 bits.

A view is one interpolation: crop, flip and rotation make a grid, and the scan is read once through it, from the level
of an averaging pyramid that matches the crop's size, so that large crops do not alias. Every random number comes from
the generator that is handed in, and is the same for a scan of a set whether one rank makes all views of the set or many do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pretrain.recipe import Range, ViewSettings

VIEWS_STREAM = 1  # names the random stream of the views in step_generator
_BLUR_RADIUS = 4  # pixels: covers 2.5 standard deviations of the widest default blur


def stack_scans(scans: Sequence[NDArray[np.float32]]) -> tuple[Tensor, Tensor]:
    """Scans (C, y, x) of any sizes → (N, C, Y, X) padded with zeros at the end, and their sizes (N, 2)."""
    sizes = torch.tensor([scan.shape[1:] for scan in scans])
    height, width = (int(n) for n in sizes.max(dim=0).values)
    padded = torch.zeros(len(scans), scans[0].shape[0], height, width)
    for i, scan in enumerate(scans):
        padded[i, :, : scan.shape[1], : scan.shape[2]] = torch.from_numpy(scan)
    return padded, sizes


@dataclass(frozen=True)
class Draws:
    """Random numbers for the scans at some places of a set, drawn for all `total` of it: nobody's depend on who is asked."""

    generator: torch.Generator
    places: range
    total: int

    def uniform(self, limits: Range, *shape: int) -> Tensor:
        """(N, *shape), N the number of places."""
        low, high = limits
        return self._here(torch.rand(self.total, *shape, generator=self.generator, device=self.device)) * (high - low) + low

    def normal(self, *shape: int) -> Tensor:
        """(N, *shape)."""
        return self._here(torch.randn(self.total, *shape, generator=self.generator, device=self.device))

    @property
    def device(self) -> torch.device:
        return self.generator.device

    def _here(self, drawn: Tensor) -> Tensor:
        return drawn[self.places.start : self.places.stop]


def make_views(
    scans: Tensor,
    sizes: Tensor,
    anchors: Tensor,
    settings: ViewSettings,
    generator: torch.Generator,
    first: int = 0,
    total: int | None = None,
) -> Tensor:
    """Two independent views of every scan.

    Args:
        scans: (N, C, Y, X), normalised.
        sizes: (N, 2), each scan's own height and width within the padding.
        anchors: (N, 2, 2), for each view a pixel (y, x) that its crop holds, so that no crop is of background only.
        first, total: these are the scans from place `first` on of a set of `total`; without them, the whole set.

    Returns:
        (2N, C, size, size) float32: the first views of all scans, then the second.
    """
    count = scans.shape[0]
    draws = Draws(generator, range(first, first + count), count if total is None else total)
    return torch.cat([_one_view(scans, sizes, anchors[:, view], settings, draws) for view in range(2)])


def _one_view(scans: Tensor, sizes: Tensor, anchors: Tensor, settings: ViewSettings, draws: Draws) -> Tensor:
    view = crop(scans, *_crop_grid(sizes, anchors, settings, draws))
    return _change_intensity(view, settings, draws)


def _crop_grid(sizes: Tensor, anchors: Tensor, settings: ViewSettings, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    """Where every pixel of every view is in its scan: (N, S, S, 2) as (x, y) pixels, sizes, and pixels a view pixel."""
    height, width = sizes.float().to(draws.device).unbind(dim=1)
    area = draws.uniform(settings.scale) * height * width
    ratio = draws.uniform((np.log(settings.ratio[0]), np.log(settings.ratio[1]))).exp()
    crop_height = torch.minimum((area / ratio).sqrt(), height)
    crop_width = torch.minimum((area * ratio).sqrt(), width)
    anchor_y, anchor_x = (anchors.float().to(draws.device) + 0.5).unbind(dim=1)
    top = _start(anchor_y, crop_height, height, draws)
    left = _start(anchor_x, crop_width, width, draws)
    flips = torch.where(draws.uniform((0, 1), 2) < settings.flip, -1.0, 1.0)
    angle = torch.deg2rad(draws.uniform((-settings.rotation, settings.rotation)))
    # view coordinates in [-1, 1], at pixel centres
    line = (torch.arange(settings.size, device=draws.device) + 0.5) * 2 / settings.size - 1
    v, u = torch.meshgrid(line, line, indexing="ij")  # (S, S) each
    dx = (crop_width / 2 * flips[:, 0])[:, None, None] * u
    dy = (crop_height / 2 * flips[:, 1])[:, None, None] * v
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    x = (left + crop_width / 2)[:, None, None] + cos * dx - sin * dy - 0.5
    y = (top + crop_height / 2)[:, None, None] + sin * dx + cos * dy - 0.5
    zoom = torch.minimum(crop_height, crop_width) / settings.size
    return torch.stack([x, y], dim=-1), torch.stack([width, height], dim=-1), zoom


def _start(anchor: Tensor, length: Tensor, extent: Tensor, draws: Draws) -> Tensor:
    """(N,): where a crop begins, uniform over the places in [0, extent − length] that put the anchor into it."""
    low = (anchor - length).clamp_min(0)
    high = torch.minimum(anchor, extent - length)
    return low + draws.uniform((0, 1)) * (high - low)


def crop(scans: Tensor, grid: Tensor, extent: Tensor, zoom: Tensor) -> Tensor:
    """Read scans at pixel positions; outside a scan it is mirrored.

    Args:
        scans: (N, C, Y, X).
        grid: (N, S, S, 2), (x, y) in pixels of the scan.
        extent: (N, 2), width and height of each scan.
        zoom: (N,), scan pixels a view pixel; reading is from an averaging pyramid's level floor(log2(zoom)).

    Returns:
        (N, C, S, S).
    """
    out = scans.new_empty(scans.shape[0], scans.shape[1], *grid.shape[1:3])
    levels = zoom.clamp_min(1).log2().floor().long()
    pyramid, level = scans, 0
    for wanted in range(int(levels.max()) + 1):
        chosen = torch.nonzero(levels == wanted).squeeze(1)
        if not len(chosen):
            continue
        while level < wanted:
            pyramid, level = F.avg_pool2d(pyramid, 2, ceil_mode=True), level + 1
        positions = (grid[chosen] + 0.5) / 2**level - 0.5
        inside = _mirror(positions, (extent[chosen] / 2**level).floor().clamp_min(1)[:, None, None, :])
        size = torch.tensor([pyramid.shape[3], pyramid.shape[2]], device=grid.device)
        out[chosen] = F.grid_sample(pyramid[chosen], (2 * inside + 1) / size - 1, align_corners=False)
    return out


def _mirror(positions: Tensor, extent: Tensor) -> Tensor:
    """Positions reflected into [0, extent − 1], about the centres of the outermost pixels."""
    last = extent - 1
    folded = positions.abs() % (2 * last).clamp_min(1e-6)
    return torch.minimum(torch.minimum(folded, 2 * last - folded).clamp_min(0), last)


def _change_intensity(view: Tensor, settings: ViewSettings, draws: Draws) -> Tensor:
    def sometimes(probability: float, changed: Tensor, unchanged: Tensor) -> Tensor:
        chosen = draws.uniform((0, 1)) < probability
        return torch.where(chosen[:, None, None, None], changed, unchanged)

    def per_scan(limits: Range) -> Tensor:
        return draws.uniform(limits)[:, None, None, None]

    curved = _gamma(view, per_scan(settings.gamma))
    changed = curved * per_scan(settings.intensity_scale) + per_scan(settings.intensity_shift)
    view = sometimes(settings.intensity, changed, view)
    if settings.blur:
        view = sometimes(settings.blur, _blur(view, per_scan(settings.blur_sigma).flatten()), view)
    if settings.noise:
        noise = draws.normal(*view.shape[1:])
        view = sometimes(settings.noise, view + noise * per_scan(settings.noise_sigma), view)
    return view


def _gamma(view: Tensor, gamma: Tensor) -> Tensor:
    """A power of the intensity within each view's own range, which is kept (Isensee et al., batchgenerators)."""
    low, high = view.amin(dim=(1, 2, 3), keepdim=True), view.amax(dim=(1, 2, 3), keepdim=True)
    span = (high - low).clamp_min(1e-6)
    return ((view - low) / span).clamp_min(0) ** gamma * span + low


def _blur(view: Tensor, sigma: Tensor) -> Tensor:
    """A Gaussian of each scan's own width, separable. view (N, C, S, S), sigma (N,) in pixels."""
    count, channels = view.shape[:2]
    offsets = torch.arange(-_BLUR_RADIUS, _BLUR_RADIUS + 1, device=view.device)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)[:, None]  # (NC, 1, K)
    flat = view.reshape(1, count * channels, *view.shape[2:])
    flat = F.pad(flat, [_BLUR_RADIUS] * 4, mode="reflect")
    flat = F.conv2d(flat, kernel[..., None], groups=count * channels)
    flat = F.conv2d(flat, kernel[..., None, :], groups=count * channels)
    return flat.reshape(view.shape)
