"""Pictures of scans with what is marked on them, in colours that the colour-blind can tell apart. Imports no torch."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resunet.data.cases import IGNORE

# From Okabe & Ito's set, told apart by all common kinds of colour blindness and distinct in lightness.
COLOURS = {"found": (240, 228, 66), "false": (213, 94, 0), "missed": (86, 180, 233)}
SWATCHES = ((COLOURS["found"], "found"), (COLOURS["false"], "false alarm"), (COLOURS["missed"], "missed"))
_OPACITY = 0.6


def grey_of(image: NDArray[np.floating]) -> NDArray[np.uint8]:
    """An image (C, y, x) as (y, x, 3) greys, over its own 1st to 99.5th percentile."""
    flat = image.mean(axis=0)
    low, high = np.percentile(flat, [1, 99.5])
    grey = np.clip((flat - low) / max(high - low, 1e-6), 0, 1) * 255
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


def label_picture(grey: NDArray[np.uint8], labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Foreground labels (y, x) tinted over a grey picture; every class the same, as the truth beside a prediction."""
    return tint(grey, {"found": (labels != 0) & (labels != IGNORE)})


def tint(grey: NDArray[np.uint8], marked: Mapping[str, NDArray[np.bool_]]) -> NDArray[np.uint8]:
    """A grey picture with what is `marked` in the colours of those names."""
    out = grey
    for name, where in marked.items():
        tinted = out.astype(np.float32)
        tinted[where] = (1 - _OPACITY) * tinted[where] + _OPACITY * np.array(COLOURS[name], np.float32)
        out = tinted.astype(np.uint8)
    return out


def side_by_side(pictures: list[NDArray[np.uint8]], longest: int = 1024) -> NDArray[np.uint8]:
    """Pictures of one height next to each other with a gap; large ones are reduced to `longest` pixels a side each."""
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    shrunk = [_reduce(picture, longest / max(height, width)) for picture in pictures]
    gap = np.full((shrunk[0].shape[0], 4, 3), 255, np.uint8)
    parts: list[NDArray[np.uint8]] = []
    for picture in shrunk:
        parts += [picture, gap]
    return np.concatenate(parts[:-1], axis=1)


def _reduce(picture: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    if factor >= 1:
        return picture
    size = (round(picture.shape[1] * factor), round(picture.shape[0] * factor))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))
