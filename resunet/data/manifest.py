"""The manifest: one row a readable image or volume, in Parquet; what a person's archive holds, without naming anybody.

M.parquet             the rows, sorted by id
M.paths.parquet       id → files (mode 0600); the only place, with the rejects, that holds a path
M.rejects.parquet     path and reason of what could not be read (mode 0600)
M.thumbnails-….npy    (planes, side, side) uint8 in the order of the rows: one plane an image, three a volume; M.parquet names it
M.html                the summary

Columns are read when they are asked for: a million rows open in a moment.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from resunet.errors import InputError
from resunet.files import file_aside

SCHEMA_VERSION = 2
_PARQUET = b"PAR1"  # with which every such file begins
# What reading a scan gives, whatever it is called and whosever it is.
FACTS = pa.schema(
    [
        ("file_sha256", pa.string()),
        ("pixel_sha256", pa.string()),
        ("perceptual", pa.binary()),
        ("format", pa.string()),
        ("modality", pa.string()),
        ("shape", pa.list_(pa.int32())),  # (y, x) or (z, y, x)
        ("channels", pa.int32()),
        ("spacing", pa.list_(pa.float32())),  # mm, in the order of shape
        ("orientation", pa.string()),
        ("dtype", pa.string()),
        ("percentiles", pa.list_(pa.float32())),  # of all channels, at describe.PERCENTILES
        ("files", pa.int32()),
        ("bytes", pa.int64()),
    ]
)
ROWS = pa.schema(
    [
        ("id", pa.string()),  # HMAC of the path below the source
        *FACTS,
        ("group", pa.string()),  # HMAC of the patient's or item's name; of the path where nobody gave one
        ("study", pa.string()),  # HMACs of the DICOM UIDs
        ("series", pa.string()),
        ("mask", pa.string()),  # the mask's id in M.paths.parquet, or null
        ("split", pa.string()),  # pool, val, test, or null
        ("position", pa.float32()),  # of a file that is one slice: its place in its volume, from 0 to 1; null where nobody said
    ]
)
PATHS = pa.schema(
    [
        ("id", pa.string()),
        ("order", pa.int32()),  # of a series' files
        ("path", pa.string()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("header", pa.string()),  # what a DICOM file says of its series, as JSON, with HMACs for names; else null
    ]
)
REJECTS = pa.schema(
    [
        ("path", pa.string()),
        ("reason", pa.string()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("under", pa.string()),  # null: the file is at fault; else the limits, or "" for permissions and disks
    ]
)

_VERSION, _SALT = b"resunet.schema_version", b"resunet.salt_fingerprint"
_GROUPS, _THUMBNAILS = b"resunet.groups_known", b"resunet.thumbnails"


def beside(manifest: Path, what: str) -> Path:
    """The file `what` ('paths.parquet') that belongs to M.parquet."""
    return manifest.with_name(f"{manifest.name.removesuffix('.parquet')}.{what}")


@contextmanager
def private_aside(path: Path) -> Iterator[Path]:
    """`file_aside` for what nobody else may read, not even while it is written."""
    with file_aside(path) as aside:
        aside.touch(0o600)
        yield aside


def path_text(path: str) -> str:
    """A path as text. Bytes that are no UTF-8 become NUL and two hex digits: no path holds a NUL."""
    if path.isascii():
        return path
    return re.sub("[\udc80-\udcff]", lambda found: f"\0{ord(found[0]) & 255:02x}", path)


def path_from(text: str) -> str:
    """What `path_text` wrote."""
    if "\0" not in text:
        return text
    return os.fsdecode(re.sub(b"\0(..)", lambda found: bytes.fromhex(found[1].decode()), text.encode()))


def manifest_metadata(salt_fingerprint: str, groups_known: bool, thumbnails: str) -> dict[bytes, bytes]:
    """The metadata that M.parquet carries. thumbnails: the name of the file beside it."""
    return {
        _VERSION: str(SCHEMA_VERSION).encode(),
        _SALT: salt_fingerprint.encode(),
        _GROUPS: str(int(groups_known)).encode(),
        _THUMBNAILS: thumbnails.encode(),
    }


@dataclass(frozen=True)
class Manifest:
    """A manifest on disk.

    groups_known: every row's group is a patient or an item; otherwise some are their own group.
    """

    path: Path
    salt_fingerprint: str
    groups_known: bool
    num_rows: int
    thumbnails: Path

    def column(self, name: str) -> pa.ChunkedArray:
        """One column of the rows."""
        return self.columns(name).column(0)

    def columns(self, *names: str) -> pa.Table:
        """Some columns of the rows."""
        return pq.read_table(self.path, columns=list(names))

    @property
    def digest(self) -> str:
        """sha256 over the sorted hashes of the files: which scans these are, whatever they are called and whosever they are."""
        files = self.column("file_sha256").to_pylist()
        return hashlib.sha256("".join(sorted(files)).encode()).hexdigest()

    def rows_of(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """The row of each id; −1 where there is none."""
        found = pc.index_in(pa.array(ids, pa.string()), value_set=self._ids.combine_chunks())
        rows: NDArray[np.int64] = found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        return rows

    def files(self, row: int) -> tuple[Path, ...]:
        """The files of a row, in order."""
        return self.files_of(self._ids[row].as_py())

    def files_of(self, file_id: str) -> tuple[Path, ...]:
        """The files of an id, of a scan or of a mask.

        Raises:
            InputError: M.paths.parquet is not there, or is of another manifest.
        """
        ids, paths = self._paths
        key = np.bytes_(file_id)
        first, last = np.searchsorted(ids, key, "left"), np.searchsorted(ids, key, "right")
        if first == last:
            raise InputError(
                f"{beside(self.path, 'paths.parquet')}: has no path for an id of {self.path}. The two do not belong together: "
                "run resunet index again."
            )
        return tuple(Path(path_from(path.as_py())) for path in paths[int(first) : int(last)])

    def first_files(self) -> list[Path]:
        """The first file of every row.

        Raises:
            InputError: as `files_of`.
        """
        ids, paths = self._paths
        firsts = np.searchsorted(ids, np.array(self._ids.to_pylist(), "S32"), "left")
        return [Path(path_from(path)) for path in paths.take(pa.array(firsts)).to_pylist()]

    def thumbnail(self, row: int) -> NDArray[np.uint8]:
        """The thumbnail of a row: (1 or 3, side, side)."""
        offsets, planes = self.all_thumbnails
        return np.array(planes[offsets[row] : offsets[row + 1]])

    @cached_property
    def _ids(self) -> pa.ChunkedArray:
        return self.column("id")

    @cached_property
    def _paths(self) -> tuple[NDArray[np.bytes_], pa.ChunkedArray]:
        path = beside(self.path, "paths.parquet")
        table = _read(path, ["id", "path"], "It holds the paths of the scans: without it they cannot be found.")
        return table.column("id").to_numpy().astype("S32"), table.column("path")

    @cached_property
    def all_thumbnails(self) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Where each row's planes begin, and all planes (mapped, not read)."""
        path = self.thumbnails
        try:
            planes = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read: {error}. Run resunet index again.") from error
        offsets = thumbnail_offsets(self.column("shape"))
        if len(planes) != offsets[-1]:
            raise InputError(f"{path}: has {len(planes)} planes, {self.path} wants {offsets[-1]}. Run resunet index again.")
        return offsets, planes


def open_manifest(path: Path) -> Manifest:
    """Open M.parquet; reads its schema only.

    Raises:
        InputError: no such file, no Parquet, or no manifest of this version.
    """
    try:
        file = pq.ParquetFile(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such manifest. resunet index SOURCE --out {path} makes one.") from error
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable manifest: {error}") from error
    schema, rows = file.schema_arrow, file.metadata.num_rows
    metadata = schema.metadata or {}
    found = metadata.get(_VERSION, b"none").decode()
    if found != str(SCHEMA_VERSION) or set(schema.names) != set(ROWS.names):
        raise InputError(
            f"{path}: not a manifest of schema version {SCHEMA_VERSION} (found: {found}). Make it anew with resunet index."
        )
    thumbnails = path.with_name(metadata[_THUMBNAILS].decode())
    return Manifest(path, metadata[_SALT].decode(), metadata[_GROUPS] == b"1", rows, thumbnails)


def is_foreign(path: Path) -> bool:
    """Whether there is a file, with something in it, that is no manifest of any version, not even a damaged one: somebody's own."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    try:
        return _VERSION not in (pq.read_schema(path).metadata or {})
    except pa.ArrowException:
        with open(path, "rb") as file:
            return file.read(len(_PARQUET)) != _PARQUET


def thumbnail_offsets(shapes: pa.ChunkedArray) -> NDArray[np.int64]:
    """Where each row's planes begin among the thumbnails, and where the last ends: three for a volume that is more than a plane."""
    lengths = pc.list_value_length(shapes).to_numpy()
    sizes = pc.list_flatten(shapes).to_numpy()
    flat = np.add.reduceat(sizes == 1, np.cumsum(lengths) - lengths) if len(lengths) else lengths
    return np.concatenate([[0], np.cumsum(np.where((lengths == 3) & (flat == 0), 3, 1))])


def _read(path: Path, columns: Sequence[str], consequence: str) -> pa.Table:
    try:
        return pq.read_table(path, columns=list(columns))
    except FileNotFoundError as error:
        raise InputError(f"{path}: is missing. {consequence}") from error
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read: {error}. {consequence}") from error
