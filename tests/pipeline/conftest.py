import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PARTS = {"pool": 8, "val": 2, "test": 5}  # groups
SLICES = 2  # images a group


@pytest.fixture
def write_blobs(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small labelled folder: bright discs on a noisy gradient, 16-bit PNG, grouped and split."""

    def write(name: str = "blobs", size: tuple[int, int] = (44, 39), splits: bool = True) -> Path:
        rng = np.random.default_rng(7)
        root = tmp_path / name
        (root / "images").mkdir(parents=True)
        (root / "masks").mkdir()
        rows, stems = [], {part: [] for part in PARTS}
        yy, xx = np.mgrid[: size[0], : size[1]]
        groups = [part for part, count in PARTS.items() for _ in range(count)]
        for number, part in enumerate(groups):
            for index in range(SLICES):
                stem = f"PATIENT-Mueller{number:02d}-{index}"
                mask = (yy - rng.integers(10, 34)) ** 2 + (xx - rng.integers(10, 29)) ** 2 < rng.integers(9, 40)
                image = 3000 + 40 * xx + 9000 * mask + rng.normal(0, 300, size)
                Image.fromarray(image.astype(np.uint16)).save(root / "images" / f"{stem}.png")
                Image.fromarray((mask * 255).astype(np.uint8)).save(root / "masks" / f"{stem}.png")
                rows.append((stem, f"Mueller{number:02d}"))
                stems[part].append(stem)
        with open(root / "groups.csv", "w", newline="") as file:
            csv.writer(file).writerows([("stem", "group"), *rows])
        if splits:
            (root / "splits.json").write_text(json.dumps(stems))
        return root

    return write


@pytest.fixture
def salt(tmp_path: Path) -> Path:
    file = tmp_path / "salt"
    file.write_text("5a" * 32)
    return file
