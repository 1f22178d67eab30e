"""Places that both views of a scan show, from the maps that made the views: which place of one is which of the other is exact.

No feature decides what matches, and nothing is rounded to pixels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.crop import AffineMap
from resunet.draws import Draws

PLACES_STREAM = 6  # names the random stream of the places in step_generator
_TRIES = 16  # candidates a place: scans whose views share a sixteenth of the first give about as many as are asked for


class Matches(NamedTuple):
    """Matching places in the two views of N scans.

    places: (2N, count, dimensions) in [-1, 1], (x, y) or (x, y, z): in the first views, then the same of the scans in the second.
    found: (N, count) bool; where the views share little or nothing fewer are found, those first, and the other places are 0.
    """

    places: Tensor
    found: Tensor


def matching_places(views: tuple[AffineMap, AffineMap], sizes: Tensor, count: int, draws: Draws) -> Matches:
    """Places drawn uniformly from what the crops of both views show of the scan itself; mirrored padding is no match.

    Args:
        views: where the first views are in their scans, and where the second are.
        sizes: (N, dimensions), of each scan without its padding, in array order.
        count: of a scan, at most.
    """
    first, second = views
    here = draws.uniform((-1, 1), count * _TRIES, sizes.shape[1])
    position = first.to_scan(here)
    there = second.to_view(position)
    end = sizes.to(position).flip(1)[:, None] - 0.5
    kept = ((there.abs() <= 1) & (position >= -0.5) & (position <= end)).all(dim=2)
    chosen = kept.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
    found = kept.gather(1, chosen)
    rows = torch.arange(len(chosen), device=chosen.device)[:, None]
    places = torch.cat([one[rows, chosen].where(found[..., None], 0) for one in (here, there)])
    return Matches(places, found)
