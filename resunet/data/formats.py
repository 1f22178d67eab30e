"""What a file is, told by its first bytes; what is refused before a reader may allocate; readers kept quiet.

Names say little in an archive: series have no endings, and an ending may be wrong.
"""

import logging
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, TypeVar

import SimpleITK as sitk
from numpy.typing import NDArray
from PIL import Image

from resunet.errors import InputError, ResUNetError

Format = Literal["nifti", "nrrd", "metaimage", "dicom", "png", "jpeg", "tiff", "bmp"]

HEAD = 1024  # bytes that `sniff` looks at

# Decoded bytes of one scan. Whole-body CT (512²·2000·2) is 1 GiB; reading, hashing and orienting hold two or three copies.
MAX_BYTES = 2**32

# Decoded bytes for each byte in the file. Deflate reaches 1032; LZW 1366; JPEG with one bit a block and channel 1024.
MAX_EXPANSION = 2048

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_META = re.compile(rb"\s*(Comment|ObjectType|ObjectSubType|NDims)\s*=")
_DICOM_NAMES = (".dcm", ".ima", ".dicom", ".dic")

# pydicom and PIL warn of what they read all the same; tifffile and nibabel log it. Where a warning carries a value of a
# header it would print what nobody may see.
_NOISY = r"(pydicom|PIL|tifffile|nibabel|imagecodecs|pylibjpeg|openjpeg|rle|jpeg_ls|resunet\.data)(\.|$)"
for _name in ("pydicom", "tifffile", "nibabel", "nibabel.global", "PIL"):
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)
sitk.ProcessObject.SetGlobalWarningDisplay(False)
Image.MAX_IMAGE_PIXELS = None  # PIL's limit warns at 89 million pixels and raises at twice that; `refuse_bomb` stands for it

_QUOTED = re.compile(r"(?<!\w)'.*?('(?!\w)|$)|\".*?(\"|$)")
_ADDRESS = re.compile(r"\(?0x[0-9a-f]{6,}\)?")

T = TypeVar("T")


@dataclass(frozen=True)
class Content:
    """What a reader found. values: (C, y, x) or (C, z, y, x); spacing in mm in array order."""

    values: NDArray
    spacing: tuple[float, ...]
    orientation: str = ""
    modality: str = ""


def sniff(path: Path) -> Format | None:
    """The format that a file's first bytes say, None for what is not read here. Reads `HEAD` bytes.

    Raises:
        InputError: no such file, or no permission.
    """

    def head() -> bytes:
        with open(path, "rb", buffering=0) as file:
            return file.read(HEAD)

    return sniff_head(guarded(path, head), path)


def sniff_head(head: bytes, path: Path) -> Format | None:
    """The same, of the first `HEAD` bytes. The name decides only for DICOM without a preamble."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head[128:132] == b"DICM":
        return "dicom"
    if head.startswith(_TIFF):
        return "tiff"
    if head.startswith(b"BM") and head[6:10] == b"\0\0\0\0" and len(head) > 26:
        return "bmp"
    if head.startswith(b"NRRD0"):
        return "nrrd"
    if _META.match(head) and b"NDims" in head:
        return "metaimage"
    if _is_nifti(_inflated(head) if head.startswith(b"\x1f\x8b") else head):
        return "nifti"
    return "dicom" if _may_be_dicom(path) and _starts_a_dataset(head) else None


def _inflated(head: bytes) -> bytes:
    try:
        return zlib.decompressobj(wbits=31).decompress(head, HEAD)
    except zlib.error:
        return b""


def _is_nifti(head: bytes) -> bool:
    return head[344:348] == b"n+1\0" or head[4:8] == b"n+2\0"


def _may_be_dicom(path: Path) -> bool:
    suffix = path.suffix.lower()
    return suffix in _DICOM_NAMES or suffix[1:].isdigit() or not suffix  # 1.2.840.10008 is a UID, not an ending


def _starts_a_dataset(head: bytes) -> bool:
    """Whether the bytes begin with a data element of group 2 or 8, in either byte order, with or without a VR."""
    if len(head) < 16:
        return False
    for order in "<>":
        group, element, length = struct.unpack(f"{order}HHI", head[:8])
        if group in (2, 8) and element < 0x1000:
            explicit = head[4:6].isalpha() and head[4:6].isupper()
            return explicit or (length < 256 and length % 2 == 0)
    return False


def refuse_bomb(path: Path, shape: Sequence[int], itemsize: int, stored: int | None, expansion: int = MAX_EXPANSION) -> None:
    """Refuse what would decode to more than a scan may hold, or than its file can hold.

    Args:
        shape: of the decoded array, any order.
        itemsize: bytes a value.
        stored: bytes in the file; None where the coder has no bound.
        expansion: decoded bytes for each of them at most; 1 where nothing is compressed.
    """
    size = itemsize
    for length in shape:
        size *= int(length)  # Python's integers: a product of 32-bit sizes would wrap
    sizes = " × ".join(str(length) for length in shape)
    if size <= 0:
        raise InputError(f"{path}: cannot be read: the header says {sizes} values; every size must be above 0.")
    if size > MAX_BYTES:
        raise InputError(
            f"{path}: cannot be read: the header says {sizes} values, {size} bytes; a scan may have {MAX_BYTES}. "
            "Crop or split it."
        )
    if stored is not None and size > expansion * stored:
        raise InputError(
            f"{path}: cannot be read: the header says {sizes} values, {size} bytes, which {stored} bytes in the file cannot hold. "
            "It is damaged or cut off: copy it again, or remove it."
        )


def guarded(path: Path, reader: Callable[[], T], says: bool = True) -> T:
    """Run a reader quietly; whatever it raises is the file's fault.

    Args:
        says: give the library's own words, which may not be done where they may quote a patient's header.
    """
    _hush()
    try:
        return reader()
    except (ResUNetError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file.") from error
    except OSError as error:
        why = error.strerror or (_words(error, path) if says else type(error).__name__)
        raise InputError(f"{path}: cannot be read: {why}") from error
    except BaseException as error:  # each library has error types of its own; a panic in Rust is not even an Exception
        why = f": {_words(error, path)}" if says else ""
        raise InputError(f"{path}: cannot be read: {type(error).__name__}{why}") from error


def _words(error: BaseException, path: Path) -> str:
    """A library's message without what may name a person: the path, and what it quotes from the file."""
    text = " ".join(str(error).split()).rpartition("ITK ERROR: ")[2]
    text = _QUOTED.sub("'…'", _ADDRESS.sub("", text))
    for name in (str(path), path.name):
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "the file", text)
    return text[-300:].strip()


def _hush() -> None:
    """Put our filter of third parties' warnings in front, once.

    Not `warnings.catch_warnings`, which swaps the whole process's filters and is not thread-safe.
    """
    first = warnings.filters[0][3] if warnings.filters else None
    if not isinstance(first, re.Pattern) or first.pattern != _NOISY:
        warnings.filterwarnings("ignore", module=_NOISY)


@contextmanager
def named(path: Path, suffix: str) -> Iterator[str]:
    """A path to the file under a name with this ending, for libraries that go by the name."""
    if path.name.lower().endswith(suffix):
        yield str(path)
        return
    with TemporaryDirectory() as folder:
        link = Path(folder) / f"scan{suffix}"
        link.symlink_to(path.absolute())
        yield str(link)
