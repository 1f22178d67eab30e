"""Reading one scan or one mask, with nothing lost: 8, 16 and 32 bit, float, grey, colour, palette indices, geometry.

Imports no torch. A scan keeps its dtype; what converts it to float is normalisation, later.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import imagecodecs
import nibabel
import numpy as np
import SimpleITK as sitk
import tifffile
from numpy.typing import NDArray
from PIL import Image

from resunet.errors import InputError

VOLUMES = (".nii", ".nii.gz", ".nrrd", ".mha", ".mhd")
TIFFS = (".tif", ".tiff")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", *TIFFS)
READABLE = VOLUMES + IMAGES

# ITU-R BT.601, what PIL's convert("L") uses, in float so that 16 bits stay 16 bits.
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)

_ALPHA = (1, 2)  # TIFF's ExtraSamples that are opacity, associated or not

T = TypeVar("T")


@dataclass(frozen=True)
class Scan:
    """One image or volume.

    values: (C, y, x) or (C, z, y, x) of a scan, without C of a mask, in the file's own dtype. A volume is in the
        canonical frame LPS: z grows towards
        superior, y towards posterior, x towards the patient's left.
    spacing: mm per pixel in array order (y, x) or (z, y, x); 1 where the file does not say.
    pixel_sha256: of the values as the file holds them, whatever channels were asked for.
    """

    values: NDArray
    spacing: tuple[float, ...]
    pixel_sha256: str


def suffix_of(path: Path) -> str:
    """The lower-case ending that names the format, '.nii.gz' as one."""
    return ".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix.lower()


def stem_of(path: Path) -> str:
    """The name without that ending."""
    return path.name[: len(path.name) - len(suffix_of(path))]


def channel_count(channels: str | int) -> int:
    """How many channels `read_scan` gives for 'grey', 'rgb' or a number."""
    return {"grey": 1, "rgb": 3}[channels] if isinstance(channels, str) else channels


def read_scan(path: Path, channels: str | int) -> Scan:
    """A scan with the channels a recipe asks for: 'grey', 'rgb', or a number that must be the file's own.

    Raises:
        InputError: unreadable, NaN or infinite values, or another number of channels.
    """
    values, spacing = _read(path, indices=False)
    _refuse_non_finite(values, path)
    return Scan(_with_channels(values, channels, path), spacing, _hash(values))


def read_mask(path: Path) -> Scan:
    """A mask as the indices that the file stores: palette and 1-bit images are not turned into colours.

    values: (y, x) or (z, y, x), integer.

    Raises:
        InputError: unreadable, values that are not whole numbers, or a colour image.
    """
    values, spacing = _read(path, indices=True)
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
    return Scan(mask, spacing, _hash(values))


def _hash(values: NDArray) -> str:
    return hashlib.sha256(f"{values.dtype.str}{values.shape}".encode() + np.ascontiguousarray(values).tobytes()).hexdigest()


def _read(path: Path, indices: bool) -> tuple[NDArray, tuple[float, ...]]:
    """(C, *size) and spacing. `indices`: a palette image gives its indices, not the colours they stand for."""
    suffix = suffix_of(path)
    if suffix in VOLUMES:
        return _guarded(path, _read_volume)
    if suffix in TIFFS:
        return _guarded(path, lambda path: _read_tiff(path, indices))
    if suffix in IMAGES:
        return _guarded(path, lambda path: _read_image(path, indices))
    raise InputError(f"{path}: {suffix or 'no ending'} is not a format this reads: {', '.join(READABLE)}.")


def _guarded(path: Path, reader: Callable[[Path], T]) -> T:
    try:
        return reader(path)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file.") from error
    except Exception as error:  # each library has error types of its own, some of them bare RuntimeErrors
        raise InputError(f"{path}: cannot be read: {type(error).__name__}: {str(error).strip()[:300]}") from error


def _read_volume(path: Path) -> tuple[NDArray, tuple[float, ...]]:
    image = sitk.ReadImage(str(path))
    if image.GetDimension() == 3:
        image = sitk.DICOMOrient(image, "LPS")
    values = sitk.GetArrayFromImage(image)
    if suffix_of(path) in (".nii", ".nii.gz"):
        _refuse_what_itk_hides(path)
    spacing = tuple(float(s) for s in image.GetSpacing()[::-1])
    if image.GetDimension() not in (2, 3):
        raise InputError(f"{path}: has {image.GetDimension()} dimensions; images of 2 and volumes of 3 are read.")
    if min(spacing) <= 0:
        raise InputError(f"{path}: spacing {spacing} mm; every spacing must be above 0.")
    values = np.moveaxis(values, -1, 0) if image.GetNumberOfComponentsPerPixel() > 1 else values[None]
    if values.ndim == 4 and values.shape[1] == 1:  # a 2D image in a volume format
        return values[:, 0], spacing[1:]
    return values, spacing


def _refuse_what_itk_hides(path: Path) -> None:
    """ITK's NIfTI reader turns NaN into 0 and makes up the end of a truncated file; nibabel does neither."""
    image = nibabel.load(path)
    assert isinstance(image, nibabel.spatialimages.SpatialImage)
    _refuse_non_finite(np.asanyarray(image.dataobj), path)


def _refuse_non_finite(values: NDArray, path: Path) -> None:
    bad = int(values.size - np.isfinite(values).sum()) if values.dtype.kind == "f" else 0
    if bad:
        raise InputError(f"{path}: {bad} of {values.size} values are NaN or infinite. Repair or remove the file.")


def _read_tiff(path: Path, indices: bool) -> tuple[NDArray, tuple[float, ...]]:
    with tifffile.TiffFile(path) as file:
        series = file.series[0]
        values, axes = _without_bool(series.asarray()), series.axes
        page = file.pages.first
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
    return values[:-1] if alpha else values, (1.0,) * len(axes)


def channel_axis_of(axes: str) -> str | None:
    """The axis of a TIFF that holds channels: colour samples, or ImageJ's channels."""
    return next((axis for axis in "SC" if axis in axes), None)


def _read_image(path: Path, indices: bool) -> tuple[NDArray, tuple[float, ...]]:
    with Image.open(path) as image:
        if image.mode in ("RGB", "RGBA") and image.format == "PNG":
            values = imagecodecs.png_decode(path.read_bytes())  # PIL cuts 16-bit colour to 8 bits
        elif image.mode in ("1", "L", "I", "F", "RGB", "RGBA", "LA") or image.mode.startswith("I;16"):
            values = _without_bool(np.asarray(image))
        elif image.mode == "P" and indices:
            values = np.asarray(image)
        else:
            values = np.asarray(image.convert("RGB"))  # palette, CMYK, YCbCr, Lab
        if image.mode == "L" and image.format == "PNG":
            values = values // _png_stretch(path)
    values = values[None] if values.ndim == 2 else np.moveaxis(values, -1, 0)
    return _without_alpha(values), (1.0, 1.0)


def _png_stretch(path: Path) -> int:
    """What PIL multiplied the samples of a grey PNG of 2 or 4 bits by, to fill 0–255 (PNG specification, 11.2.2)."""
    with open(path, "rb") as file:
        bits = file.read(25)[24]
    return 255 // (2**bits - 1) if bits < 8 else 1


def _without_bool(values: NDArray) -> NDArray:
    return values.astype(np.uint8) if values.dtype == bool else values


def _without_alpha(values: NDArray) -> NDArray:
    return values[:-1] if values.shape[0] in (2, 4) else values


def _with_channels(values: NDArray, channels: str | int, path: Path) -> NDArray:
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
        f"{path}: has {count} channels, data.channels={channels} cannot be made of them. Set data.channels={count}."
    )
