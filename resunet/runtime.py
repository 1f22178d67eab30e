"""Pre-processing in numpy: what a deployed bundle shares with training.

Imports no torch, MONAI or pydantic, so that a product needs none of them.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Intensity:
    """One channel's normalisation: clip to [low, high], subtract `mean`, divide by `std`."""

    low: float
    high: float
    mean: float
    std: float


def percentile_intensity(scan: NDArray, low: float, high: float) -> list[Intensity]:
    """Each channel's own percentiles, and the mean and standard deviation of what is clipped to them.

    Args:
        scan: (C, *size), the whole scan: never a crop of it.
        low, high: percentiles, 0–100.
    """
    found = []
    for channel in scan:
        bottom, top = (float(value) for value in np.percentile(channel, [low, high]))
        clipped = np.clip(channel.astype(np.float64), bottom, top)
        found.append(Intensity(bottom, top, float(clipped.mean()), float(clipped.std())))
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
