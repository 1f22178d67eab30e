import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SIDE = 24
# group → the raw values in its masks; two images a group
GROUPS = {"a": (255,), "b": (255, 7), "c": (), "d": (255, 7), "e": (255, 7), "v": (255, 7), "t": (255, 7)}
PARTS = {"pool": "abcde", "val": "v", "test": "t"}


def write_labelled(root: Path) -> Path:
    """Noise with a bright (255) and a dark (7) square, where the group has them; a salt beside the folder."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    for group, values in GROUPS.items():
        for i in range(2):
            pixels, mask = rng.integers(80, 120, (SIDE, SIDE)), np.zeros((SIDE, SIDE), np.uint8)
            for number, value in enumerate(values):
                place = (slice(3 + 10 * number, 11 + 10 * number), slice(2 + i, 12 + i))
                mask[place] = value
                pixels[place] += 90 if value == 255 else -70
            Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / f"{group}{i}.png")
            Image.fromarray(mask).save(root / "masks" / f"{group}{i}.png")
            rows.append([f"{group}{i}", f"patient-{group}"])
    with open(root / "groups.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["stem", "group"], *rows])
    splits = {part: [f"{group}{i}" for group in groups for i in range(2)] for part, groups in PARTS.items()}
    (root / "splits.json").write_text(json.dumps(splits), encoding="utf-8")
    (root.parent / "salt").write_text("ab" * 32, encoding="utf-8")
    return root


CLASSES = {0: "background", 255: "bright", 7: "dark"}


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    return write_labelled(tmp_path / "labelled")


@pytest.fixture
def probed(recipe: Callable, labelled: Path) -> Callable:
    """A recipe on `labelled` with a probe every step; `probe` replaces keys of it."""

    def make(**changes):
        probe = changes.pop("probe", {})
        if probe is not None:
            changes["probe"] = {"classes": CLASSES, "groups": 2, "every": 1, "neighbours": 3} | probe
        return recipe(**({"data": {"source": str(labelled)}} | changes))

    return make
