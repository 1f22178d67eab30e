"""Synthetic objects: how they are planted, and runs that learn to segment them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image
from safetensors.torch import load_file

from pretrain.draws import Draws
from pretrain.example_views import _flat, _outlined
from pretrain.loop import pretrain
from pretrain.planning.cautions import _groups
from pretrain.planning.show import show_views
from pretrain.recipe import EncoderSettings, SyntheticSettings, ViewSettings
from pretrain.save import encoder_of_checkpoint
from pretrain.synthetic import content, plant, planted_views, synthetic_terms
from resunet.checkpoint import read_config
from resunet.losses import segmentation_loss
from resunet.model import ResUNet
from resunet.transfer import DECODER, transfer_encoder

MODEL = {"channels": [4, 6, 8], "units": 1}
OBJECTS = {"radius": [1.5, 3]}
ALONE = {"model": MODEL, "objective": {"weight": 0}, "synthetic": OBJECTS}


def draws(count: int, seed: int = 0) -> Draws:
    return Draws(torch.Generator().manual_seed(seed), range(count), count)


def scans(count: int, dims: int, side: int = 32, channels: int = 1) -> torch.Tensor:
    """Dark around a bright middle."""
    made = torch.randn(count, channels, *[side] * dims, generator=torch.Generator().manual_seed(3)) * 0.05
    made[(..., *[slice(side // 4, -side // 4)] * dims)] += 2
    return made


def uniform(count: int, *size: int) -> torch.Tensor:
    return torch.rand(count, 1, *size, generator=torch.Generator().manual_seed(0))


def clear(**changes: object) -> SyntheticSettings:
    """One bright round object with a sharp border in every view."""
    settings = {"objects": 1, "probability": 1, "radius": (3, 3), "elongation": 1, "roughness": 0, "softness": (0.01, 0.01)}
    settings |= {"contrast": (5, 5), "brighter": 1, "ring": 0, "foreign": 0}
    return SyntheticSettings.model_validate(settings | changes)


@pytest.mark.parametrize("dims, size", [(2, 28), (3, 113)], ids=["2D", "3D"])
@pytest.mark.parametrize("elongation", [1, 4])
def test_an_object_is_as_large_as_asked_however_long(dims, size, elongation):
    """πr² and 4/3 πr³ of r = 3, on average of where its centre lies between pixels; smaller where it leaves the content."""
    flat = uniform(64, *[24] * dims)
    labels = plant(flat, clear(elongation=elongation), draws(64)).labels
    largest = labels.flatten(1).sum(1).sort().values[-16:].float().mean()
    assert labels.dtype == torch.int64 and float(largest) == pytest.approx(size, rel=0.2)


def test_objects_lie_in_the_content_and_nothing_else_changes():
    given = scans(32, 2)
    images, labels = plant(given, clear(), draws(32))
    inside = content(given)[:, 0] > 0
    assert 0.2 < inside.float().mean() < 0.5, "the bright middle"
    assert labels.bool().flatten(1).any(1).all() and not (labels.bool() & ~inside).any()
    change = (images - given)[:, 0]
    assert float(change[~inside].abs().max()) == 0 and float(change[labels == 1].mean()) > 0.05
    edge = torch.nn.functional.max_pool2d(labels[:, None].float(), 5, 1, 2)[:, 0]
    assert float(change[edge == 0].abs().max()) < 1e-6


def test_a_darker_object_and_one_from_elsewhere():
    given = scans(16, 2)
    images, labels = plant(given, clear(brighter=0), draws(16))
    assert float((images - given)[:, 0][labels == 1].mean()) < -0.05
    halves = torch.zeros(16, 1, 32, 32)
    halves[..., 16:] = 9.0  # what is moved by a quarter or more shows the other half somewhere
    images, labels = plant(halves, clear(foreign=1, radius=(6, 6)), draws(16))
    assert ((images - halves)[:, 0][labels == 1].abs() > 4).float().mean() > 0.2


def test_a_ring_is_bright_near_its_border_only():
    given = uniform(1, 64, 64).expand(8, -1, -1, -1)
    images, labels = plant(given, clear(ring=1, radius=(12, 12), contrast=(50, 50)), draws(8))
    whole = 0
    for change, its in zip((images - given)[:, 0], labels.bool(), strict=True):
        points = torch.nonzero(its).float()
        far = (points - points.mean(0)).norm(dim=1)
        if its.sum() > 430:
            whole += 1
            assert change[its][far < 3].mean() < 0 < change[its][(far > 8) & (far < 10)].mean()
    assert whole


def test_an_elongated_object_is_longer_than_wide():
    flat = uniform(64, 64, 64)
    labels = plant(flat, clear(elongation=9, radius=(5, 5)), draws(64)).labels
    ratios = []
    for points in (torch.nonzero(one).float() for one in labels):
        if len(points) > 60:
            values = torch.linalg.eigvalsh(points.T.cov())
            ratios.append(float((values[1] / values[0]).sqrt()))
    assert max(ratios) > 5 and min(ratios) < 2


def test_objects_appear_as_often_as_asked():
    flat = uniform(400, 16, 16)
    labels = plant(flat, clear(objects=2, probability=0.3), draws(400)).labels
    assert float(labels.bool().flatten(1).any(1).float().mean()) == pytest.approx(1 - 0.7**2, abs=0.07)
    none = plant(flat, clear(probability=0), draws(400))
    assert torch.equal(none.images, flat) and not none.labels.any()


def test_an_object_is_in_all_channels_by_their_own_measure():
    given = scans(4, 2, channels=3) * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    images, labels = plant(given, clear(), draws(4))
    change = (images - given).permute(0, 2, 3, 1)[labels == 1].mean(0)
    assert (change[1:] / change[:-1] > 1.2).all() and change[0] > 0


def test_a_blank_view_is_no_fault():
    blank = torch.zeros(3, 1, 16, 16)
    images, labels = plant(blank, SyntheticSettings(), draws(3))
    assert images.isfinite().all() and labels.shape == (3, 16, 16)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_rank_makes_its_share_of_the_whole(dims):
    settings, views = SyntheticSettings(radius=(1.5, 4)), ViewSettings(size=12)
    given, sizes = scans(6, dims, 16), torch.full((6, dims), 16)
    anchors, spacing = torch.full((6, 2, dims), 8), torch.ones(6, dims)
    whole = planted_views(given, sizes, anchors, spacing, views, settings, draws(6))
    assert whole.images.shape == (6, 1, *[12] * dims) and whole.labels.any()
    for part in (slice(0, 4), slice(4, 6)):
        share = Draws(torch.Generator().manual_seed(0), range(part.start, part.stop), 6)
        its = planted_views(given[part], sizes[part], anchors[part], spacing[part], views, settings, share)
        torch.testing.assert_close(its.images, whole.images[part], atol=1e-5, rtol=0)
        assert torch.equal(its.labels, whole.labels[part])


@pytest.mark.parametrize("dims", [2, 3])
def test_the_loss_is_that_of_fine_tuning_at_the_size_of_the_view(dims):
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, *[8] * dims, generator=draw)
    labels = torch.randint(2, (2, *[8] * dims), generator=draw)
    terms = synthetic_terms(logits, labels)
    assert terms["synthetic_loss"] == segmentation_loss(logits, labels)["loss"]
    found, true = logits[:, 0] > 0, labels == 1
    assert float(terms["synthetic_dice"]) == pytest.approx(float(2 * (found & true).sum() / (found.sum() + true.sum())))
    blocks = torch.full((2, 1, *[4] * dims), -9.0)
    blocks[(0, 0, *[slice(0, 2)] * dims)] = 9.0
    fine = torch.zeros(2, *[8] * dims, dtype=torch.int64)
    fine[(0, *[slice(0, 4)] * dims)] = 1
    assert synthetic_terms(blocks, fine)["synthetic_dice"] > 0.8
    assert synthetic_terms(blocks - 99, torch.zeros_like(fine))["synthetic_dice"] == 0


def disc(radius: float) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    return (x - 20) ** 2 + (y - 20) ** 2 <= radius**2


def test_a_real_object_is_forgiven_and_counted():
    logits = torch.full((2, 1, 64, 64), -9.0)
    logits[:, 0, 50:56, 50:56] = 9  # a real object that nobody marked
    logits[:, 0, disc(4)] = 9
    labels = disc(4).long().expand(2, -1, -1)
    kept, forgiven = synthetic_terms(logits, labels), synthetic_terms(logits, labels, 0.03)
    assert forgiven["synthetic_loss"] < 0.02 < 0.2 < kept["synthetic_loss"]
    assert forgiven["synthetic_dice"] == kept["synthetic_dice"] < 0.8
    everywhere = torch.ones_like(labels)
    assert synthetic_terms(logits, everywhere, 0.03)["synthetic_loss"] == synthetic_terms(logits, everywhere)["synthetic_loss"]


@pytest.mark.parametrize("true, found", [(2, 8), (6, 11)])
def test_what_is_found_too_large_is_not_forgiven(true, found):
    logits = torch.where(disc(found), 9.0, -9.0).expand(1, 1, -1, -1)
    labels = disc(true).long()[None]
    strict, forgiving = synthetic_terms(logits, labels), synthetic_terms(logits, labels, 0.03)
    assert float(forgiving["synthetic_loss"]) == pytest.approx(float(strict["synthetic_loss"]), rel=0.05)


@pytest.mark.parametrize("size", [(64, 64, 64), (128, 128), (96, 40)])
def test_content_is_what_all_pixels_say(size):
    """A bright ball in weak noise, whatever part of the pixels it is estimated from."""
    places = torch.meshgrid(*[(torch.arange(side) - side / 2) / (side / 3) for side in size], indexing="ij")
    far = torch.stack(places).square().sum(0)
    view = (far < 1).float()[None, None] + 0.02 * uniform(1, *size)
    assert float((content(view)[0, 0] != (far < 1)).float().mean()) < 0.12


def metrics_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_run_alone_trains_and_saves_the_whole_decoder(recipe, tmp_path):
    out = pretrain(recipe(steps=4, checkpoint_every=2, keep_checkpoints=2, **ALONE))
    for line in metrics_of(out):
        assert line["loss"] == line["synthetic_loss"] and 0 <= line["synthetic_dice"] <= 1
        assert "projection_std" not in line and "global_loss" not in line, "nothing is contrasted"
    saved = load_file(out / "model" / DECODER)
    assert {name.split(".")[1] for name in saved} == {"0", "1"} and read_config(out / "model").decoder.finest == 0
    state = torch.load(out / "checkpoints" / "step-2" / "state.pt", weights_only=True)["network"]
    assert not [name for name in state if name.startswith("head.")]
    earlier = load_file(encoder_of_checkpoint(out, 2, tmp_path / "earlier") / DECODER)
    assert all(torch.equal(state[f"decoder.{name}"], tensor) for name, tensor in earlier.items())
    assert any(not torch.equal(saved[name], tensor) for name, tensor in earlier.items())
    receipt = transfer_encoder(out / "model", ResUNet(**MODEL), parts="both")
    assert {one.name for one in receipt.tensors if one.state == "fresh"} == {"head.weight", "head.bias"}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Segmentation of synthetic objects on" in page and "Synthetic objects</h2>" in page and "Collapse" not in page
    assert "Each row: the scan, with objects, outlined." in page


def test_it_learns_what_it_is_shown(recipe):
    easy = {"radius": [2, 4], "contrast": [4, 5], "objects": 1, "probability": 1, "ring": 0, "foreign": 0}
    out = pretrain(recipe(**ALONE | {"synthetic": easy}, steps=60, optimizer={"lr": 0.01}))
    dice = [line["synthetic_dice"] for line in metrics_of(out)]
    assert sum(dice[-10:]) > sum(dice[:10]) + 1


def test_all_objectives_share_one_decoder(recipe):
    dense = {"points": 6, "pairs": 16, "hidden": 8, "output": 5}
    out = pretrain(recipe(model=MODEL, dense=dense, synthetic=OBJECTS | {"weight": 2}, steps=2, accumulate=2))
    for line in metrics_of(out):
        parts = line["global_loss"] + line["dense_loss"] + 2 * line["synthetic_loss"]
        assert line["loss"] == pytest.approx(parts, rel=1e-5)
    assert {name.split(".")[1] for name in load_file(out / "model" / DECODER)} == {"0", "1"}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "SimCLR, dense contrast and segmentation of synthetic objects on" in page


def test_the_light_network_learns_from_them(recipe):
    light = {"name": "mobile_resunet", "backbone": "mobilenetv3_small_050"}
    ours = recipe(objective={"weight": 0}, synthetic=OBJECTS, views={"size": 40}, steps=1)
    out = pretrain(ours.model_copy(update={"model": EncoderSettings.model_validate(light)}))
    assert read_config(out / "model").decoder.finest == 0 and metrics_of(out)[0]["synthetic_loss"] > 0


def test_volumes(recipe, tmp_path):
    folder = tmp_path / "volumes"
    folder.mkdir()
    for i in range(3):
        values = np.random.default_rng(i).integers(0, 900, (12 + i, 16, 14), dtype=np.int16)
        sitk.WriteImage(sitk.GetImageFromArray(values), str(folder / f"{i}.nii.gz"))
    its = {"model": MODEL | {"spatial_dims": 3}, "batch": 2, "views": {"size": [8, 12, 10]}, "data": {"source": str(folder)}}
    out = pretrain(recipe(**ALONE | its, steps=1))
    assert load_file(out / "model" / DECODER)["blocks.0.up.weight"].ndim == 5
    assert "cut through the middle three times" in (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("size", [(16, 16), (6, 16, 12)], ids=["2D", "3D"])
def test_an_outline_is_drawn_around_objects_only(size):
    labels = torch.zeros(*size, dtype=torch.int64)
    picture = np.zeros(tuple(_flat(labels.float()).shape), np.float32)
    assert not _outlined(picture, labels).any()
    labels[(..., *[slice(4, 8)] * 2)] = 1
    shown = _outlined(picture, labels)
    assert shown.shape == (*picture.shape, 3) and 0 < (shown[..., 0] > 0).mean() < 0.5
    assert not shown[_flat(labels.float(), around=0.0).numpy() > 0].any(), "around, not over them"


def test_nobody_is_told_of_groups_or_heads_that_are_not_there(recipe):
    ours = recipe(**ALONE | {"model": MODEL | {"norm": "group"}})
    assert not ours.batch_statistics and recipe(model=MODEL | {"norm": "group"}).batch_statistics
    cost = SimpleNamespace(own_group=3.0)
    assert _groups(ours, SimpleNamespace(num_groups=1, scans=SimpleNamespace(items="scans")), cost) == []


def test_the_views_are_shown_with_their_objects(recipe, tmp_path):
    with Image.open(show_views(recipe(model=MODEL, synthetic=OBJECTS), tmp_path / "views.png")) as page:
        assert page.width > 2 * 5 * 200, "scan, two views, objects, outlines, twice"
