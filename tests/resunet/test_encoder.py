import math

import pytest
import torch
from torch import nn

from resunet.encoder import ResidualEncoder, initialise, initialise_head
from resunet.errors import InputError


def test_the_default_is_five_levels_up_to_512_channels():
    encoder = ResidualEncoder()
    assert encoder.channels == (32, 64, 128, 256, 512)
    assert encoder.strides == (1, 2, 4, 8, 16)
    assert (encoder.in_channels, encoder.spatial_dims) == (1, 2)
    assert [len(level) for level in encoder.levels] == [2] * 5


@pytest.mark.parametrize(
    "channels, units, in_channels, spatial_dims",
    [((4, 6, 8, 10, 12), 2, 1, 2), ((5,), 1, 3, 2), ((3, 3, 3), 3, 3, 2), ((4, 6, 8), 1, 2, 3), ((2, 3, 4, 5, 6, 7), 1, 1, 2)],
)
def test_what_the_encoder_declares_is_true(channels, units, in_channels, spatial_dims):
    encoder = ResidualEncoder(in_channels, channels, units, spatial_dims=spatial_dims).eval()
    assert encoder.channels == channels
    assert encoder.strides == tuple(2**level for level in range(len(channels)))
    assert encoder.in_channels == in_channels
    for n in range(17, 24):
        size = (n, n + 6, n - 4)[:spatial_dims]
        features = encoder(torch.zeros(1, in_channels, *size))
        assert len(features) == len(channels)
        for feature, width, stride in zip(features, encoder.channels, encoder.strides, strict=True):
            assert feature.shape == (1, width, *(math.ceil(side / stride) for side in size))


@pytest.mark.parametrize("norm, layer", [("batch", nn.BatchNorm2d), ("instance", nn.InstanceNorm2d), ("group", nn.GroupNorm)])
def test_the_norm_is_used_everywhere(norm, layer):
    encoder = ResidualEncoder(channels=(4, 8), norm=norm)
    norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d | nn.InstanceNorm2d | nn.GroupNorm)]
    assert len(norms) == 2 * 2 * 2 + 2  # levels × units × convolutions, and two shortcuts
    assert all(isinstance(m, layer) for m in norms)


def test_the_embedding_is_the_global_mean_of_the_last_level():
    for spatial_dims in (2, 3):
        encoder = ResidualEncoder(channels=(4, 6), spatial_dims=spatial_dims).eval()
        x = torch.randn(3, 1, *[9, 10, 7][:spatial_dims])
        embedding = encoder.embed(x)
        assert embedding.shape == (3, 6)
        torch.testing.assert_close(embedding, encoder(x)[-1].flatten(2).mean(2))


def test_the_config_describes_the_network():
    encoder = ResidualEncoder(3, (4, 6, 8), 1, "group", 3)
    assert encoder.config.architecture.model_dump() == {
        "name": "residual_encoder",
        "spatial_dims": 3,
        "in_channels": 3,
        "channels": (4, 6, 8),
        "units": 1,
        "norm": "group",
        "widths": {},
    }


@pytest.mark.parametrize("in_channels, first_width", [(1, 4), (3, 4), (4, 4)])
def test_input_convolutions_are_the_weights_that_see_the_input(in_channels, first_width):
    encoder = ResidualEncoder(in_channels, (first_width, 6))
    other = ResidualEncoder(in_channels + 2, (first_width, 6)).state_dict()
    own = encoder.state_dict()
    changed = {name for name in own.keys() & other.keys() if own[name].shape != other[name].shape}
    if in_channels == first_width:  # the identity shortcut has no weight
        assert encoder.input_convolutions() == ["levels.0.0.conv1.weight"]
    else:
        assert set(encoder.input_convolutions()) == changed
    assert set(encoder.input_convolutions()) <= own.keys()


@pytest.mark.parametrize(
    "arguments, named",
    [
        (dict(in_channels=0), "in_channels=0"),
        (dict(channels=()), r"channels=\[\]"),
        (dict(channels=(4, 0)), r"channels=\[4, 0\]"),
        (dict(units=0), "units=0"),
        (dict(spatial_dims=1), "spatial_dims=1"),
        (dict(spatial_dims=4), "allowed are 2 and 3"),
    ],
)
def test_an_impossible_encoder_is_the_users_fault(arguments, named):
    with pytest.raises(InputError, match=named):
        ResidualEncoder(**arguments)


def test_initialisation_keeps_the_variance_it_promises():
    convolution, transposed = nn.Conv2d(64, 128, 3), nn.ConvTranspose2d(128, 64, 2, stride=2)
    initialise(nn.ModuleList([convolution, transposed]))
    # He: variance 2 / fan; the standard error of a deviation of n samples is about 1 / sqrt(2 n): below 0.3 % and 0.4 %
    assert float(convolution.weight.detach().std()) == pytest.approx(math.sqrt(2 / (128 * 9)), rel=0.02)
    assert float(transposed.weight.detach().std()) == pytest.approx(math.sqrt(2 / 128), rel=0.02)
    assert not convolution.bias.any() and not transposed.bias.any()


def test_a_head_starts_near_zero():
    head = nn.Conv2d(64, 64, 1)
    initialise_head(head)
    assert float(head.weight.detach().std()) == pytest.approx(0.01, rel=0.1)
    assert not head.bias.any()
