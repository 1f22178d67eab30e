import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from finetune.compression.groups import REFERENCE, find_groups, keep_channels, size_at, widths_after
from finetune.compression.importance import weight_importance
from finetune.compression.prune import prunable
from resunet.architecture import MobileResUNetArchitecture, ResUNetArchitecture, UNetArchitecture
from resunet.errors import InputError
from resunet.model import Segmenter, build_model
from resunet.widths import CONVOLUTIONS, TRANSPOSED, is_depthwise

NETWORKS = {
    "resunet": ResUNetArchitecture(channels=(4, 8, 12), num_classes=3),
    "excite": ResUNetArchitecture(channels=(8, 16), in_channels=3, units=1, squeeze_excite=True),
    "instance": ResUNetArchitecture(channels=(4, 6), norm="instance"),
    "volumes": ResUNetArchitecture(channels=(4, 6), spatial_dims=3, units=1),
    "unet": UNetArchitecture(channels=(4, 8, 12)),
    "unet volumes": UNetArchitecture(channels=(4, 8), spatial_dims=3, norm="instance"),
    "light": MobileResUNetArchitecture(channels=(8, 8, 12, 16)),
}


def network(name: str) -> Segmenter:
    torch.manual_seed(1)
    model = build_model(NETWORKS[name])
    assert isinstance(model, Segmenter)
    for layer in model.modules():  # statistics that a trained network has
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean.uniform_(-0.5, 0.5)
            layer.running_var.uniform_(0.5, 2)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.5, 0.5)
    return model.eval()


@torch.no_grad()
def silence(model: Segmenter, groups, removed) -> None:
    """Nobody reads these channels any more: the weights by which layers take them are 0."""
    for group, channels in zip(groups, removed, strict=True):
        for use in group.uses:
            layer = model.get_submodule(use.layer)
            places = [use.places[channel] for channel in channels]
            if use.side == "in" and isinstance(layer, CONVOLUTIONS + TRANSPOSED) and not is_depthwise(layer):
                layer.weight[places if isinstance(layer, TRANSPOSED) else (slice(None), places)] = 0


@pytest.mark.parametrize("name", NETWORKS)
def test_without_channels_that_nobody_reads_the_network_answers_the_same(name):
    model = network(name)
    groups, rng = find_groups(model), torch.Generator().manual_seed(2)
    removed = [torch.randperm(group.channels, generator=rng)[: group.channels // 3].sort().values.tolist() for group in groups]
    silence(model, groups, removed)
    dims = model.config.architecture.spatial_dims
    x = torch.rand(2, model.config.architecture.in_channels, *[35] * dims)
    made = prunable(model).without(removed)
    with torch.no_grad():
        torch.testing.assert_close(made(x), model(x), rtol=1e-4, atol=1e-5)
    assert sum(one.numel() for one in made.parameters()) < sum(one.numel() for one in model.parameters())
    inner = [layer for layer in made.modules() if isinstance(layer, CONVOLUTIONS) and not is_depthwise(layer)]
    assert made.config.architecture.widths and len(inner) > 5


@pytest.mark.parametrize("name", ["resunet", "excite", "unet volumes", "light"])
def test_sizes_are_those_that_are_counted(name):
    whole = prunable(network(name))
    gone = [group.channels // 2 for group in whole.groups]
    half = whole.without([range(n) for n in gone])
    architecture = half.config.architecture
    side = REFERENCE[architecture.spatial_dims]
    x = torch.zeros(1, architecture.in_channels, *[side] * architecture.spatial_dims, device="meta")
    for live, widths in ((whole.network, {}), (half, widths_after(whole.groups, gone, whole.costs))):
        size = size_at(whole.costs, widths)
        assert size.parameters == sum(one.numel() for one in live.parameters())
        with FlopCounterMode(display=False) as counter:
            live.to("meta")(x)
        assert 2 * size.macs == counter.get_total_flops()


def test_the_channels_of_a_group_norm_go_one_of_each_of_its_groups():
    model = build_model(ResUNetArchitecture(channels=(16, 32), norm="group", units=1))
    groups = find_groups(model)
    assert {group.unit for group in groups} == {8}
    # channels 0, 2, … 14 are one of each of 8 groups of 2
    removed = [list(range(0, group.channels, group.channels // 8)) for group in groups]
    tensors = keep_channels(model, groups, removed)
    assert tensors["encoder.levels.0.0.norm1.weight"].shape == (8,)
    made = prunable(model).without(removed)
    assert made.get_submodule("encoder.levels.0.0.norm1").num_groups == 8
    assert made(torch.rand(1, 1, 16, 16)).shape == (1, 1, 16, 16)


@pytest.mark.parametrize("kind", ["magnitude", "batch_norm"])
def test_importance_is_torch_prunings(kind):
    model = network("resunet")
    reference = tp.importance.GroupMagnitudeImportance(p=2) if kind == "magnitude" else tp.importance.BNScaleImportance()
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=torch.zeros(1, 1, 32, 32))
    groups = find_groups(model)
    for group, own in zip(groups, weight_importance(model, groups, kind), strict=True):
        root = model.get_submodule(group.name)
        theirs = reference(graph.get_pruning_group(root, tp.prune_conv_out_channels, list(range(group.channels))))
        torch.testing.assert_close(own, theirs)


def test_batch_norm_needs_a_norm():
    model = build_model(UNetArchitecture(channels=(4, 8)))
    with pytest.raises(InputError, match="no norm with a scale"):  # of what a transposed convolution gives
        weight_importance(model, find_groups(model), "batch_norm")
