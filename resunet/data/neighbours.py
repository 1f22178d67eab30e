"""Near neighbours among vectors of bytes, without comparing all pairs.

Each vector belongs to the nearest of about √n centres, and a query is compared only with the cells it may have
neighbours in. Products of bytes are whole numbers below 2²⁴: exact in float32 in whatever order they are summed, so
that distances do not depend on the machine or its threads.
"""

import itertools

import numpy as np
from numpy.typing import NDArray

_BLOCK = 2**14  # queries at a time: 11 MB as floats
_PRODUCTS = 2**21  # distances at a time: 8 MB
_PENDING = 2**20  # candidates before the far ones are dropped
_ROUNDS = 4  # of k-means

Found = tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]  # row, vector, squared distance


class Cells:
    """Vectors (n, L) by their nearest centre. Rows of zeros are left out."""

    def __init__(self, vectors: NDArray[np.uint8]) -> None:
        kept = np.flatnonzero(vectors.any(axis=1))
        self._vectors = vectors
        self._centres = _centres(vectors[kept])
        self._apart = np.sqrt(_squared(self._centres, self._centres).clip(0))
        nearest = _assign(vectors[kept], self._centres)
        order = np.argsort(nearest, kind="stable")
        bounds = np.searchsorted(nearest[order], np.arange(len(self._centres) + 1))
        self._members = [kept[order[low:high]].astype(np.int32) for low, high in itertools.pairwise(bounds)]

    def search(
        self, queries: NDArray[np.uint8], radius: float, limit: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
        """(query, vector, distance) of pairs within the radius, the nearest `limit` of each query.

        No pair within half the radius is missed; one farther apart hardly ever is. Ties go to the lower index. Sorted by
        query, distance, vector. Queries of zeros match nothing.
        """
        found = [(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))]
        for start in range(0, len(queries) if self._members else 0, _BLOCK):
            block = queries[start : start + _BLOCK]
            used = np.flatnonzero(block.any(axis=1))
            rows, columns, squared = self._search(block[used].astype(np.float32), radius, limit)
            found.append(((used[rows] + start).astype(np.int32), columns, np.sqrt(squared)))
        one, other, distance = (np.concatenate(column) for column in zip(*found, strict=True))
        return one, other, distance

    def _search(self, rows: NDArray[np.float32], radius: float, limit: int) -> Found:
        """The same of one block, with squared distances."""
        to_centres = _squared(rows, self._centres)
        nearest = to_centres.argmin(axis=1)
        # A member of cell a is not nearer to centre b: it lies on a's side of the plane halfway. So a ball reaches a
        # only if its middle is within its radius of that plane; b is the centre nearest to its middle. A ball of the
        # whole radius would be exact throughout and cost four times as much; half of it does because the way to a
        # neighbour hardly ever points straight at another centre: 1 in 2,000 between half and the whole is missed.
        excess = to_centres - to_centres[np.arange(len(rows)), nearest][:, None]
        reached = excess <= radius * self._apart[nearest] * (1 + 1e-6)
        bound = np.full((len(rows), 1), radius**2, np.float32)  # shrinks once a row has all it may have
        found: list[Found] = []
        pending = 0
        for cell, members in enumerate(self._members):
            near = np.flatnonzero(reached[:, cell])
            inside = self._vectors[members].astype(np.float32)
            for part in np.array_split(near, 1 + len(near) * len(members) // _PRODUCTS) if len(near) and len(members) else ():
                squared = _squared(rows[part], inside)
                row, column = np.nonzero(_within(squared, bound[part], limit))
                found.append((part[row], members[column], squared[row, column]))
                pending += len(row)
                if pending > _PENDING:
                    found = [_nearest(found, limit)]
                    pending = len(found[0][0])
                    last = np.bincount(found[0][0], minlength=len(rows)).cumsum() - 1
                    full = np.flatnonzero(np.diff(last, prepend=-1) == limit)
                    bound[full, 0] = found[0][2][last[full]]
        return _nearest(found, limit)


def _assign(vectors: NDArray[np.uint8], centres: NDArray[np.float32]) -> NDArray[np.int64]:
    """The nearest centre of each."""
    nearest = np.zeros(len(vectors), np.int64)
    for start in range(0, len(vectors), _BLOCK):
        part = slice(start, start + _BLOCK)
        nearest[part] = _squared(vectors[part].astype(np.float32), centres).argmin(axis=1)
    return nearest


def _squared(ones: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n, m) squared distances."""
    squared: NDArray[np.float32] = ones @ (-2 * others.T)
    squared += np.einsum("ij,ij->i", ones, ones)[:, None]
    squared += np.einsum("ij,ij->i", others, others)
    return squared


def _centres(vectors: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(about √n, L) by k-means on an even sample, rounded to whole numbers."""
    count = round(np.sqrt(len(vectors)))
    sample = vectors[np.linspace(0, len(vectors) - 1, min(len(vectors), 64 * count)).astype(int)]
    centres = sample[np.linspace(0, len(sample) - 1, count).astype(int)].astype(np.float32)
    for _ in range(_ROUNDS if count else 0):
        nearest = _assign(sample, centres)
        order = np.argsort(nearest, kind="stable")
        firsts = np.flatnonzero(np.diff(nearest[order], prepend=-1))
        sums = np.add.reduceat(sample[order], firsts, axis=0, dtype=np.int64)
        centres = np.rint(sums / np.diff(firsts, append=len(order))[:, None]).astype(np.float32)
    return np.asarray(centres)


def _within(squared: NDArray, bound: NDArray, limit: int) -> NDArray[np.bool_]:
    """Which pairs are within their row's bound (n, 1) and among the nearest `limit` of the row, ties to the left."""
    within: NDArray[np.bool_] = squared <= bound
    if within.sum() <= limit * len(squared) or squared.shape[1] <= limit:
        return within
    last = np.partition(squared, limit - 1, axis=1)[:, limit - 1 : limit]
    nearer, ties = squared < last, squared == last
    room = limit - nearer.sum(axis=1, keepdims=True)
    within &= nearer | (ties & (np.cumsum(ties, axis=1, dtype=np.int32) <= room))
    return within


def _nearest(found: list[Found], limit: int) -> Found:
    """Sorted by row, distance, column; at most `limit` a row."""
    if not found:
        return np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32)
    row, column, squared = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.lexsort((column, squared, row))
    row, column, squared = row[order], column[order], squared[order]
    first = np.searchsorted(row, row)
    kept = np.arange(len(row)) - first < limit
    return row[kept], column[kept], squared[kept]
