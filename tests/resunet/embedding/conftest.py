import csv
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image

from resunet.encoder import ResidualEncoder

GROUPS = 6  # of two images each


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An encoder of images, four levels, random weights."""
    torch.manual_seed(0)
    ResidualEncoder(channels=(4, 6, 8, 12), units=1).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Images of six patients in two sizes, a volume of a seventh, and an image without content of an eighth; a salt beside."""
    root, rng = tmp_path / "source", np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    rows = [("stem", "group")]
    for group in range(GROUPS):
        for i in range(2):
            side = 24 + 8 * i
            Image.fromarray(rng.integers(0, 250, (side, 40), np.uint8)).save(root / "images" / f"p{group}-{i}.png")
            rows.append((f"p{group}-{i}", f"patient{group}"))
    volume = rng.integers(1, 900, (5, 24, 30)).astype(np.int16)
    volume[0] = 0  # air
    image = sitk.GetImageFromArray(volume)
    image.SetSpacing((1.0, 1.0, 3.0))
    sitk.WriteImage(image, str(root / "images" / "vol.nii.gz"))
    Image.fromarray(np.full((24, 24), 7, np.uint8)).save(root / "images" / "empty.png")
    rows += [("vol", "patient-vol"), ("empty", "patient-empty")]
    with open(root / "groups.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    (tmp_path / "salt").write_text("ab" * 32)
    return root
