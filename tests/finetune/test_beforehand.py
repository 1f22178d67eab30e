from dataclasses import replace

import numpy as np
import pytest
import torch

from finetune.beforehand import idle_keys, tell_beforehand, tell_windows
from finetune.labelled import read_labelled, resolve
from resunet.data.cases import IGNORE
from resunet.errors import InputError
from resunet.model import ResUNet


def test_what_is_not_as_one_expects_is_told(runs, recipe, capsys):
    ours = resolve(recipe())
    data = read_labelled(ours, quiet=True)
    capsys.readouterr()
    tell_beforehand(ours, data)
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("labels: train ") and f"({len(data.train)} cases); val " in told
    coloured = [replace(case, colour_lost=number < 2) for number, case in enumerate(data.train)]
    tell_beforehand(ours, replace(data, train=coloured))
    assert f"data.channels=grey: 2 of {len(coloured)} training scans are in colour" in capsys.readouterr().err
    empty = [replace(case, labels=np.zeros_like(case.labels)) for case in data.val]
    empty[0].labels[:2] = IGNORE
    tell_beforehand(ours, replace(data, val=empty))
    assert f"val: none of its {len(empty)} cases has a pixel of any class" in capsys.readouterr().err
    tell_beforehand(ours, replace(data, test=[]))
    assert "test" not in capsys.readouterr().err, "this run does not read it"
    nothing = [replace(case, labels=np.zeros_like(case.labels)) for case in data.train]
    drawn = ours.model_copy(update={"data": ours.data.model_copy(update={"labelled": 2.0})})
    tell_beforehand(drawn, replace(data, train=nothing, test=empty))
    told = capsys.readouterr().err
    assert "(data.labelled=2) (" in told and "test: none of its" in told
    assert "'lesion' is in none of the training cases: it cannot be learned. data.labelled=2 takes some" in told


@pytest.mark.parametrize(
    "changes, key",
    [
        (
            {"model": {"name": "unet", "channels": [4, 8], "units": 2}, "optimizer": {"encoder_lr_factor": 0.3}},
            "optimizer.encoder_lr_factor",
        ),
        (
            {"loss": {"class_weights": {"lesion": 2}, "focal_weight": 0, "dice_weight": 0, "component_weight": 1}},
            "loss.class_weights",
        ),
        ({"loss": {"gamma": 1, "focal_weight": 0}}, "loss.gamma"),
        ({"model": {"statistics_batches": 7}}, "model.statistics_batches"),
        ({"foreground_by": "object", "foreground": 0}, "foreground_by"),
        ({"augment": {"zoom": [0.5, 1]}}, "augment.zoom"),
        ({"augment": {"intensity": {"gamma": [0.5, 1], "blur": 1}}}, "augment.intensity.gamma"),
        ({"consistency": {"intensity": 0, "blur": 0, "noise": 0, "cutmix": 0}, "ema": 0.9, "batch": 4}, "consistency"),
        ({"consistency": {"cutmix": 0, "cutmix_area": [0.1, 0.2]}, "ema": 0.9, "batch": 4}, "consistency.cutmix_area"),
        ({"consistency": {}, "ema": 0.9, "batch": 2}, "consistency.cutmix"),
    ],
)
def test_keys_that_do_nothing_are_told(recipe, changes, key):
    assert [idle for idle, _ in idle_keys(recipe(**changes))] == [key]


def test_boxes_need_two_patches_on_every_rank(recipe):
    ours = recipe(consistency={}, ema=0.9, batch=8)
    assert [len(idle_keys(ours, ranks)) for ranks in (1, 2, 4)] == [0, 0, 1]
    assert "a rank's share of a batch has one unlabelled patch" in idle_keys(ours, 4)[0][1]


@pytest.mark.parametrize("batch, ranks, told", [(8, 2, False), (12, 2, True), (4, 2, True), (12, 1, False), (12, 3, False)])
def test_pairs_that_differ_by_the_number_of_ranks_are_told(recipe, capsys, batch, ranks, told):
    ours = resolve(recipe(consistency={}, ema=0.9, batch=batch))
    tell_beforehand(ours, read_labelled(ours, quiet=True), ranks)
    assert ("boxes come from others than on one rank" in capsys.readouterr().err) == told


@pytest.mark.parametrize("memory, told", [(4.0, False), (1.36, True), (0.1, None)])
def test_windows_below_the_patch_are_told_before_anything_is_trained(recipe, capsys, memory, told):
    ours = resolve(recipe(memory=memory, patch=[256, 256]))
    data, model = read_labelled(ours, quiet=True), ResUNet(channels=(32, 64), units=2)
    large = replace(data.val[0], values=np.zeros((1, 1024, 1024), np.uint8))
    statistics = model.encoder.levels[0][0].norm1.running_mean.clone()
    capsys.readouterr()
    if told is None:
        with pytest.raises(InputError, match=r"c\d+a\.png: memory=0\.1 GiB: too little .* Set at least memory=1\.\d"):
            tell_windows(ours, model, data)
        return
    tell_windows(ours, model.train(), replace(data, test=[large]))
    said = capsys.readouterr().err
    assert ("through windows of" in said and "less than the patches of 256" in said) is told and (said != "") is told
    assert model.training and torch.equal(model.encoder.levels[0][0].norm1.running_mean, statistics)
    tell_windows(ours, model, replace(data, test=[large]), quiet=True)
    assert capsys.readouterr().err == ""
