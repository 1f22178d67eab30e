import html
import json
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from finetune.loop import finetune
from finetune.settings import ConsistencySettings
from finetune.training.consistency import MeanTeacher, unlabelled_patches
from finetune.training.patches import UNLABELLED
from resunet.checkpoint import read_config
from resunet.data.cases import IGNORE
from resunet.data.leakage import read_archive
from resunet.errors import Stopped
from resunet.model import ResUNet
from resunet.report import read_metrics

FEW = {"labelled": 2}


def mean_teacher(steps: int = 100, **changes) -> MeanTeacher:
    torch.manual_seed(0)
    return MeanTeacher(ResUNet(channels=(4, 8), units=1), ConsistencySettings.model_validate(changes), 3, steps)


def batch(count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Every second patch unlabelled, its lower edge beyond the scan."""
    images = torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    labels = torch.zeros(count, 16, 16, dtype=torch.uint8)
    labels[1::2] = UNLABELLED
    labels[1::2, 14:] = IGNORE
    return images, labels


def test_the_weight_rises_over_the_ramp():
    teacher = mean_teacher(weight=2.0, ramp=0.5)
    assert teacher.weight(0) == pytest.approx(2 * math.exp(-5)) and teacher.weight(25) == pytest.approx(2 * math.exp(-1.25))
    assert teacher.weight(50) == teacher.weight(99) == 2
    assert mean_teacher(ramp=0).weight(0) == 1


def test_only_unlabelled_patches_become_harder_whoever_makes_them():
    teacher, (images, labels) = mean_teacher(intensity=1, cutmix=0), batch()
    before = images.clone()
    whole = teacher.hard_view(images, labels, index=5, first=0).images
    assert torch.equal(images, before) and unlabelled_patches(labels).tolist() == [False, True, False, True]
    assert torch.equal(whole[::2], images[::2])
    changed = (whole[1::2] - images[1::2]).flatten(1).abs().mean(dim=1)
    assert (changed > 0.05).all() and changed[0] != changed[1]
    halves = [teacher.hard_view(images[part], labels[part], 5, part.start).images for part in (slice(0, 2), slice(2, 4))]
    assert torch.equal(torch.cat(halves), whole), "two ranks make what one makes"
    assert not torch.equal(teacher.hard_view(images, labels, 6, 0).images[1], whole[1])


STILL = {"intensity": 0, "blur": 0, "noise": 0}


def test_boxes_come_from_the_other_of_a_pair():
    images, labels = batch(8)
    view = mean_teacher(cutmix=1, cutmix_area=[0.2, 0.3], **STILL).hard_view(images, labels, 5, 0)
    assert view.partner.tolist() == [0, 3, 2, 1, 4, 7, 6, 5] and not view.box[::2].any()
    for place in (1, 3, 5, 7):
        box = view.box[place]
        rows, columns = box.any(dim=1), box.any(dim=0)
        assert torch.equal(box, rows[:, None] & columns) and 0.15 <= box.float().mean() <= 0.35
        for side in (rows, columns):
            assert (side.int().diff().abs().sum() + side[0] + side[-1]) == 2, "one stretch of pixels"
        assert torch.equal(view.images[place, 0][box], images[view.partner[place], 0][box])
        assert torch.equal(view.images[place, 0][~box], images[place, 0][~box])
        assert torch.equal(view.inside[place], (labels == UNLABELLED)[place]), "partners lie within their scans alike"
    assert torch.equal(view.images[::2], images[::2]) and not view.inside[::2].any()
    assert len({tuple(view.box[place].flatten().tolist()) for place in (1, 3, 5, 7)}) == 4
    halves = [
        mean_teacher(cutmix=1, cutmix_area=[0.2, 0.3], **STILL).hard_view(images[part], labels[part], 5, part.start)
        for part in (slice(0, 4), slice(4, 8))
    ]
    assert torch.equal(torch.cat([half.images for half in halves]), view.images), "two ranks make what one makes"


def test_boxes_are_as_frequent_and_as_large_as_is_said():
    images, labels = torch.randn(400, 1, 32, 32), torch.full((400, 32, 32), UNLABELLED, dtype=torch.uint8)
    box = mean_teacher(cutmix=0.25, cutmix_area=[0.1, 0.4], **STILL).hard_view(images, labels, 5, 0).box
    share = box.float().mean(dim=(1, 2))
    assert (share > 0).float().mean() == pytest.approx(0.25, abs=0.07)
    assert share[share > 0].min() > 0.08 and share.max() < 0.45 and share[share > 0].mean() == pytest.approx(0.25, abs=0.03)
    volume = torch.full((2, 8, 8, 8), UNLABELLED, dtype=torch.uint8)
    view = mean_teacher(cutmix=1, cutmix_area=[1, 1], **STILL).hard_view(torch.randn(2, 1, 8, 8, 8), volume, 5, 0)
    assert view.box.flatten(1).float().mean(dim=1).min() > 0.2, "boxes of volumes have three sides"


def test_one_without_a_partner_has_no_box():
    images, labels = batch(6)
    view = mean_teacher(cutmix=1, **STILL).hard_view(images, labels, 5, 0)
    assert view.partner.tolist() == [0, 3, 2, 1, 4, 5] and torch.equal(view.images[5], images[5])
    assert torch.equal(view.mixed(images), view.images), "the average's answers are mixed alike"


def test_what_lies_beyond_a_scan_stays_out_of_the_boxes():
    images, labels = batch(2)
    labels[:] = UNLABELLED
    labels[0, :8] = IGNORE
    view = mean_teacher(cutmix=1, cutmix_area=[0.5, 0.6], **STILL).hard_view(images, labels, 5, 0)
    inside = labels == UNLABELLED
    for place in (0, 1):
        assert torch.equal(view.inside[place], torch.where(view.box[place], inside[1 - place], inside[place]))
    assert view.box.any(dim=(1, 2)).all()


@pytest.mark.parametrize("cutmix, dice_weight", [(0, 0.0), (1, 0.0), (1, 2.0)])
def test_it_is_the_divergence_over_unlabelled_pixels(cutmix, dice_weight):
    teacher, (images, labels) = mean_teacher(ramp=0, weight=3.0, cutmix=cutmix, dice_weight=dice_weight), batch()
    accelerator = Accelerator(cpu=True)
    view = teacher.hard_view(images, labels, 5, 0)
    logits = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(2), requires_grad=True)
    loss = teacher.terms(images, logits, view, 0, accelerator)["consistency"]
    teacher.average.eval()
    with torch.no_grad():
        p = view.mixed(teacher.average(images))[:, 0].sigmoid().double()
    q = logits[:, 0].detach().sigmoid().double()
    each = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    p, q = p[view.inside], q[view.inside]
    assert loss.item() == pytest.approx(
        3 * (each[view.inside].mean() + dice_weight * (p - q).abs().sum() / (p + q).sum()).item(), rel=1e-4
    )
    loss.backward()
    assert (logits.grad[:, 0][~view.inside] == 0).all() and (logits.grad[:, 0][view.inside] != 0).all()
    assert all(parameter.grad is None for parameter in teacher.average.parameters())
    with torch.no_grad():
        assert teacher.terms(images, view.mixed(teacher.average(images)), view, 0, accelerator)["consistency"].abs() < 1e-6


def test_the_mode_of_the_average_comes_back():
    teacher, (images, labels) = mean_teacher(), batch()
    for training in (True, False):
        teacher.average.train(training)
        statistics = teacher.average.encoder.levels[0][0].norm1.running_mean.clone()
        teacher.terms(images, torch.zeros(4, 1, 16, 16), teacher.hard_view(images, labels, 0, 0), 0, Accelerator(cpu=True))
        assert teacher.average.training is training
        assert torch.equal(teacher.average.encoder.levels[0][0].norm1.running_mean, statistics)


def test_a_run_and_its_records(recipe):
    ours = recipe(data=FEW, steps=4, validate_every=2, batch=4, ema=0.5, consistency={"ramp": 0})
    out = finetune(ours)
    metrics = read_metrics(out)
    parts = np.sum([metrics[name][1] for name in ("focal", "dice", "consistency")], axis=0)
    assert metrics["loss"][1] == pytest.approx(parts) and min(metrics["consistency"][1]) > 0
    page = html.unescape((out / "report.html").read_text(encoding="utf-8"))
    assert (
        "Unlabelled scans were 50% of a batch, 50% of them with a box of another, learned from the moving average of the weights "
        "(decay 0.5), weight 1." in page
    )
    assert "unlabelled scans of 3 groups are learned from, too." in page and page.count(">consistency<") == 1, (
        "in the plot of losses"
    )
    assert "unlabelled" in json.loads((out / "run.json").read_text(encoding="utf-8"))["inputs"]
    assert len(set(read_archive(out / "model").table.column("group").to_pylist())) == 5, "the unlabelled ones were seen"
    (labels,) = read_config(out / "model").provenance.labels
    assert len(labels.groups) == 4, "but only two, and as many of val, were labelled"


def test_a_resumed_run_is_the_uninterrupted_one(recipe, sigterm_after):
    same = dict(data=FEW, steps=4, validate_every=2, batch=4, ema=0.5, consistency={}, loss={"deep_supervision": True})
    same["model"] = {"channels": [4, 4, 6, 8]}
    whole, stopped = (recipe(name=name, **same) for name in ("whole", "stopped"))
    finetune(whole)
    sigterm_after(3)
    with pytest.raises(Stopped, match="after step 3"):
        finetune(stopped)
    finetune(stopped.model_copy(update={"resume": True}))
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (stopped.out / name).read_bytes() == (whole.out / name).read_bytes(), name


def test_where_all_is_labelled_nothing_is_learned_from_it_and_that_is_told(recipe, capsys):
    out = finetune(recipe(steps=2, batch=4, ema=0.5, consistency={"ramp": 0}))
    assert read_metrics(out)["consistency"][1] == [0.0, 0.0]
    assert "every scan of the pool is labelled in this draw" in capsys.readouterr().err
