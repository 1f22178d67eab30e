from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from resunet.data.describe import describe, open_scan
from resunet.data.identity import Salt
from resunet.data.ledger import open_ledger
from resunet.data.manifest import Manifest, open_manifest
from resunet.data.merge import merge
from resunet.data.ownership import Ownership
from resunet.data.pool import Fault, Limits
from resunet.data.walk import walk

MakeManifest = Callable[..., Manifest]


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
