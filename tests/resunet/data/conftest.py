import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from PIL import Image

from resunet.data.cases import Case, Known
from resunet.data.describe import PERCENTILES, describe, open_scan
from resunet.data.identity import Salt
from resunet.data.images import read_scan
from resunet.data.ledger import open_ledger
from resunet.data.manifest import Manifest, open_manifest
from resunet.data.merge import merge
from resunet.data.ownership import Ownership
from resunet.data.pool import Fault, Limits
from resunet.data.store import Store
from resunet.data.walk import walk
from resunet.files import files_sha256
from resunet.runtime import percentiles

MakeManifest = Callable[..., Manifest]


@pytest.fixture
def random() -> Callable[..., NDArray[np.uint16]]:
    """Noise of a shape."""

    def draw(*shape: int, seed: int = 0, high: int = 3000) -> NDArray[np.uint16]:
        return np.random.default_rng(seed).integers(0, high, shape).astype(np.uint16)

    return draw


@pytest.fixture
def case() -> Callable[..., Case]:
    """The case of some files; keyword arguments as `Case` has them."""

    def make(*files: Path, **changes: object) -> Case:
        return Case("id", "group", "hmac", "group", None, files, None, **changes)  # type: ignore[arg-type]

    return make


@pytest.fixture
def png(case: Callable[..., Case]) -> Callable[..., Case]:
    """Writes an image; its case."""

    def write(path: Path, values: NDArray, **changes: object) -> Case:
        Image.fromarray(values).save(path)
        return case(path, **changes)

    return write


@pytest.fixture
def volume(case: Callable[..., Case]) -> Callable[..., Case]:
    """Writes a volume of a spacing in array order; its case."""

    def write(path: Path, values: NDArray, spacing: Sequence[float] = (3, 1, 1), **changes: object) -> Case:
        image = sitk.GetImageFromArray(values)
        image.SetSpacing([float(s) for s in spacing[::-1]])
        sitk.WriteImage(image, str(path))
        return case(path, **changes)

    return write


@pytest.fixture
def known() -> Callable[[Case], Case]:
    """The case as a manifest gives it."""

    def look_up(one: Case) -> Case:
        values = read_scan(one.files[0], None).values
        spread = tuple(percentiles(values, PERCENTILES))
        stamps = tuple((path.stat().st_size, path.stat().st_mtime_ns) for path in one.files)
        return dataclasses.replace(one, known=Known(files_sha256(one.files), values.shape[1:], len(values), spread, stamps))

    return look_up


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def make_manifest(tmp_path: Path) -> MakeManifest:
    """Images by their stems → the manifest of them, written by the real writer without any process."""

    def make(
        name: str,
        images: dict[str, NDArray[np.uint8]],
        key: bytes = bytes(32),
        groups: dict[str, str] | None = None,
        rejects: Sequence[str] = (),
    ) -> Manifest:
        root, out, salt = tmp_path / name, tmp_path / f"{name}.parquet", Salt(key)
        for stem, pixels in images.items():
            (root / stem).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / f"{stem}.png")
        if groups is not None:
            (root / "groups.csv").write_text("stem,group\n" + "".join(f"{stem},{group}\n" for stem, group in groups.items()))
        tree = walk([root])
        with open_ledger(out, salt.fingerprint, Limits()) as ledger:
            scans = [(file,) for file in tree.files]
            ledger.add_scans(scans, describe(map(open_scan, scans)).scans)
            ledger.flush()
            faults = [(file, Fault(reason)) for file, reason in zip(tree.files, rejects, strict=False)]
            merge(out, ledger, scans, faults, Ownership([root], tree, None, salt))
        return open_manifest(out)

    return make
