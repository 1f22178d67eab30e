"""A map of the archive for the report: a sample of its slices where the encoder puts them.

What it costs is bounded by the recipe: 16 batches of windows are read (where batches are small 256 windows, and never more than
1,000), each shrunk to the size of a view, and go through the encoder once, without gradients: less than 16 steps of training.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from pretrain.archive import Archive
from pretrain.recipe import PretrainRecipe
from resunet.data.scans import Window
from resunet.decoders import AnyEncoder
from resunet.embedding.features import Embedder, EmbeddingSettings
from resunet.embedding.picture import Colouring, map_picture, principal_plane, spread_out, thumbnail
from resunet.report import COLOURS, Section

_BATCHES, _FEWEST, _MOST = 16, 256, 1000
_CANDIDATES = 30  # pictures that may get a place on the map
_READERS = 4
_STREAM = 0x6D61  # of random numbers, apart from those of training


@dataclass(frozen=True)
class _Point:
    """One slice or volume, no larger than a view."""

    values: NDArray[np.float32]
    group: int
    position: float
    pixels: int


def archive_map(recipe: PretrainRecipe, archive: Archive, encoder: AnyEncoder) -> list[Section]:
    """The map, in a section of its own; none of fewer than three slices with a place. The encoder is left in evaluation mode."""
    total = archive.scans.num_items
    count = min(total, _MOST, max(_FEWEST, _BATCHES * recipe.batch))
    if count < 3:
        return []
    rng = np.random.default_rng([recipe.seed, _STREAM])
    items = np.sort(rng.choice(total, count, replace=False)).tolist()
    embedder = Embedder(encoder, encoder.config, EmbeddingSettings(precision=recipe.precision, batch=recipe.batch))
    points: list[_Point] = []
    vectors: list[NDArray[np.float32]] = []
    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, count, recipe.batch):
            chunk = items[start : start + recipe.batch]
            read = list(pool.map(lambda item: _read(recipe, archive, item), chunk))
            vectors.append(embedder.vectors([point.values for point in read]))
            points += [_Point(_middle(one.values), one.group, one.position, one.pixels) for one in read]
    found = np.concatenate(vectors)
    finite = np.flatnonzero(np.isfinite(found).all(axis=1))  # a scan beyond all others may have no place
    if len(finite) < 3:
        return []
    points, left_out, count = [points[i] for i in finite], count - len(finite), len(finite)
    plane = principal_plane(found[finite])
    shown = spread_out(plane.places)[:_CANDIDATES]
    what = archive.scans.items
    return [
        Section(
            "Map of the archive",
            text=[
                f"{count:,} of {total:,} {what}, drawn at random and shrunk to the size of a view, where the encoder puts them: "
                "what is near looks alike to it. Pictures stand where they are points of. Do neighbours share what your task is "
                "about, or only a scanner, a size, a contrast?"
            ],
            notes=[f"{left_out} of the {what} drawn have no finite embedding, and no place on the map."] if left_out else [],
            pictures=[
                map_picture(
                    plane,
                    _colouring(points, archive.scans.spatial_dims),
                    [(number, thumbnail(points[number].values)) for number in shown],
                    "The first two principal components of the embeddings.",
                    f"Map of {count} {what} by the first two principal components of their embeddings, which hold "
                    f"{plane.explained[0]:.0%} and {plane.explained[1]:.0%} of the variance, with pictures of some of them",
                )
            ],
        )
    ]


def _read(recipe: PretrainRecipe, archive: Archive, item: int) -> _Point:
    dims = recipe.model.spatial_dims
    rng = np.random.default_rng([recipe.seed, _STREAM, item])
    window = archive.scans.window(item, recipe.views.sides_of_window(dims), rng)
    group = int(archive.groups[window.scan])
    return _Point(_as_view(window, max(recipe.views.sides(dims))), group, window.position, max(window.values.shape[1:]))


def _as_view(window: Window, side: int) -> NDArray[np.float32]:
    """A window as long as a view along its longest side in mm, and in proportion."""
    extent = np.array(window.values.shape[1:]) * window.spacing
    size = tuple(max(1, round(n)) for n in (extent / extent.max() * side).tolist())
    resized: NDArray[np.float32] = F.interpolate(torch.from_numpy(window.values)[None], size, mode="area")[0].numpy()
    return resized


def _middle(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """An image as it is, of a volume the slice in the middle."""
    return values if values.ndim == 3 else values[:, values.shape[1] // 2]


def _colouring(points: Sequence[_Point], spatial_dims: int) -> Colouring | None:
    """By group where there are few, else by place in the volume, else by size; nothing where all are the same."""
    groups = sorted({one.group for one in points})
    if 1 < len(groups) <= len(COLOURS):
        names = [str(number) for number in range(1, len(groups) + 1)]
        return Colouring("Group", np.array([groups.index(one.group) for one in points], float), names)
    positions = np.array([one.position for one in points])
    if np.isfinite(positions).all():
        return Colouring("Place in the volume, first slice 0, last 1", positions)
    pixels = np.array([one.pixels for one in points], float)
    if len(np.unique(pixels)) > 1:
        return Colouring(f"Longest side, {'pixels' if spatial_dims == 2 else 'voxels'}", pixels)
    return None
