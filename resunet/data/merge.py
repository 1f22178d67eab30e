"""From what an index found to the manifest's files, written aside and put in place: M.parquet last."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from resunet.data.ledger import Ledger, Scan, header_text
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
    order = sorted(range(len(scans)), key=lambda i: owned[i].id)
    scans, owned = [scans[i] for i in order], [owned[i] for i in order]
    facts = ledger.facts_of(scans)
    thumbnails = _write_thumbnails(out, ledger, scans, facts)
    _write_private(beside(out, "paths.parquet"), _paths(ledger, scans, owned, ownership), PATHS)
    _write_private(beside(out, "rejects.parquet"), map(_rejected, rejects), REJECTS)
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
    columns = {
        "id": (one.id for one in owned),
        "group": (one.group for one in owned),
        "study": (one.study for one in owned),
        "series": (one.series for one in owned),
        "mask": (ownership.mask_id(one.mask) if one.mask is not None else None for one in owned),
        "split": (one.split for one in owned),
    }
    table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    for name in FACTS.names:
        table = table.append_column(FACTS.field(name), facts.column(name))
    return table.select(ROWS.names)


def _paths(ledger: Ledger, scans: Sequence[Scan], owned: Sequence[Owned], ownership: Ownership) -> Iterator[dict[str, Any]]:
    """Rows of M.paths.parquet, sorted by id and order: the scans' files, and the masks with order −1."""
    masks = {ownership.mask_id(mask): mask for mask in {one.mask for one in owned if one.mask is not None}}
    ahead = sorted(masks, reverse=True)
    for scan, one in zip(scans, owned, strict=True):
        while ahead and ahead[-1] < one.id:
            yield _mask(ahead[-1], masks[ahead.pop()])
        for order, file in enumerate(scan):
            yield {
                "id": one.id,
                "order": order,
                "path": path_text(file.path),
                "size": file.size,
                "mtime_ns": file.mtime_ns,
                "header": header_text(ledger.headers.get(file)),
            }
    yield from (_mask(key, masks[key]) for key in reversed(ahead))


def _mask(key: str, path: str) -> dict[str, Any]:
    return {"id": key, "order": -1, "path": path_text(path)}


def _rejected(one: tuple[FoundFile, Fault]) -> dict[str, Any]:
    file, fault = one
    return {
        "path": path_text(file.path),
        "reason": fault.reason,
        "size": file.size,
        "mtime_ns": file.mtime_ns,
        "under": fault.under,
    }


def _write_private(path: Path, records: Iterable[dict[str, Any]], schema: pa.Schema) -> None:
    left = iter(records)
    with private_aside(path) as aside, pq.ParquetWriter(aside, schema, compression="zstd") as writer:
        while batch := list(islice(left, _BATCH)):
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))


def _write_thumbnails(out: Path, ledger: Ledger, scans: Sequence[Scan], facts: pa.Table) -> Path:
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
        for position, data in ledger.thumbnails_of(scans):
            own = np.frombuffer(data, np.uint8).reshape(-1, SIDE, SIDE)
            planes[offsets[position] : offsets[position + 1]] = own
        planes.flush()
        del planes
    return path
