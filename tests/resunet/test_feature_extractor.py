from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
from torchvision.ops import FeaturePyramidNetwork

from resunet import FeatureExtractor, ResidualEncoder, ResUNet
from resunet.errors import InputError


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    ResidualEncoder(2, (4, 6, 8, 12), 1).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_it_is_what_timm_gives(saved):
    ours = FeatureExtractor.from_pretrained(saved, out_indices=(1, 3))
    theirs = timm.create_model("resnet10t", features_only=True, out_indices=(1, 3), pretrained=False)
    assert type(ours.feature_info) is type(theirs.feature_info)
    for name in ("channels", "reduction", "module_name", "get_dicts"):
        assert len(getattr(ours.feature_info, name)()) == len(getattr(theirs.feature_info, name)()) == 2
    assert ours.feature_info.channels() == [6, 12] and ours.feature_info.reduction() == [2, 8]
    assert ours.feature_info.get_dicts(["num_chs", "reduction", "module"])[0] == dict(num_chs=6, reduction=2, module="levels.1")
    assert ours.feature_info.out_indices == (1, 3) == ours.out_indices
    for name in ours.feature_info.module_name():
        assert ours.encoder.get_submodule(name)


def test_features_are_the_encoders_of_any_size(saved):
    x = torch.randn(2, 2, 45, 33)
    ours, encoder = FeatureExtractor.from_pretrained(saved, (0, -1)), ResidualEncoder.from_pretrained(saved)
    assert not ours.training
    with torch.no_grad():
        found, wanted = ours(x), encoder(x)
    assert len(found) == 2 and torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[3])
    for level, channels, stride in zip(found, ours.feature_info.channels(), ours.feature_info.reduction(), strict=True):
        assert level.shape == (2, channels, *(-(-n // stride) for n in (45, 33)))


def test_a_feature_pyramid_builds_itself_from_it_and_trains(saved):
    backbone = FeatureExtractor.from_pretrained(saved).train()
    pyramid = FeaturePyramidNetwork(backbone.feature_info.channels(), 16)
    levels = pyramid(OrderedDict((str(i), level) for i, level in enumerate(backbone(torch.randn(1, 2, 32, 32)))))
    sum(level.mean() for level in levels.values()).backward()
    assert all(np.isfinite(weight.grad.sum()) for weight in backbone.parameters() if weight.grad is not None)
    assert next(backbone.parameters()).grad.abs().sum() > 0


def test_volumes_and_segmenters_too(tmp_path):
    ResUNet(1, 2, (4, 6), 1, spatial_dims=3).save_pretrained(tmp_path / "volumes")
    ours = FeatureExtractor.from_pretrained(tmp_path / "volumes")
    assert [tuple(level.shape) for level in ours(torch.randn(1, 1, 9, 8, 7))] == [(1, 4, 9, 8, 7), (1, 6, 5, 4, 4)]
    assert ours.config.normalisation.kind == "percentile_zscore"


def test_its_state_goes_into_another(saved):
    ours, other = FeatureExtractor.from_pretrained(saved), FeatureExtractor(ResidualEncoder(2, (4, 6, 8, 12), 1), None)
    other.load_state_dict(ours.state_dict())
    x = torch.randn(1, 2, 16, 16)
    assert torch.equal(ours(x)[-1], other.eval()(x)[-1])


@pytest.mark.parametrize("wanted", [(4,), (-5,), (1, 0), (1, 1), (), (1, -3)])
def test_levels_that_there_are_not(saved, wanted):
    with pytest.raises(InputError, match=r"levels 0 to 3"):
        FeatureExtractor.from_pretrained(saved, wanted)
