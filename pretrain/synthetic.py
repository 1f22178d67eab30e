"""Synthetic objects: shapes with a texture of their own, planted into views, that the whole network learns to segment.

Where they were planted is known, so that encoder and decoder learn from scans that nobody labelled what fine-tuning asks of them:
to find what stands out, at full resolution. After Zhang et al. 2021 (arXiv 2109.03230, section 3: tumours composed into scans),
Hu et al. 2023 (arXiv 2303.14869: texture, shape and place of synthetic tumours) and, for objects with the texture of another place
of the scan, CutPaste (Li et al. 2021, arXiv 2104.04015). In 2D and in 3D from one definition.

The archive's real objects, which nobody marked, would be taught as background. So the pixels of a view that are most wrongly taken
for an object are forgiven, but near planted ones: they are left out of the loss, which is a trimmed loss (as Han et al. 2018, arXiv
1804.06872, leave out what is fitted worst under noisy labels).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.crop import crop, crop_grid
from pretrain.draws import Draws
from pretrain.intensity import change_intensity
from pretrain.recipe import SyntheticSettings, ViewSettings
from resunet.data.cases import IGNORE
from resunet.losses import Total, one_rank, segmentation_loss

PLANTS_STREAM = 7  # names the random stream of the planted views in step_generator
_NEAR = 5  # pixels a side over which a view is averaged before content is told from what is around it
_CONTENT = 0.15  # of the way from a view's darkest to its brightest
_SAMPLED = 4096  # pixels of a view by which these are estimated, about
_REACH = 2.0  # radii from an object's centre to the border of its noise
_OUTLINE, _TEXTURE = 5, 13  # numbers a side that the noise of an object's outline and of its texture come from
_MARGIN = 12  # pixels around a planted object in which nothing is forgiven
_POOL = {2: F.avg_pool2d, 3: F.avg_pool3d}
_WIDEN = {2: F.max_pool2d, 3: F.max_pool3d}


class Planted(NamedTuple):
    """Views with objects in them.

    images: (N, C, *sides) float32. labels: (N, *sides) int64, 1 where an object was planted.
    """

    images: Tensor
    labels: Tensor


def planted_views(
    scans: Tensor,
    sizes: Tensor,
    anchors: Tensor,
    spacing: Tensor,
    views: ViewSettings,
    settings: SyntheticSettings,
    draws: Draws,
) -> Planted:
    """One view of every scan with objects in it; intensities are changed afterwards, so that no noise or blur tells them apart.

    Args:
        scans, sizes, anchors, spacing: as `pretrain.views.make_views` takes them.
    """
    image = crop(scans, crop_grid(sizes, anchors[:, 0], spacing, views, draws)[0], sizes)
    planted = plant(image, settings, draws)
    return Planted(change_intensity(planted.images, views, draws), planted.labels)


def plant(image: Tensor, settings: SyntheticSettings, draws: Draws) -> Planted:
    """Plant up to settings.objects objects into every view (N, C, *size)."""
    given = image
    inside = content(image)
    spread = _spread(image, inside)
    labels = torch.zeros_like(inside)
    for _ in range(settings.objects):
        depth, radius, position = _shape(inside, settings, draws)
        softness = _each(draws.uniform(settings.softness), depth)
        share = torch.sigmoid(depth / softness) * inside * _chosen(settings.probability, draws, depth)
        local = (image * share).flatten(2).sum(2) / share.flatten(2).sum(2).clamp_min(1e-3)
        own = _own_texture(image, _each(local, depth), spread, depth / radius, position, settings, draws)
        texture = torch.where(_chosen(settings.foreign, draws, depth) > 0, _foreign_texture(given, spread, draws), own)
        image = torch.lerp(image, texture, share)
        labels = torch.maximum(labels, (share > 0.5).to(labels))
    return Planted(image, labels[:, 0].long())


def content(image: Tensor) -> Tensor:
    """(N, C, *size) → (N, 1, *size), 1 where a view shows something and not the dark around it, else 0."""
    dims = image.ndim - 2
    mean = _POOL[dims](image.mean(dim=1, keepdim=True), _NEAR, 1, _NEAR // 2, count_include_pad=False)
    every = max(1, round((mean[0].numel() / _SAMPLED) ** (1 / dims)))  # along each axis: every k-th of all could be one column
    along = slice(every // 2, None, every)
    sample = (mean[..., along, along] if dims == 2 else mean[..., along, along, along]).flatten(1)
    low, high = (_each(torch.quantile(sample, q, dim=1), image) for q in (0.02, 0.98))
    return (mean > low + _CONTENT * (high - low)).to(image)


def synthetic_terms(logits: Tensor, labels: Tensor, forgiven: float = 0.0, total: Total = one_rank) -> dict[str, Tensor]:
    """Focal + Dice of the planted objects over all ranks, and the Dice of what is found at a probability of a half.

    Args:
        logits: (N, 1, *size); of a network whose finest level is coarser than the view, resized.
        labels: (N, *sides).
        forgiven: share of a view's pixels that is left out of the loss.

    Returns:
        synthetic_loss, synthetic_dice; the Dice is of all pixels, and 0 where there is no object and none is found.
    """
    if logits.shape[2:] != labels.shape[1:]:
        mode = {4: "bilinear", 5: "trilinear"}[logits.ndim]
        logits = F.interpolate(logits.float(), size=labels.shape[1:], mode=mode, align_corners=False)
    counted_labels = _forgive(logits[:, 0].detach(), labels, forgiven)
    loss = segmentation_loss(logits, counted_labels, total=total)["loss"]
    with torch.no_grad():
        found, true = logits[:, 0] > 0, labels == 1
        overlap, counted = total(torch.stack([(found & true).sum(), found.sum() + true.sum()]).float()).unbind()
    return {"synthetic_loss": loss, "synthetic_dice": 2 * overlap / counted.clamp_min(1)}


def _forgive(logits: Tensor, labels: Tensor, share: float) -> Tensor:
    """Labels with `IGNORE` at the pixels of the highest logits, a share of every view's, but near planted objects.

    There they are of one that is found too large, which is no real object.
    """
    count = int(share * labels[0].numel())
    if not count:
        return labels
    near = _WIDEN[labels.ndim - 1]((labels == 1)[:, None].float(), 2 * _MARGIN + 1, 1, _MARGIN)[:, 0] > 0
    highest = logits.float().masked_fill(near, -torch.inf).flatten(1).topk(count, dim=1)
    flat = labels.flatten(1)
    values = torch.where(highest.values > -torch.inf, IGNORE, flat.gather(1, highest.indices))
    return flat.scatter(1, highest.indices, values).view_as(labels)


def _shape(inside: Tensor, settings: SyntheticSettings, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    """Of one object in every view: how deep each pixel lies in it, its radius, and where each pixel is seen from its centre.

    An ellipsoid at a random place of the content, turned at random, its outline moved by smooth noise.

    Returns:
        depth: (N, 1, *size) pixels of a round object, below 0 outside; along a long one more, across it fewer.
        radius: (N, 1, …) pixels. position: (N, *size, dimensions) in radii.
    """
    count, size, dims = len(inside), inside.shape[2:], inside.ndim - 2
    radius = settings.radius[0] * (settings.radius[1] / settings.radius[0]) ** draws.uniform((0, 1))
    stretch = settings.elongation ** draws.uniform((0, 1))
    axes = torch.stack([stretch ** (1 - 1 / dims), *[stretch ** (-1 / dims)] * (dims - 1)], dim=1)  # of the same volume
    turned = torch.linalg.qr(draws.normal(dims, dims)).Q
    offset = _pixels(size, inside.device) - _centres(inside, draws).view(count, *[1] * dims, dims)
    position = (offset.flatten(1, -2) @ turned).view(offset.shape) / (axes * radius[:, None]).view(count, *[1] * dims, dims)
    moved = _noise(position, _OUTLINE, draws) * settings.roughness
    radius = _each(radius, inside)
    return radius * (1 + moved - position.norm(dim=-1)[:, None]), radius, position


def _own_texture(
    image: Tensor, local: Tensor, spread: Tensor, depth: Tensor, position: Tensor, settings: SyntheticSettings, draws: Draws
) -> Tensor:
    """The tissue, as far as it shows through, brighter or darker, with noise; some only or mostly in a ring near the border.

    Args:
        local: mean of the tissue there. depth: in radii.
    """
    through = _each(draws.uniform((0, 1)), image)
    sign = _chosen(settings.brighter, draws, image) * 2 - 1
    contrast = sign * _each(draws.uniform(settings.contrast), image) * spread
    ring = torch.exp(-0.5 * ((depth - 0.25) / 0.18) ** 2) * 1.3 - 0.3
    profile = torch.where(_chosen(settings.ring, draws, image) > 0, ring, torch.ones_like(ring))
    noise = _noise(position, _TEXTURE, draws) * _each(draws.uniform((0, 0.5)), image) * spread
    return torch.lerp(local, image, through) + contrast * profile + noise


def _foreign_texture(image: Tensor, spread: Tensor, draws: Draws) -> Tensor:
    """The view moved by a quarter to three quarters of each side, what leaves it coming back at the other."""
    dims = image.ndim - 2
    shifts = (draws.uniform((0.25, 0.75), dims).cpu() * torch.tensor(image.shape[2:])).long().tolist()
    moved = torch.stack([one.roll(by, tuple(range(1, dims + 1))) for one, by in zip(image, shifts, strict=True)])
    return moved * _each(draws.uniform((0.7, 1.3)), image) + _each(draws.uniform((-0.3, 0.3)), image) * spread


def _spread(image: Tensor, inside: Tensor) -> Tensor:
    """The standard deviation of a view's content, channel by channel: (N, C, 1, …)."""
    weight, values = inside.flatten(2), image.flatten(2)
    count = weight.sum(2, keepdim=True).clamp_min(1)
    mean = (values * weight).sum(2, keepdim=True) / count
    deviation = (((values - mean) ** 2 * weight).sum(2) / count[..., 0]).sqrt()
    floor = 0.02 * (values.amax(2) - values.amin(2))
    return _each(torch.maximum(deviation, floor), image)


def _centres(inside: Tensor, draws: Draws) -> Tensor:
    """A pixel of the content of every view, in array order: (N, dimensions)."""
    reached = (inside.flatten(1).double() + 1e-9).cumsum(1)  # where there is none, any
    drawn = draws.uniform((0, 1)).double() * reached[:, -1]
    flat = torch.searchsorted(reached, drawn[:, None])[:, 0].clamp_max(reached.shape[1] - 1)
    return torch.stack(torch.unravel_index(flat, inside.shape[2:]), dim=1).float()


def _pixels(size: torch.Size, device: torch.device) -> Tensor:
    """(1, *size, dimensions): every pixel's place, in array order."""
    lines = [torch.arange(side, device=device, dtype=torch.float32) for side in size]
    return torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1)[None]


def _noise(position: Tensor, numbers: int, draws: Draws) -> Tensor:
    """Smooth noise of unit deviation at its knots, of so many numbers a side, around an object: (N, 1, *size)."""
    dims = position.shape[-1]
    knots = draws.normal(1, *[numbers] * dims)
    return F.grid_sample(knots, position / _REACH, padding_mode="reflection", align_corners=True)


def _chosen(probability: float, draws: Draws, like: Tensor) -> Tensor:
    """(N, 1, …): 1 with a probability, else 0."""
    return _each((draws.uniform((0, 1)) < probability).to(like), like)


def _each(values: Tensor, like: Tensor) -> Tensor:
    """(N,) or (N, C), to be broadcast over views (N, C, *size)."""
    return values.view(len(values), -1, *[1] * (like.ndim - 2))
