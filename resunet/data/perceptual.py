"""How an image looks, so that its copies are found under other names: re-encoded, resized, flipped, rotated by 90°.

A look is a hash and a thumbnail. The hash is for searching: magnitudes of the low frequencies, combined so that a flip
or a rotation by 90° cannot change them, and scaled so that brightness, contrast and bit depth do not. It says little
about what the image shows and may leave the machine. The thumbnail shows the image and stays beside the manifest:
pairs of near hashes are verified by its correlation, which tells copies from neighbouring slices.

An image that is flat to within half a grey level carries no evidence: its hash is all zeros and matches nothing.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from resunet.data.neighbours import Cells

SIDE = 32  # of a thumbnail
# Radius of the disk of frequencies that are hashed, in half-waves an image. A larger one tells neighbouring slices
# further apart and JPEG's copies, too: 14 has the widest gap relative to both of 8 to 20.
_HASHED = 14
# Images have less of the high frequencies; √frequency evens that out by half. Full evening lets JPEG's noise in.
_EVENING = 0.5
_STEPS = 600  # per unit length; 255 of them, so that larger values, which practically do not occur, are clipped
_COMPARED = 20  # frequencies below it, in half-waves an image, are correlated: above them re-encoding shows first
_SLAB = 1 / 3  # share of a volume's extent averaged into a central plane: a thinner one moves when the volume is resized
_FLAT = 0.5  # standard deviation of the thumbnail, in steps of an integer image; so an image of 1 bit is flat
_FLAT_FLOAT = 16  # the same for floats, in roundings of the largest magnitude

_LUMINANCE = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as a colour image is turned grey on re-encoding

# Measured by benchmarks/copies.py on JPEG 75, resizing to 80 %, rotations, flips and any two of them. Distances of
# copies reach 30 (steel textures), or 54 (nearly black micrographs as JPEG); gamma 1.3, beyond the target, 85.
RADIUS = 100.0
# Copies stay above 0.995, neighbouring brain slices below 0.987, other images of one kind below 0.96.
CORRELATION = 0.99
# For distances that no thumbnail verifies: neighbouring brain slices come as near as 54.
ALONE = 45.0
LIMIT = 16  # candidates of one archive image

_PAIRS = 4096  # correlated at a time

Thumbnail = NDArray[np.uint8] | bytes


@dataclass(frozen=True)
class Look:
    """hash: HASH_BYTES bytes. thumbnail: uint8 (planes, SIDE, SIDE), one plane of an image, three of a volume."""

    hash: bytes
    thumbnail: NDArray[np.uint8]


def look(values: NDArray) -> Look:
    """The look of an image (C, y, x) or a volume (C, z, y, x) of finite numbers of any type.

    Colours are weighed into grey. Both axes are squeezed onto one square. Of a volume the three central orthogonal
    planes are taken; their vectors are averaged, so that the order of axes does not matter.
    """
    return looks([values])[0]


def looks(scans: Sequence[NDArray]) -> list[Look]:
    """`look` of each, at a third of the cost for small images: their squares go through numpy together."""
    planes = [_planes(values) for values in scans]
    reduced = np.stack([_reduced(plane) for own in planes for plane in own])
    assert np.isfinite(reduced).all(), "look() needs finite values"
    ends = np.cumsum([len(own) for own in planes]).tolist()
    starts = [0, *ends[:-1]]
    within = np.concatenate([_flat_within(values, reduced[i:j]) for values, i, j in zip(scans, starts, ends, strict=True)])
    flat = reduced.std(axis=(1, 2)) <= within
    low = reduced.min(axis=(1, 2), keepdims=True)
    extent = np.where(flat, np.inf, np.ptp(reduced, axis=(1, 2)))[:, None, None]
    scaled = (reduced - low) / extent
    vectors = _invariants(scaled)
    averaged = [vectors[i] if j - i == 1 else vectors[i:j].mean(axis=0) for i, j in zip(starts, ends, strict=True)]
    lengths = np.sqrt([vector @ vector for vector in averaged])
    lengths[lengths == 0] = 1
    hashes = np.minimum(np.rint(np.stack(averaged) * (_STEPS / lengths)[:, None]), 255).astype(np.uint8)
    thumbnails = np.rint(scaled * 255).astype(np.uint8)
    return [Look(own.tobytes(), thumbnails[i:j]) for own, i, j in zip(hashes, starts, ends, strict=True)]


def _flat_within(values: NDArray, reduced: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each plane of a scan, the standard deviation up to which it counts as flat."""
    if values.dtype.kind != "f":
        return np.full(len(reduced), _FLAT)
    return np.full(len(reduced), _FLAT_FLOAT * np.finfo(values.dtype).eps * np.abs(reduced).max())


def _planes(values: NDArray) -> list[NDArray]:
    """(C, y, x) each. An axis of size 1 makes a volume an image."""
    if values.ndim == 4 and 1 in values.shape[1:]:
        values = values.squeeze(axis=1 + values.shape[1:].index(1))
    assert values.ndim in (3, 4) and values.size, f"(C, y, x) or (C, z, y, x) expected, not {values.shape}"
    return [values] if values.ndim == 3 else [_central(values, axis) for axis in (1, 2, 3)]


def _central(volume: NDArray, axis: int) -> NDArray[np.float64]:
    """The mean over the middle of an axis, symmetric, so that flips leave it alone."""
    size = volume.shape[axis]
    half = max(1.0, size * _SLAB) / 2
    edges = np.arange(size + 1).clip(size / 2 - half, size / 2 + half)
    weights = np.diff(edges) / (2 * half)
    used = np.flatnonzero(weights)
    slab = np.moveaxis(volume, axis, 0)[used[0] : used[-1] + 1]
    outer, inner = weights[used[0]], weights[size // 2]
    ends = slab[0].astype(np.float64) + slab[-1]
    plane: NDArray[np.float64] = inner * slab.sum(axis=0, dtype=np.float64) + (outer - inner) * ends
    return plane


def _reduced(image: NDArray) -> NDArray[np.float64]:
    """Grey (SIDE, SIDE) by area averages of (C, y, x)."""
    channels, height, width = image.shape
    precise = image.dtype.itemsize > 4 or (image.dtype.itemsize == 4 and image.dtype.kind in "iu")
    working = np.float64 if precise else np.float32  # float32 holds 16 bits and is twice as fast
    share = _LUMINANCE if channels == 3 else np.full(channels, 1 / channels)
    total = np.zeros((SIDE, width), working)
    whole = image.dtype.kind in "iu" and image.dtype.itemsize <= 2 and height % SIDE == 0 and height < 2**21
    for channel, weight in zip(image, share, strict=True):
        if whole:  # integers in equal parts are added up exactly, and five times as fast
            total += _sums(channel).astype(working) * np.asarray(weight * SIDE / height, working)
            continue
        rows = _averaging(height, working)
        block = max(1, 2**20 // width)  # of rows: a copy of the whole image in floats would not fit the cache
        for start in range(0, height, block):
            part = channel[start : start + block].astype(working)
            total += (rows[:, start : start + block] * working(weight)) @ part
    square: NDArray[np.float64] = (total @ _averaging(width, working).T).astype(np.float64)
    return square


def _sums(channel: NDArray) -> NDArray:
    """(SIDE, x): the sums over equal parts of the rows, exact."""
    height, width = channel.shape
    parts = channel.reshape(SIDE, height // SIDE, width)
    if channel.dtype == np.uint8 and height // SIDE <= 16:  # few rows are added faster one after the other, in 16 bits
        total = parts[:, 0].astype(np.uint16)
        for row in range(1, height // SIDE):
            total += parts[:, row]
        return total
    kind = np.uint32 if channel.dtype.kind == "u" else np.int32
    return np.asarray(parts.sum(axis=1, dtype=kind))


@lru_cache(maxsize=64)
def _averaging(size: int, dtype: type) -> NDArray:
    """(SIDE, size): rows of weights that average `size` pixels into SIDE equal parts."""
    edges = np.linspace(0, size, SIDE + 1)
    pixels = np.arange(size)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    matrix: NDArray = (covered.clip(0) * (SIDE / size)).astype(dtype)
    matrix.flags.writeable = False
    return matrix


def _cosines(count: int) -> NDArray[np.float64]:
    """(count, SIDE): the first rows of the orthonormal DCT-II."""
    frequencies, positions = np.arange(count)[:, None], np.arange(SIDE)
    rows: NDArray[np.float64] = np.sqrt(2 / SIDE) * np.cos(np.pi * frequencies * (2 * positions + 1) / (2 * SIDE))
    rows[0] /= np.sqrt(2)
    return rows


def _evened(count: int) -> NDArray[np.float64]:
    """(count, count): frequency to the power _EVENING; the mean does not count."""
    along = np.arange(count)
    weights: NDArray[np.float64] = np.hypot(along[:, None], along) ** _EVENING
    weights[0, 0] = 0
    return weights


_HASH_COSINES = _cosines(_HASHED + 1)
_HASH_WEIGHTS = _evened(_HASHED + 1)
_ROW, _COLUMN = np.triu_indices(_HASHED + 1)
_INSIDE = (_ROW + _COLUMN > 0) & (_ROW**2 + _COLUMN**2 <= _HASHED**2)
_ROW, _COLUMN = _ROW[_INSIDE], _COLUMN[_INSIDE]
_OFF = _ROW != _COLUMN
HASH_BYTES = len(_ROW) + int(_OFF.sum())


def _invariants(squares: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, SIDE, SIDE) → (n, HASH_BYTES) of length 1, or 0 where constant.

    A flip changes the signs of odd coefficients, a transposition swaps (u, v) and (v, u): the sum and the difference
    of the two magnitudes stay, and together they keep the distances between the magnitudes themselves.
    """
    magnitudes = np.abs(_HASH_COSINES @ squares @ _HASH_COSINES.T) * _HASH_WEIGHTS
    one, other = magnitudes[:, _ROW, _COLUMN], magnitudes[:, _COLUMN, _ROW]
    sums = np.where(_OFF, (one + other) * np.sqrt(0.5), one)
    differences = np.abs(one - other)[:, _OFF] * np.sqrt(0.5)
    vectors = np.concatenate([sums, differences], axis=1)
    return _unit(vectors)


_COMPARE_COSINES = _cosines(_COMPARED)
_COMPARE_WEIGHTS = _evened(_COMPARED)


def correlation(one: Thumbnail, other: Thumbnail) -> float:
    """The correlation of two thumbnails, the best over flips and rotations by 90°, between 0 and 1."""
    return float(correlations([one], [other])[0])


def correlations(ones: Sequence[Thumbnail], others: Sequence[Thumbnail]) -> NDArray[np.float64]:
    """`correlation` of each pair: arrays as `look` gives them, or their bytes.

    Low and middle frequencies are evened out as for the hash, because look-alikes agree in the lowest. A negative
    counts as a copy. Planes of two volumes are assigned as fits best; an image and a volume have nothing in common.
    """
    result = np.zeros(len(ones))
    sizes = np.array([[_size(one), _size(other)] for one, other in zip(ones, others, strict=True)]).reshape(-1, 2)
    for size in np.unique(sizes):
        pairs = np.flatnonzero((sizes == size).all(axis=1))
        for start in range(0, len(pairs), _PAIRS):
            part = pairs[start : start + _PAIRS]
            result[part] = _compare(_spectra([ones[i] for i in part]), _spectra([others[i] for i in part]))
    return result


def _size(thumbnail: Thumbnail) -> int:
    return len(thumbnail) if isinstance(thumbnail, bytes) else thumbnail.size


def _spectra(thumbnails: Sequence[Thumbnail]) -> NDArray[np.float64]:
    """(n, planes, _COMPARED, _COMPARED): evened spectra of length 1, or 0 where flat."""
    squares = np.stack([np.frombuffer(thumbnail, np.uint8) for thumbnail in thumbnails]).reshape(
        len(thumbnails), -1, SIDE, SIDE
    )
    spectra = (_COMPARE_COSINES @ squares @ _COMPARE_COSINES.T) * _COMPARE_WEIGHTS
    return _unit(spectra.reshape(*spectra.shape[:2], -1)).reshape(spectra.shape)


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """(…, n) of length 1; what is 0 but for rounding becomes 0."""
    lengths = np.sqrt((vectors**2).sum(axis=-1, keepdims=True))
    unit = np.zeros_like(vectors)
    np.divide(vectors, lengths, out=unit, where=lengths > 1e-6)
    return unit


def _compare(ones: NDArray, others: NDArray) -> NDArray[np.float64]:
    """(n, planes, k, k) twice → (n,): the best assignment of planes."""
    planes = range(ones.shape[1])
    pairs = [[_best_symmetry(ones[:, i], others[:, j]) for j in planes] for i in planes]
    best = np.zeros(len(ones))
    for order in itertools.permutations(planes):
        best = np.maximum(best, np.mean([pairs[i][j] for i, j in enumerate(order)], axis=0))
    return best


def _best_symmetry(one: NDArray, other: NDArray) -> NDArray[np.float64]:
    """(n, k, k) twice → (n,). In spectra a flip is a change of sign of odd rows or columns, so that four sums do for all."""
    best = np.zeros(len(one))
    for turned in (other, other.transpose(0, 2, 1)):
        product = one * turned
        even, odd = product[:, ::2], product[:, 1::2]
        sums = [part.sum(axis=(1, 2)) for part in (even[:, :, ::2], even[:, :, 1::2], odd[:, :, ::2], odd[:, :, 1::2])]
        for vertical, horizontal in itertools.product((1, -1), repeat=2):
            signs = (1, horizontal, vertical, vertical * horizontal)
            value = np.abs(sum(sign * part for sign, part in zip(signs, sums, strict=True)))
            best = np.maximum(best, value)
    return best


def is_copy(distance: NDArray | float, correlation: NDArray | float | None) -> NDArray[np.bool_]:
    """Which pairs are one image, by the distance of their hashes and the correlation of their thumbnails.

    correlation: None where a side has no thumbnails, as beside an encoder; then the distance alone has to do.
    """
    if correlation is None:
        return np.asarray(np.asarray(distance) <= ALONE)
    return np.asarray((np.asarray(distance) <= RADIUS) & (np.asarray(correlation) >= CORRELATION))


def find_candidates(
    archive: NDArray[np.uint8], held_out: NDArray[np.uint8], radius: float = RADIUS, limit: int = LIMIT
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    """For each archive image the held-out images within `radius`, the nearest `limit` of them.

    Deterministic, sub-quadratic, and independent of how the archive is cut into calls. No pair within half the radius is
    missed; of those farther apart fewer than 1 in 2,000 were, measured against all pairs.

    Args:
        archive: (m, HASH_BYTES). held_out: (n, HASH_BYTES). Rows of zeros match nothing.
        limit: what keeps a million look-alikes from becoming n million pairs. Of more than `limit` held-out copies of
            one image only the nearest are listed; ties go to the lower index.

    Returns:
        archive index, held-out index, Euclidean distance, sorted by archive index, then distance, then held-out index.
    """
    return Cells(held_out).search(archive, radius, limit)
