"""Where a scan has content: a coarse map, so that random crops are not of air, padding or an empty slide.

Background is padding (blocks of one value, the lowest or the highest of the scan) and what is flat, forms a peak at the same
end of the scan's own intensities with nothing beyond it, and reaches the scan's border. Where that is not found (a texture, a
scan cropped to the organ), everything is foreground: a crop too many costs little, content that is never seen costs more.
The map is made of a few samples a block, not of all voxels.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SAMPLES = 64  # a block
# Shares of the scan's range, which is from the 0.5th to the 99.5th percentile outside the padding:
_FLAT = 0.07  # spread (10th to 90th percentile) of a background block at most
_BIN = 0.02  # a bin of the histogram in which the peak is looked for
_MARGIN = 0.03  # what is that little above the peak is background still
_NEAR_ZERO = 0.25  # of the distance from 0 to the brightest: where the dark background of a scan without negative values ends
# Shares of blocks or voxels:
_PEAK = 0.05  # of all blocks: what a bin must hold to be a peak
_DARKER = 0.02  # of all voxels: what may be darker than background
_BORDER = 0.15  # of the blocks at the scan's border: what must be background at least
_LITTLE = 0.1  # of all blocks: less background than this is not worth avoiding
_TINY = 0.005  # of all blocks: less foreground than this is not believed


@dataclass(frozen=True)
class ForegroundMap:
    """Which blocks of a scan have content.

    mask: one entry a block, in array order; blocks at the far edges may be cut.
    block: the edges of a block in voxels.
    size: the scan's, without channels.
    """

    mask: NDArray[np.bool_]
    block: tuple[int, ...]
    size: tuple[int, ...]

    def facts(self) -> dict[str, Any]:
        """As JSON, for the facts of a stored scan."""
        packed = base64.b64encode(np.packbits(self.mask).tobytes()).decode()
        return {"mask": packed, "block": list(self.block), "size": list(self.size)}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "ForegroundMap":
        """What `facts` gave."""
        block, size = tuple(facts["block"]), tuple(facts["size"])
        grid = _grid(size, block)
        bits = np.unpackbits(np.frombuffer(base64.b64decode(facts["mask"]), np.uint8), count=int(np.prod(grid)))
        return cls(bits.astype(bool).reshape(grid), block, size)

    def usable_slices(self, axis: int, share: float = 0.0) -> NDArray[np.intp]:
        """The slices along an axis whose blocks have content: more than `share` of what the fullest layer has."""
        others = tuple(i for i in range(self.mask.ndim) if i != axis)
        content = self.mask.sum(axis=others)
        usable = content > share * content.max()
        return np.flatnonzero(np.repeat(usable, self.block[axis])[: self.size[axis]])

    def slice(self, axis: int, index: int) -> "ForegroundMap":
        """The map of one slice along an axis."""
        mask = np.take(self.mask, index // self.block[axis], axis=axis)
        return ForegroundMap(mask, _without(self.block, axis), _without(self.size, axis))


def foreground_map(values: NDArray, block: int | Sequence[int]) -> ForegroundMap:
    """The map of a scan.

    Args:
        values: (C, *size), finite.
        block: the edge of a block in voxels, or one an axis (a volume of thick slices: 1 along them).
    """
    size = values.shape[1:]
    edges = (block,) * len(size) if isinstance(block, int) else tuple(block)
    edges = tuple(min(edge, n) for edge, n in zip(edges, size, strict=True))
    everything = ForegroundMap(np.ones(_grid(size, edges), bool), edges, size)
    samples, zero, white = _grey(_sample(values, edges))
    last = samples.shape[-1] - 1
    tenth = round(0.1 * last)
    samples.partition((tenth, last - tenth), axis=-1)
    low, high = samples[..., tenth], samples[..., last - tenth]
    dark = _background(samples, low, high, zero)
    bright = _background(-samples, -high, -low, None if white is None else -white)
    border = _border(dark.shape)
    background = max(dark, bright, key=lambda mask: int(mask[border].sum()))
    mask = ~background
    if background[border].mean() < _BORDER or background.mean() < _LITTLE or mask.mean() < _TINY:
        return everything
    return ForegroundMap(mask, edges, size)


def foreground_corner(rng: np.random.Generator, map: ForegroundMap, crop: Sequence[int]) -> tuple[int, ...]:
    """The corner of a crop whose centre is in a foreground block, each as likely as the other; moved into the scan.

    Along an axis where the crop is larger than the scan the corner is 0. Without any foreground every block is as good.
    """
    blocks = np.argwhere(map.mask if map.mask.any() else np.ones_like(map.mask))
    chosen = blocks[rng.integers(len(blocks))]
    corner = []
    for number, edge, n, wanted in zip(chosen, map.block, map.size, crop, strict=True):
        first = int(number) * edge
        centre = int(rng.integers(first, min(first + edge, n)))
        corner.append(max(0, min(centre - wanted // 2, n - wanted)))
    return tuple(corner)


def _sample(values: NDArray, edges: tuple[int, ...]) -> NDArray:
    """Evenly spaced voxels of every block: (C, *grid, samples)."""
    size = values.shape[1:]
    grid = _grid(size, edges)
    wanted = round(_SAMPLES ** (1 / sum(edge > 1 for edge in edges))) if max(edges) > 1 else 1
    counts = [min(edge, wanted) for edge in edges]
    places = []
    for n, edge, blocks, count in zip(size, edges, grid, counts, strict=True):
        first = np.arange(blocks) * edge
        extent = np.minimum(edge, n - first)
        within = (np.arange(count) + 0.5) / count
        places.append((first[:, None] + (within * extent[:, None]).astype(int)).ravel())
    taken = values[(slice(None), *np.ix_(*places))]
    parted = taken.reshape(len(values), *(n for pair in zip(grid, counts, strict=True) for n in pair))
    axes = range(1, parted.ndim)
    return parted.transpose(0, *axes[::2], *axes[1::2]).reshape(len(values), *grid, -1)


def _grey(samples: NDArray) -> tuple[NDArray[np.float32], float | None, float | None]:
    """The sum of the channels, each on its range, and where on that scale black and white are, if they are known.

    samples: (C, *grid, samples). Black is 0 where nothing is negative, white is 255 of 8 bits.
    """
    ranges = [_range(channel) for channel in samples]
    scales = np.array([high - low if high > low else 1 for low, high in ranges])
    grey = sum(channel.astype(np.float32) / np.float32(scale) for channel, scale in zip(samples, scales, strict=True))
    assert isinstance(grey, np.ndarray)
    zero = 0.0 if samples.min() >= 0 else None
    white = float((255 / scales).sum()) if samples.dtype == np.uint8 else None
    return grey, zero, white


def _background(
    samples: NDArray[np.float32], low: NDArray[np.float32], high: NDArray[np.float32], black: float | None
) -> NDArray[np.bool_]:
    """Blocks of padding and dark background.

    Args:
        samples: (*grid, samples).
        low, high: their 10th and 90th percentiles, (*grid).
        black: the value of no signal, if known.
    """
    lowest = samples.min()
    padding: NDArray[np.bool_] = samples.max(axis=-1) == lowest
    rest = samples
    if padding.any():
        rest = samples[~padding]
        rest = rest[rest > lowest]
    if not rest.size:
        return padding
    bottom, top = _range(rest)
    if not top > bottom:
        return padding
    low, high = ((values - bottom) / (top - bottom) for values in (low, high))
    peak = _peak(low[~padding], high[~padding], _PEAK * padding.size)
    if peak is None:
        return padding
    floor, level = peak
    darker = (rest < bottom + (floor - _MARGIN) * (top - bottom)).mean()
    zero = level if black is None else (black - bottom) / (top - bottom)
    if darker > _DARKER or level - zero > _NEAR_ZERO * (1 - zero):
        return padding
    background: NDArray[np.bool_] = high <= level + _MARGIN  # padding too: it is darker still
    return background


def _peak(low: NDArray[np.float32], high: NDArray[np.float32], wanted: float) -> tuple[float, float] | None:
    """The darkest peak of flat blocks, below what parts dark from bright: from their 10th percentile to its upper end."""
    chosen = (high - low <= _FLAT) & (high <= _otsu(high))
    low, binned = low[chosen], np.floor(high[chosen] / _BIN)
    bins, counts = np.unique(binned, return_counts=True)
    held = dict(zip(bins.tolist(), counts.tolist(), strict=True))
    first = next((number for number in bins.tolist() if held[number] >= wanted), None)
    if first is None:
        return None
    last = first
    while held.get(last + 1, 0) >= wanted / 2:
        last += 1
    inside = (binned >= first) & (binned <= last)
    return float(np.quantile(low[inside], 0.05)), float(last + 1) * _BIN


def _range(values: NDArray) -> tuple[float, float]:
    """The 0.5th and 99.5th percentile, of at most some 100,000 of the values."""
    step = values.size // 100_000 | 1  # odd, and so no multiple of the samples a block
    low, high = np.percentile(values.ravel()[::step], [0.5, 99.5])
    return float(low), float(high)


def _otsu(values: NDArray[np.float32]) -> float:
    """The threshold that parts values into the two classes of largest variance between them (Otsu 1979)."""
    counts, edges = np.histogram(values, 128)
    if values.min() == values.max():
        return float(values.max())
    centres = (edges[:-1] + edges[1:]) / 2
    below, sums = np.cumsum(counts)[:-1], np.cumsum(counts * centres)
    above = values.size - below
    difference = sums[:-1] / below - (sums[-1] - sums[:-1]) / above
    return float(edges[1 + np.argmax(below * above * difference**2)])


def _border(grid: tuple[int, ...]) -> NDArray[np.bool_]:
    """Blocks at either end of some axis that has more than two."""
    inner = tuple(slice(1, -1) if n > 2 else slice(None) for n in grid)
    border = np.ones(grid, bool)
    border[inner] = False
    return border if border.any() else np.ones(grid, bool)


def _grid(size: Sequence[int], block: Sequence[int]) -> tuple[int, ...]:
    return tuple(-(-n // edge) for n, edge in zip(size, block, strict=True))


def _without(numbers: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return numbers[:axis] + numbers[axis + 1 :]
