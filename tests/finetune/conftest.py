import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from finetune.cross_validation.folds import train
from finetune.loop import finetune
from finetune.recipe import FinetuneRecipe
from resunet.checkpoint import ModelConfig
from resunet.config import FixedNormalisation, validate
from resunet.data.evidence import SCHEMA, Evidence
from resunet.data.leakage import ARCHIVE, write_archive
from resunet.data.perceptual import HASH_BYTES
from resunet.encoder import ResidualEncoder
from resunet.fingerprint import fingerprint

SIZE = 24
NOBODY = ("group", "file", "pixels", b"\xff" * HASH_BYTES)  # what no scan looks like
PARTS = {"pool": range(5), "val": range(5, 8), "test": range(8, 14)}  # groups; each has one case, group 0 has two


def write_case(root: Path, stem: str, seed: int) -> None:
    """A noisy image with a bright square, and its mask: 0 outside, 255 inside."""
    rng = np.random.default_rng(seed)
    y, x, side = rng.integers(2, 10), rng.integers(2, 10), rng.integers(6, 12)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[y : y + side, x : x + side] = 255
    Image.fromarray((rng.integers(0, 80, mask.shape) + mask // 2).astype(np.uint8)).save(root / "images" / f"{stem}.png")
    Image.fromarray(mask).save(root / "masks" / f"{stem}.png")


def write_labelled(root: Path) -> Path:
    """15 cases of 14 groups with splits, and a salt beside the folder."""
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    groups, splits = {}, {part: [] for part in PARTS}
    for part, numbers in PARTS.items():
        for number in numbers:
            for i in range(2 if number == 0 else 1):
                stem = f"c{number:02}{'ab'[i]}"
                write_case(root, stem, 10 * number + i)
                groups[stem] = f"patient{number}"
                splits[part].append(stem)
    with open(root / "groups.csv", "w", newline="") as file:
        csv.writer(file).writerows([["stem", "group"], *groups.items()])
    (root / "splits.json").write_text(json.dumps(splits))
    (root.parent / "salt").write_text("cd" * 32)
    return root


def write_record(folder: Path, rows: list[tuple[str, str, str, bytes]], salt: str) -> None:
    """The archive.parquet of an encoder that saw these: group, file_sha256, pixel_sha256, perceptual."""
    columns = [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), SCHEMA, strict=True)]
    write_archive(folder / ARCHIVE, Evidence(pa.table(columns, schema=SCHEMA), salt))


def make_recipe(source: Path, out: Path, **changes: object) -> FinetuneRecipe:
    """A tiny recipe; keyword arguments replace its keys, nested ones only what they name."""
    values: dict = {
        "out": str(out),
        "steps": 3,
        "batch": 2,
        "patch": [16, 16],
        "warmup": 0,
        "log_every": 1,
        "validate_every": 2,
        "data": {
            "source": str(source),
            "salt_file": str(source.parent / "salt"),
            "classes": {0: "background", 255: "lesion"},
            "names": "keep",
        },
        "model": {"channels": [4, 8], "units": 1},
        "augment": {"elastic": {"sigma": 2}},
        "optimizer": {"lr": 1e-2},
        "wandb": {"mode": "disabled"},
    }
    for key, value in changes.items():
        values[key] = values.get(key, {}) | value if isinstance(value, dict) and key != "normalisation" else value
    return validate(FinetuneRecipe, values, "recipe")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A labelled source of this test alone."""
    return write_labelled(tmp_path / "labelled")


@pytest.fixture
def recipe(tmp_path: Path, source: Path) -> Callable[..., FinetuneRecipe]:
    return lambda **changes: make_recipe(source, tmp_path / str(changes.pop("name", "run")), **changes)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two finished runs of two seeds on one source. Not to be changed: copy what a test changes."""
    root = tmp_path_factory.mktemp("runs")
    labelled = write_labelled(root / "labelled")
    first = finetune(make_recipe(labelled, root / "first", steps=8, validate_every=1))
    second = finetune(make_recipe(labelled, root / "second", steps=2, seed=1))
    return first, second


@pytest.fixture(scope="session")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cross-validation of three folds. Not to be changed: copy what a test changes."""
    root = tmp_path_factory.mktemp("folded")
    recipe = make_recipe(write_labelled(root / "labelled"), root / "run", steps=4, data={"folds": 3})
    return train(recipe)


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A pretrained encoder's model directory with other norms and intensities than a recipe's defaults."""
    torch.manual_seed(7)
    network = ResidualEncoder(1, (4, 8), units=1, norm="instance")
    network.config = ModelConfig(
        architecture=network.config.architecture,
        normalisation=FixedNormalisation(kind="fixed", low=0, high=255, mean=60, std=50),
        feature_check=fingerprint(network),
    )
    folder = tmp_path / "encoder"
    network.save_pretrained(folder)
    write_record(folder, [NOBODY], "another salt")
    return folder


@pytest.fixture
def archive_of(encoder: Path) -> Callable[..., None]:
    """Writes another record beside `encoder`."""
    return lambda rows, salt: write_record(encoder, rows, salt)
