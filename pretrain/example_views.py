"""A few scans beside their views, as pictures: what the network is shown."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pretrain.loader import ContrastiveSets
from pretrain.recipe import PretrainRecipe
from pretrain.step import views_of_set

SHOWN = 8  # scans

Picture = NDArray[np.float32]


@dataclass(frozen=True)
class Example:
    """A scan's window and its views: (y, x) greys or (y, x, 3) colours in [0, 1]; of volumes three planes in the middle.

    scan: which of the archive's. size: of the window, in array order. position: of a slice in its
    volume, else NaN.
    """

    window: Picture
    views: tuple[Picture, Picture]
    scan: int
    size: tuple[int, ...]
    position: float


def examples(recipe: PretrainRecipe, sets: ContrastiveSets, accelerator: Accelerator) -> Iterator[Example]:
    """The first scans of this rank's share of the first set, with the views that training makes of them.

    A scan and its views share one scale, from the darkest to the brightest of the window, so that a change of intensity is seen.
    """
    read = sets.read(0)
    views = views_of_set(recipe, read, 0, accelerator).float().cpu().chunk(2)
    for i in range(min(SHOWN, len(read.sizes))):
        size = tuple(read.sizes[i].tolist())
        window = read.windows[i][(slice(None), *map(slice, size))]
        limits = _limits(window)
        first, second = (_shown(one[i], limits) for one in views)
        yield Example(_shown(window, limits), (first, second), int(read.scan[i]), size, float(read.position[i]))


def example_views(recipe: PretrainRecipe, sets: ContrastiveSets, accelerator: Accelerator) -> list[Picture]:
    """The same, each as one row (y, x) or (y, x, 3) of the window and its views, for the report."""
    rows = []
    for one in examples(recipe, sets, accelerator):
        row = [resized(one.window, one.views[0].shape[:2]), *one.views]
        rows.append(np.concatenate(row, axis=1))
    return rows


def resized(picture: Picture, size: tuple[int, ...]) -> Picture:
    """Fitted into `size` with its proportions kept, and white around it."""
    values = torch.from_numpy(picture).reshape(*picture.shape[:2], -1).permute(2, 0, 1)[None]  # (1, C, y, x)
    ratio = min(size[0] / picture.shape[0], size[1] / picture.shape[1])
    height, width = (min(limit, max(1, round(n * ratio))) for n, limit in zip(picture.shape[:2], size, strict=True))
    fitted = F.interpolate(values, (height, width), mode="area" if ratio < 1 else "nearest")
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    padded = F.pad(fitted, [left, size[1] - width - left, top, size[0] - height - top], value=1.0)[0].permute(1, 2, 0)
    return padded.reshape(*size[:2], *picture.shape[2:]).numpy()


def _limits(window: Tensor) -> tuple[Tensor, Tensor]:
    """(C, 1) the darkest and the brightest: of each colour its own, as normalisation is; of other channels their mean's."""
    flat = _channels(window).flatten(1)
    return flat.amin(dim=1, keepdim=True), flat.amax(dim=1, keepdim=True)


def _channels(image: Tensor) -> Tensor:
    """Three channels as colours; of another number the mean, as grey."""
    return image if len(image) == 3 else image.mean(dim=0, keepdim=True)


def _shown(image: Tensor, limits: tuple[Tensor, Tensor]) -> Picture:
    """(C, *size) → (y, x) or (y, x, 3) in [0, 1]."""
    values = _channels(image)
    low, high = (one.reshape(-1, *[1] * (values.ndim - 1)) for one in limits)
    # a channel without contrast is black: normalisation gives it zeros
    scaled = ((values - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
    flat = torch.stack([_flat(one) for one in scaled], dim=-1).numpy().astype(np.float32)
    return flat[..., 0] if flat.shape[-1] == 1 else flat


def _flat(view: Tensor, around: float = 1.0) -> Tensor:
    """An image as it is; of a volume (Z, Y, X) the planes across z, y and x in its middle, one below the other, z upwards.

    Args:
        around: the value beside planes that are narrower than others; white.
    """
    if view.ndim == 2:
        return view
    depth, height, width = view.shape
    planes = [view[depth // 2], view[:, height // 2].flip(0), view[:, :, width // 2].flip(0)]
    widest = max(height, width)
    return torch.cat([F.pad(plane, [0, widest - plane.shape[1]], value=around) for plane in planes])
