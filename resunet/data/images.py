"""Reading one scan or one mask, with nothing lost: 8, 16 and 32 bit, float, grey, colour, palette indices, geometry.

Imports no torch. A scan keeps its dtype; what converts it to float is normalisation, later.
"""

import hashlib
import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from resunet.data.dicom_pixels import read_series
from resunet.data.formats import HEAD, MAX_EXPANSION, Content, Format, guarded, refuse_bomb, sniff, sniff_head
from resunet.data.volumes import read_volume, refuse_non_finite
from resunet.errors import InputError
from resunet.files import sha256
from resunet.plain import number_of

VOLUMES = (".nii", ".nii.gz", ".nrrd", ".mha", ".mhd")
TIFFS = (".tif", ".tiff")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", *TIFFS)
READABLE = VOLUMES + IMAGES

# ITU-R BT.601, what PIL's convert("L") uses, in float so that 16 bits stay 16 bits.
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)

_ALPHA = (1, 2)  # TIFF's ExtraSamples that are opacity, associated or not

# Compressions of TIFF that cannot hold more than MAX_EXPANSION bytes in one: none, LZW, JPEG, deflate, PackBits.
_BOUND_TIFFS = (1, 5, 7, 8, 32773, 32946)

__all__ = ["READABLE", "Scan", "channel_count", "read_mask", "read_scan", "sniff", "stem_of", "suffix_of"]


@dataclass(frozen=True)
class Scan:
    """One image or volume.

    values: (C, y, x) or (C, z, y, x) of a scan, without C of a mask, in the file's own dtype. A volume is in the
        canonical frame LPS: z grows towards
        superior, y towards posterior, x towards the patient's left.
    spacing: mm per pixel in array order (y, x) or (z, y, x); 1 where the file does not say.
    pixel_sha256: of the values as the file holds them, whatever channels were asked for.
    orientation: towards where the axes x, y, z of the file run, such as 'RAS'; '' for plain images.
    modality: DICOM's, '' elsewhere.
    colour_lost: grey was asked of a colour image whose channels differ.
    """

    values: NDArray
    spacing: tuple[float, ...]
    pixel_sha256: str
    format: Format
    orientation: str
    modality: str
    colour_lost: bool = False


def suffix_of(path: Path) -> str:
    """The lower-case ending that names the format, '.nii.gz' as one."""
    return ".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix.lower()


def stem_of(path: Path) -> str:
    """The name without that ending."""
    return path.name[: len(path.name) - len(suffix_of(path))]


def channel_count(channels: str | int) -> int:
    """How many channels `read_scan` gives for 'grey', 'rgb' or a number."""
    return {"grey": 1, "rgb": 3}[channels] if isinstance(channels, str) else channels


def read_scan(files: Path | Sequence[Path], channels: str | int | None) -> Scan:
    """A scan with the channels a recipe asks for.

    Args:
        files: one file of any format, told by its content; or the slices of one DICOM series, in order.
        channels: 'grey', 'rgb', a number that must be the file's own, or None for the file's own.

    Raises:
        InputError: unreadable, NaN or infinite values, more than `MAX_BYTES`, or another number of channels. It names
            the first file.
    """
    if isinstance(files, Path):
        path, (content, format, _) = files, _read(files, indices=False)
    else:
        path, content, format = files[0], read_series(files), "dicom"
    scan = _scan(content, format, path)
    if channels is None:
        return scan
    lost = channels == "grey" and any((channel != scan.values[0]).any() for channel in scan.values[1:])
    return replace(scan, values=with_channels(scan.values, channels, path), colour_lost=lost)


def read_hashed(path: Path) -> tuple[Scan, str]:
    """A file's scan with its own channels, and the sha256 of the file: read once where it is one compressed piece.

    Raises:
        InputError: as `read_scan`.
    """
    content, format, data = _read(path, indices=False)
    scan = _scan(content, format, path)
    return scan, sha256(path) if data is None else hashlib.sha256(data).hexdigest()


def _scan(content: Content, format: Format, path: Path) -> Scan:
    refuse_non_finite(content.values, path)
    return Scan(content.values, content.spacing, _hash(content.values), format, content.orientation, content.modality)


def read_mask(path: Path) -> Scan:
    """A mask as the indices that the file stores: palette and 1-bit images are not turned into colours.

    values: (y, x) or (z, y, x), integer.

    Raises:
        InputError: unreadable, values that are not whole numbers, or a colour image.
    """
    content, format, _ = _read(path, indices=True)
    values = content.values
    if values.shape[0] > 1 and not (values == values[:1]).all():
        raise InputError(
            f"{path}: the mask has {values.shape[0]} different channels. A mask holds one class index a pixel: "
            "grey, palette or 1-bit."
        )
    mask = values[0]
    if mask.dtype.kind == "f":
        if not np.isfinite(mask).all() or (mask != np.round(mask)).any():
            raise InputError(f"{path}: the mask holds values that are not whole numbers. It must hold class indices.")
        mask = mask.astype(np.int64)
    return Scan(mask, content.spacing, _hash(values), format, content.orientation, content.modality)


def _hash(values: NDArray) -> str:
    digest = hashlib.sha256(f"{values.dtype.str}{values.shape}".encode())
    digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _read(path: Path, indices: bool) -> tuple[Content, Format, bytes | None]:
    """What is in a file; its bytes, too, where they were read in one piece.

    indices: a palette image gives its indices, not the colours they stand for.
    """
    return guarded(path, lambda: _dispatch(path, indices))


def _dispatch(path: Path, indices: bool) -> tuple[Content, Format, bytes | None]:
    with open(path, "rb", buffering=0) as file:
        head = file.read(HEAD)
        format = sniff_head(head, path)
        if format in ("png", "jpeg", "bmp"):  # one compressed piece: a second opening costs more than a small image
            data = head + file.read() if len(head) == HEAD else head
    if format in ("nifti", "nrrd", "metaimage"):
        return read_volume(path, format, head), format, None
    if format == "dicom":
        return read_series([path]), format, None
    if format == "tiff":
        return _read_tiff(path, indices), format, None
    if format is not None:
        values = _read_png(path, data, indices) if format == "png" else _read_image(path, data, indices)
        return Content(values, (1.0, 1.0)), format, data
    suffix = suffix_of(path)
    if suffix in READABLE:
        raise InputError(f"{path}: cannot be read: what is in it is no {suffix[1:]}, nor another format that is read.")
    raise InputError(f"{path}: {suffix or 'no ending'} is not a format this reads: {', '.join(READABLE)}.")


def _read_tiff(path: Path, indices: bool) -> Content:
    with tifffile.TiffFile(path) as file:
        series = file.series[0]
        page = file.pages.first
        assert isinstance(page, tifffile.TiffPage)
        expansion = 1 if page.compression == tifffile.COMPRESSION.NONE else MAX_EXPANSION
        stored = path.stat().st_size if page.compression in _BOUND_TIFFS else None
        bits = page.bitspersample if isinstance(page.bitspersample, int) else 8
        refuse_bomb(path, series.shape, series.dtype.itemsize, stored, -(-expansion * 8 // min(bits, 8)))
        values, axes = _without_bool(series.asarray()), series.axes
        palette = None if indices else page.colormap
        alpha = channel_axis_of(axes) == "S" and any(int(extra) in _ALPHA for extra in page.extrasamples)
    channel_axis = channel_axis_of(axes)
    if palette is not None:
        values = palette[:, values]
    elif channel_axis is not None:
        values = np.moveaxis(values, axes.index(channel_axis), 0)
        axes = axes.replace(channel_axis, "")
    else:
        values = values[None]
    if len(axes) not in (2, 3):
        raise InputError(f"{path}: TIFF axes {axes!r}; an image (YX), a stack of pages and colour samples are read.")
    return Content(values[:-1] if alpha else values, (1.0,) * len(axes))


def channel_axis_of(axes: str) -> str | None:
    """The axis of a TIFF that holds channels: colour samples, or ImageJ's channels."""
    return next((axis for axis in "SC" if axis in axes), None)


def _read_png(path: Path, data: bytes, indices: bool) -> NDArray:
    """PNG specification, 11.2.2: width, height, bits a sample and kind of colour stand at fixed places."""
    width, height, bits, colour = struct.unpack_from(">IIBB", data, 16)
    channels = {2: 3, 3: 3, 4: 2, 6: 4}.get(colour, 1)
    expansion = MAX_EXPANSION * (3 if colour == 3 else 1) * 8 // max(1, min(bits, 8))
    refuse_bomb(path, (height, width, channels), max(1, bits // 8), len(data), expansion)
    if bits < 8 or colour == 3:
        stretch = 255 // (2**bits - 1) if colour == 0 and 1 < bits < 8 else 1
        return _read_image(path, data, indices, expansion, stretch)
    return _channels_first(imagecodecs.png_decode(data))  # PIL cuts 16-bit colour to 8 bits


def _read_image(path: Path, data: bytes, indices: bool, expansion: int = MAX_EXPANSION, stretch: int = 1) -> NDArray:
    """`stretch`: what PIL multiplies the samples of a grey PNG of 2 or 4 bits by, to fill 0–255."""
    with Image.open(io.BytesIO(data)) as image:
        refuse_bomb(path, (*image.size[::-1], len(image.getbands())), 1, len(data), expansion)
        if image.mode in ("1", "L", "I", "F", "RGB", "RGBA", "LA") or image.mode.startswith("I;16"):
            values = _without_bool(np.asarray(image))
        elif image.mode == "P" and indices:
            values = np.asarray(image)
        else:
            values = np.asarray(image.convert("RGB"))  # palette, CMYK, YCbCr, Lab
    return _channels_first(values if stretch == 1 else values // stretch)


def _channels_first(values: NDArray) -> NDArray:
    return values[None] if values.ndim == 2 else _without_alpha(np.moveaxis(values, -1, 0))


def _without_bool(values: NDArray) -> NDArray:
    return values.astype(np.uint8) if values.dtype == bool else values


def _without_alpha(values: NDArray) -> NDArray:
    return values[:-1] if values.shape[0] in (2, 4) else values


def with_channels(values: NDArray, channels: str | int, path: Path) -> NDArray:
    """(C, *size) with the channels that are asked for: grey is the luminance of a colour image, rgb three times a grey one.

    Raises:
        InputError: another number, of `path`.
    """
    count = values.shape[0]
    if channels == "grey":
        if count == 1:
            return values
        if count == 3:
            return np.tensordot(_LUMINANCE, values.astype(np.float32), axes=1)[None]
    elif channels == "rgb":
        if count == 3:
            return values
        if count == 1:
            return np.repeat(values, 3, axis=0)
    elif count == channels:
        return values
    raise InputError(
        f"{path}: has {number_of(count, 'channel')}, {channels} is wanted: by data.channels of a recipe, or by "
        f"the model, which was trained so. Give scans that have it (channels in files of their own come as an nnU-Net data set); "
        f"a recipe can set data.channels={count}."
    )
