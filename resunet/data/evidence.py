"""What tells that two records hold one patient or one image, and the pairs that it finds.

A group (HMAC, comparable only where one salt made both), sha256 of the files and of the pixels, and a look: hash and, where both
sides have them, thumbnails. Imports no torch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from resunet.data.manifest import Manifest
from resunet.data.perceptual import HASH_BYTES, correlations, find_candidates, is_copy

COLUMNS = ("group", "file_sha256", "pixel_sha256", "perceptual")
SCHEMA = pa.schema([(name, pa.binary() if name == "perceptual" else pa.string()) for name in COLUMNS])
_NAMED = {"group": "group", "file_sha256": "sha256 of the file", "pixel_sha256": "sha256 of the pixels"}
_BLOCK = 20_000  # candidates whose thumbnails are read together


@dataclass(frozen=True)
class Evidence:
    """One row a scan, of an archive or of what must not be in it.

    table: `SCHEMA`.
    thumbnail: the thumbnail of a row; None where there are none, as beside an encoder.
    """

    table: pa.Table
    salt_fingerprint: str
    thumbnail: Callable[[int], NDArray[np.uint8]] | None = None

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def hashes(self) -> NDArray[np.uint8]:
        """(n, HASH_BYTES), zeros where a scan carries no evidence."""
        column = self.table.column("perceptual").cast(pa.binary(HASH_BYTES)).combine_chunks()
        if not len(column):
            return np.zeros((0, HASH_BYTES), np.uint8)
        values = np.frombuffer(column.buffers()[1], np.uint8)[column.offset * HASH_BYTES :]
        return values[: len(column) * HASH_BYTES].reshape(-1, HASH_BYTES)


@dataclass(frozen=True)
class Pairs:
    """Pairs of an archive's row and a held-out row, and what speaks for each, sorted by held-out row, then archive row.

    shared: column → which pairs agree in it. distance and correlation: of the looks; NaN where they were not near.
    """

    archive: NDArray[np.int64]
    held_out: NDArray[np.int64]
    shared: dict[str, NDArray[np.bool_]]
    distance: NDArray[np.float64]
    correlation: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.archive)

    def evidence(self, pairs: NDArray[np.int64] | slice) -> tuple[str, ...]:
        """What speaks for some pairs together, in words; of several look-alikes the best."""
        words = [name for column, name in _NAMED.items() if self.shared[column][pairs].any()]
        near, verified = self.distance[pairs], self.correlation[pairs]
        if not np.isnan(verified).all():
            words.append(f"perceptual, correlation {np.nanmax(verified):.3f}")
        elif not np.isnan(near).all():
            words.append(f"perceptual, distance {np.nanmin(near):.0f} without thumbnails to verify it")
        return tuple(words)


def evidence_of(manifest: Manifest) -> Evidence:
    """A manifest's rows."""
    return Evidence(manifest.columns(*COLUMNS).select(COLUMNS), manifest.salt_fingerprint, manifest.thumbnail)


def comparable_groups(one: Evidence, other: Evidence) -> bool:
    """Whether one salt made the groups of both."""
    return one.salt_fingerprint == other.salt_fingerprint


def find_pairs(archive: Evidence, held_out: Evidence) -> Pairs:
    """All evidence that held-out scans, or others of their groups, are in an archive.

    Of a group or a hash that both sides hold many times each row is in some pair, not each with each. Hashes of images without
    any contrast are no evidence: all black images are alike.
    """
    columns = [name for name in _NAMED if name != "group" or comparable_groups(archive, held_out)]
    telling = archive.hashes().any(axis=1), held_out.hashes().any(axis=1)
    codes = {name: _codes(archive, held_out, name, *(telling if name != "group" else (None, None))) for name in columns}
    looks = _look_alikes(archive, held_out)
    found = [looks[:2]] + [_meet(*pair) for pair in codes.values()]
    width = max(len(archive), 1)  # keys in the order of the result
    keys = np.unique(np.concatenate([others.astype(np.int64) * width + rows for rows, others in found]))
    others, rows = np.divmod(keys, width)
    none = np.zeros(len(keys), bool)
    shared = {
        name: (codes[name][0][rows] == codes[name][1][others]) & (codes[name][0][rows] >= 0) if name in codes else none
        for name in _NAMED
    }
    scores = np.full((2, len(keys)), np.nan)
    scores[:, np.searchsorted(keys, looks[1].astype(np.int64) * width + looks[0])] = looks[2:]
    return Pairs(rows, others, shared, *scores)


def _look_alikes(archive: Evidence, held_out: Evidence) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Rows, held-out rows, distances and correlations (NaN without thumbnails) of verified copies."""
    rows, others, distance = find_candidates(archive.hashes(), held_out.hashes())
    if archive.thumbnail is None or held_out.thumbnail is None:
        kept = is_copy(distance, None)
        return rows[kept], others[kept], distance[kept], np.full(int(kept.sum()), np.nan)
    verified = np.concatenate(
        [np.zeros(0)]
        + [
            correlations([archive.thumbnail(int(i)) for i in rows[part]], [held_out.thumbnail(int(j)) for j in others[part]])
            for part in (slice(start, start + _BLOCK) for start in range(0, len(rows), _BLOCK))
        ]
    )
    kept = is_copy(distance, verified)
    return rows[kept], others[kept], distance[kept], verified[kept]


def _codes(
    archive: Evidence, held_out: Evidence, column: str, use: NDArray[np.bool_] | None, use_other: NDArray[np.bool_] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The column's values as numbers, equal where they are; −1 for none, or where `use` says so."""
    both = pa.chunked_array([*archive.table.column(column).chunks, *held_out.table.column(column).chunks], pa.string())
    values = both.combine_chunks()
    codes = pc.fill_null(values.dictionary_encode().indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    codes[pc.equal(values, "").fill_null(True).to_numpy(zero_copy_only=False)] = -1
    one, other = codes[: len(archive)], codes[len(archive) :]
    return (one if use is None else np.where(use, one, -1)), (other if use_other is None else np.where(use_other, other, -1))


def _meet(one: NDArray[np.int64], other: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of positions with equal codes: of m and n equal ones max(m, n) pairs, so that each is in one."""
    common = np.intersect1d(one[one >= 0], other[other >= 0])
    orders = [np.argsort(codes, kind="stable") for codes in (one, other)]
    ranges = [np.searchsorted(codes[order], [common, common + 1]) for codes, order in zip((one, other), orders, strict=True)]
    sizes = [last - first for first, last in ranges]
    counts = np.maximum(*sizes)
    turn = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # 0, 1, … for each code
    pairs = [
        order[np.repeat(first, counts) + turn % np.repeat(size, counts)]
        for order, (first, _), size in zip(orders, ranges, sizes, strict=True)
    ]
    return pairs[0], pairs[1]
