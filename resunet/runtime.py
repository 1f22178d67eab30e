"""Pre- and post-processing in numpy: what a deployed bundle shares with training.

Imports no torch, MONAI or pydantic, so that a product needs none of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_PART = 2**22  # values at a time, of what is made of a scan and as long as it


@dataclass(frozen=True)
class Intensity:
    """One channel's normalisation: clip to [low, high], subtract `mean`, divide by `std`."""

    low: float
    high: float
    mean: float
    std: float


@dataclass(frozen=True)
class Percentiles:
    """Every scan is normalised by two percentiles (0–100) of its own; see `percentile_intensity`."""

    low: float
    high: float


@dataclass(frozen=True)
class ObjectRule:
    """What is removed of the predicted objects of class `index`: all but the largest, and those below `smallest` voxels."""

    index: int
    largest_only: bool
    smallest: int


def percentile_intensity(scan: NDArray, low: float, high: float) -> list[Intensity]:
    """Each channel's own percentiles, and the mean and standard deviation of what is clipped to them.

    Args:
        scan: (C, *size), the whole scan: never a crop of it.
        low, high: percentiles, 0–100.
    """
    found = []
    for channel in scan:
        values, counts = _distinct(channel)
        bottom, top = _percentiles(values, counts, [low, high])
        mean, std = _moments(values, counts, bottom, top)
        found.append(Intensity(float(bottom), float(top), mean, std))
    return found


def _moments(values: NDArray, counts: NDArray[np.int64] | None, bottom: float, top: float) -> tuple[float, float]:
    """Mean and standard deviation of values clipped to [bottom, top], a part at a time: of a scan that barely fits into memory,
    too. counts: how often each occurs; None for once each."""
    parts = [slice(start, start + _PART) for start in range(0, len(values), _PART)]
    weights = [None if counts is None else counts[part] for part in parts]
    many = len(values) if counts is None else counts.sum()

    def clipped(part: slice) -> NDArray[np.float64]:
        return np.clip(values[part].astype(np.float64), bottom, top)

    def summed(of: NDArray[np.float64], weight: NDArray[np.int64] | None) -> float:
        return float(of.sum() if weight is None else (of * weight).sum())

    mean = sum(summed(clipped(part), weight) for part, weight in zip(parts, weights, strict=True)) / many
    squares = sum(summed((clipped(part) - mean) ** 2, weight) for part, weight in zip(parts, weights, strict=True))
    return float(mean), float(np.sqrt(squares / many))


def intensities_by(scan: NDArray, rule: Intensity | Percentiles) -> list[Intensity]:
    """The normalisation of each channel of a whole scan (C, *size): its own, or the same constants for every scan."""
    if isinstance(rule, Intensity):
        return [rule] * scan.shape[0]
    return percentile_intensity(scan, rule.low, rule.high)


def percentiles(values: NDArray, wanted: Sequence[float]) -> list[float]:
    """Percentiles (0–100) of all values, as np.percentile gives them; integers of 8 and 16 bits are counted, not sorted."""
    return [float(value) for value in _percentiles(*_distinct(values), wanted)]


def _distinct(values: NDArray) -> tuple[NDArray, NDArray[np.int64] | None]:
    """Values and how often each occurs; None for once each, where counting would not be faster than sorting."""
    flat = values.ravel()
    if flat.dtype.kind not in "iu" or flat.dtype.itemsize > 2:
        return flat, None
    lowest = 0 if flat.dtype.kind == "u" else int(flat.min())
    if flat.dtype == np.uint8 and flat.size >= 2**16:
        # two pixels at a time, which takes half as long
        pairs = np.bincount(flat[: flat.size // 2 * 2].view(np.uint16), minlength=2**16).reshape(256, 256)
        counts = pairs.sum(axis=0) + pairs.sum(axis=1)
        if flat.size % 2:
            counts[flat[-1]] += 1
    else:
        counts = np.zeros(int(flat.max()) - lowest + 1, np.int64)
        for start in range(0, flat.size, _PART):  # bincount copies what it counts to 64 bits
            counts += np.bincount(flat[start : start + _PART].astype(np.int64) - lowest, minlength=len(counts))
    present = np.flatnonzero(counts)
    return present + lowest, counts[present]


def _percentiles(values: NDArray, counts: NDArray[np.int64] | None, wanted: Sequence[float]) -> NDArray[np.float64]:
    if counts is None:
        return np.asarray(np.percentile(values, wanted), np.float64)
    last = np.cumsum(counts)  # one beyond the last position of each value, were they sorted
    position = np.asarray(wanted) / 100 * (last[-1] - 1)
    below = np.floor(position)
    at = values[np.searchsorted(last, below, side="right")].astype(np.float64)
    after = values[np.searchsorted(last, np.minimum(below + 1, last[-1] - 1), side="right")].astype(np.float64)
    found: NDArray[np.float64] = at + (after - at) * (position - below)
    return found


def normalise(scan: NDArray, intensities: list[Intensity]) -> NDArray[np.float32]:
    """(C, *size) in any dtype → float32, channel by channel. A constant channel becomes zeros."""
    out = np.empty(scan.shape, np.float32)
    for channel, (values, intensity) in enumerate(zip(scan, intensities, strict=True)):
        clipped = np.clip(values.astype(np.float32), intensity.low, intensity.high)
        # relative: what is constant does not depend on the unit, and rounding leaves a little
        std = intensity.std if intensity.std > 1e-7 * max(abs(intensity.low), abs(intensity.high)) else 1.0
        out[channel] = (clipped - np.float32(intensity.mean)) / np.float32(std)
    return out


def slice_axis(spacing: tuple[float, ...]) -> int:
    """The axis along which a (z, y, x) volume is sliced for a 2D network: the coarsest; ties: superior–inferior."""
    return int(np.argmax(np.round(spacing, 4)))


def remove_objects(labels: NDArray[np.uint8], rules: Sequence[ObjectRule]) -> NDArray[np.uint8]:
    """A label map, (y, x) or (z, y, x), in which the objects that rules name are background; the map itself without rules.

    Objects are connected components of a class, 8-connected in 2D and 26-connected in 3D, as evaluation counts them. Of two
    that are largest the one that comes first in the array is kept.
    """
    if not rules:
        return labels
    import cc3d  # which a bundle without rules does not need

    cleaned = np.array(labels, order="C")
    for rule in rules:
        where = np.flatnonzero(labels == rule.index)
        components = cc3d.connected_components(labels == rule.index, connectivity=8 if labels.ndim == 2 else 26)
        component = components.ravel()[where]
        size = np.bincount(component, minlength=2)  # component 0 is everything else, and is not among them
        removed = size < rule.smallest
        if rule.largest_only:
            removed[np.arange(len(size)) != size.argmax()] = True
        cleaned.ravel()[where[removed[component]]] = 0
    return cleaned
