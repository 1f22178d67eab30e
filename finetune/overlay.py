"""Pictures of a prediction over its scan: true positive, false positive, false negative in three colours."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resunet.data.cases import IGNORE, LoadedCase

# From Okabe & Ito's set, told apart by all common kinds of colour blindness and distinct in lightness.
COLOURS = {"found": (240, 228, 66), "false": (213, 94, 0), "missed": (86, 180, 233)}
LEGEND = "Yellow: found. Orange-red: false alarm. Blue: missed."
_OPACITY = 0.6


def grey_picture(case: LoadedCase, index: int) -> NDArray[np.uint8]:
    """Slice `index` as (y, x, 3) greys, over its own 1st to 99.5th percentile."""
    image = case.image_slice(index).mean(axis=0)
    low, high = np.percentile(image, [1, 99.5])
    grey = np.clip((image - low) / max(high - low, 1e-6), 0, 1) * 255
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


def label_picture(grey: NDArray[np.uint8], labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Foreground labels (y, x) tinted over a grey picture; every class the same, as the truth beside a prediction."""
    return _tint(grey, (labels != 0) & (labels != IGNORE), COLOURS["found"])


def error_picture(grey: NDArray[np.uint8], truth: NDArray[np.uint8], predicted: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A prediction over a grey picture in the three colours of `LEGEND`; a wrong class is a false alarm."""
    counted = truth != IGNORE
    picture = _tint(grey, counted & (predicted != 0) & (predicted == truth), COLOURS["found"])
    picture = _tint(picture, counted & (predicted != 0) & (predicted != truth), COLOURS["false"])
    return _tint(picture, counted & (predicted == 0) & (truth != 0), COLOURS["missed"])


def telling_slice(truth: NDArray[np.uint8], axis: int | None) -> int:
    """The slice of a volume with most foreground; the middle one where there is none; 0 for an image."""
    if axis is None:
        return 0
    foreground = (truth != 0) & (truth != IGNORE)
    counts = foreground.sum(axis=tuple(i for i in range(truth.ndim) if i != axis))
    return int(counts.argmax()) if counts.any() else truth.shape[axis] // 2


def side_by_side(pictures: list[NDArray[np.uint8]], longest: int = 1024) -> NDArray[np.uint8]:
    """Pictures of one height next to each other with a gap; large ones are reduced to `longest` pixels a side each."""
    shrunk = [_reduce(picture, longest) for picture in pictures]
    gap = np.full((shrunk[0].shape[0], 4, 3), 255, np.uint8)
    parts: list[NDArray[np.uint8]] = []
    for picture in shrunk:
        parts += [picture, gap]
    return np.concatenate(parts[:-1], axis=1)


def _reduce(picture: NDArray[np.uint8], longest: int) -> NDArray[np.uint8]:
    side = max(picture.shape[:2])
    if side <= longest:
        return picture
    size = (round(picture.shape[1] * longest / side), round(picture.shape[0] * longest / side))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))


def _tint(picture: NDArray[np.uint8], where: NDArray[np.bool_], colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    out = picture.astype(np.float32)
    out[where] = (1 - _OPACITY) * out[where] + _OPACITY * np.array(colour, np.float32)
    return out.astype(np.uint8)
