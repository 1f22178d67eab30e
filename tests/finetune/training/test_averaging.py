import pytest
import torch
from torch import nn

from finetune.training.averaging import averaged


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))


def step(model: nn.Module, index: int) -> None:
    generator = torch.Generator().manual_seed(index)
    model(torch.randn(2, 1, 8, 8, generator=generator))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator)


def test_the_average_is_its_definition():
    """Against a loop in float64 over everything that is floating point, the batch statistics too."""
    model = network()
    average = averaged(model, 0.6)
    expected: dict[str, torch.Tensor] = {}
    for index in range(16):
        step(model, index)
        average.update_parameters(model)
        decay = 0.0 if index == 0 else min(0.6, (1 + index) / (10 + index))
        for name, tensor in model.state_dict().items():
            expected[name] = decay * expected.get(name, 0) + (1 - decay) * tensor.double()
    assert decay == 0.6 and (1 + 5) / (10 + 5) < 0.6  # both branches were seen
    for name, tensor in average.module.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)
        else:
            assert tensor == 16
    assert not torch.equal(average.module[0].weight, model[0].weight)


def test_a_short_run_does_not_end_on_its_start():
    model = network()
    start = {name: parameter.clone() for name, parameter in model.named_parameters()}
    average = averaged(model, 0.9999)
    for _ in range(10):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1
        average.update_parameters(model)
    for name, parameter in average.module.named_parameters():
        assert (parameter - start[name]).mean().item() == pytest.approx(9, abs=1e-3)  # of 10; without the warm-up 1.0


def test_averaging_goes_on_as_if_it_had_not_stopped():
    model, other = network(), network()
    whole, before = averaged(model, 0.9), averaged(other, 0.9)
    for index in range(6):
        step(model, index)
        whole.update_parameters(model)
        step(other, index)
        if index == 3:  # a process ends, and another begins
            state, after = before.state_dict(), averaged(network(), 0.9)
            after.load_state_dict(state)
            before = after
        before.update_parameters(other)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), before.state_dict().values(), strict=True))
