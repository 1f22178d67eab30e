import csv

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from pretrain.archive_map import archive_map
from pretrain.loop import pretrain
from resunet.training import start_ranks


@pytest.fixture
def made(recipe):
    """The map of a recipe's archive by an encoder nobody trained."""
    from pretrain.archive import read_archive
    from pretrain.network import build_network

    def make(**changes):
        torch.manual_seed(0)
        ours = recipe(**changes)
        accelerator = start_ranks(ours, ours.batch, "scans")
        return archive_map(ours, read_archive(ours, accelerator), build_network(ours, accelerator).encoder)

    return make


def test_it_is_in_the_report(recipe, look_at):
    out = pretrain(recipe())
    page = look_at(out / "report.html")
    assert "Map of the archive" in page.headings and "9 of 9 slices" in page.text
    assert any("Map of 9 slices" in one["name"] for one in page.pictures)


def test_by_size_by_group_and_by_place(made, archive, tmp_path):
    assert "Longest side, pixels" in made()[0].pictures[0].markup
    rows = [("stem", "group"), *((path.stem, f"person-{i % 2}") for i, path in enumerate(sorted(archive.iterdir())))]
    with open(archive / "groups.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    grouped = made()[0].pictures[0].markup
    assert ">Group<" in grouped and "person" not in grouped
    volumes = tmp_path / "volumes"
    volumes.mkdir()
    rng = np.random.default_rng(0)
    for i in range(7):
        sitk.WriteImage(
            sitk.GetImageFromArray(rng.integers(1, 900, (4, 16, 20)).astype(np.int16)), str(volumes / f"v{i}.nii.gz")
        )
    (found,) = made(data={"source": str(volumes)})
    assert "Place in the volume" in found.pictures[0].markup and "28 of 28 slices" in found.text[0]
    (found,) = made(data={"source": str(volumes)}, model={"spatial_dims": 3}, views={"size": 8, "window": 16})
    assert "7 of 7 volumes" in found.text[0]


def test_it_is_a_function_of_the_recipe(made):
    views = {"size": 8, "window": 10}  # windows of slices that are larger
    assert made(views=views) == made(views=views) != made(views=views, seed=1)
