"""A fixed sample of the archive: two views of some scans, the same whenever it is asked for and however many ranks there are."""

import math

from accelerate import Accelerator
from torch import Tensor

from pretrain.archive import Archive
from pretrain.loader import ContrastiveSets
from pretrain.recipe import PretrainRecipe
from pretrain.step import views_of_set

_SCANS = 256  # at most, so that there are 512 embeddings
_FEWEST = 16
_PIXELS = 2**21  # of all views together, about
_EPOCH = 10**6  # one that no training comes to: its order and its views are not those of training


def sample_views(recipe: PretrainRecipe, archive: Archive, accelerator: Accelerator) -> list[Tensor]:
    """Views as training makes them, in chunks (2 · n, C, *sides): the first views of n scans, then the second.

    Raises:
        ResUNetError: a scan cannot be read.
    """
    pixels = 2 * math.prod(recipe.views.sides(recipe.model.spatial_dims))
    scans = min(max(_PIXELS // pixels, _FEWEST), _SCANS, archive.scans.num_items)
    chunk = min(_FEWEST, scans)
    alone = recipe.model_copy(update={"batch": chunk, "processes": 1})
    sets, first = ContrastiveSets(archive.scans, alone, rank=0), _EPOCH * (archive.scans.num_items // chunk)
    indices = range(first, first + scans // chunk)
    return [views_of_set(alone, sets.read(index), index, accelerator).cpu() for index in indices]
