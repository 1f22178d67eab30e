"""A prediction as a file, in the format and the geometry of the scan that it is of.

    NIfTI             NIfTI of the same version; header, affine and shape as they are
    NRRD, MetaImage   .nrrd, .mha (one file); origin, spacing and direction as they are
    DICOM             DICOM-SEG; probabilities as a fractional one, in steps of 1/255
    TIFF              TIFF; resolution and georeference as they are
    PNG, JPEG, BMP    PNG with a palette, or of 16 bits where a mask value is above 255; probabilities as TIFF

Labels hold the mask values that the model was trained on. Probabilities are float32: of the foreground where there are two classes,
else one a class, as a last axis (NIfTI), a vector (NRRD, MetaImage) or pages (TIFF).
"""

import importlib.util
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import nibabel
import numpy as np
import SimpleITK as sitk
import tifffile
from numpy.typing import NDArray
from PIL import Image

from resunet.data.formats import Format, named
from resunet.errors import EnvironmentFault, InputError

_LPS = (("R", "L"), ("A", "P"), ("I", "S"))  # each axis of a scan in memory grows towards the second
_READERS = {"nrrd": "NrrdImageIO", "metaimage": "MetaImageIO"}
_GEOREFERENCE = (33550, 33922, 34264, 34735, 34736, 34737)  # GeoTIFF's tags
# Okabe & Ito's set, told apart by all common kinds of colour blindness
_COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))


@dataclass(frozen=True)
class Prediction:
    """What a network made of a scan, in the frame that `read_scan` gave it.

    values: class indices, uint8 (*size); or probabilities, float32 (M, *size), M = 1 (of the foreground) or one a class.
    classes: raw mask value → name, background first.
    files, format, orientation: of the scan; of one file a channel, the first.
    model: the sha256 of the weights, for formats that say what made them.
    """

    values: NDArray
    classes: Mapping[int, str]
    files: tuple[Path, ...]
    format: Format
    orientation: str
    model: str

    @property
    def probabilities(self) -> bool:
        return self.values.dtype == np.float32

    def planes(self) -> NDArray:
        """(1, *size) of raw mask values, or (M, *size) of probabilities."""
        return self.values if self.probabilities else raw_labels(self.values, self.classes)[None]


def write_prediction(prediction: Prediction, folder: Path, name: str) -> Path:
    """Write OUT/NAME with the format's ending, whole or not at all; the file.

    Raises:
        InputError: a DICOM header that lacks what DICOM-SEG needs, or a mask value that PNG cannot hold.
        EnvironmentFault: DICOM-SEG without highdicom.
    """
    suffix = _suffix(prediction)
    with _aside(folder / f"{name}{suffix}") as path:
        if prediction.format == "nifti":
            _write_nifti(prediction, path)
        elif prediction.format in _READERS:
            _write_itk(prediction, path)
        elif prediction.format == "dicom":
            _write_dicom(prediction, path)
        elif prediction.format == "tiff":
            _write_tiff(prediction, path)
        elif prediction.probabilities:
            tifffile.imwrite(path, _unstacked(prediction.values), photometric="minisblack", compression="zlib")
        else:
            _write_png(prediction, path)
    return folder / f"{name}{suffix}"


def can_write_dicom() -> bool:
    """Whether the library for DICOM-SEG, which a bundle does not require, is here."""
    return importlib.util.find_spec("highdicom") is not None


def refuse_dicom(file: Path) -> NoReturn:
    """Raises EnvironmentFault: `file` is DICOM, and `can_write_dicom` says no."""
    raise EnvironmentFault(
        f"{file}: its prediction is written as DICOM-SEG, which needs highdicom: pip install highdicom. Or convert the series to "
        "NIfTI first."
    )


def raw_labels(labels: NDArray[np.uint8], classes: Mapping[int, str]) -> NDArray:
    """Class indices → the mask values they stand for, in the smallest dtype that holds those."""
    values = list(classes)
    fits = (dtype for dtype in (np.uint8, np.int16, np.uint16, np.int32) if np.iinfo(dtype).min <= min(values))
    dtype = next((dtype for dtype in fits if max(values) <= np.iinfo(dtype).max), np.int64)
    return np.array(values, dtype)[labels]


def to_file_frame(values: NDArray, orientation: str) -> NDArray:
    """(M, z, y, x) in LPS → the file's own frame; what `read_scan` did, undone."""
    if not orientation:
        return values
    file = nibabel.orientations.axcodes2ornt(orientation, _LPS)
    lps = nibabel.orientations.axcodes2ornt("LPS", _LPS)
    turn = nibabel.orientations.ornt_transform(lps, file)
    turned: NDArray = nibabel.apply_orientation(values.T, turn).T
    return turned


def _suffix(prediction: Prediction) -> str:
    if prediction.format == "nifti":
        with open(prediction.files[0], "rb") as file:
            return ".nii.gz" if file.read(2) == b"\x1f\x8b" else ".nii"
    if prediction.format == "tiff":
        return ".tif" if prediction.files[0].suffix.lower() == ".tif" else ".tiff"
    if prediction.format in ("png", "jpeg", "bmp"):
        return ".tiff" if prediction.probabilities else ".png"
    return {"nrrd": ".nrrd", "metaimage": ".mha", "dicom": ".dcm"}[prediction.format]


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A file of the same name in a hidden folder beside it, moved into place at the end: libraries go by the ending."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    aside.mkdir(parents=True)
    try:
        yield aside / path.name
        with open(aside / path.name, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside / path.name, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _volume(prediction: Prediction, dimensions: int) -> NDArray:
    """(M, z, y, x), or (M, y, x) of a file with two dimensions, as the file has them."""
    planes = prediction.planes()
    if dimensions == 2:
        return planes
    if planes.ndim == 3:  # a volume format's single slice, which is read as an image
        planes = planes[:, None]
    return to_file_frame(planes, prediction.orientation)


def _write_nifti(prediction: Prediction, path: Path) -> None:
    source = prediction.files[0]
    with named(source, _suffix(prediction)) as name:
        image = nibabel.load(name)
    assert isinstance(image, nibabel.Nifti1Image)  # which a Nifti2Image is, too
    planes = _volume(prediction, min(len(image.shape), 3))
    assert planes.shape[:0:-1] == image.shape[:3]
    data = planes.T if len(planes) > 1 else planes[0].T  # (x, y, z), classes last
    if len(planes) == 1 and np.prod(image.shape) == data.size:
        data = data.reshape(image.shape)  # (x, y, z, 1)
    header = image.header.copy()
    header.extensions.clear()  # of the scan, and may name a person
    for text in ("db_name", "aux_file", "descrip"):
        if text in header:
            header[text] = b""
    header.set_intent("none")
    header["cal_min"] = header["cal_max"] = 0
    header.set_data_dtype(data.dtype)
    header.set_slope_inter(1, 0)
    nibabel.save(type(image)(data, image.affine, header), path)


def _write_dicom(prediction: Prediction, path: Path) -> None:
    if not can_write_dicom():
        refuse_dicom(prediction.files[0])
    from resunet.inference.dicom_seg import write_segmentation

    write_segmentation(prediction, path)


def _write_itk(prediction: Prediction, path: Path) -> None:
    source = sitk.ImageFileReader()
    source.SetImageIO(_READERS[prediction.format])
    source.SetFileName(str(prediction.files[0]))
    source.ReadImageInformation()
    planes = _volume(prediction, source.GetDimension())
    vector = len(planes) > 1
    image = sitk.GetImageFromArray(np.moveaxis(planes, 0, -1) if vector else planes[0], isVector=vector)
    assert image.GetSize() == source.GetSize()
    image.SetOrigin(source.GetOrigin())
    image.SetSpacing(source.GetSpacing())
    image.SetDirection(source.GetDirection())
    sitk.WriteImage(image, str(path), useCompression=True)


def _write_tiff(prediction: Prediction, path: Path) -> None:
    with tifffile.TiffFile(prediction.files[0]) as file:
        tags = file.pages.first.tags
        about: dict = {}
        if "XResolution" in tags and "YResolution" in tags:
            about["resolution"] = (tags["XResolution"].value, tags["YResolution"].value)
            about["resolutionunit"] = tags["ResolutionUnit"].value if "ResolutionUnit" in tags else None
        about["extratags"] = [
            (code, int(tag.dtype), tag.count, tag.value, True) for code in _GEOREFERENCE if (tag := tags.get(code)) is not None
        ]
    planes = _unstacked(prediction.planes())
    tifffile.imwrite(path, planes, photometric="minisblack", compression="zlib", metadata=None, **about)


def _unstacked(planes: NDArray) -> NDArray:
    return planes[0] if len(planes) == 1 else planes


def _write_png(prediction: Prediction, path: Path) -> None:
    labels: NDArray = prediction.planes()[0]
    if labels.dtype != np.uint8:
        if labels.min() < 0 or labels.max() > np.iinfo(np.uint16).max:
            raise InputError(
                f"{prediction.files[0]}: its mask is written as PNG, which holds 0 to 65535, and a class of this model is "
                f"{labels.min() if labels.min() < 0 else labels.max()}. Convert the image to TIFF, or write --probabilities."
            )
        Image.fromarray(labels.astype(np.uint16)).save(path)
        return
    image = Image.fromarray(labels)
    image.putpalette(palette(prediction.classes).tobytes())
    image.save(path)


def palette(classes: Mapping[int, str]) -> NDArray[np.uint8]:
    """(256, 3): a colour for each class at its mask value, black for the background, greys elsewhere."""
    colours = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    for number, value in enumerate(classes):
        if 0 <= value < 256:
            colours[value] = _COLOURS[(number - 1) % len(_COLOURS)] if number else (0, 0, 0)
    return colours


def foreground(classes: Mapping[int, str]) -> Sequence[tuple[int, str]]:
    """Raw value and name of every class but the first."""
    return list(classes.items())[1:]
