"""From a scan to its classes or their probabilities: whole where memory allows, else by a sliding window.

A 2D network sees a volume slice by slice, a 3D network as it is. The window's scores are blended with Gaussian weights. What is
blended, over windows and over flips, are logits. All of it is settings, the network's footprint and the scan's size: nothing
depends on how much memory happens to be free, nor on what computes the scores, so that evaluation, prediction and a bundle,
which all come here, agree.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from resunet.errors import InputError
from resunet.runtime import Intensity, normalise

Floats = NDArray[np.float32]

_GIB = 2**30
_BATCH = 16  # slices at once
_WINDOWS = 4  # windows at once
_SMALLEST_WINDOW = {2: 64, 3: 32}
_MADE = (
    5  # bytes a voxel of a label and a probability: planned with whichever is asked for, so that windows do not depend on it
)

# A process with torch and MONAI before a network sees anything, measured by benchmarks/predict_memory.py; one without takes less.
_PROCESS = 1.25 * _GIB


class Settings(Protocol):
    """How a scan is predicted; `finetune.inference.window.Inference` says what each is."""

    @property
    def memory(self) -> float: ...
    @property
    def window(self) -> int: ...
    @property
    def overlap(self) -> float: ...
    @property
    def flips(self) -> bool: ...


class Footprint(NamedTuple):
    """What a network needs. floats: float32 values a pixel of a forward pass at its peak; stride: of its coarsest level."""

    floats: float
    logits: int
    stride: int


class Plan(NamedTuple):
    """How one scan is predicted. at_once: slices, or 1 for a 3D network's volume; 0 where not even one fits; else by windows."""

    at_once: int
    window: int
    windows: int
    rows: int  # of windows along the first axis, whose scores are held together


class Scorer(Protocol):
    """A network, whatever computes it; flips are its own affair."""

    @property
    def footprint(self) -> Footprint: ...
    @property
    def spatial_dims(self) -> int: ...

    def __call__(self, images: Floats) -> Floats:
        """(N, C, *size), normalised → logits (N, K, *size)."""

    def slide(self, image: Floats, plan: Plan, overlap: float) -> Floats:
        """(1, C, *size) → logits (1, K, *size), blended over windows as `monai.inferers.sliding_window_inference` does."""


def predict_values(
    scorer: Scorer,
    values: NDArray,
    axis: int | None,
    intensities: Sequence[Intensity],
    settings: Settings,
    probabilities: bool = False,
    plan: Plan | None = None,
) -> NDArray:
    """The class index of every pixel, uint8 (*size); or float32 (M, *size), M = 1 (of the foreground) or one a class.

    Args:
        values: (C, *size) of a scan, not normalised.
        axis: of size, along which a volume is sliced for a 2D network; None for an image.
        plan: instead of the one that `settings.memory` allows.

    Raises:
        InputError: `settings.memory` is too little for this scan and network; an image, for a 3D network; or logits that are not
            finite.
    """
    size = values.shape[1:]
    out = np.empty((scorer.footprint.logits, *size), np.float32) if probabilities else np.empty(size, np.uint8)
    made = probabilities_of if probabilities else _classes
    _predict(
        scorer,
        values,
        axis,
        intensities,
        settings,
        plan,
        [out if probabilities else out[None]],
        lambda logits: [made(_finite(logits))],
    )
    return out


def predict_scores(
    scorer: Scorer, values: NDArray, axis: int | None, intensities: Sequence[Intensity], settings: Settings
) -> tuple[NDArray[np.uint8], Floats]:
    """What `predict_values` decides, and the probability that a pixel is not background, float32 (*size), from one pass.

    Of many classes no map of each is kept. Arguments and errors as there.
    """
    labels, foreground = np.empty(values.shape[1:], np.uint8), np.empty(values.shape[1:], np.float32)

    def made(logits: Floats) -> list[NDArray]:
        return [_classes(_finite(logits)), foreground_of(logits)[:, None]]

    _predict(scorer, values, axis, intensities, settings, None, [labels[None], foreground[None]], made)
    return labels, foreground


def predict_logits(
    scorer: Scorer,
    values: NDArray,
    axis: int | None,
    intensities: Sequence[Intensity],
    settings: Settings,
    plan: Plan | None = None,
) -> Floats:
    """Logits, float32 (1 or K, *size), of what `predict_values` decides; arguments as there."""
    out = np.empty((scorer.footprint.logits, *values.shape[1:]), np.float32)
    _predict(scorer, values, axis, intensities, settings, plan, [out], lambda logits: [logits])
    return out


def _predict(
    scorer: Scorer,
    values: NDArray,
    axis: int | None,
    intensities: Sequence[Intensity],
    settings: Settings,
    plan: Plan | None,
    outs: Sequence[NDArray],
    made: Callable[[Floats], Sequence[NDArray]],
) -> None:
    """Fill each of `outs` (M, *size) with what `made` makes for it of logits: (N, K, *size) → (N, M, *size)."""
    if scorer.spatial_dims == 3:
        axis = None
        refuse_image(values.shape[1:])
    found = scorer.footprint
    slices, places = _along(values, axis), [_along(out, axis) for out in outs]  # (slices, C, y, x), or (1, C, z, y, x)
    plan = plan or plan_scan(found, values, axis, settings, sum(out.nbytes for out in outs))
    if plan.at_once:
        for start in range(0, len(slices), plan.at_once):
            index = slice(start, min(start + plan.at_once, len(slices)))
            images = np.stack([normalise(one, list(intensities)) for one in slices[index]])
            for place, one in zip(places, made(_padded(scorer, images, found.stride)), strict=True):
                place[index] = one
        return
    for number, one in enumerate(slices):
        for rows, core, band in _bands(slices.shape[2:], plan, settings.overlap):
            image = normalise(one[:, rows], list(intensities))[None]
            logits = scorer.slide(image, plan, settings.overlap)[:, :, core]
            for place, of_band in zip(places, made(logits), strict=True):
                place[number : number + 1, :, band] = of_band


def _along(values: NDArray, axis: int | None) -> NDArray:
    """(C, *size) → a view (slices, C, y, x), or without an axis (1, C, *size)."""
    return values[None] if axis is None else np.moveaxis(values, 1 + axis, 0)


def decide(logits: Floats) -> NDArray[np.uint8]:
    """Logits (N, 1 or K, *size) → class indices (N, *size): above probability 0.5, or the largest."""
    if logits.shape[1] == 1:
        return np.asarray(logits[:, 0] > 0, np.uint8)
    return np.asarray(logits.argmax(axis=1), np.uint8)


def _classes(logits: Floats) -> NDArray[np.uint8]:
    return decide(logits)[:, None]


def _finite(logits: Floats) -> Floats:
    """Raises InputError for others: NaN would be decided as background, a finding that is missed without a word."""
    if not np.isfinite(logits).all():
        raise InputError(
            "the network gives values that are not finite. In half precision large ones overflow: use fp32 or bf16. In fp32 the "
            "scan's values may be far from those of training."
        )
    return logits


def foreground_of(logits: Floats) -> Floats:
    """Logits (N, 1 or K, *size) → the probability of not being background, (N, *size)."""
    probabilities = probabilities_of(logits)
    # not 1 less the background's: small probabilities would be rounded to steps of 6e-8
    summed: Floats = probabilities[:, 0] if logits.shape[1] == 1 else probabilities[:, 1:].sum(axis=1)
    return summed


def probabilities_of(logits: Floats) -> Floats:
    """Logits (N, 1 or K, *size) → the foreground's probability, or each class's."""
    if logits.shape[1] == 1:
        small = np.exp(-np.abs(logits))  # at most 1, so that nothing overflows
        return np.asarray(np.where(logits >= 0, np.float32(1), small) / (1 + small), np.float32)
    raised: Floats = np.exp(logits - logits.max(axis=1, keepdims=True))
    raised /= raised.sum(axis=1, keepdims=True)
    return raised


def mirrors(dimensions: int, flips: bool) -> list[tuple[int, ...]]:
    """The axes of (N, C, *size) that are mirrored, once for each image that is averaged; without flips the image alone."""
    if not flips:
        return [()]
    axes = range(2, 2 + dimensions)
    return [some for count in range(dimensions + 1) for some in itertools.combinations(axes, count)]


def refuse_image(size: Sequence[int]) -> None:
    """Raises InputError unless `size` is a volume's."""
    if len(size) != 3:
        raise InputError(
            f"is an image of {' × '.join(map(str, size))} pixels; this model is of volumes (spatial_dims=3). Give it volumes, or "
            "use a model with spatial_dims=2, which takes both."
        )


def plan_scan(found: Footprint, values: NDArray, axis: int | None, settings: Settings, kept: int = 0) -> Plan:
    """How a scan (C, *size) is predicted, along `axis` by a 2D network. kept: bytes of what is made of it, if that is much.

    Raises:
        InputError: not even the smallest window fits.
    """
    plane = [n for other, n in enumerate(values.shape[1:]) if other != axis]
    return plan_slices(found, values, plane, max(_MADE * math.prod(values.shape[1:]), kept), settings)


def plan_slices(found: Footprint, values: NDArray, plane: Sequence[int], out_bytes: int, settings: Settings) -> Plan:
    """What fits into `settings.memory` beside the scan and what is made of it.

    Args:
        plane: what the network sees at once: (y, x) of a slice, or (z, y, x).

    Raises:
        InputError: not even the smallest window.
    """
    channels, pixels, dims = values.shape[0], math.prod(plane), len(plane)
    budget = settings.memory * _GIB - _PROCESS - values.nbytes - 2 * out_bytes
    a_pixel = 4 * (found.floats + 3 * channels + 4 * found.logits)
    if (at_once := int(budget // (a_pixel * max(pixels, found.stride**dims)))) > 0:
        return Plan(min(at_once, _BATCH), 0, 0, 0)
    # of a band: its values and their normalisation, its scores, their weights and decisions
    row = 4 * (4 * channels + 2 * found.logits + 4) * math.prod(plane[1:])
    enough = math.ceil(1 / (1 - settings.overlap)) if dims == 3 else 4  # windows that a row can be in; in 2D more cost little
    window = settings.window
    while True:
        side, step = min(window, plane[0]), step_of(window, plane[0], settings.overlap)
        along = 1 + math.ceil((plane[0] - side) / step)
        fewest = min(enough, along)
        a_window = a_pixel * math.prod(min(window, n) for n in plane)
        for_band = budget / 4 if dims == 2 else budget - a_window
        rows = min(along, 1 + int((for_band / row - side) // step))
        windows = int((budget - row * (side + (rows - 1) * step)) // a_window)
        if windows >= 1 and rows >= fewest:
            return Plan(0, window, min(windows, _WINDOWS), rows)
        if window // 2 < max(_SMALLEST_WINDOW[dims], 2 * found.stride):
            break
        window //= 2
    a_band = row * (side + (fewest - 1) * step)
    together = max(4 * a_band, a_band + a_window) if dims == 2 else a_band + a_window
    needed = (_PROCESS + values.nbytes + 2 * out_bytes + together) / _GIB
    raise InputError(
        f"memory={settings.memory:g} GiB: too little for a scan of {' × '.join(map(str, values.shape))} {values.dtype} with this "
        f"network. Set at least --memory {math.ceil(needed * 10) / 10:g}."
    )


def step_of(window: int, length: int, overlap: float) -> int:
    """From one window to the next, as MONAI has it."""
    return length if window >= length else max(1, int(window * (1 - overlap)))


def _padded(scorer: Scorer, images: Floats, stride: int) -> Floats:
    """Images that the coarsest level would see as one position, which has no variance to normalise by, are continued."""
    size = images.shape[2:]
    if max(size) > stride:
        return scorer(images)
    beyond = [(0, 0), (0, 0), *((0, stride + 1 - n) for n in size)]
    own = (slice(None), slice(None), *(slice(n) for n in size))
    return scorer(np.pad(images, beyond, mode="edge"))[own]


def _bands(plane: Sequence[int], plan: Plan, overlap: float) -> Iterator[tuple[slice, slice, slice]]:
    """Bands across the first axis whose scores are those of the whole, because they hold every window that touches their core.

    The windows of a band lie where those of the whole lie: each begins with a window, and the last one ends with the whole.
    Yields a band's rows, its core in the band, and its core in the whole. The cores make up the whole.
    """
    height = plane[0]
    window = min(plan.window, height)
    step = step_of(window, height, overlap)
    starts = [*range(0, height - window, step), height - window]
    first, done = 0, 0
    while done < height:
        last = max(first + plan.rows, next(i for i, start in enumerate([*starts, height]) if start > done))
        last = min(last, len(starts))  # one beyond the band's last window
        core_end = starts[last] if last < len(starts) else height
        rows = slice(starts[first], starts[last - 1] + window)
        yield rows, slice(done - rows.start, core_end - rows.start), slice(done, core_end)
        done = core_end
        first = sum(start + window <= done for start in starts)
