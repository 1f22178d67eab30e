"""Whether a mask lies where its image lies: size, spacing, origin and direction as the two headers say. Reads no pixels."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from resunet.data.cases import Case
from resunet.data.formats import named, sniff

_GZIP = b"\x1f\x8b"
# What headers differ by when two programs wrote the same grid: float32, and rotations stored as quaternions.
_SAME_SPACING = 1e-3  # of it
_SAME_DIRECTION = 1e-3  # of any cosine
_SAME_ORIGIN = 0.1  # of the smallest spacing: what a segmentation cannot show


@dataclass(frozen=True)
class Grid:
    """Where a volume's voxels are, in LPS mm; axes in the order of the file (x, y, z), directions as the columns of a matrix."""

    size: tuple[int, ...]
    spacing: NDArray[np.float64]
    origin: NDArray[np.float64]
    direction: NDArray[np.float64]


@dataclass(frozen=True)
class Mismatch:
    """How a mask's grid differs from its image's. what: 'size', 'spacing', 'origin' or 'direction'."""

    case: Case
    what: tuple[str, ...]
    message: str


def read_grid(path: Path) -> Grid | None:
    """The grid in a volume's header; None for what has none (plain images, DICOM slices) or cannot be read here."""
    format = sniff(path)
    if format not in ("nifti", "nrrd", "metaimage"):
        return None
    try:
        return _nifti_grid(path) if format == "nifti" else _itk_grid(path)
    except (RuntimeError, ValueError, OSError, nibabel.filebasedimages.ImageFileError):
        return None  # loading says what is wrong with it


def compare_geometry(cases: Sequence[Case]) -> tuple[list[Mismatch], int]:
    """The masks whose grid is not their image's, and how many pairs could be compared."""
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(_compare, cases))
    return [one for one in found if isinstance(one, Mismatch)], sum(one is not None for one in found)


def _compare(case: Case) -> Mismatch | bool | None:
    """None: nothing to compare; True: the same grid."""
    if case.mask is None:
        return None
    image, mask = read_grid(case.files[0]), read_grid(case.mask)
    if image is None or mask is None:
        return None
    differences = grid_differences(image, mask)
    if not differences:
        return True
    return Mismatch(case, tuple(differences), "; ".join(differences.values()))


def grid_differences(image: Grid, mask: Grid) -> dict[str, str]:
    """What differs → the numbers of both."""
    found = {}
    if image.size != mask.size:
        found["size"] = f"size: image {_row(image.size)}, mask {_row(mask.size)}"
    if len(image.size) != len(mask.size):
        return found
    if not np.allclose(image.spacing, mask.spacing, rtol=_SAME_SPACING, atol=0):
        found["spacing"] = f"spacing: image {_row(image.spacing)} mm, mask {_row(mask.spacing)} mm"
    if np.abs(image.origin - mask.origin).max() > _SAME_ORIGIN * image.spacing.min():
        distance = float(np.linalg.norm(image.origin - mask.origin))
        found["origin"] = f"origin: image {_row(image.origin)} mm, mask {_row(mask.origin)} mm (LPS), {distance:.3g} mm apart"
    if np.abs(image.direction - mask.direction).max() > _SAME_DIRECTION:
        cosines = np.clip((image.direction * mask.direction).sum(axis=0), -1, 1)
        degrees = np.degrees(np.arccos(cosines))
        found["direction"] = (
            f"direction: image {_row(image.direction.T.ravel())}, mask {_row(mask.direction.T.ravel())} "
            f"(axes {_row(degrees)} degrees apart)"
        )
    return found


def _nifti_grid(path: Path) -> Grid:
    """By nibabel: ITK refuses affines with shear, and so every mask that it would be good to hear of."""
    with open(path, "rb") as file:
        head = file.read(2)
    with named(path, ".nii.gz" if head == _GZIP else ".nii") as name:
        image = nibabel.load(name)
        assert isinstance(image, nibabel.spatialimages.SpatialImage)
        affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.asarray(image.affine, np.float64)  # NIfTI's axes grow towards RAS
        shape = tuple(int(n) for n in image.shape[:3])
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if min(spacing) <= 0:
        raise ValueError("a spacing of 0")
    shape += (1,) * (3 - len(shape))
    return Grid(shape, spacing, affine[:3, 3], affine[:3, :3] / spacing)


def _itk_grid(path: Path) -> Grid:
    file = sitk.ImageFileReader()
    file.SetFileName(str(path))
    file.ReadImageInformation()
    dimensions = file.GetDimension()
    direction = np.array(file.GetDirection(), np.float64).reshape(dimensions, dimensions)
    return Grid(file.GetSize(), np.array(file.GetSpacing()), np.array(file.GetOrigin()), direction)


def _row(values: Sequence[float] | NDArray) -> str:
    return "(" + ", ".join(f"{float(value):.4g}" for value in values) + ")"
