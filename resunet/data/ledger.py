"""What an index knows already: facts, headers and rejects of the last manifest and of runs that were killed.

What is found is written as it comes into M.parts/. Everything is keyed by files with their size and time of change, so that
what still holds of a tree is not read again. One process at a time writes a manifest.
"""

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from resunet.data.describe import DESCRIBED
from resunet.data.dicom import DicomHeader
from resunet.data.manifest import FACTS, Manifest, beside, open_manifest, path_from, path_text, private_aside
from resunet.data.perceptual import SIDE
from resunet.data.pool import Fault, Limits
from resunet.data.walk import FoundFile
from resunet.errors import InputError
from resunet.progress import say

_FLUSH_SECONDS, _FLUSH_SHARE, _FLUSH_ROWS = (1.0, 30.0), 0.05, 20_000  # a kill costs about a twentieth of what was done
_BATCH = 50_000  # rows that are Python objects at a time
_STAMP = [("path", pa.string()), ("size", pa.int64()), ("mtime_ns", pa.int64())]
_SCANS = pa.schema([*DESCRIBED, ("stamps", pa.list_(pa.struct(_STAMP)))])
# a file's header, as `header_text` writes it, or the reason why it is rejected
_FILES = pa.schema([*_STAMP, ("header", pa.string()), ("reason", pa.string()), ("under", pa.string())])
_SALT = b"resunet.salt_fingerprint"

Scan = tuple[FoundFile, ...]  # the files that are read as one


class Ledger:
    """What is known; made by `open_ledger`.

    headers: of DICOM files, with HMACs in place of names.
    hidden: DICOM files whose headers another salt hid.
    rejects: files that cannot be read, for reasons that still hold.
    """

    def __init__(self, out: Path, folder: Path, salt_fingerprint: str, limits: Limits) -> None:
        self.headers: dict[FoundFile, DicomHeader] = {}
        self.hidden: set[FoundFile] = set()
        self.rejects: dict[FoundFile, Fault] = {}
        self._folder, self._limits = folder, limits
        self._metadata = {_SALT: salt_fingerprint.encode()}
        self._facts: list[pa.Table] = []
        self._thumbnails: list[tuple[int, Path | Manifest]] = []  # from which row on they are where
        self._rows = 0
        self._row: dict[bytes, int] = {}  # key of a scan → row of the tables, one after the other
        self._new_scans: list[Scan] = []
        self._described: list[pa.RecordBatch] = []  # of the new scans, in their order
        self._new_files: list[dict[str, Any]] = []
        self._shared: dict[Any, Any] = {}  # one object for each value that many headers have
        self._opened = self._flushed = time.monotonic()
        self._restore_manifest(out)
        parts = sorted(folder.glob("*.parquet"), key=_number)
        for path in parts:
            self._restore_part(path)
        self._next = 1 + max((_number(path) for path in parts), default=-1)

    @property
    def knows_something(self) -> bool:
        """Whether anything was found before."""
        return bool(self._row or self.headers or self.hidden or self.rejects)

    def __contains__(self, scan: Scan) -> bool:
        return _key(scan) in self._row

    def add_scans(self, scans: Sequence[Scan], described: pa.RecordBatch) -> None:
        """Scans were read. described: a row of DESCRIBED each."""
        assert len(scans) == described.num_rows
        self._new_scans += scans
        self._described.append(described)
        self._flush_if_due()

    def add_header(self, file: FoundFile, header: DicomHeader) -> None:
        """A file is DICOM. header: with HMACs in place of names."""
        self.headers[file] = self._slim(header)
        self._new_files.append(_stamp(file) | {"header": header_text(header), "reason": None, "under": None})
        self._flush_if_due()

    def add_reject(self, file: FoundFile, fault: Fault) -> None:
        """A file cannot be read."""
        self.rejects[file] = fault
        self._new_files.append(_stamp(file) | {"header": None, "reason": fault.reason, "under": fault.under})
        self._flush_if_due()

    def flush(self) -> None:
        """Write what is new."""
        if self._new_scans:
            table = pa.Table.from_batches(self._described, DESCRIBED).combine_chunks()
            path = self._write("scans", table.append_column("stamps", _stamps(self._new_scans)).cast(_SCANS))
            self._adopt(table.select(FACTS.names), [_key(scan) for scan in self._new_scans], path)
            self._new_scans, self._described = [], []
        if self._new_files:
            self._write("files", pa.Table.from_pylist(self._new_files, schema=_FILES))
            self._new_files = []
        self._flushed = time.monotonic()

    def rows_of(self, scans: Sequence[Scan]) -> NDArray[np.int64]:
        """Where the ledger has what is known of each scan; −1 where nothing is."""
        return np.array([self._row.get(_key(scan), -1) for scan in scans], np.int64)

    def facts_at(self, rows: NDArray[np.int64]) -> pa.Table:
        """The facts of known scans, in the order of `rows`."""
        everything = pa.concat_tables(self._facts) if self._facts else FACTS.empty_table()
        return everything.take(pa.array(rows))

    def thumbnails_at(self, rows: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
        """(positions in `rows`, their planes one after the other), a part at a time: memory stays flat."""
        order = np.argsort(rows, kind="stable")
        starts = [start for start, _ in self._thumbnails]
        for (start, source), its in zip(
            self._thumbnails, np.split(order, np.searchsorted(rows[order], starts[1:])), strict=True
        ):
            if not len(its):
                continue
            known = source if isinstance(source, Manifest) else pq.read_table(source, columns=["thumbnail"]).column(0)
            for first in range(0, len(its), _BATCH):
                some = its[first : first + _BATCH]
                yield some, _planes(known, rows[some] - start)

    def close(self) -> None:
        """The manifest stands: the parts are no longer needed."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, name: str, table: pa.Table) -> Path:
        path = self._folder / f"{name}-{self._next:06d}.parquet"
        with private_aside(path) as aside:  # hashes and thumbnails do not repeat
            pq.write_table(table.replace_schema_metadata(self._metadata), aside, compression="zstd", use_dictionary=False)
        self._next += 1
        return path

    def _flush_if_due(self) -> None:
        now = time.monotonic()
        pause = float(np.clip(_FLUSH_SHARE * (now - self._opened), *_FLUSH_SECONDS))
        if now - self._flushed > pause or len(self._new_scans) + len(self._new_files) >= _FLUSH_ROWS:
            self.flush()

    def _adopt(self, facts: pa.Table, keys: Iterable[bytes], thumbnails: Path | Manifest) -> None:
        """Facts become known; a later table has the last word on a scan."""
        self._row.update((key, self._rows + i) for i, key in enumerate(keys))
        self._thumbnails.append((self._rows, thumbnails))
        self._facts.append(facts.replace_schema_metadata(None))
        self._rows += facts.num_rows

    def _restore_part(self, path: Path) -> None:
        try:
            schema = pq.read_schema(path)
            if schema.equals(_SCANS):
                table = pq.read_table(path, columns=[*FACTS.names, "stamps"])
                stamps = table.column("stamps").combine_chunks()
                files = _found(pa.Table.from_struct_array(stamps.flatten()))
                lengths = pc.list_value_length(stamps).to_pylist()
                self._adopt(table.select(FACTS.names), [_key(tuple(islice(files, length))) for length in lengths], path)
            elif schema.equals(_FILES):
                self._restore_files(pq.read_table(path), (schema.metadata or {}).get(_SALT))
        except (pa.ArrowException, OSError):  # of another version, or damaged: found again
            return

    def _restore_files(self, table: pa.Table, salt_fingerprint: bytes | None) -> None:
        """Headers, unless another salt hid their names; and rejects, unless other limits made them."""
        same_salt = salt_fingerprint == self._metadata[_SALT]
        columns = (table.column(name).to_pylist() for name in ("header", "reason", "under"))
        for file, header, reason, under in zip(_found(table), *columns, strict=True):
            if reason is not None:
                if under in (None, str(self._limits)):
                    self.rejects[file] = Fault(reason, under)
            elif same_salt:
                self.headers[file] = self._slim(header_from(header))
            else:
                self.hidden.add(file)

    def _restore_manifest(self, out: Path) -> None:
        if not out.exists():
            return
        try:
            manifest = open_manifest(out)
            paths = pq.read_table(beside(out, "paths.parquet"))
            rejects = pq.read_table(beside(out, "rejects.parquet"))
            manifest.all_thumbnails  # noqa: B018 (are they there?)
            facts = manifest.columns(*FACTS.names)
            ids = manifest.column("id").to_pylist()
            self._restore_files(rejects.append_column("header", pa.nulls(rejects.num_rows, pa.string())), None)
            files = paths.filter(pc.greater_equal(paths.column("order"), 0))
            headers = files.filter(files.column("header").is_valid())
            for name in ("reason", "under"):
                headers = headers.append_column(name, pa.nulls(headers.num_rows, pa.string()))
            self._restore_files(headers, manifest.salt_fingerprint.encode())
        except (InputError, OSError, KeyError, pa.ArrowException) as error:
            say(f"{out}: is not used, everything is read again: {error}")
            return
        stamps: dict[str, list[FoundFile]] = {}
        for key, file in zip(files.column("id").to_pylist(), _found(files), strict=True):  # sorted by id and order
            stamps.setdefault(key, []).append(file)
        self._adopt(facts.select(FACTS.names), [_key(tuple(stamps.get(key, ()))) for key in ids], manifest)

    def _slim(self, header: DicomHeader) -> DicomHeader:
        """The header, sharing its texts with others of its series: a million of them have to be held."""
        shared = {name: getattr(header, name) for name in ("patient", "study", "series", "modality", "stack", "phases")}
        return replace(header, **{name: self._shared.setdefault(value, value) for name, value in shared.items()})


@contextmanager
def open_ledger(out: Path, salt_fingerprint: str, limits: Limits) -> Iterator[Ledger]:
    """What is known for `out`, the manifest that it came from and will go into; on leaving, what is new is written.

    Args:
        salt_fingerprint, limits: of this run: headers that another salt hid, and rejects that other limits made, are not
            known.

    Raises:
        InputError: another process writes the same manifest.
        OSError: the folder cannot be written.
    """
    folder = beside(out, "parts")
    out.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder, out):
        _sweep(out)
        ledger = Ledger(out, folder, salt_fingerprint, limits)
        try:
            yield ledger
        finally:
            ledger.flush()
            if not any(folder.glob("*.parquet")):
                ledger.close()


@contextmanager
def _locked(folder: Path, out: Path) -> Iterator[None]:
    """Hold `folder` for this process: the kernel lets go when it ends, however it ends."""
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)  # paths are in it
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    f"--out {out}: another resunet index is writing it. Wait for it, or name another file."
                ) from error
            if not _is_at(descriptor, folder / "lock"):  # the other one ended in between and took the folder away
                continue
            yield
            return
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _sweep(out: Path) -> None:
    """Take away what a killed run had written aside."""
    stem = re.escape(out.name.removesuffix(".parquet"))
    left = re.compile(rf"\.{stem}\.(parquet|(paths|rejects)\.parquet|html|thumbnails-[0-9a-f]+\.npy)\.[0-9a-f]{{32}}")
    for path in out.parent.iterdir():
        if left.fullmatch(path.name):
            path.unlink(missing_ok=True)


def header_text(header: DicomHeader | None) -> str | None:
    """A header as it is kept: JSON."""
    return None if header is None else json.dumps(asdict(header))


def header_from(text: str) -> DicomHeader:
    """What `header_text` wrote."""
    values: dict[str, Any] = json.loads(text)
    return DicomHeader(**values | {"phases": tuple(values["phases"])})


def _key(scan: Scan) -> bytes:
    """What stands for a scan's files as they are: 16 bytes, where a million tuples would fill the memory."""
    stamps = "\0".join(f"{path}\0{size}\0{mtime_ns}" for path, size, mtime_ns in scan)  # no path holds a NUL
    return blake2b(stamps.encode(errors="surrogateescape"), digest_size=16).digest()


def _number(path: Path) -> int:
    """Of a part: they are read in the order in which they were written."""
    digits = path.stem.rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1


def _stamp(file: FoundFile) -> dict[str, Any]:
    return {"path": path_text(file.path), "size": file.size, "mtime_ns": file.mtime_ns}


def _stamps(scans: Sequence[Scan]) -> pa.ListArray:
    """The files of each scan, as `_SCANS` keeps them."""
    files = [file for scan in scans for file in scan]
    columns = ([path_text(file.path) for file in files], [file.size for file in files], [file.mtime_ns for file in files])
    arrays = [pa.array(its, kind) for its, (_, kind) in zip(columns, _STAMP, strict=True)]
    ends = np.cumsum([0, *map(len, scans)]).astype(np.int32)
    return pa.ListArray.from_arrays(ends, pa.StructArray.from_arrays(arrays, [name for name, _ in _STAMP]))


def _found(table: pa.Table) -> Iterator[FoundFile]:
    """The files of rows that have the columns of _STAMP."""
    for batch in table.select([name for name, _ in _STAMP]).to_batches(max_chunksize=_BATCH):
        for path, size, mtime_ns in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            yield FoundFile(path_from(path), size, mtime_ns)


def _planes(source: pa.ChunkedArray | Manifest, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The planes of some rows' thumbnails, one after the other."""
    if isinstance(source, Manifest):
        offsets, planes = source.all_thumbnails
        return np.asarray(planes[spans(offsets[rows], offsets[rows + 1])])
    data = b"".join(source.take(pa.array(rows)).to_pylist())
    return np.frombuffer(data, np.uint8).reshape(-1, SIDE, SIDE)


def spans(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """The indices of several spans, one after the other."""
    lengths = ends - starts
    before = np.cumsum(lengths) - lengths
    found: NDArray[np.int64] = np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)
    return found
