from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain.recipe import PretrainRecipe
from resunet.config import validate


def write_archive_of(folder: Path, count: int, seed: int = 0) -> Path:
    """`count` 16-bit images of different sizes below `folder`, and a salt beside it."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.integers(0, 4000, (20 + i, 28 - i), dtype=np.uint16)
        Image.fromarray(pixels).save(folder / f"scan{i:02}.png")
    (folder.parent / "salt").write_text("ab" * 32)
    return folder


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_archive_of(tmp_path / "scans", 9)


@pytest.fixture
def recipe(tmp_path: Path, archive: Path) -> Callable[..., PretrainRecipe]:
    """A tiny recipe on `archive`; keyword arguments replace its keys, `data` and `views` only what they name."""

    def make(**changes: object) -> PretrainRecipe:
        values: dict = {
            "out": str(tmp_path / "run"),
            "steps": 2,
            "batch": 4,
            "log_every": 1,
            "data": {
                "source": str(archive),
                "salt_file": str(tmp_path / "salt"),
                "store": str(tmp_path / "store"),
                "workers": 0,
            },
            "model": {"channels": [4, 8], "units": 1},
            "head": {"hidden": 8, "output": 8},
            "views": {"size": 12},
            "wandb": {"mode": "disabled"},
        }
        for key, value in changes.items():
            values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
        return validate(PretrainRecipe, values, "recipe")

    return make
