"""A prediction of a DICOM scan as DICOM-SEG, through highdicom: one frame a slice and segment, each with its source slice.

It belongs to the study of its scan, and holds its patient's data, as the archive that it goes to wants it.
"""

import importlib.metadata
import warnings
from collections.abc import Sequence
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.sr.codedict import codes

from resunet.data.dicom import frame_count
from resunet.data.dicom_planes import place, planes_of
from resunet.errors import InputError
from resunet.inference.masks import Prediction, foreground, to_file_frame

_MUST_BE_THERE = ("StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID")
_SERIES_NUMBER = 9000  # apart from what scanners count
# Type 2 of the patient and study modules: present, and empty where nobody knows
_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber"),
    *("StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
)


def write_segmentation(prediction: Prediction, path: Path) -> None:
    """A binary segmentation, or of probabilities a fractional one, in steps of 1/255.

    Segments are numbered from 1 in the order of the classes; a segment's label is the class's name, its description says
    which mask value it was.

    Raises:
        InputError: the scan's header lacks what DICOM-SEG needs. Its values, which may name a person, are not quoted.
    """
    source = prediction.files[0]
    slices = [pydicom.dcmread(file, stop_before_pixels=True, force=True) for file in prediction.files]
    for one in slices:
        for name in _MAY_BE_EMPTY:
            one.setdefault(name, "")
        wanted = list(_MUST_BE_THERE)
        wanted += ["PixelSpacing"] if "ImagePositionPatient" in one else []
        wanted += ["FrameOfReferenceUID"] if "ImagePositionPatient" in one or (frame_count(one) or 1) > 1 else []
        if missing := [name for name in wanted if not one.get(name)]:
            raise InputError(f"{source}: cannot be written as DICOM-SEG: its header has no {', '.join(missing)}. Repair it.")
    try:
        with warnings.catch_warnings():  # which quote the header
            warnings.simplefilter("ignore")
            _segmentation(prediction, slices).save_as(path)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # pydicom's and highdicom's own have no common base
        what = f" ({error.name} is missing)" if isinstance(error, AttributeError) else ""
        raise InputError(
            f"{source}: cannot be written as DICOM-SEG: {type(error).__name__}{what}. Its header does not fit the standard: "
            "repair it, or convert the series to NIfTI first."
        ) from error


def _segmentation(prediction: Prediction, slices: Sequence[pydicom.Dataset]) -> hd.seg.Segmentation:
    planes = _in_file_order(prediction, slices)  # (M, frames, y, x)
    if prediction.probabilities:
        segments = planes if len(planes) == 1 else planes[1:]
        pixels = np.ascontiguousarray(np.moveaxis(segments, 0, -1))
    else:
        pixels = np.ascontiguousarray(planes[0])  # class indices are segment numbers
    segmentation = hd.seg.Segmentation(
        source_images=slices,
        pixel_array=pixels,
        segmentation_type="FRACTIONAL" if prediction.probabilities else "BINARY",
        segment_descriptions=_segments(prediction),
        series_instance_uid=hd.UID(),
        series_number=_SERIES_NUMBER,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="resunet",
        manufacturer_model_name="resunet",
        software_versions=_version(),
        device_serial_number=prediction.model[:16],
        omit_empty_frames=False,  # a slice without anything found was looked at, too
    )
    segmentation.SeriesDescription = "resunet"
    return segmentation


def _segments(prediction: Prediction) -> Sequence[hd.seg.SegmentDescription]:
    algorithm = hd.AlgorithmIdentificationSequence(
        name="resunet",
        version=_version(),
        family=codes.cid7162.ArtificialIntelligence,
        parameters={"weights sha256": prediction.model},
    )
    described = []
    for number, (value, name) in enumerate(foreground(prediction.classes), start=1):
        segment = hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:64],
            segmented_property_category=codes.SCT.Tissue,  # what the class is, nobody said but in its name
            segmented_property_type=codes.SCT.Tissue,
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm,
        )
        segment.SegmentDescription = f"mask value {value}"
        described.append(segment)
    return described


def _in_file_order(prediction: Prediction, slices: Sequence[pydicom.Dataset]) -> NDArray:
    """(M, frames, y, x) as the frames lie in the files: what `resunet.data.dicom_pixels.read_series` did, undone."""
    planes = prediction.values if prediction.probabilities else prediction.values[None]
    if planes.ndim == 3:  # a single slice is not turned
        return planes[:, None]
    planes = to_file_frame(planes, prediction.orientation)
    if len(slices) > 1:
        return planes
    frames = frame_count(slices[0]) or planes.shape[1]
    numbers = np.arange(frames, dtype=np.int32).reshape(1, frames, 1, 1)
    sorted_numbers = place(numbers, planes_of(slices[0], frames), (1.0, 1.0, 1.0), "", sort=True).values
    order = to_file_frame(sorted_numbers, prediction.orientation).ravel() if sorted_numbers.ndim == 4 else [0]
    in_order = np.empty_like(planes)
    in_order[:, order] = planes
    return in_order


def _version() -> str:
    return importlib.metadata.version("resunet")
