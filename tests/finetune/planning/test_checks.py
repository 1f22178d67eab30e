import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from finetune.labelled import read_labelled, resolve
from finetune.planning import checks, command
from finetune.planning.checks import find_rate, overfit, read_sweep
from finetune.planning.command import before_training
from finetune.step import build
from finetune.training.patches import PatchSampler
from resunet.config import Recipe
from resunet.errors import CheckFailed, InputError
from resunet.gradients import GradientRecord, gradient_norms, gradients_section, quiet_units
from resunet.model import ResUNet, UNet
from resunet.training import start_ranks


def test_the_suggestion_is_the_steepest_point_of_the_curve() -> None:
    """A logistic fall in log rate is steepest in its middle, wherever it is; then a rise."""
    rates = np.logspace(-6, 0, 100)
    for middle in (-4.0, -2.5):
        place = np.log10(rates)
        losses = 1 - 0.8 / (1 + np.exp(-4 * (place - middle))) + 3 * np.clip(place - middle - 1.5, 0, None) ** 2
        losses = losses + np.random.default_rng(0).normal(0, 0.005, 100)
        sweep = read_sweep(rates, losses)
        assert math.log10(sweep.steepest) == pytest.approx(middle, abs=0.15)
        assert math.log10(sweep.lowest) == pytest.approx(middle + 1.5, abs=0.3)


def test_a_flat_or_rising_curve_suggests_nothing() -> None:
    rates, noise = np.logspace(-6, 0, 100), np.random.default_rng(0).normal(0, 0.01, 100)
    assert read_sweep(rates, 1 + noise).steepest is None
    assert read_sweep(rates, 1 + np.linspace(0, 5, 100) ** 2).steepest is None


def prepared(recipe):
    recipe = resolve(recipe)
    accelerator = start_ranks(recipe, recipe.batch, "patches")
    return recipe, build(recipe)[0], read_labelled(recipe, quiet=True).train, accelerator


def test_a_sweep_leaves_the_model_alone_and_finds_a_rate(recipe) -> None:
    ours, model, train, accelerator = prepared(recipe(batch=4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sampler = PatchSampler(train, ours.patch, ours.foreground)
    sweep = find_rate(ours, model, sampler, accelerator, transferred=False, steps=50, quiet=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert sweep.rates[0] == checks.RATES[0] and sweep.rates[1] / sweep.rates[0] == pytest.approx(10 ** (6 / 49))
    assert sweep.steepest is not None and 1e-4 < sweep.steepest < 1


def test_one_batch_is_learned_or_not(recipe) -> None:
    ours, model, train, accelerator = prepared(recipe(batch=4, optimizer={"lr": 0.03}))
    done = overfit(ours, model, train, accelerator, transferred=False, steps=300, quiet=True)
    assert done.passed and done.last_loss < 0.1 < done.first_loss and done.steps < 300
    assert done.dice_training > 0.85 and done.classes == (1,)
    still = ours.model_copy(update={"optimizer": ours.optimizer.model_copy(update={"lr": 1e-7})})
    done = overfit(still, build(still)[0], train, accelerator, transferred=False, steps=10, quiet=True)
    assert not done.passed and done.steps == 10 and done.last_loss == pytest.approx(done.first_loss, rel=0.02)


def test_every_step_of_overfitting_sees_the_same_batch(recipe) -> None:
    """Without augmentation, to the interpolation's rounding."""
    ours, model, train, accelerator = prepared(recipe(batch=2))
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    overfit(ours, model, train, accelerator, transferred=False, steps=3, quiet=True)
    fixed = PatchSampler(train, ours.patch, 1.0).batch(2, (ours.seed, 0))
    assert len(seen) >= 3 and all(torch.allclose(images, fixed[0], atol=1e-4) for images in seen)  # the last are Dice's
    assert all((labels == 1).any() for labels in fixed[1])


def test_nothing_to_overfit(recipe) -> None:
    ours, model, train, accelerator = prepared(recipe())
    for one in train:
        one.labels[:] = 0
    with pytest.raises(InputError, match="training cases has a pixel of any class"):
        overfit(ours, model, train, accelerator, transferred=False, steps=2, quiet=True)


def test_a_failure_says_what_to_check(recipe, monkeypatch) -> None:
    ours = recipe(optimizer={"lr": 1e-7})
    monkeypatch.setattr(command, "OVERFIT_STEPS", 2)
    with pytest.raises(CheckFailed, match=r"(?s)FAILED: loss .* in 2 steps.*--plan.*--find-lr \(now 1e-07\)"):
        before_training(ours, "overfit", None)
    assert not ours.out.exists()
    with pytest.raises(InputError, match="writes nothing"):
        before_training(ours, "overfit", ours.out)
    with pytest.raises(InputError, match=r"\.html"):
        before_training(ours, "find-lr", ours.out)


@pytest.mark.parametrize("network", [ResUNet(1, 2, (4, 8), 1), UNet(1, 2, (4, 8))])
def test_gradient_norms_are_those_of_autograd(network) -> None:
    network.zero_grad()
    network(torch.randn(2, 1, 16, 16)).square().mean().backward()
    norms = gradient_norms(network)
    everything = torch.cat([parameter.grad.ravel() for parameter in network.parameters()])
    assert math.sqrt(sum(norm**2 for norm in norms["layers"].values())) == pytest.approx(float(everything.norm()), rel=1e-5)
    layer = network.get_submodule(name := next(iter(norms["layers"])))
    assert norms["layers"][name] == pytest.approx(float(layer.weight.grad.norm()), rel=1e-5)
    assert bool(norms["units"]) == isinstance(network, ResUNet)
    for unit, norm in norms["units"].items():
        grads = [parameter.grad.ravel() for parameter in network.get_submodule(unit).parameters()]
        assert norm == pytest.approx(float(torch.cat(grads).norm()), rel=1e-5)


def steps(**changes) -> Recipe:
    """What a record needs of a recipe."""
    return Recipe(**({"out": "run", "steps": 100, "log_every": 1, "checkpoint_every": 20} | changes))


def test_a_unit_that_does_not_learn_is_told(tmp_path, capsys) -> None:
    torch.manual_seed(0)
    network = ResUNet(1, 2, (4, 8), 1)
    dead = network.encoder.levels[1][0]
    record = GradientRecord(tmp_path, steps(log_every=25), clip=1e-3, first=0, writes=True)
    for step in (1, 24, 50, 51, 60, 75, 80, 100):
        network.zero_grad()
        F.binary_cross_entropy_with_logits(10 * network(torch.randn(4, 1, 16, 16)), torch.ones(4, 1, 16, 16)).backward()
        for parameter in dead.parameters():
            parameter.grad *= 1e-6
        expected = gradient_norms(network)["units"]
        total = float(nn.utils.clip_grad_norm_(network.parameters(), 1e-3))
        if record.due(step):
            record.take(step, network, total)
    written = json.loads((tmp_path / "gradients.json").read_text(encoding="utf-8"))["records"]
    assert [one["step"] for one in written] == [1, 50, 60, 80, 100]  # first as they are logged, then as checkpoints are written
    assert min(expected.values()) < 0.01 and quiet_units(written) == ["encoder.levels.1.0"]
    told = capsys.readouterr().err
    assert told.count("gradients:") == 1 and "1 of 3 residual units" in told and "(encoder.levels.1.0)" in told
    section = gradients_section(tmp_path)
    assert "encoder.levels.1.0" in section.text[0]
    units, layers = (picture.markup for picture in section.pictures)
    assert "encoder.levels.1.0<" in units and "encoder.levels.1.0.conv1<" in layers


def test_a_short_run_is_warned_too(tmp_path, capsys) -> None:
    network = ResUNet(1, 2, (4, 8), 1)
    record = GradientRecord(tmp_path, steps(steps=12), math.inf, 0, True)
    for step in range(1, 13):
        network.zero_grad()
        (1e-9 * network(torch.randn(2, 1, 16, 16)).square().mean()).backward()
        record.take(step, network, 1e-9)
    assert "3 of 3 residual units have norms below 0.01 in the first 12 steps" in capsys.readouterr().err


def test_a_record_without_first_steps_is_shown_all_the_same(tmp_path) -> None:
    """With fp16 the first step overflows, and the next that is logged may be a late one."""
    network = ResUNet(1, 2, (4, 8), 1)
    network(torch.randn(2, 1, 16, 16)).square().mean().backward()
    GradientRecord(tmp_path, steps(), math.inf, 0, True).take(80, network, 1.0)
    section = gradients_section(tmp_path)
    assert section.text == [] and len(section.pictures) == 2


def test_recorded_norms_are_those_before_clipping(tmp_path) -> None:
    network = ResUNet(1, 2, (4, 8), 1)
    network(torch.randn(2, 1, 16, 16)).square().mean().backward()
    for clip in (1e-3, 1e3):
        expected = gradient_norms(network)["units"]
        kept = [parameter.grad.clone() for parameter in network.parameters()]
        folder = tmp_path / str(clip)
        folder.mkdir()
        GradientRecord(folder, steps(), clip, 0, True).take(
            1, network, float(nn.utils.clip_grad_norm_(network.parameters(), clip))
        )
        (record,) = json.loads((folder / "gradients.json").read_text(encoding="utf-8"))["records"]
        assert record["units"] == pytest.approx(expected, rel=1e-3)
        for parameter, gradient in zip(network.parameters(), kept, strict=True):
            parameter.grad = gradient


def test_a_resumed_record_goes_on(tmp_path) -> None:
    network = ResUNet(1, 2, (4, 8), 1)
    network(torch.randn(2, 1, 16, 16)).square().mean().backward()
    before = GradientRecord(tmp_path, steps(), 12, 0, True)
    before.take(1, network, 1.0)
    before.take(3, network, 1.0)
    GradientRecord(tmp_path, steps(), 12, 2, True).take(3, network, 1.0)  # the checkpoint was of step 2
    assert [one["step"] for one in json.loads((tmp_path / "gradients.json").read_text(encoding="utf-8"))["records"]] == [1, 3]
    GradientRecord(tmp_path / "nowhere", steps(), 12, 0, False).take(1, network, 1.0)  # not the main rank
    assert not (tmp_path / "nowhere").exists() and gradients_section(tmp_path / "nowhere") is None
