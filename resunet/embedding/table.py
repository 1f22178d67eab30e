"""E.parquet: the embeddings of an archive, a row a scan or a row a slice, sorted by id. No path and no name is in it.

What they were made with is in the schema's metadata, so that embeddings of two models are never mixed.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import ValidationError

from resunet.config import Frozen, Normalisation, Precision
from resunet.errors import InputError
from resunet.files import file_aside

_KEY = b"resunet.embeddings"
_ROWS = 4096  # that are held until they are written


class EmbeddingRecord(Frozen):
    """What a table of embeddings was made with.

    model_sha256: of the weights file. salt_fingerprint: of the salt of the groups' HMACs. longest: see `EmbeddingSettings`.
    """

    schema_version: Literal[1] = 1
    model_sha256: str
    salt_fingerprint: str
    dims: int
    spatial_dims: int
    input_channels: str | int
    normalisation: Normalisation
    longest: int
    precision: Precision
    row: Literal["scan", "slice"]
    names: Literal["hash", "keep"]
    groups_known: bool
    has_splits: bool


@dataclass(frozen=True)
class Embeddings:
    """A table in memory. table: `schema_of(record)`, the embedding null where a scan has no content."""

    record: EmbeddingRecord
    table: pa.Table

    def column(self, name: str) -> list[Any]:
        values: list[Any] = self.table.column(name).to_pylist()
        return values

    def vectors(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Which rows have an embedding, and those: (n,) and (n, D)."""
        column = self.table.column("embedding").combine_chunks()
        rows = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
        flat = column.drop_null().flatten().to_numpy().reshape(len(rows), self.record.dims)
        return rows, flat


def schema_of(record: EmbeddingRecord) -> pa.Schema:
    """The columns, with the record as metadata.

    slices: how many were used, of a 3D encoder windows. slice, position: only in a table of slices.
    """
    per_slice = [("slice", pa.int32()), ("position", pa.float32())]  # of an image null, and its place what groups.csv says
    return pa.schema(
        [
            ("id", pa.string()),
            ("group", pa.string()),
            ("split", pa.string()),
            ("labelled", pa.bool_()),
            *([("slices", pa.int32())] if record.row == "scan" else per_slice),
            ("embedding", pa.list_(pa.float32(), record.dims)),
        ],
        metadata={_KEY: record.model_dump_json().encode()},
    )


@dataclass
class EmbeddingWriter:
    """Takes rows one by one, and keeps few of them."""

    writer: pq.ParquetWriter
    schema: pa.Schema
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        self.rows += rows
        if len(self.rows) >= _ROWS:
            self.flush()

    def flush(self) -> None:
        self.writer.write_table(pa.Table.from_pylist(self.rows, self.schema))
        self.rows.clear()


@contextmanager
def writing_embeddings(path: Path, record: EmbeddingRecord) -> Iterator[EmbeddingWriter]:
    """A table that stands at `path` once the block has ended, whole or not at all."""
    schema = schema_of(record)
    with file_aside(path) as aside, pq.ParquetWriter(aside, schema) as file:
        writer = EmbeddingWriter(file, schema)
        yield writer
        writer.flush()


def read_embeddings(path: Path) -> Embeddings:
    """A table that `resunet embed` wrote, in memory.

    Raises:
        InputError: no such file, or another one.
    """
    try:
        table = pq.read_table(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file. resunet embed MODEL --data SOURCE --out {path} makes it.") from error
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {error}") from error
    try:
        record = EmbeddingRecord.model_validate_json((table.schema.metadata or {}).get(_KEY, b""))
    except ValidationError as error:
        raise InputError(f"{path}: not a table of embeddings of this version; resunet embed makes one.") from error
    return Embeddings(record, table)
