"""Where the frames of DICOM files lie in the patient, and how they become a volume in LPS."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import nibabel
import numpy as np
import pydicom
from numpy.typing import NDArray

from resunet.data.formats import Content

SAME_PLACE = 0.01  # mm: slices nearer than this are at one position
_AXES = (("R", "L"), ("A", "P"), ("I", "S"))  # LPS: each axis grows towards the second


@dataclass(frozen=True)
class Plane:
    """Where a slice lies in the patient, in LPS and mm.

    origin: of the centre of the first pixel. rows, columns: unit vectors along which the column index (x) and the row
    index (y) grow. spacing: mm in array order (y, x).
    """

    origin: tuple[float, ...]
    rows: tuple[float, ...]
    columns: tuple[float, ...]
    spacing: tuple[float, float]

    def normal(self) -> np.ndarray:
        return np.cross(self.rows, self.columns)

    def along(self) -> float:
        """mm along the normal."""
        return float(np.dot(self.normal(), self.origin))


def plane_of(place: Any, measures: Any) -> Plane | None:
    """The plane that a dataset describes, None where it does not or where its numbers make none.

    Args:
        place: has ImagePositionPatient and ImageOrientationPatient.
        measures: has PixelSpacing.
    """
    origin, directions = numbers(place, "ImagePositionPatient", 3), numbers(place, "ImageOrientationPatient", 6)
    if origin is None or directions is None:
        return None
    rows, columns = np.array(directions[:3]), np.array(directions[3:])
    lengths = np.linalg.norm(rows), np.linalg.norm(columns)
    if min(lengths) < 0.5 or abs(np.dot(rows, columns)) > 0.1 * lengths[0] * lengths[1]:
        return None
    spacing = numbers(measures, "PixelSpacing", 2) or (1.0, 1.0)
    if min(spacing) <= 0:
        spacing = (1.0, 1.0)
    rows, columns = rows / lengths[0], columns / lengths[1]
    return Plane(origin, tuple(rows.tolist()), tuple(columns.tolist()), (spacing[0], spacing[1]))


def numbers(dataset: Any, name: str, count: int) -> tuple[float, ...] | None:
    """Finite numbers of an element, None unless there are exactly `count`."""
    try:
        value = dataset.get(name)
        found = tuple(float(v) for v in (value if isinstance(value, (list, pydicom.multival.MultiValue)) else [value]))
    except (TypeError, ValueError, OverflowError):
        return None
    return found if len(found) == count and all(math.isfinite(v) for v in found) else None


def functional_groups(dataset: Any, frames: int) -> tuple[Any, list[Any]]:
    """The group of all frames and those of each; empty ones where there are none."""
    each = list(dataset.get("PerFrameFunctionalGroupsSequence") or ())
    return first_item(dataset, "SharedFunctionalGroupsSequence") or {}, each if len(each) == frames else [{}] * frames


def first_item(dataset: Any, name: str) -> Any:
    sequence = dataset.get(name)
    return sequence[0] if sequence else None


def planes_of(dataset: Any, frames: int) -> tuple[Plane, ...]:
    """A plane for each frame, or none at all."""
    whole = plane_of(dataset, dataset)
    if frames == 1 and whole is not None:
        return (whole,)
    offsets = numbers(dataset, "GridFrameOffsetVector", frames)
    if whole is not None and offsets is not None:  # of a dose
        base = offsets[0]
        return tuple(
            replace(whole, origin=tuple((np.array(whole.origin) + (offset - base) * whole.normal()).tolist()))
            for offset in offsets
        )
    shared, each = functional_groups(dataset, frames)
    planes = [_plane_of_frame(group, shared) for group in each]
    found = tuple(plane for plane in planes if plane is not None)
    return found if len(found) == frames else ()


def _plane_of_frame(group: Any, shared: Any) -> Plane | None:
    described: dict[str, Any] = {}
    for sequence, name in (
        ("PlanePositionSequence", "ImagePositionPatient"),
        ("PlaneOrientationSequence", "ImageOrientationPatient"),
        ("PixelMeasuresSequence", "PixelSpacing"),
    ):
        item = first_item(group, sequence) or first_item(shared, sequence)
        described[name] = item.get(name) if item is not None else None
    return plane_of(described, described)


def place(values: NDArray, planes: Sequence[Plane], spacing: tuple[float, ...], modality: str, sort: bool) -> Content:
    """An image, or a volume in LPS; frames without a common direction stay in their order along z.

    Args:
        values: (C, frames, y, x).
        planes: one a frame, or none.
        spacing: mm (z, y, x) where there are none.
        sort: order the frames of one file by position; a series comes in order.
    """
    if values.shape[1] == 1:
        plane = planes[0] if planes else None
        code = "" if plane is None else axis_code(_affine(plane, 1.0))
        return Content(values[:, 0], spacing[1:] if plane is None else plane.spacing, code, modality)
    if not planes or not _parallel(planes):
        return Content(values, spacing, "", modality)
    positions = np.array([plane.along() for plane in planes])
    if sort:
        order = _order(positions)
        values, positions = values[:, order], positions[order]
    steps = np.diff(positions)
    steps = steps[np.abs(steps) > SAME_PLACE]
    if not len(steps):  # one place at several times
        return Content(values, (spacing[0], *planes[0].spacing), "", modality)
    forward = steps[np.sign(steps) == np.sign(np.median(steps))] if np.median(steps) else steps[:1]
    step = float(np.median(forward))
    affine = _affine(planes[0], np.sign(step))
    turned, mm = to_lps(values, (abs(step), *planes[0].spacing), affine)
    return Content(turned, mm, axis_code(affine), modality)


def _parallel(planes: Sequence[Plane]) -> bool:
    first = np.array((planes[0].rows, planes[0].columns))
    return all(np.abs(np.array((plane.rows, plane.columns)) - first).max() < 0.02 for plane in planes)


def _order(positions: NDArray) -> NDArray:
    """By position; where several frames share one (phases), the first of each place, then the second, and so on."""
    rounded = np.round(positions / SAME_PLACE).astype(np.int64)
    seen: dict[int, int] = {}
    turn = []
    for place in rounded.tolist():
        turn.append(seen.get(place, 0))
        seen[place] = turn[-1] + 1
    return np.lexsort((rounded, np.array(turn)))


def _affine(plane: Plane, sign: float) -> NDArray:
    """Columns: where the array's axes x, y, z run in LPS."""
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = plane.rows, plane.columns, sign * plane.normal()
    return affine


def axis_code(affine: NDArray) -> str:
    return "".join(axis or "" for axis in nibabel.aff2axcodes(affine, _AXES))


def to_lps(values: NDArray, spacing: tuple[float, ...], affine: NDArray) -> tuple[NDArray, tuple[float, ...]]:
    """values: (C, z, y, x), permuted and flipped to the nearest axes; never resampled."""
    orientation = nibabel.io_orientation(affine)
    turned = nibabel.apply_orientation(values.T, orientation).T  # nibabel's order: x, y, z first
    target = orientation[:, 0].astype(int)
    mm = [0.0, 0.0, 0.0]
    for axis, length in enumerate(spacing[::-1]):
        mm[target[axis]] = length
    return np.ascontiguousarray(turned), tuple(mm[::-1])
