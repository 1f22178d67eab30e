"""Scans → their facts: hashes, geometry, intensities, and looks. What the workers of an index do. Imports no torch."""

import mimetypes
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from resunet.data.dicom import DicomHeader, read_header
from resunet.data.formats import sniff
from resunet.data.images import READABLE, Scan, read_hashed, read_scan, suffix_of
from resunet.data.manifest import FACTS
from resunet.data.perceptual import looks
from resunet.data.walk import FoundFile
from resunet.errors import InputError
from resunet.files import files_sha256
from resunet.runtime import percentiles

# Which percentiles of its values a row holds: enough to draw a histogram from.
PERCENTILES = (0.0, 0.5, 1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.5, 100.0)
DESCRIBED = pa.schema([*FACTS, ("thumbnail", pa.binary())])  # planes of (SIDE, SIDE) uint8: one of an image, three of a volume

_COUNTED = 2**18  # values of 8 bits: fewer are counted faster by PIL
_TOGETHER = 2**23  # bytes of decoded scans that are held and described at once
_ENDINGS = frozenset(mimetypes.MimeTypes().types_map[True])


_name_of = lru_cache(maxsize=None)(lambda dtype: dtype.name)  # numpy makes the name anew each time


class Pixels(NamedTuple):
    """A scan that was read, and the digest of its files."""

    files: tuple[FoundFile, ...]
    scan: Scan
    file_sha256: str


class Described(NamedTuple):
    """What opened files gave, in their order. headers: of those that are DICOM, by place; scans: DESCRIBED of the others."""

    headers: dict[int, DicomHeader]
    scans: pa.RecordBatch


def open_file(file: FoundFile) -> Pixels | DicomHeader:
    """A file that is read by itself; of a DICOM file, which may be part of a volume, the header.

    Raises:
        InputError: it cannot be read.
    """
    path = Path(file.path)
    suffix = suffix_of(path)
    if suffix not in READABLE:
        format = sniff(path)
        if format == "dicom":
            return read_header(path)
        if format is None:  # the ending only if it is a common one: those of others are part of a name
            what = f"{suffix} is not a format" if suffix in _ENDINGS else "it is no DICOM and has no ending of a format"
            raise InputError(f"{path}: {what} this reads: {', '.join(READABLE)}.")
    scan, digest = read_hashed(path)
    return read_header(path) if scan.format == "dicom" else Pixels((file,), scan, digest)  # its name said something else


def open_scan(files: tuple[FoundFile, ...]) -> Pixels:
    """The files of a DICOM series in order, or a single one, whatever it is.

    Raises:
        InputError: it cannot be read.
    """
    paths = [Path(file.path) for file in files]
    if len(paths) == 1:
        return Pixels(files, *read_hashed(paths[0]))
    return Pixels(files, read_scan(paths, None), files_sha256(paths))


def describe(opened: Iterable[Pixels | DicomHeader]) -> Described:
    """Facts of what was read; headers stay as they are. A few decoded scans are held at a time."""
    headers: dict[int, DicomHeader] = {}
    batches = list(_batches(opened, headers))
    if len(batches) > 1:
        batches = pa.Table.from_batches(batches).combine_chunks().to_batches()
    return Described(headers, batches[0])


def _batches(opened: Iterable[Pixels | DicomHeader], headers: dict[int, DicomHeader]) -> Iterator[pa.RecordBatch]:
    """At least one; `headers` are filled in."""
    held: list[Pixels] = []
    size = 0
    for place, one in enumerate(opened):
        if isinstance(one, DicomHeader):
            headers[place] = one
            continue
        held.append(one)
        size += one.scan.values.nbytes
        if size > _TOGETHER:
            yield _facts(held)
            held, size = [], 0
    yield _facts(held)


def _facts(opened: Sequence[Pixels]) -> pa.RecordBatch:
    """A row of DESCRIBED each."""
    scans = [one.scan for one in opened]
    seen = looks([scan.values for scan in scans]) if scans else []
    spread = _percentiles([scan.values for scan in scans])
    columns = {
        "file_sha256": _texts([one.file_sha256 for one in opened]),
        "pixel_sha256": _texts([scan.pixel_sha256 for scan in scans]),
        "perceptual": _bytes([look.hash for look in seen], pa.binary()),
        "format": _texts([scan.format for scan in scans]),
        "modality": _texts([scan.modality for scan in scans]),
        "shape": _lists([scan.values.shape[1:] for scan in scans], np.int32),
        "channels": _numbers([scan.values.shape[0] for scan in scans], np.int32),
        "spacing": _lists([scan.spacing for scan in scans], np.float32),
        "orientation": _texts([scan.orientation for scan in scans]),
        "dtype": _texts([_name_of(scan.values.dtype) for scan in scans]),
        "percentiles": _lists(spread.tolist(), np.float32),
        "files": _numbers([len(one.files) for one in opened], np.int32),
        "bytes": _numbers([sum(file.size for file in one.files) for one in opened], np.int64),
        "thumbnail": _bytes([look.thumbnail.tobytes() for look in seen], pa.binary()),
    }
    return pa.record_batch([columns[name] for name in DESCRIBED.names], schema=DESCRIBED)


# Arrow's columns from their buffers: `pa.array` would import pandas, a quarter of a second in each worker.


def _numbers(values: Sequence[float] | NDArray[np.int32], dtype: type[np.generic]) -> pa.Array:
    data = np.array(values, dtype)
    return pa.Array.from_buffers(pa.from_numpy_dtype(data.dtype), len(data), [None, pa.py_buffer(data)])


def _texts(values: Sequence[str]) -> pa.Array:
    return _bytes([value.encode() for value in values], pa.string())


def _bytes(values: Sequence[bytes], kind: pa.DataType) -> pa.Array:
    ends = np.cumsum([0, *map(len, values)], dtype=np.int32)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(values))])


def _lists(rows: Sequence[Sequence[float]], dtype: type[np.generic]) -> pa.Array:
    ends = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return pa.ListArray.from_arrays(_numbers(ends, np.int32), _numbers(list(chain.from_iterable(rows)), dtype))


def _percentiles(scans: Sequence[NDArray]) -> NDArray[np.float64]:
    """(n, len(PERCENTILES)): of all values of each scan."""
    found = np.empty((len(scans), len(PERCENTILES)))
    small = [i for i, values in enumerate(scans) if values.dtype == np.uint8 and values.size < _COUNTED]
    if small:  # most of many archives; PIL counts 8 bits in less than half the time
        found[small] = counted_percentiles(np.array([_histogram(scans[i]) for i in small]))
    for i in set(range(len(scans))).difference(small):
        found[i] = percentiles(scans[i], PERCENTILES)
    return found


def _histogram(values: NDArray[np.uint8]) -> list[int]:
    rows = np.ascontiguousarray(values).reshape(-1, values.shape[-1])
    return Image.frombuffer("L", rows.shape[::-1], rows, "raw", "L", 0, 1).histogram()


def counted_percentiles(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """(n, values from 0 on) how often each occurs → (n, len(PERCENTILES)), as np.percentile gives them."""
    last = np.cumsum(counts, axis=1)  # one beyond the last position of each value, were they sorted
    total = last[:, -1:]
    position = np.asarray(PERCENTILES) / 100 * (total - 1)
    below = np.floor(position).astype(np.int64)
    # one search in all rows, each shifted beyond the one before
    shift = np.arange(len(counts))[:, None] * (total.max() + 1)
    where = (last + shift).ravel()
    start = np.arange(len(counts))[:, None] * counts.shape[1]
    at = np.searchsorted(where, below + shift, side="right") - start
    after = np.searchsorted(where, np.minimum(below + 1, total - 1) + shift, side="right") - start
    found: NDArray[np.float64] = at + (after - at) * (position - below)
    return found
