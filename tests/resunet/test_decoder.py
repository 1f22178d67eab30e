import pytest
import torch
from torch import Tensor

from resunet.blocks import SqueezeExcite
from resunet.decoder import ProgressiveDecoder
from resunet.encoder import ResidualEncoder
from resunet.model import ResUNet, UNet


class DeclaredEncoder:
    """An encoder that is nothing but what it declares."""

    spatial_dims = 2
    in_channels = 1
    channels = (3, 7, 5, 11)
    strides = (1, 2, 4, 8)

    def __call__(self, x: Tensor) -> list[Tensor]:
        sizes = [[-(-n // stride) for n in x.shape[2:]] for stride in self.strides]
        return [torch.randn(len(x), width, *size) for width, size in zip(self.channels, sizes, strict=True)]


def test_the_decoder_builds_itself_from_what_any_encoder_declares():
    encoder = DeclaredEncoder()
    decoder = ProgressiveDecoder(encoder)
    assert [block.up.in_channels for block in decoder.blocks] == [11, 5, 7]
    for size in ((16, 16), (17, 23), (9, 31)):
        assert decoder(encoder(torch.zeros(2, 1, *size))).shape == (2, 3, *size)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_the_result_has_size_and_width_of_the_finest_level(spatial_dims):
    encoder = ResidualEncoder(channels=(4, 6, 8), spatial_dims=spatial_dims)
    decoder = ProgressiveDecoder(encoder)
    size = (7, 9, 11)[:spatial_dims]
    assert decoder(encoder(torch.zeros(2, 1, *size))).shape == (2, 4, *size)


def test_squeeze_and_excitation_stands_on_every_skip_or_on_none():
    encoder = ResidualEncoder(channels=(4, 6, 8))
    for wanted in (True, False):
        decoder = ProgressiveDecoder(encoder, squeeze_excite=wanted)
        assert [isinstance(block.excite, SqueezeExcite) for block in decoder.blocks] == [wanted] * 2


def test_every_level_reaches_the_result():
    encoder = ResidualEncoder(channels=(4, 6, 8)).eval()
    decoder = ProgressiveDecoder(encoder).eval()
    features = [f.detach().requires_grad_() for f in encoder(torch.randn(1, 1, 16, 16))]
    decoder(features).square().sum().backward()
    assert all(feature.grad.abs().sum() > 0 for feature in features)


@pytest.mark.parametrize("network", [ResUNet(1, 2, (4, 6, 8, 10), 1), UNet(1, 2, (4, 6, 8, 10))])
def test_levels_are_what_every_block_gives(network):
    network.eval()
    given = []
    blocks = network.decoder.blocks if isinstance(network, ResUNet) else network.merge
    for block in blocks:
        block.register_forward_hook(lambda block, inputs, output: given.append(output))
    x = torch.randn(1, 1, 21, 18)
    logits = network(x)
    levels = network.levels(x)
    assert all(torch.equal(a, b) for a, b in zip(levels, given[2::-1], strict=True))
    assert torch.equal(network.head(levels[0]), logits)
    assert [level.shape[1:] for level in levels] == [(4, 21, 18), (6, 11, 9), (8, 6, 5)]


def test_features_of_another_number_of_levels_are_refused():
    encoder = ResidualEncoder(channels=(4, 6, 8))
    with pytest.raises(ValueError, match="zip"):
        ProgressiveDecoder(encoder)(encoder(torch.zeros(1, 1, 16, 16))[1:])


def test_the_encoder_is_not_kept():
    encoder = ResidualEncoder(channels=(4, 6))
    decoder = ProgressiveDecoder(encoder)
    own = {id(p) for p in encoder.parameters()}
    assert not any(id(p) in own for p in decoder.parameters())
