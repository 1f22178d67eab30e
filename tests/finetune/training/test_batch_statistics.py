import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.swa_utils import update_bn

from finetune.training.batch_statistics import batch_norms, moving, recompute_statistics
from resunet.model import ResUNet, UNet


def trained(kind: type[ResUNet] | type[UNet] = ResUNet) -> nn.Module:
    """A network whose running statistics are those of a few batches."""
    torch.manual_seed(0)
    network = kind(1, 2, (4, 6, 8))
    for _ in range(3):
        network(torch.randn(2, 1, 24, 20))
    return network


def batches(count: int) -> list[torch.Tensor]:
    """Images whose means differ more than their pixels do."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 1, 24, 20, generator=generator) + 3 * torch.randn(1, generator=generator) for _ in range(count)]


def statistics(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.named_buffers()}


@pytest.mark.parametrize("kind", [ResUNet, UNet])
def test_of_one_batch_they_are_torchs(kind):
    network, theirs, (one,) = trained(kind), trained(kind), batches(1)
    recompute_statistics(network, batch_norms(network), [one], Accelerator(cpu=True))
    update_bn([one], theirs)
    ours, expected = statistics(network), statistics(theirs)
    for name in ours:
        if "num_batches" not in name:
            torch.testing.assert_close(ours[name], expected[name], rtol=1e-4, atol=1e-5)


def test_of_many_batches_they_are_those_of_all_values_together():
    network, many = trained(), batches(5)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in batch_norms(network)}
    for name, layer in batch_norms(network).items():
        layer.register_forward_pre_hook(lambda layer, given, to=seen[name]: to.append(given[0].detach().double()))
    recompute_statistics(network, seen, many, Accelerator(cpu=True))
    for name, layer in batch_norms(network).items():
        values = torch.cat(seen[name]).movedim(1, 0).flatten(1)
        assert len(seen[name]) == 5
        torch.testing.assert_close(layer.running_mean.double(), values.mean(dim=1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.running_var.double(), values.var(dim=1), rtol=1e-5, atol=1e-6)


def test_normalising_by_batch_is_what_training_does():
    """What the layers saw while statistics were recomputed is what they see in training mode."""
    network, many = trained(), batches(2)
    seen: list[torch.Tensor] = []
    last = list(batch_norms(network).values())[-1]
    last.register_forward_pre_hook(lambda layer, given: seen.append(given[0].detach().clone()))
    recompute_statistics(network, batch_norms(network), many, Accelerator(cpu=True))
    network.train()
    for one in many:
        network(one)
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])


def test_nothing_else_changes():
    network = trained()
    network.encoder.eval()
    before, modes = statistics(network), [module.training for module in network.modules()]
    parameters = [parameter.clone() for parameter in network.parameters()]
    state = torch.random.get_rng_state()
    names = moving(network)
    assert names and not any(name.startswith("encoder") for name in names)
    recompute_statistics(network, names, batches(2), Accelerator(cpu=True))
    changed = {name.rpartition(".")[0] for name, tensor in statistics(network).items() if not torch.equal(tensor, before[name])}
    assert changed == names  # not the encoder's, which stands still
    assert all(torch.equal(tensor, before[name]) for name, tensor in statistics(network).items() if "num_batches" in name)
    assert [module.training for module in network.modules()] == modes
    assert all(layer.track_running_stats for layer in batch_norms(network).values())
    assert all(torch.equal(a, b) for a, b in zip(parameters, network.parameters(), strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in network.parameters())
