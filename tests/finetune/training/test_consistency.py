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
    teacher, (images, labels) = mean_teacher(intensity=1), batch()
    before = images.clone()
    whole = teacher.strong_augmentation(images, labels, index=5, first=0)
    assert torch.equal(images, before) and unlabelled_patches(labels).tolist() == [False, True, False, True]
    assert torch.equal(whole[::2], images[::2])
    changed = (whole[1::2] - images[1::2]).flatten(1).abs().mean(dim=1)
    assert (changed > 0.05).all() and changed[0] != changed[1]
    halves = [teacher.strong_augmentation(images[part], labels[part], 5, part.start) for part in (slice(0, 2), slice(2, 4))]
    assert torch.equal(torch.cat(halves), whole), "two ranks make what one makes"
    assert not torch.equal(teacher.strong_augmentation(images, labels, 6, 0)[1], whole[1])


def test_it_is_the_divergence_over_unlabelled_pixels():
    teacher, (images, labels) = mean_teacher(ramp=0, weight=3.0), batch()
    accelerator = Accelerator(cpu=True)
    logits = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(2), requires_grad=True)
    loss = teacher.terms(images, logits, labels, 0, accelerator)["consistency"]
    teacher.average.eval()
    with torch.no_grad():
        p = teacher.average(images)[:, 0].sigmoid().double()
    q = logits[:, 0].detach().sigmoid().double()
    each = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert loss.item() == pytest.approx(3 * each[labels == UNLABELLED].mean().item(), rel=1e-4)
    loss.backward()
    assert (logits.grad[:, 0][labels != UNLABELLED] == 0).all() and (logits.grad[:, 0][labels == UNLABELLED] != 0).all()
    assert all(parameter.grad is None for parameter in teacher.average.parameters())
    with torch.no_grad():
        assert teacher.terms(images, teacher.average(images), labels, 0, accelerator)["consistency"].abs() < 1e-6


def test_the_mode_of_the_average_comes_back():
    teacher, (images, labels) = mean_teacher(), batch()
    for training in (True, False):
        teacher.average.train(training)
        statistics = teacher.average.encoder.levels[0][0].norm1.running_mean.clone()
        teacher.terms(images, torch.zeros(4, 1, 16, 16), labels, 0, Accelerator(cpu=True))
        assert teacher.average.training is training
        assert torch.equal(teacher.average.encoder.levels[0][0].norm1.running_mean, statistics)


def test_a_run_and_its_records(recipe):
    ours = recipe(data=FEW, steps=4, validate_every=2, batch=4, ema=0.5, consistency={"ramp": 0})
    out = finetune(ours)
    metrics = read_metrics(out)
    parts = np.sum([metrics[name][1] for name in ("focal", "dice", "consistency")], axis=0)
    assert metrics["loss"][1] == pytest.approx(parts) and min(metrics["consistency"][1]) > 0
    page = html.unescape((out / "report.html").read_text(encoding="utf-8"))
    assert "Unlabelled scans were 50% of a batch, learned from the moving average of the weights (decay 0.5), weight 1." in page
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
