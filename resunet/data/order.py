"""The order in which training meets its scans: a pure function of (seed, epoch, place), whatever their number.

A resumed run sees the same scans, every rank works out its own share, and a million volumes' slices need no list in memory.
"""

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8


def batch_order(size: int, batch: int, seed: int, index: int) -> NDArray[np.int64]:
    """The items of the `index`-th batch; what does not fill the last batch of an epoch is left out of that epoch."""
    epoch, place = divmod(index, size // batch)
    return shuffled_places(np.arange(place * batch, (place + 1) * batch), size, seed, epoch)


def shuffled_places(places: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Which of `size` items stand at some places of an epoch's order.

    A permutation that is worked out place by place: a balanced Feistel network over the next power of four, repeated until the
    result is below `size` (Black & Rogaway 2002, Ciphers with arbitrary finite domains: cycle walking).
    """
    half = max(1, (int(size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = np.random.default_rng([seed, 1, epoch]).integers(2**63, size=_ROUNDS, dtype=np.uint64)
    found = places.astype(np.uint64)
    walking = np.ones(len(found), bool)
    while walking.any():
        left, right = found[walking] >> np.uint64(half), found[walking] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        found[walking] = left << np.uint64(half) | right
        walking = found >= size
    return found.astype(np.int64)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: every bit of the result depends on every bit of the value."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
