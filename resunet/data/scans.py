"""The scans of an archive as training reads them: windows of slices or of volumes, normalised by the whole scan, where there is
content.

2D images in a fast format are read whole, as they are. Everything else is decoded once into a store, from which only the chunks
of a window are read. For a network of volumes, images and single slices are left out. What is held in memory is a few numbers a
scan. Imports no torch.
"""

import base64
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from resunet.config import FixedNormalisation, Normalisation
from resunet.data.cases import Case, Known, intensities_of, read_case
from resunet.data.describe import PERCENTILES
from resunet.data.evidence import SCHEMA, Evidence
from resunet.data.foreground import ForegroundMap, foreground_corner, foreground_map
from resunet.data.images import IMAGES, Scan, suffix_of
from resunet.data.perceptual import SIDE, look
from resunet.data.store import Absent, Store, StoredScan, store_key
from resunet.errors import EnvironmentFault, InputError
from resunet.files import files_sha256
from resunet.runtime import Intensity, normalise, slice_axis

BLOCK = 16  # pixels, of the foreground map
DIRECT_PIXELS = 2**20  # larger images take too long to be decoded whole at every read; see benchmarks/loader.py
_FACTS = "2"  # the version of what the store is told of a scan: another one when looks, maps or readers change
_THREADS = min(8, os.cpu_count() or 1)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Looked:
    """What the leakage guard compares of a scan. thumbnail: the bytes of (planes, SIDE, SIDE)."""

    file_sha256: str
    pixel_sha256: str
    perceptual: bytes
    thumbnail: bytes


@dataclass(frozen=True)
class Prepared:
    """What training has to know of a scan.

    key: in the store; "" for an image that is read directly.
    num_slices: those with content; of an image 1, or 0.
    is_volume: of more than one slice.
    decoded: into the store, now and not before.
    looked: None where a manifest knows it.
    """

    key: str
    num_slices: int
    is_volume: bool
    decoded: bool = False
    looked: Looked | None = None


@dataclass(frozen=True)
class Window:
    """Part of a slice or of a volume, and where it is from.

    values: (C, y, x) or (C, z, y, x) float32, normalised.
    anchors: (2, dimensions), a place with content for each view, in array order.
    scan: index of the scan among the cases.
    spacing: mm in array order, of a volume; the pixels of slices and images are taken as they are: 1.
    axis: of the volume, in LPS, that it is sliced along; None for an image and for a volume as it is.
    position: of the slice along that axis, from 0 for the first slice to 1 for the last; NaN where there is no such place.
    """

    values: NDArray[np.float32]
    anchors: NDArray[np.int64]
    scan: int
    spacing: tuple[float, ...] = (1.0, 1.0)
    axis: int | None = None
    position: float = math.nan


class Scans:
    """The scans of some cases, once prepared; may be pickled and forked.

    Args:
        prepared: of each case, in their order.
        spatial_dims: 2: an item is an image or a slice of a volume; 3: a volume as it is, and there are no others.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        prepared: Sequence[Prepared],
        channels: str | int,
        normalisation: Normalisation,
        store: Store,
        spatial_dims: int = 2,
    ) -> None:
        self.cases = cases
        self.spatial_dims = spatial_dims
        self._keys = np.array([one.key for one in prepared], "S64")
        self._ends = np.cumsum([_num_items(one, spatial_dims) for one in prepared], dtype=np.int64)
        self._channels, self._normalisation, self._store = channels, normalisation, store

    @property
    def num_items(self) -> int:
        """How many slices have content, over all scans; of `spatial_dims` 3 how many volumes."""
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def items(self) -> str:
        """What they are called."""
        return "slices" if self.spatial_dims == 2 else "volumes"

    def window(self, item: int, size: int | Sequence[int], rng: np.random.Generator) -> Window:
        """A window of at most `size` of the `item`-th slice or volume, around content.

        Args:
            size: voxels, of every side, or one a side.

        Raises:
            InputError: the image cannot be read any more.
            EnvironmentFault: the store lost the scan.
        """
        assert 0 <= item < self.num_items, item
        sides = (size,) * self.spatial_dims if isinstance(size, int) else tuple(size)
        scan = int(np.searchsorted(self._ends, item, side="right"))
        key = self._keys[scan].decode()
        if not key:
            return self._from_image(scan, sides, rng)
        return self._from_store(scan, key, item - int(self._ends[scan - 1] if scan else 0), sides, rng)

    def _from_image(self, index: int, size: tuple[int, ...], rng: np.random.Generator) -> Window:
        values = read_case(self.cases[index], self._channels).values
        content = foreground_map(values, BLOCK)
        place = _place(content, size, rng)
        cut = normalise(values[(slice(None), *place)], intensities_of(values, self._normalisation))
        return Window(cut, _anchors(content, place, rng), index)

    def _from_store(self, scan_index: int, key: str, number: int, size: tuple[int, ...], rng: np.random.Generator) -> Window:
        """Of the `number`-th slice with content, or of the whole volume."""
        try:
            scan = self._store.open(key)
            axis, content, intensities = _facts(scan)
            if self.spatial_dims == 3:
                axis = None
            index = scan.facts["slices"][number]
            if axis is not None:
                content = content.slice(axis, index)
            place = _place(content, size, rng)
            where = [slice(None), *place]
            if axis is not None:
                where.insert(1 + axis, slice(index, index + 1))
            cut = scan.crop(tuple(where))
        except Absent as error:
            raise EnvironmentFault(
                f"{self._store.folder}: a decoded scan is missing or damaged. resume=true decodes it again and goes on."
            ) from error
        values, anchors = normalise(cut, intensities), _anchors(content, place, rng)
        if self.spatial_dims == 3:
            return Window(values, anchors, scan_index, tuple(scan.facts["spacing"]))
        if axis is None:
            return Window(values, anchors, scan_index)
        last = scan.shape[1 + axis] - 1
        position = index / last if last else math.nan
        return Window(values.squeeze(1 + axis), anchors, scan_index, axis=axis, position=position)


def prepare_scans(
    cases: Iterable[Case], channels: str | int, normalisation: Normalisation, store: Store, spatial_dims: int = 2
) -> Iterator[Prepared]:
    """Read every case once, in their order, and fill the store; what the store or a manifest knows is not decoded again.

    With `spatial_dims` 3 what is no volume is not stored, and not read where a manifest knows it.

    Raises:
        InputError: the first file at fault.
        EnvironmentFault: the store's disk.
    """
    return _each(lambda case: _prepare(case, channels, normalisation, store, spatial_dims), cases)


def look_at_cases(cases: Iterable[Case], channels: str | int) -> Iterator[Looked]:
    """What the leakage guard compares of cases that are not trained on, in their order.

    Raises:
        InputError: the first file at fault.
    """
    return _each(lambda case: _look(case, read_case(case, channels)), cases)


def _each(function: Callable[[Case], Result], cases: Iterable[Case]) -> Iterator[Result]:
    """In threads, which the readers release the GIL for; only so far ahead that decoded volumes do not pile up."""
    with ThreadPoolExecutor(_THREADS) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for case in cases:
                waiting.append(pool.submit(function, case))
                if len(waiting) > 2 * _THREADS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)  # after an error nobody wants the others


def evidence_of_scans(cases: Sequence[Case], looked: Sequence[Looked], salt_fingerprint: str) -> Evidence:
    """What the leakage guard compares, with thumbnails."""
    columns = [
        [case.group_hmac for case in cases],
        [one.file_sha256 for one in looked],
        [one.pixel_sha256 for one in looked],
        [one.perceptual for one in looked],
    ]
    table = pa.table([pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)
    return Evidence(table, salt_fingerprint, lambda row: np.frombuffer(looked[row].thumbnail, np.uint8).reshape(-1, SIDE, SIDE))


def _num_items(prepared: Prepared, spatial_dims: int) -> int:
    return prepared.num_slices if spatial_dims == 2 else int(prepared.is_volume and prepared.num_slices > 0)


def _prepare(case: Case, channels: str | int, normalisation: Normalisation, store: Store, spatial_dims: int) -> Prepared:
    known = case.known
    if known is not None and not _is_volume(known.shape) and spatial_dims == 3:
        return Prepared("", 0, is_volume=False)
    if known is not None and _is_direct(case, known.shape):
        _refuse_changed(case, known)
        return Prepared("", int(_has_contrast(known, normalisation)), is_volume=False)
    digest = known.file_sha256 if known is not None else _digest(case)
    key = store_key(_FACTS, digest, str(channels), normalisation.model_dump_json(), repr(case.spacing))
    with suppress(Absent):
        stored = store.open(key)
        its, facts = None if known is not None else _looked(digest, stored.facts), stored.facts
        return Prepared(key, len(facts["slices"]), _is_volume(stored.shape[1:]), looked=its)
    if known is not None and _digest(case) != digest:
        raise _changed(case)
    scan = read_case(case, channels)
    looked = _look(case, scan, digest)
    is_volume = _is_volume(scan.values.shape[1:])
    if not is_volume and spatial_dims == 3:
        return Prepared("", 0, is_volume, looked=looked)
    intensities = intensities_of(scan.values, normalisation)
    if _is_direct(case, scan.values.shape[1:]):
        return Prepared("", len(_slices_with_contrast(scan.values, None, intensities)), is_volume, looked=looked)
    axis = slice_axis(scan.spacing) if scan.values.ndim == 4 else None
    content = foreground_map(scan.values, tuple(1 if i == axis else BLOCK for i in range(scan.values.ndim - 1)))
    slices = _slices_with_contrast(scan.values, axis, intensities)
    if axis is not None:
        slices = np.intersect1d(slices, content.usable_slices(axis))
    facts = {
        "axis": axis,
        "spacing": list(scan.spacing),
        "slices": slices.tolist(),
        "foreground": content.facts(),
        "intensities": [asdict(intensity) for intensity in intensities],
        "looked": [scan.pixel_sha256, *(base64.b64encode(b).decode() for b in (looked.perceptual, looked.thumbnail))],
    }
    store.put(key, scan.values, facts, slice_axis=axis)
    return Prepared(key, len(slices), is_volume, decoded=True, looked=None if known is not None else looked)


def _looked(digest: str, facts: Mapping[str, Any]) -> Looked:
    pixels, *encoded = facts["looked"]
    return Looked(digest, pixels, *map(base64.b64decode, encoded))


def _refuse_changed(case: Case, known: Known) -> None:
    """Raise InputError if the files are not those that were indexed; their content is read only where the stamps differ."""
    try:
        stats = [path.stat() for path in case.files]
    except OSError as error:
        raise _gone(case, error) from error
    if tuple((stat.st_size, stat.st_mtime_ns) for stat in stats) != known.stamps and _digest(case) != known.file_sha256:
        raise _changed(case)


def _digest(case: Case) -> str:
    try:
        return files_sha256(case.files)
    except OSError as error:
        raise _gone(case, error) from error


def _gone(case: Case, error: OSError) -> InputError:
    advice = " It was there when it was indexed: restore it, or run resunet index again." if case.known is not None else ""
    return InputError(f"{Path(error.filename or case.files[0])}: cannot be read: {error.strerror}.{advice}")


def _changed(case: Case) -> InputError:
    return InputError(f"{case.where()}: has changed since it was indexed. Run resunet index again.")


def _has_contrast(known: Known, normalisation: Normalisation) -> bool:
    """Whether an image has any once it is normalised, as far as a manifest, which knows all channels together, can tell."""
    if isinstance(normalisation, FixedNormalisation):
        return max(known.percentiles[0], normalisation.low) < min(known.percentiles[-1], normalisation.high)
    wanted = (normalisation.low, normalisation.high) if known.channels == 1 else (0, 100)
    low, high = np.interp(wanted, PERCENTILES, known.percentiles)
    return bool(low < high)


def _look(case: Case, scan: Scan, digest: str | None = None) -> Looked:
    seen = look(scan.values)
    return Looked(digest or _digest(case), scan.pixel_sha256, seen.hash, seen.thumbnail.tobytes())


def _is_volume(size: Sequence[int]) -> bool:
    return len(size) == 3 and min(size) > 1


def _is_direct(case: Case, size: Sequence[int]) -> bool:
    image = len(case.files) == 1 and suffix_of(case.files[0]) in IMAGES and len(size) == 2
    return image and size[0] * size[1] <= DIRECT_PIXELS


def _slices_with_contrast(values: NDArray, axis: int | None, intensities: Sequence[Intensity]) -> NDArray[np.intp]:
    """The slices that are not constant once they are normalised, such as air outside the field of view."""
    others = tuple(i for i in range(values.ndim - 1) if i != axis)
    contrast = np.zeros(1 if axis is None else values.shape[1 + axis], bool)
    for channel, intensity in zip(values, intensities, strict=True):
        low = np.maximum(channel.min(axis=others), intensity.low)
        contrast |= low < np.minimum(channel.max(axis=others), intensity.high)
    return np.flatnonzero(contrast)


def _facts(scan: StoredScan) -> tuple[int | None, ForegroundMap, list[Intensity]]:
    facts = scan.facts
    return facts["axis"], ForegroundMap.from_facts(facts["foreground"]), [Intensity(**one) for one in facts["intensities"]]


def _place(content: ForegroundMap, size: Sequence[int], rng: np.random.Generator) -> tuple[slice, ...]:
    """A window of `size`, or of the whole axis where that is shorter, centred on content: a slice an axis."""
    corner = foreground_corner(rng, content, size)
    return tuple(slice(first, min(first + side, n)) for first, side, n in zip(corner, size, content.size, strict=True))


def _anchors(content: ForegroundMap, place: Sequence[slice], rng: np.random.Generator) -> NDArray[np.int64]:
    """Two places with content within a window, relative to it."""
    starts, stops = np.array([one.start for one in place]), np.array([one.stop for one in place])
    edges = np.array(content.block)
    first, last = starts // edges, -(-stops // edges)
    mask = content.mask[tuple(slice(*bounds) for bounds in zip(first, last, strict=True))]
    blocks = np.argwhere(mask if mask.any() else np.ones_like(mask)) + first
    chosen = blocks[rng.integers(len(blocks), size=2)]
    places = rng.integers(np.maximum(chosen * edges, starts), np.minimum((chosen + 1) * edges, stops))
    anchors: NDArray[np.int64] = places - starts
    return anchors
