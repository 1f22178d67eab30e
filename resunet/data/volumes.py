"""NIfTI, NRRD and MetaImage: volumes with a geometry, in whatever frame the file has, turned to LPS."""

import re
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk
from nibabel.openers import ImageOpener

from resunet.data.dicom_planes import axis_code, to_lps
from resunet.data.formats import HEAD, MAX_EXPANSION, Content, named, refuse_bomb
from resunet.errors import InputError

_READERS = {"nifti": "NiftiImageIO", "nrrd": "NrrdImageIO", "metaimage": "MetaImageIO"}
_GZIP = b"\x1f\x8b"
_DATA_FILE = re.compile(rb"^(?:ElementDataFile\s*=|data ?file:)[ \t]*(\S[^\r\n]*?)[ \t]*\r?$", re.MULTILINE)
_RAW = re.compile(rb"^(?:encoding:\s*raw|CompressedData\s*=\s*False)\s*$", re.MULTILINE)


def read_volume(path: Path, format: str, head: bytes) -> Content:
    """A volume in LPS, or the image that a volume format holds.

    Args:
        format: nifti, nrrd or metaimage.
        head: the file's first bytes.

    Raises:
        InputError: not 2 or 3 dimensions, NaN or infinite values, a spacing of 0, or a header that claims more than there is.
    """
    if format != "nifti":
        return _read(path, str(path), _READERS[format], *_stored(path, head))
    with named(path, ".nii.gz" if head.startswith(_GZIP) else ".nii") as name:
        image = _refuse_what_itk_hides(path, name)
        if isinstance(image, nibabel.Nifti2Image):
            return _read_nifti_2(path, image)
        return _read(path, name, _READERS[format], None, 1)


def _stored(path: Path, head: bytes) -> tuple[int | None, int]:
    """Bytes of the file that holds the values, and how many decoded ones each stands for at most."""
    with open(path, "rb") as file:
        header = head + file.read(15 * HEAD)
    name = _DATA_FILE.search(header)
    expansion = 1 if _RAW.search(header) else MAX_EXPANSION
    if name is None or name[1] == b"LOCAL":
        return path.stat().st_size, expansion
    data = path.parent / name[1].decode("utf-8", "surrogateescape")
    return (data.stat().st_size, expansion) if data.is_file() else (None, 1)  # a list or a pattern of files


def _read(path: Path, name: str, reader: str, stored: int | None, expansion: int) -> Content:
    file = sitk.ImageFileReader()
    file.SetImageIO(reader)
    file.SetFileName(name)
    file.ReadImageInformation()
    dimensions, count = file.GetDimension(), file.GetNumberOfComponents()
    if dimensions not in (2, 3):
        raise InputError(f"{path}: has {dimensions} dimensions; images of 2 and volumes of 3 are read.")
    itemsize = np.dtype(sitk.GetArrayViewFromImage(sitk.Image([1] * dimensions, file.GetPixelID())).dtype).itemsize
    refuse_bomb(path, (*file.GetSize(), count), itemsize, stored, expansion)
    try:
        image = file.Execute()
    except RuntimeError as error:
        if "Zero-valued spacing" in str(error):
            raise InputError(f"{path}: a spacing in its header is 0 mm; every one must be above 0.") from error
        raise
    orientation = ""
    if dimensions == 3:
        orientation = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection())
        image = sitk.DICOMOrient(image, "LPS")
    values = sitk.GetArrayFromImage(image)
    spacing = tuple(float(s) for s in image.GetSpacing()[::-1])
    if not np.isfinite(spacing).all() or min(spacing) <= 0:
        raise InputError(f"{path}: spacing {spacing} mm; every spacing must be above 0.")
    values = np.moveaxis(values, -1, 0) if count > 1 else values[None]
    if values.ndim == 4 and values.shape[1] == 1:  # a 2D image in a volume format
        return Content(values[:, 0], spacing[1:], orientation)
    return Content(values, spacing, orientation)


def _read_nifti_2(path: Path, image: nibabel.Nifti2Image) -> Content:
    """NIfTI-2, which ITK does not know."""
    if image.ndim != 3:
        raise InputError(f"{path}: has {image.ndim} dimensions; of NIfTI-2 volumes of 3 are read.")
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.affine  # NIfTI's axes grow towards RAS
    spacing = tuple(float(s) for s in np.linalg.norm(affine[:3, :3], axis=0))
    if not np.isfinite(affine).all() or min(spacing) <= 0:
        raise InputError(f"{path}: spacing {spacing} mm; every spacing must be above 0.")
    values = np.asanyarray(image.dataobj)
    values = values.astype(values.dtype.newbyteorder("="))
    turned, mm = to_lps(values.T[None], spacing[::-1], affine)
    return Content(turned, mm, axis_code(affine))


def _refuse_what_itk_hides(path: Path, name: str) -> nibabel.spatialimages.SpatialImage:
    """ITK's NIfTI reader turns NaN into 0 and makes up the end of a truncated file, nibabel neither. Both hide a spacing of 0."""
    image = nibabel.load(name)
    assert isinstance(image, nibabel.Nifti1Image)  # which a Nifti2Image is, too
    _refuse_zero_spacing(path, name, image)
    stored = Path(name).stat().st_size
    packed = name.lower().endswith(".gz")
    refuse_bomb(path, image.shape, image.get_data_dtype().itemsize, stored, MAX_EXPANSION if packed else 1)
    assert isinstance(image.dataobj, nibabel.arrayproxy.ArrayProxy)
    refuse_non_finite(image.dataobj.get_unscaled(), path)
    return image


def _refuse_zero_spacing(path: Path, name: str, image: nibabel.Nifti1Image) -> None:
    """ITK and nibabel read a NIfTI spacing of 0 as 1, without a word: sizes, and which slices are thick, would be made up.

    Of an axis with one voxel, of which no size follows, it may be 0.
    """
    with ImageOpener(name) as file:
        header = type(image.header).from_fileobj(file, check=False)  # the check would put 1 there
    dimensions = min(int(header["dim"][0]), 3)
    spacing = [float(value) for value in header["pixdim"][1 : 1 + dimensions]]
    if any(mm == 0 and count > 1 for mm, count in zip(spacing, image.shape, strict=False)):
        raise InputError(
            f"{path}: the spacing in its header is {' × '.join(f'{value:g}' for value in spacing)} mm; every one must be above 0. "
            "Convert it again from its original, or correct pixdim."
        )


def refuse_non_finite(values: np.ndarray, path: Path) -> None:
    """Refuse NaN and infinite values, saying how many."""
    bad = int(values.size - np.isfinite(values).sum()) if values.dtype.kind == "f" else 0
    if bad:
        raise InputError(f"{path}: {bad} of {values.size} values are NaN or infinite. Repair or remove the file.")
