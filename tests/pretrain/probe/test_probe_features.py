import pytest
import torch
from torch.nn import functional as F

from pretrain.probe.features import features_at
from resunet.encoder import ResidualEncoder


@pytest.mark.parametrize("size", [(16, 12), (13, 9), (9, 8, 10)])
def test_features_are_those_of_the_positions(size):
    """At pixels that are positions of the coarsest level every level is read where it is, without interpolation."""
    torch.manual_seed(0)
    encoder = ResidualEncoder(1, (3, 4, 5), units=1, spatial_dims=len(size)).eval()
    image = torch.randn(1, *size)
    places = torch.cartesian_prod(*(torch.arange(0, n, 4) for n in size))
    with torch.no_grad():
        found = features_at(encoder, image, places)
        levels = encoder(image[None])
    for row, place in zip(found, places, strict=True):
        parts = [
            F.normalize(level[(0, slice(None), *(int(p) // stride for p in place))], dim=0)
            for level, stride in zip(levels, encoder.strides, strict=True)
        ]
        torch.testing.assert_close(row, F.normalize(torch.cat(parts), dim=0), rtol=1e-4, atol=1e-5)


def test_between_positions_it_is_the_mean_and_beyond_the_last_the_last():
    torch.manual_seed(0)
    encoder = ResidualEncoder(1, (3, 4), units=1).eval()
    image = torch.randn(1, 8, 8)
    with torch.no_grad():
        found = features_at(encoder, image, torch.tensor([[2, 3], [7, 6], [6, 6]]))
        fine, coarse = encoder(image[None])
    between = (coarse[0, :, 1, 1] + coarse[0, :, 1, 2]) / 2
    wanted = torch.cat([F.normalize(fine[0, :, 2, 3], dim=0), F.normalize(between, dim=0)])
    torch.testing.assert_close(found[0], F.normalize(wanted, dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(F.normalize(found[1, 3:], dim=0), F.normalize(coarse[0, :, 3, 3], dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(F.normalize(found[2, 3:], dim=0), F.normalize(coarse[0, :, 3, 3], dim=0), rtol=1e-4, atol=1e-5)
