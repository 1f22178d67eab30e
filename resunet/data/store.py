"""Decoded scans on disk, in chunks: what is slow to decode (gzip, compressed DICOM) is decoded once, and crops read only theirs.

One file a scan, named by a digest of its content, so that it is never changed, only made or removed:

    preamble   magic with the format's version, length of the header, number of chunks, CRC-32 of all that and of the next two
    header     JSON: shape, dtype, chunk, facts
    index      length and CRC-32 of every chunk, little-endian uint32, in C order of the grid of chunks
    chunks     each a blosc2 buffer (bit-shuffled LZ4), or of length 0 for zeros; those at the far edges are cut, not padded

A file is written aside, synced and renamed, so that a reader sees all of it or nothing. Opening finds a file that is cut short,
too long, or damaged in header, facts or index; reading finds damage in the chunks that it reads. Nothing here unpickles.

Why not blosc2's own frames: they hold no checksums, opening one may evaluate what it says, and writing small chunks is slow.
Why not zarr, which has checksums: benchmarks/LOG.md.
"""

import errno
import fcntl
import itertools
import json
import math
import os
import re
import struct
import uuid
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from resunet.errors import EnvironmentFault

JSON = None | bool | int | float | str | Sequence["JSON"] | Mapping[str, "JSON"]

_MAGIC = b"RESUNET2"
_PREAMBLE = struct.Struct("<8sII")  # and the checksum after it
_CHECKSUM = struct.Struct("<I")
_INDEX = np.dtype("<u4")
_DTYPES = frozenset(["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64"])
_CHUNK = {2: (128, 128), 3: (32, 32, 32)}  # voxels by number of axes; see benchmarks/LOG.md
_SLICES, _FLAT = 2, (64, 64)  # the chunk of a volume that is read slice by slice: along the slices, and within one
_ASIDE = "aside"
_ATTEMPTS = 3
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Absent(KeyError):
    """The store does not hold this scan, or no longer: it was damaged and has been removed. Put it again."""


def store_key(*parts: str) -> str:
    """The key of what these strings identify (the sha256 of the files, how they are read): it holds the format's version too."""
    return sha256(b"\0".join([_MAGIC, *(part.encode() for part in parts)])).hexdigest()


class StoredScan:
    """A scan in the store, open for reading. It stays readable when its entry is removed, and may be pickled and forked."""

    def __init__(self, path: Path) -> None:
        """Raises:
        Absent: there is no such file, or it is damaged (and now removed).
        EnvironmentFault: it cannot be read.
        """
        self._path = path
        with _faults(path, "read"):
            try:
                self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                raise Absent(path.name) from None
            weakref.finalize(self, os.close, self._file)
            if not self._read_header():
                self._remove()

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredScan, (self._path,)

    def crop(self, slices: tuple[slice, ...]) -> NDArray:
        """A part of the scan, as `values[slices]` would give it, one slice of step 1 an axis (channels first).

        Raises:
            Absent: a chunk is damaged; the entry is removed.
            EnvironmentFault: it cannot be read.
        """
        assert len(slices) == len(self.shape) and all(s.step in (None, 1) for s in slices), slices
        bounds = [s.indices(n)[:2] for s, n in zip(slices, self.shape, strict=True)]
        out = np.empty([max(0, stop - start) for start, stop in bounds], self.dtype)
        # of every axis: (which chunk, its extent, what is taken of it, where that goes)
        axes = [list(_overlaps(*bound, chunk, n)) for bound, chunk, n in zip(bounds, self._chunk, self.shape, strict=True)]
        with _faults(self._path, "read"):
            for parts in itertools.product(*axes):
                where, extent, taken, given = zip(*parts, strict=True)
                out[given] = self._read_chunk(where, extent)[taken]
        return out

    def _read_header(self) -> bool:
        """Whether header and index are whole, and the file as long as they say."""
        size, begin = os.fstat(self._file).st_size, _PREAMBLE.size + _CHECKSUM.size
        if size < begin:
            return False
        preamble = os.pread(self._file, begin, 0)
        magic, length, count = _PREAMBLE.unpack_from(preamble)
        end = begin + length + count * 2 * _INDEX.itemsize
        if magic != _MAGIC or end > size:
            return False
        rest = os.pread(self._file, end - begin, begin)
        if _checksum(preamble[: _PREAMBLE.size], rest) != preamble[_PREAMBLE.size :]:
            return False
        described = json.loads(rest[:length])
        self.shape = tuple(described["shape"])
        self.dtype = np.dtype(described["dtype"]).newbyteorder("=")
        self.facts: dict[str, Any] = described["facts"]
        self._chunk = tuple(described["chunk"])
        self._grid = _grid(self.shape, self._chunk)
        lengths, self._checksums = np.frombuffer(rest, _INDEX, offset=length).reshape(2, count)
        self._offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]) + end
        return bool(self._offsets[-1] == size)

    def _read_chunk(self, where: Sequence[int], extent: Sequence[int]) -> NDArray:
        number = int(np.ravel_multi_index(tuple(where), self._grid))
        begin, end = int(self._offsets[number]), int(self._offsets[number + 1])
        packed = os.pread(self._file, end - begin, begin)
        if len(packed) != end - begin or zlib.crc32(packed) != self._checksums[number]:
            self._remove()
        if not packed:
            return np.zeros(extent, self.dtype)
        stored = self.dtype.newbyteorder("<")
        return np.frombuffer(imagecodecs.blosc2_decode(packed, numthreads=1), stored).reshape(extent)

    def _remove(self) -> None:
        """Remove this damaged entry, unless somebody has put a new one in its place, and say that it is absent."""
        try:
            if os.path.samestat(self._path.stat(), os.fstat(self._file)):
                self._path.unlink()
        except FileNotFoundError:
            pass
        raise Absent(self._path.name)


class Store:
    """A folder of scans. Any number of processes may read and fill it; it may be pickled and forked."""

    def __init__(self, folder: Path, handles: int = 64) -> None:
        """
        Args:
            handles: how many scans stay open in a process.

        Raises:
            EnvironmentFault: the folder cannot be made or read.
        """
        self.folder = folder
        self._handles = handles
        self._opened = lru_cache(handles)(lambda key: StoredScan(self._path(key)))  # an absent scan is not remembered
        with _faults(folder, "written"):
            (folder / _ASIDE).mkdir(parents=True, exist_ok=True)
        self.sweep()

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.folder, self._handles)

    def __contains__(self, key: str) -> bool:
        try:
            StoredScan(self._path(key))
        except Absent:
            return False
        return True

    def open(self, key: str) -> StoredScan:
        """A stored scan; it is kept open for the next time.

        Raises:
            Absent: it is not there, or was damaged: put it (again).
            EnvironmentFault: it cannot be read.
        """
        scan = self._opened(key)
        assert isinstance(scan, StoredScan)
        return scan

    def put(self, key: str, values: NDArray, facts: Mapping[str, JSON], slice_axis: int | None = None) -> None:
        """Keep a scan under a key, unless it is there already.

        Args:
            values: (C, *size), integers or floats.
            facts: what else is known of it, as JSON: a tuple comes back as a list.
            slice_axis: the axis of `size` along which a volume will be read slice by slice; None: as crops of any shape.

        Raises:
            EnvironmentFault: the disk is full, or the folder cannot be written.
        """
        assert values.dtype.name in _DTYPES and values.ndim in (3, 4) and values.size, (values.dtype, values.shape)
        chunk = _chunk_shape(values.shape, slice_axis)
        with _faults(self.folder, "written"):
            for attempt in range(_ATTEMPTS):
                if key in self:
                    return
                try:
                    self._write_entry(key, values, facts, chunk)
                    return
                except FileNotFoundError:  # swept from another machine that does not see this one's locks
                    if attempt + 1 == _ATTEMPTS:
                        raise

    def remove(self, key: str) -> None:
        """Forget a scan; nothing happens where it is not there."""
        self._path(key).unlink(missing_ok=True)
        self._opened.cache_clear()

    def sweep(self) -> int:
        """Remove what writers that died have left behind; how many files. What a living process writes is locked, and stays."""
        removed = 0
        with _faults(self.folder, "written"):
            for aside in (self.folder / _ASIDE).iterdir():
                try:
                    with open(aside, "rb") as file:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        aside.unlink()
                        removed += 1
                except (BlockingIOError, FileNotFoundError, PermissionError):  # being written; gone; another user's
                    continue
        return removed

    def size(self) -> tuple[int, int]:
        """How many scans there are, and their bytes on disk."""
        sizes = [path.stat().st_size for path in self.folder.glob("??/*")]
        return len(sizes), sum(sizes)

    def _path(self, key: str) -> Path:
        assert re.fullmatch(r"[0-9a-f]{8,128}", key), key
        return self.folder / key[:2] / key

    def _write_entry(self, key: str, values: NDArray, facts: Mapping[str, JSON], chunk: tuple[int, ...]) -> None:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._aside(key) as (aside, file):
            _write(file, values, facts, chunk)
            file.flush()
            os.fsync(file.fileno())
            os.replace(aside, path)
        for folder in (path.parent, self.folder):
            _sync_folder(folder)

    @contextmanager
    def _aside(self, key: str) -> Iterator[tuple[Path, BinaryIO]]:
        """A new file that is locked, and so known to have a living writer; gone afterwards unless it was renamed."""
        aside = self.folder / _ASIDE / f"{key}.{uuid.uuid4().hex}"
        aside.parent.mkdir(exist_ok=True)
        with open(aside, "xb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield aside, file
            finally:
                aside.unlink(missing_ok=True)


def _write(file: BinaryIO, values: NDArray, facts: Mapping[str, JSON], chunk: tuple[int, ...]) -> None:
    dtype = values.dtype.newbyteorder("<")
    described = {"shape": values.shape, "dtype": dtype.str, "chunk": chunk, "facts": dict(facts)}
    header = json.dumps(described, allow_nan=False, separators=(",", ":")).encode()
    grid = _grid(values.shape, chunk)
    index = np.zeros((2, math.prod(grid)), _INDEX)
    file.seek(_PREAMBLE.size + _CHECKSUM.size + len(header) + index.nbytes)
    for number, where in enumerate(np.ndindex(*grid)):
        part = values[tuple(slice(i * n, (i + 1) * n) for i, n in zip(where, chunk, strict=True))]
        packed = _packed(part.astype(dtype).tobytes(), dtype.itemsize)
        index[:, number] = len(packed), zlib.crc32(packed)
        file.write(packed)
    preamble, rest = _PREAMBLE.pack(_MAGIC, len(header), index.shape[1]), header + index.tobytes()
    file.seek(0)
    file.write(preamble + _checksum(preamble, rest) + rest)


def _packed(raw: bytes, itemsize: int) -> bytes:
    """A chunk as it is stored; nothing at all for zeros, which blosc2 encodes and cannot decode at sizes that 8 does not divide."""
    if not np.frombuffer(raw, np.uint8).any():
        return b""
    packed = imagecodecs.blosc2_encode(
        raw,
        level=5,
        compressor="lz4",
        shuffle="bitshuffle",
        splitmode="never",  # smaller: 38 % instead of 41 % of a CT
        typesize=itemsize,
        numthreads=1,
    )
    return bytes(packed)


def _checksum(preamble: bytes, rest: bytes) -> bytes:
    return _CHECKSUM.pack(zlib.crc32(rest, zlib.crc32(preamble)))


def _chunk_shape(shape: Sequence[int], slice_axis: int | None) -> tuple[int, ...]:
    size = shape[1:]
    chunk: tuple[int, ...] = _CHUNK[len(size)]
    if slice_axis is not None and len(size) == 3:
        chunk = (*_FLAT[:slice_axis], _SLICES, *_FLAT[slice_axis:])
    return (1, *(min(n, m) for n, m in zip(size, chunk, strict=True)))


def _grid(shape: Sequence[int], chunk: Sequence[int]) -> tuple[int, ...]:
    return tuple(-(-n // m) for n, m in zip(shape, chunk, strict=True))


def _overlaps(start: int, stop: int, chunk: int, size: int) -> Iterator[tuple[int, int, slice, slice]]:
    """Along one axis, the chunks that [start, stop) meets: number, extent, slice of the chunk, slice of the result."""
    for number in range(start // chunk, -(-stop // chunk)) if stop > start else ():
        first = number * chunk
        low, high = max(start, first), min(stop, first + chunk)
        yield number, min(chunk, size - first), slice(low - first, high - first), slice(low - start, high - start)


def _sync_folder(folder: Path) -> None:
    """Make a rename in a folder outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _faults(path: Path, verb: str) -> Iterator[None]:
    """The operating system's errors as faults of the environment."""
    try:
        yield
    except OSError as error:
        advice = "Free some space there, or keep the store on another disk." if error.errno in _FULL else "Check the disk."
        raise EnvironmentFault(f"{path}: the store of decoded scans cannot be {verb}: {error.strerror}. {advice}") from error
