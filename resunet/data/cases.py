"""A case: a scan's files and, where somebody labelled it, its mask. Loading checks everything a later step relies on."""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from resunet.data.images import Scan, channel_count, read_mask, read_scan
from resunet.data.perceptual import Look, look
from resunet.errors import InputError
from resunet.files import files_sha256, joined_sha256, sha256
from resunet.runtime import Intensity, Percentiles, intensities_by, normalise, slice_axis

if TYPE_CHECKING:
    from resunet.config import Normalisation  # pydantic's, which a bundle does without

IGNORE = 255  # in a label map: left out of every loss and every count
_MAX_CLASSES = 254
_WITH_SPACING = ("nifti", "nrrd", "metaimage", "dicom")
_SHOWN = 10  # values in a message
_SAME_SPACING = 1e-3  # of it: half a voxel over 500


def take_slice(labels: NDArray[np.uint8], axis: int | None, index: int) -> NDArray[np.uint8]:
    """Slice `index` of a label volume along `axis`; the label map itself where there is no axis."""
    return labels if axis is None else np.take(labels, index, axis=axis)


@dataclass(frozen=True)
class Known:
    """What a manifest knows of a scan before it is read.

    shape: without channels.
    percentiles: of all channels together, at `describe.PERCENTILES`.
    stamps: size and time of change (ns) of each file, when it was indexed.
    """

    file_sha256: str
    shape: tuple[int, ...]
    channels: int
    percentiles: tuple[float, ...]
    stamps: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Case:
    """Where a case is, and what it may be called in a record.

    id, group: as a run may show them: HMACs, or the names themselves where the recipe keeps names.
    group_hmac: always the HMAC, for the leakage guard.
    group_name, stem: as the source names them. For splits and splits.json only: they go into no record.
    part: 'pool', 'val', 'test', or None where the source has no splits.
    files: one file; a DICOM series' files in order; or, with `file_per_channel`, one file a channel in their order.
    spacing: mm in array order, where it stands beside the files and not in them.
    position: of a file that is one slice, its place in its volume, from 0 to 1; None where nobody said.
    """

    id: str
    group: str
    group_hmac: str
    group_name: str
    part: str | None
    files: tuple[Path, ...]
    mask: Path | None
    stem: str = ""
    file_per_channel: bool = False
    spacing: tuple[float, ...] | None = None
    known: Known | None = None
    position: float | None = None

    def where(self) -> str:
        """The files, for a message on the terminal."""
        return str(self.files[0]) + (f" and {len(self.files) - 1} more" if len(self.files) > 1 else "")


@dataclass(frozen=True)
class LoadedCase:
    """A case in memory, in the file's own dtype.

    values: (C, y, x) or (C, z, y, x).
    labels: (y, x) or (z, y, x) uint8 class indices, or None.
    spacing: mm, in array order.
    """

    case: Case
    values: NDArray
    spacing: tuple[float, ...]
    intensities: list[Intensity]
    labels: NDArray[np.uint8] | None
    file_sha256: str
    pixel_sha256: str
    look: Look
    mask_sha256: str | None = None
    colour_lost: bool = False  # as Scan's
    in_mm: bool = True  # somebody gave a spacing: the file, or what stands beside it

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(self.values.shape[1:])

    @property
    def axis(self) -> int | None:
        """The axis a volume is sliced along; None for an image."""
        return slice_axis(self.spacing) if len(self.size) == 3 else None

    @property
    def num_slices(self) -> int:
        return 1 if self.axis is None else self.size[self.axis]

    def image_slice(self, index: int) -> NDArray[np.float32]:
        """Slice `index`, normalised with the whole scan's intensities: (C, y, x)."""
        values = self.values if self.axis is None else self.values.take(index, axis=self.axis + 1)
        return normalise(values, self.intensities)

    def label_slice(self, index: int) -> NDArray[np.uint8]:
        """The class indices of slice `index`: (y, x)."""
        assert self.labels is not None
        return take_slice(self.labels, self.axis, index)

    def assemble(self, slices: Sequence[NDArray]) -> NDArray:
        """Slices of (y, x) put back where `image_slice` took them from."""
        return slices[0] if self.axis is None else np.stack(slices, axis=self.axis)

    def is_constant(self, index: int) -> bool:
        """A slice without any contrast once it is normalised, such as air outside the field of view."""
        values = self.values if self.axis is None else self.values.take(index, axis=self.axis + 1)
        return all(
            max(float(channel.min()), intensity.low) >= min(float(channel.max()), intensity.high)
            for channel, intensity in zip(values, self.intensities, strict=True)
        )


class UnlistedValues(InputError):
    """A mask holds values that the recipe has no class for."""


def load_cases(
    cases: Sequence[Case],
    channels: str | int,
    normalisation: "Normalisation",
    classes: Mapping[int, str] | None = None,
    ignore: Sequence[int] = (),
    progress: Callable[[Iterable[LoadedCase], int], Iterable[LoadedCase]] | None = None,
) -> list[LoadedCase]:
    """Read cases and check them; with `classes` (raw mask value → name, background first), masks too.

    Raises:
        InputError: the first file at fault, with what is wrong with it.
    """

    def load(case: Case) -> LoadedCase:
        return _load(case, channels, normalisation, classes, ignore)

    with ThreadPoolExecutor() as pool:  # SimpleITK and the image codecs release the GIL
        loaded = pool.map(load, cases)
        try:
            return list(progress(loaded, len(cases)) if progress else loaded)
        except UnlistedValues as error:
            assert classes is not None
            raise InputError(f"{error}{_of_all(cases, {*classes, *ignore})}") from error


def refuse_images(cases: Sequence[LoadedCase], spatial_dims: int) -> None:
    """Stop where a network of volumes would be given an image.

    Raises:
        InputError: with the first of them.
    """
    images = [case for case in cases if len(case.size) < spatial_dims]
    if images:
        raise InputError(
            f"{images[0].case.where()}: is an image of two dimensions, as are {len(images)} of {len(cases)} scans here; a network "
            "of volumes (spatial_dims=3) cannot see it. One with model.spatial_dims=2 takes both, volumes slice by slice."
        )


def read_case(case: Case, channels: str | int) -> Scan:
    """A case's scan, whichever way its files hold it.

    pixel_sha256: of channels in files of their own, sha256 over theirs in order.

    Raises:
        InputError: unreadable, another number of channels, channels that differ in size or spacing, or a spacing beside
            the files that is not one a dimension.
    """
    scan = _join_channels(case, channels) if case.file_per_channel else read_scan(_series(case.files), channels)
    if case.spacing is None:
        return scan
    if len(case.spacing) != len(scan.spacing):
        raise InputError(
            f"{case.where()}: the spacing beside it is {_numbers(case.spacing)}, the scan has {len(scan.spacing)} dimensions."
        )
    return replace(scan, spacing=case.spacing)


def intensities_of(values: NDArray, normalisation: "Normalisation") -> list[Intensity]:
    """The normalisation of each channel of a whole scan (C, *size)."""
    return intensities_by(values, rule_of(normalisation))


def rule_of(normalisation: "Normalisation") -> Intensity | Percentiles:
    """What a recipe or a config.json asks for, as `resunet.runtime` takes it."""
    if normalisation.kind == "fixed":
        return Intensity(normalisation.low, normalisation.high, normalisation.mean, normalisation.std)
    return Percentiles(normalisation.low, normalisation.high)


def source_digest(cases: Iterable[LoadedCase]) -> str:
    """sha256 over the sorted hashes of files and masks: which images and labels these are, whatever they are called."""
    return hashlib.sha256("".join(sorted(f"{case.file_sha256}{case.mask_sha256}" for case in cases)).encode()).hexdigest()


def encode_labels(mask: NDArray, classes: Mapping[int, str], ignore: Sequence[int], path: Path) -> NDArray[np.uint8]:
    """Raw mask values → class indices in the order of `classes`; ignored values → IGNORE.

    Raises:
        UnlistedValues: a value that is in neither, with all such values.
    """
    assert 2 <= len(classes) <= _MAX_CLASSES
    labels = np.full(mask.shape, IGNORE, np.uint8)
    known = np.isin(mask, list(ignore))
    for index, value in enumerate(classes):
        here = mask == value
        labels[here] = index
        known |= here
    if not known.all():
        unlisted = [int(value) for value in np.unique(mask[~known])]
        noun = "value" if len(unlisted) == 1 else "values"
        listed = ", ".join(f"{value}: {name}" for value, name in classes.items())
        todo = "Add what is missing there, or to data.ignore."
        if path.suffix.lower() in (".jpg", ".jpeg"):
            todo = "JPEG changes values when it compresses: write masks as PNG."
        raise UnlistedValues(
            f"{path}: the mask holds the {noun} {_short(unlisted)}, which data.classes does not list. data.classes has "
            f"{listed}. {todo}"
        )
    return labels


def _load(
    case: Case,
    channels: str | int,
    normalisation: "Normalisation",
    classes: Mapping[int, str] | None,
    ignore: Sequence[int],
) -> LoadedCase:
    scan = read_case(case, channels)
    labels = None
    if classes is not None:
        assert case.mask is not None, "the source refuses images without masks where masks are needed"
        mask = read_mask(case.mask)
        if mask.values.shape != scan.values.shape[1:]:
            raise InputError(
                f"{case.mask}: the mask is {_size(mask.values.shape)}, its image {_size(scan.values.shape[1:])}. "
                "They must have the same size."
            )
        labels = encode_labels(mask.values, classes, ignore, case.mask)
    values = np.ascontiguousarray(scan.values)
    return LoadedCase(
        case=case,
        values=values,
        spacing=scan.spacing,
        intensities=intensities_of(values, normalisation),
        labels=labels,
        file_sha256=files_sha256(case.files),
        pixel_sha256=scan.pixel_sha256,
        look=look(values),
        mask_sha256=sha256(case.mask) if case.mask is not None and labels is not None else None,
        colour_lost=scan.colour_lost,
        in_mm=case.spacing is not None or scan.format in _WITH_SPACING,
    )


def _of_all(cases: Sequence[Case], listed: Collection[int]) -> str:
    """Which other values than those listed the masks hold, and how many do; '' if only one. What cannot be read is passed over."""
    masks = Counter[int]()
    odd = 0
    for case in cases:
        try:
            others = np.setdiff1d(read_mask(case.mask).values, list(listed)) if case.mask is not None else np.empty(0, int)
        except InputError:
            continue
        masks.update(others.tolist())
        odd += len(others) > 0
    held = ", ".join(f"{value} (in {count})" for value, count in sorted(masks.items())[:_SHOWN])
    more = f" and {len(masks) - _SHOWN} more" if len(masks) > _SHOWN else ""
    return f" In all, {odd} of {len(cases)} masks hold such values: {held}{more}." if odd > 1 else ""


def _series(files: tuple[Path, ...]) -> Path | tuple[Path, ...]:
    return files if len(files) > 1 else files[0]


def _join_channels(case: Case, channels: str | int) -> Scan:
    wanted = channel_count(channels)
    if wanted != len(case.files):
        raise InputError(
            f"{case.where()}: {len(case.files)} channels, a file each, data.channels={channels} wants {wanted}. "
            f"Set data.channels={len(case.files)}."
        )
    scans = [read_scan(path, None) for path in case.files]
    first = scans[0]
    for path, scan in zip(case.files, scans, strict=True):
        if len(scan.values) != 1:
            raise InputError(f"{path}: has {len(scan.values)} channels; it is one channel of a case, and must hold one.")
        same_size = scan.values.shape == first.values.shape
        if not same_size or not np.allclose(scan.spacing, first.spacing, rtol=_SAME_SPACING, atol=0):
            raise InputError(
                f"{path}: {_grid(scan)}; {case.files[0].name}, the first channel, {_grid(first)}. The channels of a case "
                "must be of one grid: resample them."
            )
    values = np.concatenate([scan.values for scan in scans])
    return replace(first, values=values, pixel_sha256=joined_sha256([scan.pixel_sha256 for scan in scans]))


def _size(shape: tuple[int, ...]) -> str:
    return "×".join(str(n) for n in shape)


def _grid(scan: Scan) -> str:
    return f"{_size(scan.values.shape[1:])} at {_numbers(scan.spacing)} mm"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _short(values: list[int]) -> str:
    return ", ".join(map(str, values[:_SHOWN])) + (f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else "")
