"""Pictures of a prediction over its scan: true positive, false positive, false negative in three colours."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from finetune.evaluation.targets import FALSE, FOUND, MISSED, Targets
from resunet.data.cases import IGNORE, LoadedCase
from resunet.pictures import grey_of, label_picture, side_by_side, tint

LEGEND = "Yellow: found. Orange-red: false alarm. Blue: missed."
_SMALLEST_ZOOM = 16  # pixels a side of what is enlarged
_TINY = 10  # pixels: an object below is enlarged, wherever the others are
_WHITE = (255, 255, 255)

Box = tuple[slice, slice]


def grey_picture(case: LoadedCase, index: int) -> NDArray[np.uint8]:
    """Slice `index` as (y, x, 3) greys, over its own 1st to 99.5th percentile."""
    return grey_of(case.image_slice(index))


def error_picture(
    grey: NDArray[np.uint8], truth: NDArray[np.uint8], predicted: NDArray[np.uint8], targets: Targets
) -> NDArray[np.uint8]:
    """A prediction over a grey picture in the three colours of `LEGEND`; a wrong class is a false alarm.

    Of regions a pixel is a false alarm if it is predicted to be of one that it is not of, else missed if one is missing.
    """
    errors = targets.errors(truth, predicted)
    return tint(grey, {"found": errors == FOUND, "false": errors == FALSE, "missed": errors == MISSED})


def overlay(
    grey: NDArray[np.uint8], truth: NDArray[np.uint8], predicted: NDArray[np.uint8], targets: Targets
) -> NDArray[np.uint8]:
    """Scan, truth and errors side by side; what is too small to be seen is framed, and enlarged as a fourth."""
    error = error_picture(grey, truth, predicted, targets)
    row = [grey, label_picture(grey, truth)]
    box = zoom_box(truth, predicted)
    if box is None:
        return side_by_side([*row, error])
    enlarged = np.asarray(Image.fromarray(error[box]).resize((grey.shape[0],) * 2, Image.Resampling.NEAREST))
    return side_by_side([*row, _framed(error, box), enlarged])


def zoom_box(truth: NDArray[np.uint8], predicted: NDArray[np.uint8]) -> Box | None:
    """The square of a slice (y, x) to enlarge: around all that is marked, or the smallest true object if that is tiny.

    None where the square would be more than half of the slice's height: nothing there is hard to see.
    """
    true = (truth != 0) & (truth != IGNORE)
    box = _around(true | ((predicted != 0) & (truth != IGNORE)))
    if box is not None:
        return box
    components, count = ndimage.label(true, np.ones((3, 3)))
    sizes = np.bincount(components[true], minlength=count + 1)[1:]
    if count and sizes.min() < _TINY:
        return _around(components == sizes.argmin() + 1)
    return None


def square(box: Box, side: int, size: tuple[int, ...]) -> Box:
    """A square of `side` pixels around the middle of a box, moved into a slice of `size`, and no larger than that."""
    placed = []
    for part, length in zip(box, size, strict=True):
        extent = min(side, length)
        start = min(max((part.start + part.stop - extent) // 2, 0), length - extent)
        placed.append(slice(start, start + extent))
    return placed[0], placed[1]


def telling_slice(truth: NDArray[np.uint8], axis: int | None) -> int:
    """The slice of a volume with most foreground; the middle one where there is none; 0 for an image."""
    if axis is None:
        return 0
    foreground = (truth != 0) & (truth != IGNORE)
    counts = foreground.sum(axis=tuple(i for i in range(truth.ndim) if i != axis))
    return int(counts.argmax()) if counts.any() else truth.shape[axis] // 2


def _around(marked: NDArray[np.bool_]) -> Box | None:
    """A square with room around what is marked; None if that is nothing, or too much to be worth it."""
    rows, columns = np.flatnonzero(marked.any(axis=1)), np.flatnonzero(marked.any(axis=0))
    if not len(rows):
        return None
    box = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
    side = max(_SMALLEST_ZOOM, *(3 * (part.stop - part.start) // 2 for part in box))
    return square(box, side, marked.shape) if 2 * side <= min(marked.shape) else None


def _framed(picture: NDArray[np.uint8], box: Box) -> NDArray[np.uint8]:
    """A white line around a box, a pixel outside of it."""
    out = picture.copy()
    top, left = (max(part.start - 1, 0) for part in box)
    bottom, right = (min(part.stop, length - 1) for part, length in zip(box, picture.shape, strict=False))
    out[[top, bottom], left : right + 1] = out[top : bottom + 1, [left, right]] = _WHITE
    return out
