"""Pictures of a prediction over its scan: true positive, false positive, false negative in three colours."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from finetune.evaluation.targets import FALSE, FOUND, MISSED, Targets
from resunet.data.cases import IGNORE, LoadedCase

# From Okabe & Ito's set, told apart by all common kinds of colour blindness and distinct in lightness.
COLOURS = {"found": (240, 228, 66), "false": (213, 94, 0), "missed": (86, 180, 233)}
LEGEND = "Yellow: found. Orange-red: false alarm. Blue: missed."
SWATCHES = ((COLOURS["found"], "found"), (COLOURS["false"], "false alarm"), (COLOURS["missed"], "missed"))
_OPACITY = 0.6
_SMALLEST_ZOOM = 16  # pixels a side of what is enlarged
_TINY = 10  # pixels: an object below is enlarged, wherever the others are
_WHITE = (255, 255, 255)

Box = tuple[slice, slice]


def grey_picture(case: LoadedCase, index: int) -> NDArray[np.uint8]:
    """Slice `index` as (y, x, 3) greys, over its own 1st to 99.5th percentile."""
    image = case.image_slice(index).mean(axis=0)
    low, high = np.percentile(image, [1, 99.5])
    grey = np.clip((image - low) / max(high - low, 1e-6), 0, 1) * 255
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


def label_picture(grey: NDArray[np.uint8], labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Foreground labels (y, x) tinted over a grey picture; every class the same, as the truth beside a prediction."""
    return _tint(grey, (labels != 0) & (labels != IGNORE), COLOURS["found"])


def error_picture(
    grey: NDArray[np.uint8], truth: NDArray[np.uint8], predicted: NDArray[np.uint8], targets: Targets
) -> NDArray[np.uint8]:
    """A prediction over a grey picture in the three colours of `LEGEND`; a wrong class is a false alarm.

    Of regions a pixel is a false alarm if it is predicted to be of one that it is not of, else missed if one is missing.
    """
    errors, picture = targets.errors(truth, predicted), grey
    for kind, name in ((FOUND, "found"), (FALSE, "false"), (MISSED, "missed")):
        picture = _tint(picture, errors == kind, COLOURS[name])
    return picture


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


def side_by_side(pictures: list[NDArray[np.uint8]], longest: int = 1024) -> NDArray[np.uint8]:
    """Pictures of one height next to each other with a gap; large ones are reduced to `longest` pixels a side each."""
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    shrunk = [_reduce(picture, longest / max(height, width)) for picture in pictures]
    gap = np.full((shrunk[0].shape[0], 4, 3), 255, np.uint8)
    parts: list[NDArray[np.uint8]] = []
    for picture in shrunk:
        parts += [picture, gap]
    return np.concatenate(parts[:-1], axis=1)


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


def _reduce(picture: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    if factor >= 1:
        return picture
    size = (round(picture.shape[1] * factor), round(picture.shape[0] * factor))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))


def _tint(picture: NDArray[np.uint8], where: NDArray[np.bool_], colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    out = picture.astype(np.float32)
    out[where] = (1 - _OPACITY) * out[where] + _OPACITY * np.array(colour, np.float32)
    return out.astype(np.uint8)
