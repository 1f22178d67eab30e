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
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from resunet.data.describe import Described
from resunet.data.dicom import DicomHeader
from resunet.data.manifest import FACTS, Manifest, beside, open_manifest, path_from, path_text, private_aside
from resunet.data.pool import Fault, Limits
from resunet.data.walk import FoundFile
from resunet.errors import InputError
from resunet.progress import say

_FLUSH_SECONDS, _FLUSH_SHARE, _FLUSH_ROWS = (1.0, 30.0), 0.05, 20_000  # a kill costs about a twentieth of what was done
_BATCH = 50_000  # rows that are Python objects at a time
_STAMP = [("path", pa.string()), ("size", pa.int64()), ("mtime_ns", pa.int64())]
_SCANS = pa.schema([*FACTS, ("stamps", pa.list_(pa.struct(_STAMP))), ("thumbnail", pa.binary())])
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
        self._new_scans: list[tuple[Scan, Described]] = []
        self._new_files: list[dict[str, Any]] = []
        self._shared: dict[Any, Any] = {}  # one object for each value that many headers have
        self._opened = self._flushed = time.monotonic()
        self._restore_manifest(out)
        parts = sorted(folder.glob("*.parquet"), key=_number)
        for path in parts:
            self._restore_part(path)
        self._next = 1 + max((_number(path) for path in parts), default=-1)

    def __contains__(self, scan: Scan) -> bool:
        return _key(scan) in self._row

    def add_scan(self, scan: Scan, described: Described) -> None:
        """A scan was read."""
        self._new_scans.append((scan, described))
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
            records = [
                one.facts | {"stamps": [_stamp(file) for file in scan], "thumbnail": one.thumbnail.tobytes()}
                for scan, one in self._new_scans
            ]
            path, table = self._write("scans", records, _SCANS)
            self._adopt(table.select(FACTS.names), [_key(scan) for scan, _ in self._new_scans], path)
            self._new_scans.clear()
        if self._new_files:
            self._write("files", self._new_files, _FILES)
            self._new_files.clear()
        self._flushed = time.monotonic()

    def facts_of(self, scans: Sequence[Scan]) -> pa.Table:
        """The facts of known scans, in their order."""
        everything = pa.concat_tables(self._facts) if self._facts else FACTS.empty_table()
        return everything.take(pa.array(self._rows_of(scans)))

    def thumbnails_of(self, scans: Sequence[Scan]) -> Iterator[tuple[int, bytes]]:
        """(position in `scans`, bytes of the planes), a part at a time: memory stays flat."""
        rows = self._rows_of(scans)
        order = np.argsort(rows)
        starts = [start for start, _ in self._thumbnails]
        for (start, source), its in zip(
            self._thumbnails, np.split(order, np.searchsorted(rows[order], starts[1:])), strict=True
        ):
            if isinstance(source, Manifest):
                yield from ((int(i), source.thumbnail(int(rows[i]) - start).tobytes()) for i in its)
            elif len(its):
                column = pq.read_table(source, columns=["thumbnail"]).column(0)
                yield from ((int(i), column[int(rows[i]) - start].as_py()) for i in its)

    def close(self) -> None:
        """The manifest stands: the parts are no longer needed."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, name: str, records: list[dict[str, Any]], schema: pa.Schema) -> tuple[Path, pa.Table]:
        path = self._folder / f"{name}-{self._next:06d}.parquet"
        table = pa.Table.from_pylist(records, schema=schema.with_metadata(self._metadata))
        with private_aside(path) as aside:
            pq.write_table(table, aside, compression="zstd")
        self._next += 1
        return path, table

    def _rows_of(self, scans: Sequence[Scan]) -> NDArray[np.int64]:
        return np.array([self._row[_key(scan)] for scan in scans], np.int64)

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
                scans = (tuple(_found(stamp) for stamp in stamps) for stamps in table.column("stamps").to_pylist())
                self._adopt(table.select(FACTS.names), [_key(scan) for scan in scans], path)
            elif schema.equals(_FILES):
                self._restore_files(pq.read_table(path), (schema.metadata or {}).get(_SALT))
        except (pa.ArrowException, OSError):  # of another version, or damaged: found again
            return

    def _restore_files(self, table: pa.Table, salt_fingerprint: bytes | None) -> None:
        """Headers, unless another salt hid their names; and rejects, unless other limits made them."""
        same_salt = salt_fingerprint == self._metadata[_SALT]
        for record in _records(table):
            file = _found(record)
            if record["reason"] is not None:
                if record["under"] in (None, str(self._limits)):
                    self.rejects[file] = Fault(record["reason"], record["under"])
            elif same_salt:
                self.headers[file] = self._slim(header_from(record["header"]))
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
        for record in _records(files.select(["id", "order", "path", "size", "mtime_ns"])):  # sorted by id and order
            stamps.setdefault(record["id"], []).append(_found(record))
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
    stamps = [(file.path, file.size, file.mtime_ns) for file in scan]
    return blake2b(repr(stamps).encode(errors="surrogateescape"), digest_size=16).digest()


def _number(path: Path) -> int:
    """Of a part: they are read in the order in which they were written."""
    digits = path.stem.rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1


def _stamp(file: FoundFile) -> dict[str, Any]:
    return {"path": path_text(file.path), "size": file.size, "mtime_ns": file.mtime_ns}


def _found(stamp: dict[str, Any]) -> FoundFile:
    return FoundFile(path_from(stamp["path"]), stamp["size"], stamp["mtime_ns"])


def _records(table: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=_BATCH):
        yield from batch.to_pylist()
