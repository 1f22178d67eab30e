import pytest
import torch
from torch.nn import functional as F

from finetune.training.supervision import Supervised, coarser, level_weights, supervised_loss
from resunet.data.cases import IGNORE
from resunet.errors import InputError
from resunet.losses import segmentation_loss
from resunet.model import ResUNet, UNet

NETWORKS = {
    "resunet": lambda dims: ResUNet(1, 3, (4, 4, 6, 6, 8), 1, spatial_dims=dims),
    "unet": lambda dims: UNet(1, 3, (4, 4, 6, 6, 8), spatial_dims=dims),
}


@pytest.mark.parametrize("size", [(48, 33), (17, 18, 20)], ids=["2D", "3D"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_level_but_the_coarsest_has_logits_that_labels_fit(name, size):
    network = NETWORKS[name](len(size))
    supervised = Supervised(network).eval()
    x = torch.randn(2, 1, *size)
    logits = supervised(x)
    assert len(logits) == 3 and torch.equal(logits[0], network.eval()(x))  # of five levels: two beside the finest
    labels = torch.zeros(2, *size, dtype=torch.uint8)
    for level, one in enumerate(logits):
        assert one.shape[1:] == (3, *coarser(labels, level).shape[1:]) == (3, *(-(-n // 2**level) for n in size))


def test_the_heads_learn_and_are_no_part_of_the_network():
    network = ResUNet(1, 2, (4, 4, 8, 8), 1)
    names = list(network.state_dict())
    supervised = Supervised(network)
    labels = (torch.rand(2, 32, 32) < 0.3).to(torch.uint8)
    supervised_loss(supervised(torch.randn(2, 1, 32, 32)), labels, segmentation_loss)["loss"].backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in supervised.heads.parameters())
    assert list(network.state_dict()) == names and len(supervised.heads) == 1


def test_the_weights_are_those_of_nnunet():
    assert level_weights(3) == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert level_weights(1) == [1]


def test_coarser_labels_are_the_nearest():
    labels = torch.randint(0, 4, (2, 24, 16)).to(torch.uint8)
    for level in range(3):
        nearest = F.interpolate(labels[:, None].float(), scale_factor=0.5**level, mode="nearest")[:, 0]
        assert torch.equal(coarser(labels, level).float(), nearest)


def test_a_coarse_pixel_has_the_label_of_the_pixel_it_is_centred_on():
    """A strided convolution with the identity for a kernel picks the pixels that coarser labels are read at."""
    labels = torch.arange(35, dtype=torch.float32).view(1, 5, 7)
    identity = torch.zeros(1, 1, 3, 3)
    identity[0, 0, 1, 1] = 1
    once = F.conv2d(labels[:, None], identity, stride=2, padding=1)
    assert torch.equal(coarser(labels, 1), once[:, 0])
    assert torch.equal(coarser(labels, 2), F.conv2d(once, identity, stride=2, padding=1)[:, 0])


def test_the_loss_is_the_weighted_sum_of_the_levels_without_ignored_pixels():
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (2, 16, 16)).to(torch.uint8)
    labels[:, :8] = IGNORE
    logits = [torch.randn(2, 3, 16 // 2**level, 16 // 2**level, requires_grad=True) for level in range(3)]
    terms = supervised_loss(logits, labels, segmentation_loss)
    alone = [segmentation_loss(one, labels[:, :: 2**level, :: 2**level]) for level, one in enumerate(logits)]
    expected = sum(weight * one["loss"] for weight, one in zip((4 / 7, 2 / 7, 1 / 7), alone, strict=True))
    torch.testing.assert_close(terms["loss"], expected)
    assert terms["dice"] == alone[0]["dice"] and terms["focal"] == alone[0]["focal"]
    terms["loss"].backward()
    for level, one in enumerate(logits):
        rows = 8 // 2**level
        assert not one.grad[:, :, :rows].any() and (one.grad[:, :, rows:] != 0).all()


def test_a_network_of_three_levels_has_nothing_to_supervise():
    with pytest.raises(InputError, match=r"loss\.deep_supervision=true: a network of 3 levels .* at least 4"):
        Supervised(ResUNet(1, 2, (4, 4, 8), 1))
