"""DICOM headers, and which files of an archive are one volume. No pixels are read here."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom
from pydicom.filereader import read_partial

from resunet.data.dicom_planes import SAME_PLACE, plane_of
from resunet.data.formats import guarded
from resunet.errors import InputError
from resunet.plain import number_of

_TAGS = """
    SpecificCharacterSet ImageType Modality PatientID StudyInstanceUID SeriesInstanceUID AcquisitionNumber InstanceNumber
    TemporalPositionIdentifier EchoTime EchoNumbers InversionTime FlipAngle TriggerTime DiffusionBValue AcquisitionTime
    ImagePositionPatient ImageOrientationPatient PixelSpacing SamplesPerPixel PhotometricInterpretation
    Rows Columns NumberOfFrames
"""
_TAG_NUMBERS: list[pydicom.tag.BaseTag | int] = [pydicom.tag.Tag(name) for name in _TAGS.split()]
_LAST = 0x0028_0104  # what is wanted stands before the palettes and the pixels

_GAP = 1.5  # times the usual distance of slices

# What tells apart volumes that share a series and their positions, tried in this order. Times come late: a scanner may
# stamp every slice.
_PHASES = (
    "AcquisitionNumber",
    "TemporalPositionIdentifier",
    "EchoNumbers",
    "EchoTime",
    "DiffusionBValue",
    "InversionTime",
    "FlipAngle",
    "ImageType",
    "TriggerTime",
    "AcquisitionTime",
)

pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE  # strange values are read, or fail where used


@dataclass(frozen=True)
class DicomHeader:
    """What grouping needs of one file.

    patient, study, series: raw ids, '' where missing. They name a person: never to be written anywhere.
    stack: what slices of one volume share: size, orientation, pixel spacing, colour; '' for a file that is a unit of its
        own (several frames, no geometry, no series).
    position: mm along the normal of the slice.
    instance: InstanceNumber, -1 where missing.
    frames: number of frames, 0 where the header's is no number.
    phases: values that tell apart volumes at equal positions (acquisition, time, echo, b-value, …).
    """

    patient: str
    study: str
    series: str
    modality: str
    stack: str
    position: float
    instance: int
    frames: int
    phases: tuple[str, ...]


# Modalities of files that stand in a study beside its images: masks, structures, plans, reports, presentation states, waveforms.
# DICOM PS3.3, C.7.3.1.1.1
# fmt: off
BESIDE_IMAGES = frozenset({
    "ANN", "AU", "DOC", "ECG", "EEG", "EMG", "EPS", "FID", "HD", "KO", "M3D", "PLAN", "PR", "REG", "RESP", "RTDOSE",
    "RTINTENT", "RTPLAN", "RTRAD", "RTRECORD", "RTSEGANN", "RTSTRUCT", "RWV", "SEG", "SMR", "SR", "STAIN", "TEXTUREMAP",
})
# fmt: on


class NoScan(InputError):
    """A DICOM file that is no scan, and is none by what it says of itself: not one that was cut off."""


def read_header(path: Path) -> DicomHeader:
    """The header of one file; reads up to the description of the image and no pixels.

    Raises:
        InputError: no DICOM, or a file without an image.
        NoScan: without an image, as it is a plan, a report or another of `BESIDE_IMAGES`.
    """
    return guarded(path, lambda: _read_header(path), says=False)


def _read_header(path: Path) -> DicomHeader:
    with open(path, "rb") as file:
        dataset = read_partial(file, lambda tag, _vr, _length: tag > _LAST, force=True, specific_tags=_TAG_NUMBERS)
    if not dataset.get("Rows") or not dataset.get("Columns"):
        kind = NoScan if modality_of(dataset) in BESIDE_IMAGES else InputError
        raise kind(no_image(path))
    frames = frame_count(dataset) or 0
    position, stack = 0.0, ""
    plane = plane_of(dataset, dataset)
    series = _text(dataset, "SeriesInstanceUID")
    if plane is not None and frames == 1 and series:
        position = plane.along()
        directions = [round(float(c), 2) + 0.0 for c in (*plane.rows, *plane.columns)]
        spacing = [float(f"{s:.4g}") for s in plane.spacing]
        colour = (_text(dataset, "SamplesPerPixel"), _text(dataset, "PhotometricInterpretation"))
        stack = repr((int(dataset.Rows), int(dataset.Columns), directions, spacing, colour))
    return DicomHeader(
        patient=_text(dataset, "PatientID"),
        study=_text(dataset, "StudyInstanceUID"),
        series=series,
        modality=modality_of(dataset),
        stack=stack,
        position=position,
        instance=_whole(dataset.get("InstanceNumber")),
        frames=frames,
        phases=tuple(_text(dataset, name) for name in _PHASES),
    )


def group_files(headers: Mapping[str, DicomHeader]) -> list[tuple[str, ...]]:
    """Which files are read together: the slices of a volume from the lowest position to the highest, or one file.

    Files of different patients, studies or series are never joined. Where several files of a series are at one position
    (phases, echoes, b-values, copies), each volume gets one of them. The result depends on names and headers only, not on
    the order of the mapping.
    """
    units: list[tuple[str, ...]] = []
    stacks: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in sorted(headers):
        header = headers[name]
        if header.stack:
            stacks[header.patient, header.study, header.series, header.stack].append(name)
        else:
            units.append((name,))
    for names in stacks.values():
        units += (_ordered(volume, headers) for volume in _volumes(names, headers, range(len(_PHASES))))
    return sorted(units)


def _volumes(names: Sequence[str], headers: Mapping[str, DicomHeader], phases: Sequence[int]) -> list[list[str]]:
    """Split files of one stack until no two of a part are at one position."""
    most = _most_at_one_position(names, headers)
    if most == 1:
        return [list(names)]
    for index in phases:
        parts: dict[str, list[str]] = defaultdict(list)
        for name in names:
            parts[headers[name].phases[index]].append(name)
        # as many parts as files at one position, at most: a number that every slice has of its own would shred the volume
        if 1 < len(parts) <= most and max(_most_at_one_position(part, headers) for part in parts.values()) < most:
            rest = [other for other in phases if other != index]
            return [volume for key in sorted(parts) for volume in _volumes(parts[key], headers, rest)]
    volumes: list[list[str]] = [[] for _ in range(most)]
    for files in _by_position(names, headers):
        for volume, name in zip(volumes, sorted(files, key=lambda name: (headers[name].instance, name)), strict=False):
            volume.append(name)
    return volumes


def _most_at_one_position(names: Sequence[str], headers: Mapping[str, DicomHeader]) -> int:
    return max(len(files) for files in _by_position(names, headers))


def _by_position(names: Sequence[str], headers: Mapping[str, DicomHeader]) -> list[list[str]]:
    """Files at one position each, from the lowest to the highest."""
    places: list[list[str]] = []
    before = -math.inf
    for name in sorted(names, key=lambda name: (headers[name].position, name)):
        position = headers[name].position
        if position - before > SAME_PLACE:
            places.append([])
            before = position
        places[-1].append(name)
    return places


def _ordered(names: Sequence[str], headers: Mapping[str, DicomHeader]) -> tuple[str, ...]:
    return tuple(sorted(names, key=lambda name: (headers[name].position, headers[name].instance, name)))


def gaps_told(volumes: Iterable[Mapping[str, DicomHeader]]) -> list[str]:
    """What to say of volumes whose slices do not follow each other evenly, as when one is missing; nothing where all do.

    Args:
        volumes: of each the headers of its files, in order.
    """
    uneven = [list(headers) for headers in volumes if _has_gap([header.position for header in headers.values()])]
    if not uneven:
        return []
    count = f"{number_of(len(uneven), 'DICOM volume')} {'has' if len(uneven) == 1 else 'have'}"
    return [
        f"{count} gaps: two neighbouring slices lie more than {_GAP:g} times as far apart as most do, as if slices between "
        f"them were missing. They are read as if they were evenly spaced; lengths and volumes in mm are wrong there. The first: "
        f"the {len(uneven[0])} files from {uneven[0][0]}"
    ]


def _has_gap(positions: Sequence[float]) -> bool:
    steps = sorted(after - before for before, after in itertools.pairwise(positions))
    return len(steps) > 1 and steps[-1] > max(_GAP * steps[(len(steps) - 1) // 2], SAME_PLACE)


def frame_count(dataset: Any) -> int | None:
    """NumberOfFrames, 1 where it is missing or 0, None where it is no number."""
    try:
        return max(1, int(dataset.get("NumberOfFrames") or 1))
    except (TypeError, ValueError, OverflowError):
        return None


def modality_of(dataset: Any) -> str:
    """The code of the modality, '' where missing or where it is none: free text may say anything."""
    code = _text(dataset, "Modality").upper()
    return code if code.isalnum() and len(code) <= 16 else ""


def no_image(path: Path) -> str:
    return (
        f"{path}: has no image (a DICOM file without pixel data, such as a plan, a report or a directory, or one cut off before "
        "them)."
    )


def _text(dataset: Any, name: str) -> str:
    try:
        value = dataset.get(name)
    except (TypeError, ValueError, OverflowError):
        return ""
    return "" if value is None else str(value).strip().strip("\0")


def _whole(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return -1
