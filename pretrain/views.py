"""The two views of a scan: batched float tensors on the device, one or many channels, never through 8 bits.

A view is one interpolation of an image or a volume (`pretrain.crop`), then a change of intensities (`resunet.intensity`). Every
random number comes from the generator that is handed in, and is the same for a scan of a set whether one rank makes all views of
the set or many do.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.crop import AffineMap, crop, crop_grid
from pretrain.recipe import ViewSettings
from resunet.draws import Draws
from resunet.intensity import change_intensity

VIEWS_STREAM = 1  # names the random stream of the views in step_generator


class Views(NamedTuple):
    """Two views of every scan.

    values: (2N, C, *settings.sides) float32: the first views of all scans, then the second.
    places: where the first views are in their scans, and where the second are.
    """

    values: Tensor
    places: tuple[AffineMap, AffineMap]


def stack_scans(scans: Sequence[NDArray[np.float32]]) -> tuple[Tensor, Tensor]:
    """Scans (C, *size) of any sizes → (N, C, *size) padded with zeros at the end, and their sizes (N, dimensions)."""
    sizes = torch.tensor([scan.shape[1:] for scan in scans])
    padded = torch.zeros(len(scans), scans[0].shape[0], *sizes.amax(dim=0).tolist())
    for scan, place in zip(scans, padded, strict=True):
        place[(slice(None), *map(slice, scan.shape[1:]))] = torch.from_numpy(scan)
    return padded, sizes


def make_views(
    scans: Tensor,
    sizes: Tensor,
    anchors: Tensor,
    settings: ViewSettings,
    generator: torch.Generator,
    first: int = 0,
    total: int | None = None,
    spacing: Tensor | None = None,
) -> Views:
    """Two independent views of every scan.

    Args:
        scans: (N, C, Y, X) or (N, C, Z, Y, X), normalised.
        sizes: (N, dimensions), each scan's own size within the padding, in array order.
        anchors: (N, 2, dimensions), for each view a voxel that its crop holds, so that no crop is of background only.
        first, total: these are the scans from place `first` on of a set of `total`; without them, the whole set.
        spacing: (N, 3) mm, of volumes; images are cut and turned in pixels.
    """
    count = scans.shape[0]
    draws = Draws(generator, range(first, first + count), count if total is None else total)
    if spacing is None:
        assert scans.ndim == 4
        spacing = torch.ones(sizes.shape)
    values, places = [], []
    for view in range(2):
        grid, place = crop_grid(sizes, anchors[:, view], spacing, settings, draws)
        values.append(change_intensity(crop(scans, grid, sizes), settings, draws))
        places.append(place)
    return Views(torch.cat(values), (places[0], places[1]))
