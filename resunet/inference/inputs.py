"""What `resunet predict` is given: files, folders, DICOM series, nnU-Net data sets, manifests → scans, and what each is called.

A file below a folder keeps its place below it. A DICOM series is called as the folder that holds nothing else, or as the file of
its lowest slice; an nnU-Net case as its files without the channel; a scan of a manifest as its file, or, where two are called the
same, as its id.
"""

import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from resunet.data.cases import Case
from resunet.data.dicom import BESIDE_IMAGES, DicomHeader, NoScan, gaps_told, group_files, read_header
from resunet.data.formats import sniff
from resunet.data.images import READABLE, stem_of, suffix_of
from resunet.data.nnunet import is_nnunet, list_nnunet
from resunet.data.walk import walk
from resunet.errors import EnvironmentFault, InputError
from resunet.progress import say

_DICOM_SUFFIXES = (".dcm", ".ima", ".dicom", ".dic")
NNUNET_IMAGES = ("imagesTr", "imagesTs")


@dataclass(frozen=True)
class Input:
    """A scan to predict. name: of what is written, relative to the output folder, without an ending."""

    case: Case
    name: str


@dataclass(frozen=True)
class Inputs:
    """What was found. faults: one message each; strangers: files in folders that are no scans, by name and by
    content: of DICOM those of plans, reports and segmentations."""

    scans: tuple[Input, ...]
    faults: tuple[str, ...]
    strangers: int


def list_inputs(paths: Sequence[Path], channels: str | int) -> Inputs:
    """Everything in `paths`, by name; of pixels nothing is read.

    Args:
        channels: what the model takes, 'grey', 'rgb' or a number: an nnU-Net data set must have them.

    Raises:
        InputError: a path that does not exist, a folder or manifest that is none, no scan at all, or two of one name.
    """
    scans: list[Input] = []
    faults: list[str] = []
    strangers = 0
    files: list[Path] = []
    sets: dict[Path, Mapping[Path, Input]] = {}
    for path in paths:
        if path.is_dir():
            found = _nnunet(path, channels) or _folder(path)
        elif path.suffix == ".parquet":
            found = _manifest(path)
        elif path.is_file():
            sets[path.absolute().parent] = its = sets.get(path.absolute().parent) or _nnunet_files(path, channels)
            if (case := its.get(path.absolute())) is None:
                files.append(path)
            elif case not in scans:  # of several channels each may have been given
                scans.append(case)
            continue
        else:
            raise InputError(f"INPUT {path}: no such file or folder.")
        scans += found.scans
        faults += found.faults
        strangers += found.strangers
    found = _files(files, _own_stem, lambda path: path.resolve().parent.name, known=True)
    scans = sorted([*scans, *found.scans], key=lambda one: one.name)
    faults += found.faults
    if not scans:
        given = ", ".join(map(str, paths[:5])) + (", …" if len(paths) > 5 else "")
        raise InputError("\n".join(faults) or f"INPUT {given}: no scan there. Formats read: {', '.join(READABLE)}, DICOM.")
    for one, other in itertools.pairwise(scans):
        if one.name == other.name:
            raise InputError(
                f"{one.case.files[0]} and {other.case.files[0]} would both be written as {one.name}. Rename one, or predict them "
                "into two folders."
            )
    return Inputs(tuple(scans), tuple(faults), strangers)


def _nnunet(root: Path, channels: str | int) -> Inputs | None:
    """A raw data set, or one of its folders of images; None for another folder."""
    part = root.absolute()
    if part.name in NNUNET_IMAGES and (part.parent / "dataset.json").is_file():
        entries = list_nnunet(part.parent, channels, masks=False).entries
        entries = {stem: entry for stem, entry in entries.items() if entry.files[0].parent == part}
    elif is_nnunet(root):
        entries = list_nnunet(root, channels, masks=False).entries
    else:
        return None
    scans = [Input(_case(entry.files, entry.file_per_channel, entry.spacing), stem) for stem, entry in entries.items()]
    return Inputs(tuple(scans), (), 0)


def _nnunet_files(path: Path, channels: str | int) -> Mapping[Path, Input]:
    """Of a file in a folder of a raw data set: every file of the folder → its case, whose name has no channel."""
    folder = path.absolute().parent
    found = _nnunet(folder, channels) if folder.name in NNUNET_IMAGES else None
    return {} if found is None else {file: one for one in found.scans for file in one.case.files}


def _folder(root: Path) -> Inputs:
    top = root / "images" if (root / "images").is_dir() else root
    below = top.absolute()
    tree = walk([top])

    def place(path: Path) -> str:
        return os.path.relpath(path.with_name(_own_stem(path)), below)

    def folder(path: Path) -> str:
        relative = os.path.relpath(path.parent, below)
        return root.resolve().name if relative == "." else relative

    found = _files([Path(file.path) for file in tree.files], place, folder, known=False)
    unreachable = tuple(f"{file.path}: {reason}." for file, reason in tree.unreachable)
    return Inputs(found.scans, found.faults + unreachable, found.strangers)


def _manifest(path: Path) -> Inputs:
    try:
        from resunet.data.manifest import open_manifest
        from resunet.data.manifest_source import list_manifest
    except ModuleNotFoundError as error:
        if error.name != "pyarrow":
            raise
        raise EnvironmentFault(
            f"INPUT {path}: reading a manifest needs pyarrow: pip install pyarrow. Or name folders."
        ) from error
    cases = list(list_manifest(open_manifest(path), keep=False))
    times = Counter(case.stem for case in cases)
    return Inputs(tuple(Input(case, case.stem if times[case.stem] == 1 else case.id) for case in cases), (), 0)


def _files(paths: Sequence[Path], place: Callable[[Path], str], folder: Callable[[Path], str], known: bool) -> Inputs:
    """Images and volumes, and DICOM files put together.

    Args:
        place: what a file is called; folder: what the folder of a file is called.
        known: somebody named each of these files: what is no scan is a fault.
    """
    scans: list[Input] = []
    faults: list[str] = []
    headers: dict[str, DicomHeader] = {}
    strangers = 0
    for path in paths:
        try:
            format = sniff(path)
            if format == "dicom":
                header = read_header(path)
                if header.modality in BESIDE_IMAGES:  # it has pixels, as an earlier segmentation has
                    raise NoScan(f"{path}: is no scan but a DICOM file of modality {header.modality}.")
                headers[str(path)] = header
            elif format is None and not known and suffix_of(path) not in (*READABLE, *_DICOM_SUFFIXES):
                strangers += 1
            else:
                scans.append(Input(_case((path,)), place(path)))
        except NoScan as error:
            if known:
                faults.append(str(error))
            else:
                strangers += 1
        except InputError as error:
            faults.append(str(error))
    return Inputs((*scans, *_series(headers, place, folder)), tuple(faults), strangers)


def _series(headers: Mapping[str, DicomHeader], place: Callable[[Path], str], folder: Callable[[Path], str]) -> list[Input]:
    volumes = group_files(headers)
    for line in gaps_told({name: headers[name] for name in volume} for volume in volumes):
        say(line)
    units = [tuple(map(Path, volume)) for volume in volumes]
    in_folder: dict[Path, int] = defaultdict(int)
    for unit in units:
        for parent in {path.parent for path in unit}:
            in_folder[parent] += 1

    def name(unit: Sequence[Path]) -> str:
        alone = len({path.parent for path in unit}) == 1 and in_folder[unit[0].parent] == 1
        return folder(unit[0]) if alone and len(unit) > 1 else place(unit[0])

    return [Input(_case(unit), name(unit)) for unit in units]


def _own_stem(path: Path) -> str:
    """The name without an ending that names a format: 1.2.840.10008 is a UID, and has none."""
    return stem_of(path) if suffix_of(path) in (*READABLE, *_DICOM_SUFFIXES) else path.name


def _case(files: tuple[Path, ...], file_per_channel: bool = False, spacing: tuple[float, ...] | None = None) -> Case:
    """A case that goes into no record."""
    return Case("", "", "", "", None, files, None, file_per_channel=file_per_channel, spacing=spacing)
