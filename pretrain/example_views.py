"""A few scans beside their views, as pictures: what the network is shown."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from pretrain.loader import ContrastiveSets
from pretrain.recipe import PretrainRecipe
from pretrain.views import VIEWS_STREAM, make_views
from resunet.training import step_generator

_SHOWN = 8  # scans


def example_views(recipe: PretrainRecipe, sets: ContrastiveSets) -> list[NDArray[np.float32]]:
    """A few windows with their two views, one row each side by side, for the report: (S, 3 S) greys in [0, 1]."""
    scans, sizes, anchors = (part[:_SHOWN] for part in sets.read(0)[:3])
    generator = step_generator(torch.device("cpu"), recipe.seed, VIEWS_STREAM, 0, rank=0)
    views = make_views(scans, sizes, anchors, recipe.views, generator, 0, recipe.batch).mean(dim=1).chunk(2)
    size = (recipe.views.size, recipe.views.size)
    rows = []
    for i, (height, width) in enumerate(sizes.tolist()):
        scan = scans[i, :, :height, :width]
        whole = F.interpolate(scan[None], size, mode="area")[0].mean(dim=0)
        row = torch.cat([whole, views[0][i], views[1][i]], dim=1)
        rows.append(((row - whole.min()) / (whole.max() - whole.min())).clamp(0, 1).numpy())
    return rows
