"""One scan → its facts: hashes, geometry, intensities, and a look. What the workers of an index do. Imports no torch."""

import hashlib
import mimetypes
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resunet.data.dicom import DicomHeader, read_header
from resunet.data.formats import sniff
from resunet.data.images import READABLE, Scan, read_scan, suffix_of
from resunet.data.perceptual import look
from resunet.data.walk import FoundFile
from resunet.errors import InputError
from resunet.files import files_sha256
from resunet.runtime import counted_percentiles, percentiles

# Which percentiles of its values a row holds: enough to draw a histogram from.
PERCENTILES = (0.0, 0.5, 1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.5, 100.0)

_SMALL = 2**20  # bytes
_ENDINGS = frozenset(mimetypes.MimeTypes().types_map[True])


_name_of = lru_cache(maxsize=None)(lambda dtype: dtype.name)  # numpy makes the name anew each time


@dataclass(frozen=True)
class Described:
    """What reading a scan gave.

    facts: the columns `manifest.FACTS`.
    thumbnail: (planes, side, side) uint8; one plane of an image, three of a volume.
    """

    facts: dict[str, Any]
    thumbnail: NDArray[np.uint8]


class Pixels(NamedTuple):
    """A scan that was read, and the digest of its files."""

    files: tuple[FoundFile, ...]
    scan: Scan
    file_sha256: str


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
    pixels = open_scan((file,))
    return read_header(path) if pixels.scan.format == "dicom" else pixels  # its name said something else


def open_scan(files: tuple[FoundFile, ...]) -> Pixels:
    """A scan: a file, or the files of a DICOM series in order.

    Raises:
        InputError: it cannot be read.
    """
    paths = [Path(file.path) for file in files]
    scan = read_scan(paths[0] if len(paths) == 1 else paths, None)
    return Pixels(files, scan, _digest(files[0]) if len(files) == 1 else files_sha256(paths))


def _digest(file: FoundFile) -> str:
    """sha256 of a file; of a small one, most of an archive, in one piece, which is three times as fast."""
    if file.size > _SMALL:
        return files_sha256([Path(file.path)])
    with open(file.path, "rb", buffering=0) as opened:
        return hashlib.sha256(opened.readall()).hexdigest()


def describe(pixels: Pixels | DicomHeader) -> Described | DicomHeader:
    """What was read; a header stays as it is."""
    if isinstance(pixels, DicomHeader):
        return pixels
    scan = pixels.scan
    seen = look(scan.values)
    facts = {
        "file_sha256": pixels.file_sha256,
        "pixel_sha256": scan.pixel_sha256,
        "perceptual": seen.hash,
        "format": scan.format,
        "modality": scan.modality,
        "shape": scan.values.shape[1:],
        "channels": scan.values.shape[0],
        "spacing": scan.spacing,
        "orientation": scan.orientation,
        "dtype": _name_of(scan.values.dtype),
        "percentiles": _percentiles(scan.values),
        "files": len(pixels.files),
        "bytes": sum(file.size for file in pixels.files),
    }
    return Described(facts, seen.thumbnail)


def _percentiles(values: NDArray) -> list[float]:
    if values.dtype != np.uint8 or values.size < _SMALL // 4:
        return percentiles(values, PERCENTILES)
    # most images: PIL counts 8 bits in less than half the time
    counts = Image.fromarray(values.reshape(-1, values.shape[-1])).histogram()
    return counted_percentiles(np.array(counts), PERCENTILES)
