"""What training has to know of scans before it reads them: decoded into the store once, their slices with content, their looks.

Read in threads, only so far ahead that decoded volumes do not pile up. Imports no torch.
"""

import base64
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
from resunet.data.foreground import foreground_map
from resunet.data.images import IMAGES, Scan, suffix_of
from resunet.data.perceptual import SIDE, look
from resunet.data.store import Absent, Store, store_key
from resunet.errors import InputError
from resunet.files import files_sha256
from resunet.runtime import Intensity, slice_axis

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
