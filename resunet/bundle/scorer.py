"""A graph as prediction wants it: mirror images averaged, windows blended, in numpy."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from resunet.bundle.contract import Contract
from resunet.bundle.engines import Engine
from resunet.inference.window import Floats, Footprint, Plan, mirrors, step_of

SIGMA = 0.125  # of the window's side; MONAI's default
_LEAST = 1e-3  # weight of the window's corners


@dataclass(frozen=True)
class EngineScorer:
    """An engine as a `resunet.inference.window.Scorer`."""

    engine: Engine
    footprint: Footprint
    spatial_dims: int
    flips: bool = False

    def __call__(self, images: Floats) -> Floats:
        mirrored = mirrors(images.ndim - 2, self.flips)
        if len(mirrored) == 1:
            return self.engine(images)
        total = np.zeros(1, np.float32)
        for axes in mirrored:
            total = total + np.flip(self.engine(np.flip(images, axes)), axes)
        return np.asarray(total / np.float32(len(mirrored)), np.float32)

    def slide(self, image: Floats, plan: Plan, overlap: float) -> Floats:
        size = image.shape[2:]
        window = [min(plan.window, length) for length in size]
        weights = gaussian(window)
        total, weight = None, np.zeros(size, np.float32)
        places = list(places_of(size, window, overlap))
        for start in range(0, len(places), plan.windows):
            some = places[start : start + plan.windows]
            logits = self(np.concatenate([image[(slice(None), slice(None), *place)] for place in some]))
            if total is None:
                total = np.zeros((logits.shape[1], *size), np.float32)
            for one, place in zip(logits, some, strict=True):
                total[(slice(None), *place)] += one * weights
                weight[place] += weights
        assert total is not None, "there is always a window"
        total /= weight
        return total[None]


def scorer_of(contract: Contract, engine: Engine, flips: bool) -> EngineScorer:
    return EngineScorer(engine, contract.measured, contract.spatial_dims, flips)


def gaussian(window: Sequence[int]) -> Floats:
    """Weights of a window, 1 in its middle, as `monai.data.utils.compute_importance_map` has them."""
    weights = np.ones((), np.float32)
    for length in window:
        x = np.arange(-(length - 1) / 2, (length - 1) / 2 + 1, dtype=np.float32)
        weights = weights[..., None] * np.exp(x**2 / np.float32(-2 * (SIGMA * length) ** 2))
    return np.asarray(np.maximum(weights, max(float(weights.min()), _LEAST)), np.float32)


def places_of(size: Sequence[int], window: Sequence[int], overlap: float) -> Iterator[tuple[slice, ...]]:
    """Where windows lie, the last of each axis at its end: as `monai.data.utils.dense_patch_slices` has them."""
    axes = []
    for length, side in zip(size, window, strict=True):
        starts = [*range(0, length - side, step_of(side, length, overlap)), length - side]
        axes.append([slice(start, start + side) for start in starts])
    return itertools.product(*axes)
