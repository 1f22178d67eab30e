"""The pixels and the geometry of DICOM files.

pydicom and its plugins decode, imagecodecs RLE, extended and lossless JPEG, SimpleITK what is left (private transfer syntaxes). The
other way round would be wrong without a word: SimpleITK swaps the bytes of big-endian 32-bit images, scrambles 16- and 32-bit
RLE colours, reads the first of 15 frames where their number is damaged and gives 255 for 1 in 1-bit images
(benchmarks/dicom_files.py). Where both are right they are equal.
"""

import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydicom
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.pixels import apply_color_lut, convert_color_space
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from resunet.data.dicom import frame_count, modality_of, no_image
from resunet.data.dicom_codecs import decode_jpeg_above_8_bits, decode_rle, inflate_frames
from resunet.data.dicom_planes import Plane, first_item, functional_groups, numbers, place, planes_of
from resunet.data.formats import MAX_EXPANSION, Content, guarded, refuse_bomb
from resunet.errors import InputError

_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_ITEMSIZES = {"PixelData": None, "FloatPixelData": 4, "DoubleFloatPixelData": 8}
_JPEG_ABOVE_8_BITS = tuple(f"1.2.840.10008.1.2.4.{number}" for number in (51, 53, 55, 57, 70))  # extended, lossless
_UNBOUND = "1.2.840.10008.1.2.4.9", "1.2.840.10008.1.2.4.20"  # JPEG 2000 and its relatives: an even image costs nothing
_NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
_DEFLATED_FRAMES = "1.2.840.10008.1.2.8.1"
_RLE = "1.2.840.10008.1.2.5"

# The size a frame's own header gives: JPEG and JPEG-LS (ITU T.81 B.2.2: precision, lines, samples a line), JPEG 2000 (SIZ).
_FRAME_OF_JPEG = re.compile(
    rb"\xff[\xc0-\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf\xf7]\0[\x0b\x0e\x11\x14][\x02-\x10](..)(..)", re.DOTALL
)
_FRAME_OF_JPEG_2000 = re.compile(rb"\xff\x4f\xff\x51....(....)(....)", re.DOTALL)


class _Frames(NamedTuple):
    """One file. values: (C, frames, y, x); planes: one a frame, or none; spacing: mm (z, y, x) where there are none."""

    values: NDArray
    planes: tuple[Plane, ...]
    spacing: tuple[float, ...]
    modality: str


def read_series(files: Sequence[Path]) -> Content:
    """The slices of a volume, in order, or one file of any number of frames.

    A volume with a geometry is turned to LPS; frames without one (angiography, ultrasound) stay in their order along z.

    Raises:
        InputError: it names the file; none of the header's values that may name a person.
    """
    first = guarded(files[0], lambda: _read_file(files[0]), says=False)
    if len(files) == 1:
        return place(*first, sort=True)
    refuse_bomb(files[0], (len(files), *first.values.shape), first.values.itemsize, None)
    slices = [first]
    for path in files[1:]:
        slices.append(guarded(path, lambda path=path: _read_file(path), says=False))  # type: ignore[misc]
        if slices[-1].values.shape != first.values.shape:
            raise InputError(
                f"{path}: has the shape {slices[-1].values.shape}, the first slice of the volume {first.values.shape}. "
                "Slices of a volume must have one shape."
            )
    values = np.concatenate([part.values for part in slices], axis=1)
    if values.dtype == np.float64 and first.values.dtype != np.float64:
        values = values.astype(np.float32)  # some slices needed fractions, some did not
    planes = tuple(plane for part in slices for plane in part.planes)
    planes = planes if len(planes) == values.shape[1] else ()
    return place(values, planes, first.spacing, first.modality, sort=False)


def _read_file(path: Path) -> _Frames:
    dataset = pydicom.dcmread(path, force=True)
    kind = next((name for name in _PIXELS if dataset.get(name)), None)
    if not dataset.get("Rows") or not dataset.get("Columns") or kind is None:
        raise InputError(no_image(path))
    _complete(dataset, kind)
    _refuse_bombs(path, dataset, kind)
    values = _decoded(path, dataset)
    planes = planes_of(dataset, values.shape[1])
    between = numbers(dataset, "SpacingBetweenSlices", 1) or (1.0,)
    in_plane = next(
        (
            spacing
            for name in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
            if (spacing := numbers(dataset, name, 2)) and min(spacing) > 0
        ),
        (1.0, 1.0),
    )
    return _Frames(values, planes, (abs(between[0]) or 1.0, *in_plane), modality_of(dataset))


def _complete(dataset: Any, kind: str) -> None:
    """Fill in what old and damaged headers leave out and what follows from the rest."""
    if not hasattr(dataset, "file_meta"):
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    if "SamplesPerPixel" not in dataset:
        dataset.SamplesPerPixel = 1
    if not dataset.get("PhotometricInterpretation"):
        dataset.PhotometricInterpretation = "RGB" if dataset.SamplesPerPixel == 3 else "MONOCHROME2"
    if kind == "PixelData":
        dataset.setdefault("PixelRepresentation", 0)
        dataset.setdefault("BitsStored", dataset.BitsAllocated)
        dataset.setdefault("HighBit", dataset.BitsStored - 1)
    if frame_count(dataset) is None:
        one = max(
            1, dataset.Rows * dataset.Columns * dataset.SamplesPerPixel * (_ITEMSIZES[kind] or dataset.BitsAllocated // 8)
        )
        dataset.NumberOfFrames = max(1, len(dataset[kind].value) // one)


def _refuse_bombs(path: Path, dataset: Any, kind: str) -> None:
    syntax: UID = dataset.file_meta.TransferSyntaxUID
    data: bytes = dataset[kind].value
    frames, bits = frame_count(dataset) or 1, dataset.get("BitsAllocated", 8)
    shape = (frames, dataset.Rows, dataset.Columns, dataset.SamplesPerPixel)
    packed = syntax not in _NATIVE
    unbound = syntax.startswith(_UNBOUND)
    expansion = MAX_EXPANSION if packed else 2 if dataset.PhotometricInterpretation == "YBR_FULL_422" else 1
    refuse_bomb(
        path, shape, _ITEMSIZES[kind] or max(1, bits // 8), None if unbound else len(data), expansion * (8 if bits == 1 else 1)
    )
    if not packed or syntax in (_RLE, _DEFLATED_FRAMES):
        return
    limit = 16 * dataset.Rows * dataset.Columns
    for pattern, number in ((_FRAME_OF_JPEG, ">H"), (_FRAME_OF_JPEG_2000, ">I")):
        for found in pattern.finditer(data):
            height, width = (struct.unpack(number, size)[0] for size in found.groups())
            if height * width > limit:
                raise InputError(
                    f"{path}: a frame says {height} × {width} pixels, the header {dataset.Rows} × {dataset.Columns}. "
                    "It is damaged: copy it again, or remove it."
                )


def _decoded(path: Path, dataset: Any) -> NDArray:
    """(C, frames, y, x): colours as RGB, MONOCHROME1 inverted, slope and intercept applied."""
    syntax: UID = dataset.file_meta.TransferSyntaxUID
    samples = dataset.SamplesPerPixel
    try:
        if syntax == _DEFLATED_FRAMES:
            stored = inflate_frames(dataset)
        elif syntax == _RLE:
            stored = decode_rle(dataset)
        elif syntax in _JPEG_ABOVE_8_BITS:
            stored = decode_jpeg_above_8_bits(dataset)
        elif dataset.get("HighBit", 0) != dataset.get("BitsStored", 1) - 1:
            raise NotImplementedError("the stored bits are not the lowest ones")
        else:
            stored = dataset.pixel_array
    except Exception as error:
        if isinstance(error, NotImplementedError):
            return _by_simpleitk(path, dataset)
        raise InputError(_why(path, dataset, error)) from error
    stored = stored.reshape(-1, dataset.Rows, dataset.Columns, samples)
    if not stored.dtype.isnative:
        stored = stored.astype(stored.dtype.newbyteorder("="))
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        return np.moveaxis(_eight_bits(apply_color_lut(stored[..., 0], dataset))[..., :3], -1, 0)
    if samples > 1:
        if syntax == _RLE and dataset.PhotometricInterpretation == "YBR_FULL":
            stored = convert_color_space(stored, "YBR_FULL", "RGB")
        return np.moveaxis(stored, -1, 0)
    values = stored[..., 0]
    if dataset.PhotometricInterpretation == "MONOCHROME1" and values.dtype.kind in "ui":
        top = 2**dataset.BitsStored - 1 if values.dtype.kind == "u" else -1  # of signed ones lowest and highest sum to -1
        values = np.asarray(top, values.dtype) - values
    return _rescaled(values, _slopes(dataset, len(values)))[None]


def _eight_bits(colours: NDArray) -> NDArray:
    """16-bit palette entries as 8 bits where one byte says it all: the other is 0, or the same."""
    if colours.dtype == np.uint16:
        high, low = colours >> 8, colours & 255
        if not high.any():
            return low.astype(np.uint8)
        if not low.any() or (low == high).all():
            return high.astype(np.uint8)
    return colours


def _slopes(dataset: Any, frames: int) -> list[tuple[float, float]]:
    """Slope and intercept of each frame: of the file, of all its frames, or of each."""
    own = _slope(dataset)
    shared, each = functional_groups(dataset, frames)
    return [
        _slope(
            first_item(group, "PixelValueTransformationSequence")
            or first_item(shared, "PixelValueTransformationSequence")
            or {},
            own,
        )
        for group in each
    ]


def _slope(dataset: Any, default: tuple[float, float] = (1.0, 0.0)) -> tuple[float, float]:
    slope, intercept = (numbers(dataset, name, 1) for name in ("RescaleSlope", "RescaleIntercept"))
    if slope is None and intercept is None:
        return default
    return (slope or (1.0,))[0] or 1.0, (intercept or (0.0,))[0]  # a slope of 0 is a field left empty


def _rescaled(values: NDArray, slopes: list[tuple[float, float]]) -> NDArray:
    """values: (frames, y, x). int16 or int32 where that is exact, float32 otherwise; untouched by 1 and 0."""
    if set(slopes) == {(1.0, 0.0)}:
        return values
    if len(set(slopes)) == 1:
        return _scaled(values, *slopes[0])
    parts = [_scaled(frame, *slope) for frame, slope in zip(values, slopes, strict=True)]
    stacked = np.stack(parts)
    return stacked.astype(np.float32) if stacked.dtype == np.float64 else stacked


def _scaled(values: NDArray, slope: float, intercept: float) -> NDArray:
    whole = slope.is_integer() and intercept.is_integer() and max(abs(slope), abs(intercept)) < 2**31
    if whole and values.dtype.kind in "ui":
        ends = [int(end) * int(slope) + int(intercept) for end in (values.min(), values.max())]
        for dtype in (np.int16, np.int32):
            if np.iinfo(dtype).min <= min(ends) and max(ends) <= np.iinfo(dtype).max:
                return (values.astype(np.int64) * int(slope) + int(intercept)).astype(dtype)
    return (values * np.float64(slope) + np.float64(intercept)).astype(np.float32)


def _by_simpleitk(path: Path, dataset: Any) -> NDArray:
    """SimpleITK gives values that are finished: RGB, inverted, rescaled."""
    try:
        if dataset.BitsAllocated not in (8, 16):
            raise NotImplementedError("SimpleITK misreads these")
        file = sitk.ImageFileReader()
        file.SetImageIO("GDCMImageIO")
        file.SetFileName(str(path))
        values = sitk.GetArrayFromImage(file.Execute())
    except Exception as error:
        raise InputError(_why(path, dataset, error)) from error
    values = values.reshape(-1, dataset.Rows, dataset.Columns, dataset.SamplesPerPixel)
    if values.dtype == np.float64:
        values = values.astype(np.float32)
    return np.moveaxis(values, -1, 0)


def _why(path: Path, dataset: Any, error: Exception) -> str:
    """The reason without the library's words, which may quote the header."""
    syntax: UID = dataset.file_meta.TransferSyntaxUID
    known = syntax in pydicom.uid.UID_dictionary
    coded = f"{syntax.name if known else 'an unknown transfer syntax'}, {dataset.get('BitsAllocated', '?')} bits"
    if isinstance(error, MemoryError):
        return f"{path}: cannot be read: no memory for its pixels ({coded})."
    if isinstance(error, NotImplementedError):
        return f"{path}: cannot be read: no decoder for its pixels ({coded})."
    return (
        f"{path}: cannot be read: its pixel data cannot be decoded ({coded}): {type(error).__name__}. "
        "They are damaged, cut off, or do not fit the header."
    )
