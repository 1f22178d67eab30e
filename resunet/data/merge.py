"""From what an index found to the manifest's files, written aside and put in place: M.parquet last."""

import hashlib
import heapq
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from operator import itemgetter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from resunet.data.ledger import Ledger, Scan, header_text, spans
from resunet.data.manifest import (
    FACTS,
    PATHS,
    REJECTS,
    ROWS,
    beside,
    manifest_metadata,
    path_text,
    private_aside,
    thumbnail_offsets,
)
from resunet.data.ownership import Owned, Ownership, refuse_torn_groups
from resunet.data.perceptual import SIDE
from resunet.data.pool import Fault
from resunet.data.walk import FoundFile
from resunet.files import file_aside

_BATCH = 100_000  # rows that are Python objects at a time, and of a row group


def merge(
    out: Path, ledger: Ledger, scans: Sequence[Scan], rejects: Sequence[tuple[FoundFile, Fault]], ownership: Ownership
) -> Path:
    """Write M.parquet and what stands beside it; `out`.

    Args:
        scans: all that can be read; the ledger knows their facts.
        rejects: files with the reason why they cannot, in their order.

    Raises:
        InputError: a patient in two parts of the split.
        OSError: the disk is full.
    """
    owned = [ownership.of([file.path for file in scan], ledger.headers.get(scan[0])) for scan in scans]
    refuse_torn_groups((scan[0].path, one) for scan, one in zip(scans, owned, strict=True))
    order = sorted(range(len(scans)), key=[one.id for one in owned].__getitem__)
    scans, owned = [scans[i] for i in order], [owned[i] for i in order]
    rows = ledger.rows_of(scans)
    facts = ledger.facts_at(rows)
    thumbnails = _write_thumbnails(out, ledger, rows, facts)
    _write_private(beside(out, "paths.parquet"), _paths(ledger, scans, owned, ownership), PATHS)
    _write_private(beside(out, "rejects.parquet"), _rejected(rejects), REJECTS)
    metadata = manifest_metadata(ownership.salt.fingerprint, all(one.grouped for one in owned), thumbnails.name)
    table = _rows(facts, owned, ownership).cast(ROWS).replace_schema_metadata(metadata)
    with file_aside(out) as aside:
        pq.write_table(table, aside, compression="zstd", row_group_size=_BATCH)
    for other in out.parent.iterdir():
        if other.name.startswith(beside(out, "thumbnails-").name) and other.suffix == ".npy" and other != thumbnails:
            other.unlink(missing_ok=True)
    ledger.close()
    return out


def _rows(facts: pa.Table, owned: Sequence[Owned], ownership: Ownership) -> pa.Table:
    columns = dict(zip(Owned._fields, zip(*owned, strict=True), strict=True))
    columns["mask"] = tuple(None if mask is None else ownership.mask_id(mask) for mask in columns["mask"])
    return pa.table(
        [facts.column(one.name) if one.name in FACTS.names else pa.array(columns[one.name], one.type) for one in ROWS],
        names=ROWS.names,
    )


def _paths(ledger: Ledger, scans: Sequence[Scan], owned: Sequence[Owned], ownership: Ownership) -> Iterator[pa.Table]:
    """Rows of M.paths.parquet, sorted by id and order: the scans' files, and the masks with order −1."""
    masks = {ownership.mask_id(mask): mask for mask in {one.mask for one in owned if one.mask is not None}}
    known = ledger.headers
    entries = (
        (one.id, order, path_text(file.path), file.size, file.mtime_ns, header_text(known.get(file)) if known else None)
        for scan, one in zip(scans, owned, strict=True)
        for order, file in enumerate(scan)
    )
    beside_them = ((key, -1, path_text(masks[key]), None, None, None) for key in sorted(masks))
    both = heapq.merge(entries, beside_them, key=itemgetter(0)) if masks else entries
    while some := list(islice(both, _BATCH)):
        columns = zip(*some, strict=True)
        yield pa.table([pa.array(its, field.type) for its, field in zip(columns, PATHS, strict=True)], schema=PATHS)


def _rejected(rejects: Sequence[tuple[FoundFile, Fault]]) -> Iterator[pa.Table]:
    for start in range(0, len(rejects), _BATCH):
        records = [
            {
                "path": path_text(file.path),
                "reason": fault.reason,
                "size": file.size,
                "mtime_ns": file.mtime_ns,
                "under": fault.under,
            }
            for file, fault in rejects[start : start + _BATCH]
        ]
        yield pa.Table.from_pylist(records, schema=REJECTS)


def _write_private(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    with private_aside(path) as aside, pq.ParquetWriter(aside, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)


def _write_thumbnails(out: Path, ledger: Ledger, rows: NDArray[np.int64], facts: pa.Table) -> Path:
    """All planes in the order of the rows, scattered into a mapped file; its name says which rows it belongs to."""
    offsets = thumbnail_offsets(facts.column("shape"))
    digest = hashlib.sha256()
    for chunk in facts.column("file_sha256").chunks:
        digest.update("".join(chunk.to_pylist()).encode())
    path = beside(out, f"thumbnails-{digest.hexdigest()[:12]}.npy")
    with file_aside(path) as aside:
        planes = np.lib.format.open_memmap(aside, mode="w+", dtype=np.uint8, shape=(int(offsets[-1]), SIDE, SIDE))
        if hasattr(os, "posix_fallocate"):  # a mapped file that finds the disk full kills the process
            with open(aside, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, file.seek(0, os.SEEK_END))
        for positions, own in ledger.thumbnails_at(rows):
            planes[spans(offsets[positions], offsets[positions + 1])] = own
        planes.flush()
        del planes
    return path
