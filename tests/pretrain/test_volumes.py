"""Pretraining of a network of volumes, from the archive to the encoder in a Res-UNet."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from pretrain.archive import read_archive
from pretrain.example_views import example_views
from pretrain.loader import ContrastiveSets
from pretrain.loop import pretrain
from pretrain.network import build_network
from pretrain.recipe import PretrainRecipe
from pretrain.step import views_of_set
from resunet.checkpoint import read_config
from resunet.data.index import IndexRequest, index
from resunet.data.leakage import read_archive as read_record
from resunet.encoder import ResidualEncoder
from resunet.errors import InputError
from resunet.fingerprint import feature_error
from resunet.model import ResUNet
from resunet.transfer import transfer_encoder

Make = Callable[..., PretrainRecipe]
SHAPE = {"channels": [4, 8], "units": 1, "norm": "group"}
OURS = {
    "model": SHAPE | {"spatial_dims": 3},
    "head": {"batch_norm": False},
    "views": {"size": 8, "window": 16},
    "batch": 4,
}


@pytest.fixture
def volumes(archive: Path) -> Path:
    """Six volumes of different sizes and spacings and a single slice, among nine images."""
    for i in range(7):
        shape = (1 if i == 6 else 12 + i, 20 - i, 16)
        image = sitk.GetImageFromArray(np.random.default_rng(i).integers(0, 900, shape, dtype=np.int16))
        image.SetSpacing([1.0, 1.0, 1.0 + i / 2])
        sitk.WriteImage(image, str(archive / f"volume{i}.nii.gz"))
    return archive


def test_what_is_no_volume_is_left_out_and_told(recipe: Make, volumes, capsys, tmp_path):
    """Of the archive's record too: it says what the encoder was trained on."""
    manifest = index(IndexRequest((volumes,), tmp_path / "m.parquet", workers=1, salt_file=tmp_path / "salt"))
    records = []
    for source in (volumes, manifest):
        ours = recipe(**OURS, data={"source": str(source)})
        archive = read_archive(ours, Accelerator(cpu=True))
        note = "10 of 16 scans are images or single slices, and were left out: model.spatial_dims=3."
        assert archive.notes[-1] == note and archive.scans.num_items == 6 and archive.num_groups == 6
        assert f"{note} The first: {volumes}/scan" in capsys.readouterr().err  # rows of a manifest are sorted by id
        assert len(archive.groups) == len(archive.scans.cases) == 16 and len(set(archive.groups.tolist())) == 16
        seen = ContrastiveSets(archive.scans, ours.model_copy(update={"batch": 6}), 0).read(0).scan
        assert {archive.scans.cases[i].files[0].name for i in seen.tolist()} == {f"volume{i}.nii.gz" for i in range(6)}
        records.append((archive.digest, archive.evidence.table.column("file_sha256")))
    assert records[0][0] == records[1][0]
    assert set(records[0][1].to_pylist()) == set(records[1][1].to_pylist())


def test_an_archive_of_images_only_is_refused(recipe: Make, archive):
    message = r"model\.spatial_dims=3: none of the 9 scans .* \(the first: .*scan00\.png\)\. Set model\.spatial_dims=2"
    with pytest.raises(InputError, match=message):
        pretrain(recipe(**OURS))
    assert not recipe().out.exists()


def test_too_few_volumes_for_a_set(recipe: Make, volumes):
    with pytest.raises(InputError, match=r"batch=8: the archive has only 6 volumes with any contrast"):
        pretrain(recipe(**OURS | {"batch": 8}))


def test_a_set_of_volumes(recipe: Make, volumes):
    ours = recipe(**OURS | {"batch": 6})
    archive = read_archive(ours, Accelerator(cpu=True))
    found = ContrastiveSets(archive.scans, ours, 0).read(0)
    assert found.windows.shape[:2] == (6, 1) and found.windows.ndim == 5 and max(found.windows.shape[2:]) <= 16
    assert (found.axis == -1).all() and found.position.isnan().all()
    for scan, spacing, size in zip(found.scan.tolist(), found.spacing.tolist(), found.sizes.tolist(), strict=True):
        number = scan - 9
        assert spacing == pytest.approx([1 + number / 2, 1, 1]) and size == [min(12 + number, 16), min(20 - number, 16), 16]
    views = views_of_set(ours, found, 0, Accelerator(cpu=True))
    assert views.shape == (12, 1, 8, 8, 8) and views.is_contiguous(memory_format=torch.channels_last_3d)
    changed = found._replace(spacing=torch.ones(6, 3))
    assert not torch.equal(views_of_set(ours, changed, 0, Accelerator(cpu=True)), views), "the spacing counts"


def test_ranks_divide_a_set_of_volumes(recipe: Make, volumes):
    scans = read_archive(recipe(**OURS), Accelerator(cpu=True)).scans
    ours = OURS | {"batch": 6, "views": {"size": 8, "window": (10, 8, 9)}}
    alone = ContrastiveSets(scans, recipe(**ours), 0).read(1)
    shares = [ContrastiveSets(scans, recipe(**ours, processes=3), rank).read(1) for rank in range(3)]
    for parts, whole in zip(zip(*shares, strict=True), alone, strict=True):
        assert torch.equal(torch.cat(parts).nan_to_num(-1), whole.nan_to_num(-1))
    assert alone.windows.shape == (6, 1, 10, 8, 9)


def test_the_network_is_one_of_volumes_with_channels_last(recipe: Make):
    network = build_network(recipe(**OURS), Accelerator(cpu=True))
    weights = [parameter for parameter in network.encoder.parameters() if parameter.ndim > 1]
    assert all(weight.ndim == 5 and weight.is_contiguous(memory_format=torch.channels_last_3d) for weight in weights)


def test_examples_show_three_planes(recipe: Make, volumes):
    ours = recipe(**OURS | {"views": {"size": [8, 9, 10], "window": 16}})
    sets = ContrastiveSets(read_archive(ours, Accelerator(cpu=True)).scans, ours, 0)
    pictures = example_views(ours, sets, Accelerator(cpu=True))
    assert len(pictures) == 4
    for picture in pictures:
        assert picture.shape == (9 + 8 + 8, 3 * 10) and picture.min() >= 0 and picture.max() <= 1


def test_a_run_of_volumes_gives_an_encoder_of_volumes(recipe: Make, volumes, tmp_path):
    """In bf16, whose gradients this torch leaves unwritten at small sizes: the coarsest level here has two positions a side."""
    deep = SHAPE | {"channels": [4, 4, 8], "spatial_dims": 3}
    ours = recipe(**OURS | {"model": deep}, steps=3, precision="bf16", objective={"loss": "decoupled"}, cache_chunk=4)
    out = pretrain(ours)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and all(0 < line["gradient_norm"] < 100 for line in lines)
    config = read_config(out / "model")
    encoder = ResidualEncoder.from_pretrained(out / "model")
    assert encoder.spatial_dims == 3 and feature_error(encoder, config.feature_check) < 1e-12
    assert len(read_record(out / "model")) == 6
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "6 volumes (6 groups)" in page and "10 of 16 scans are images or single slices" in page and "sagittal" in page

    network = ResUNet(spatial_dims=3, channels=(4, 4, 8), units=1, norm="group")
    receipt = transfer_encoder(out, network)
    assert receipt.encoder_share_loaded == 1 and receipt.feature_error <= receipt.feature_tolerance
    saved = load_file(out / "model" / "model.safetensors")
    state = network.encoder.state_dict()
    assert state.keys() == saved.keys() and all(torch.equal(state[name], tensor) for name, tensor in saved.items())
    with pytest.raises(InputError, match=r"spatial_dims: encoder 3, network 2"):
        transfer_encoder(out, ResUNet(channels=(4, 4, 8), units=1, norm="group"))


def test_an_encoder_of_images_is_none_of_volumes(recipe: Make, archive):
    out = pretrain(recipe(steps=1, model={"norm": "group"}, head={"batch_norm": False}))
    with pytest.raises(InputError, match=r"spatial_dims: encoder 2, network 3"):
        transfer_encoder(out, ResUNet(spatial_dims=3, channels=(4, 8), units=1, norm="group"))
