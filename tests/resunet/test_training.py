import copy
import math
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from resunet.config import Recipe
from resunet.errors import CheckFailed, EnvironmentFault, InputError, Stopped
from resunet.runs import Run
from resunet.step_clock import StepClock
from resunet.stopping import failing_as, stop_on_sigterm
from resunet.training import (
    any_rank,
    learning_rate,
    mean_over_ranks,
    parameter_groups,
    refuse_non_finite,
    restore_training,
    start_ranks,
    step_generator,
    sum_over_ranks,
    training_state,
)


def recipe(tmp_path, **values) -> Recipe:
    return Recipe(**(dict(out=tmp_path / "run", steps=10, wandb={"mode": "disabled"}) | values))


def test_a_step_generator_is_a_pure_function_of_all_its_arguments():
    def draw(*arguments: int) -> tuple:
        return tuple(torch.rand(4, generator=step_generator(torch.device("cpu"), *arguments)).tolist())

    every = [(seed, stage, step, rank) for seed in (0, 1) for stage in (0, 1) for step in (0, 1, 2**31) for rank in (0, 1, 7)]
    draws = [draw(*arguments) for arguments in every]
    assert len(set(draws)) == len(every)
    torch.manual_seed(9)
    assert draws == [draw(*arguments) for arguments in every]


@pytest.mark.parametrize("steps, warmup", [(10, 0.2), (100, 0.05), (7, 0.0), (50, 0.5)])
def test_the_learning_rate_is_its_closed_form(steps, warmup):
    rising, peak = round(warmup * steps), 0.3
    for step in range(steps):
        if step < rising:
            expected = peak * (step + 1) / rising
        else:
            expected = peak * (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2
        assert learning_rate(step, steps, warmup, peak) == pytest.approx(expected, abs=1e-12)
    assert 0 < learning_rate(steps - 1, steps, warmup, peak) < 0.2 * peak
    assert max(learning_rate(step, steps, warmup, peak) for step in range(steps)) == pytest.approx(peak)


def test_the_polynomial_decay_is_its_closed_form():
    rates = [learning_rate(step, 50, 0.2, 0.3, "polynomial") for step in range(50)]
    assert rates[:10] == [learning_rate(step, 50, 0.2, 0.3) for step in range(10)]
    assert rates[10:] == pytest.approx([0.3 * (1 - (step - 10) / 40) ** 0.9 for step in range(10, 50)])


def test_a_warm_up_over_all_steps_leaves_one_at_the_peak():
    assert [learning_rate(step, 4, 1.0, 3.0) for step in range(4)] == pytest.approx([1, 2, 3, 3])
    assert learning_rate(0, 1, 0.5, 3.0) == 3.0


def test_norms_and_biases_have_no_weight_decay():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1, bias=False))
    groups = parameter_groups({"encoder": network, "head": nn.Linear(2, 2), "empty": nn.ReLU()}, 0.1)
    decayed = [p for group in groups if group["weight_decay"] == 0.1 for p in group["params"]]
    plain = [p for group in groups if group["weight_decay"] == 0.0 for p in group["params"]]
    assert len(decayed) + len(plain) == 7
    assert {p.ndim for p in plain} == {1} and {p.ndim for p in decayed} == {2, 4}
    assert [group["name"] for group in groups] == ["encoder", "encoder", "head", "head"]


def test_a_loss_that_is_not_finite_stops():
    refuse_non_finite({"loss": 1.0, "dice": 0.0}, 3, Accelerator(cpu=True))
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(CheckFailed, match=rf"step 7.*loss=1\.0, dice={bad}.*Start anew, under another out"):
            refuse_non_finite({"loss": 1.0, "dice": bad}, 7, Accelerator(cpu=True))


def test_sigterm_sets_the_request_and_the_handler_before_is_restored():
    received = []

    def mine(signum, frame):
        received.append(signum)

    original = signal.signal(signal.SIGTERM, mine)
    try:
        with stop_on_sigterm() as stop:
            assert not stop
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            assert stop and received == []
        assert signal.getsignal(signal.SIGTERM) is mine
        with pytest.raises(KeyError), stop_on_sigterm():
            raise KeyError
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, original)


def test_ctrl_c_is_a_request_too_and_the_second_one_does_not_wait(tmp_path, capsys):
    original = signal.getsignal(signal.SIGINT)
    with (
        pytest.raises(Stopped, match=r"stopped by Ctrl-C after step 4; continue with resume=true") as error,
        stop_on_sigterm() as stop,
    ):
        signal.raise_signal(signal.SIGINT)
        assert stop and "stopping after this step" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        stop.stop(Run(recipe(tmp_path), "pretrain", {}), 4)
    assert error.value.exit_code == 130 and signal.getsignal(signal.SIGINT) is original


def test_a_stopped_run_stays_stopped_and_a_failed_one_is_failed(tmp_path):
    run = Run(recipe(tmp_path), "pretrain", {})
    with pytest.raises(Stopped, match=r"after step 4.*resume=true"), stop_on_sigterm() as stop, failing_as(run):
        stop.stop(run, 4)
    assert '"status": "stopped"' in (run.folder / "run.json").read_text(encoding="utf-8")
    with pytest.raises(KeyboardInterrupt), failing_as(run):
        raise KeyboardInterrupt
    assert '"status": "stopped"' in (run.folder / "run.json").read_text(encoding="utf-8")
    with pytest.raises(KeyError), failing_as(run):
        raise KeyError
    assert '"status": "failed"' in (run.folder / "run.json").read_text(encoding="utf-8")


def test_training_goes_on_as_if_it_had_not_stopped():
    accelerator = Accelerator(cpu=True)

    def fresh(seed):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        return network, torch.optim.AdamW(network.parameters(), lr=0.1)

    def step(network, optimizer, index):
        x = torch.randn(8, 3, generator=step_generator(torch.device("cpu"), 0, 0, index, 0))
        optimizer.zero_grad()
        network(x).square().mean().backward()
        optimizer.step()

    network, optimizer = fresh(0)
    for index in range(3):
        step(network, optimizer, index)
    state = copy.deepcopy(training_state(3, network, optimizer, accelerator))
    for index in range(3, 6):
        step(network, optimizer, index)
    other, its_optimizer = fresh(1)
    assert restore_training(state, other, its_optimizer, accelerator) == 3
    for index in range(3, 6):
        step(other, its_optimizer, index)
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), other.state_dict().values(), strict=True))


def test_start_ranks_checks_what_the_recipe_wants(tmp_path, capsys):
    accelerator = start_ranks(recipe(tmp_path), 6, "scans")
    assert accelerator.num_processes == 1
    assert "1 rank on cpu, batch 6 scans (6 a rank), fp32, 10 steps" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"processes=2.*1 started.*processes=1"):
        start_ranks(recipe(tmp_path, processes=2), 6, "scans")
    if not torch.cuda.is_available():
        with pytest.raises(EnvironmentFault, match="needs a GPU"):
            start_ranks(recipe(tmp_path, precision="fp16"), 6, "scans")


class TwoRanks(SimpleNamespace):
    """torch.distributed's part: this rank's values and those of another."""

    num_processes = 2
    device = torch.device("cpu")

    def reduce(self, values, reduction):
        return {"sum": values + self.other, "mean": (values + self.other) / 2}[reduction]


def test_over_ranks():
    alone = Accelerator(cpu=True)
    assert any_rank(True, alone) and not any_rank(False, alone)
    assert mean_over_ranks({"a": 1.0, "b": 2.0}, alone) == {"a": 1.0, "b": 2.0}
    values = torch.tensor([1.0, 2.0])
    assert sum_over_ranks(values, alone) is values
    assert any_rank(False, TwoRanks(other=torch.tensor([1]))) and not any_rank(False, TwoRanks(other=torch.tensor([0])))
    assert mean_over_ranks({"a": 1.0, "b": 2.0}, TwoRanks(other=torch.tensor([3.0, 0.0]))) == {"a": 2.0, "b": 1.0}


def test_the_clock_goes_on_after_a_resume_and_knows_what_was_computed():
    clock = StepClock()
    sum(range(10**6))
    state = clock.state()
    assert 0 < state["cpu_seconds"] < 10 and state["seconds"] > 0
    later = StepClock({"seconds": 100.0, "cpu_seconds": 50.0}).state()
    assert 100 < later["seconds"] < 110 and 50 <= later["cpu_seconds"] < 60
    assert StepClock({"seconds": 100.0}).record(Accelerator(cpu=True)).keys() == {"seconds", "seconds_per_step"}, (
        "unknown, of an earlier version"
    )


def test_the_clock_leaves_the_first_step_out(monkeypatch):
    clock = StepClock()
    assert clock.seconds_per_step() is None
    times = iter([100.0, 100.5, 101.0, 109.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    clock.tick()
    assert clock.seconds_per_step() is None
    for _ in range(3):
        clock.tick()
    assert clock.seconds_per_step() == 0.5
