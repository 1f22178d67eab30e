import copy
from pathlib import Path

import pytest
import torch

from resunet.architecture import EncoderArchitecture, ResUNetArchitecture, UNetArchitecture
from resunet.checkpoint import ModelConfig
from resunet.encoder import ResidualEncoder
from resunet.ensemble import Ensemble
from resunet.errors import InputError
from resunet.feature_extractor import FeatureExtractor
from resunet.model import ResUNet, build_model, load_model
from resunet.widths import different_widths, level_channels, narrow, widths_of

# the stream of the coarsest of three levels, 32 channels wide, with 8
COARSEST = {
    "encoder.levels.2.0.conv2": (32, 8),
    "encoder.levels.2.0.norm2": (8, 8),
    "encoder.levels.2.0.shortcut.0": (16, 8),
    "encoder.levels.2.0.shortcut.1": (8, 8),
    "decoder.blocks.0.up": (8, 16),
}


def pruned(**changes: object) -> ResUNet:
    architecture = ResUNetArchitecture(channels=(8, 16, 32), units=1, widths=COARSEST, **changes)
    model = build_model(architecture)
    assert isinstance(model, ResUNet)
    return model.eval()


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
@pytest.mark.parametrize("dims", [2, 3])
def test_a_narrowed_network_is_saved_and_loaded_exactly(norm, dims, tmp_path: Path):
    model = pruned(norm=norm, spatial_dims=dims)
    model.save_pretrained(tmp_path / "model")
    again = load_model(tmp_path / "model")
    x = torch.rand(1, 1, *[24] * dims)
    assert torch.equal(again(x), model(x))
    assert again.config.architecture.widths == COARSEST
    assert different_widths(again, build_model(ResUNetArchitecture(channels=(8, 16, 32), units=1, norm=norm))) == COARSEST


def test_what_a_narrowed_network_says_of_itself_is_true(tmp_path: Path):
    model = pruned()
    assert model.encoder.channels == (8, 16, 8)
    assert level_channels(model) == tuple(level.shape[1] for level in model.levels(torch.rand(1, 1, 32, 32)))
    assert sum(one.numel() for one in model.parameters()) < sum(one.numel() for one in build_full().parameters())
    model.save_pretrained(tmp_path)
    extractor = FeatureExtractor.from_pretrained(tmp_path)
    assert extractor.feature_info.channels() == [8, 16, 8]
    assert [one.shape[1] for one in extractor(torch.rand(1, 1, 32, 32))] == [8, 16, 8]


def build_full() -> torch.nn.Module:
    return build_model(ResUNetArchitecture(channels=(8, 16, 32), units=1))


def test_the_encoder_of_a_narrowed_network_is_a_model_of_its_own(tmp_path: Path):
    encoder = pruned().encoder
    encoder.save_pretrained(tmp_path)
    again = ResidualEncoder.from_pretrained(tmp_path)
    x = torch.rand(1, 1, 32, 32)
    assert all(torch.equal(a, b) for a, b in zip(again(x), encoder(x), strict=True))
    assert set(again.config.architecture.widths) == {name.removeprefix("encoder.") for name in COARSEST if "encoder" in name}


def test_narrowed_networks_make_an_ensemble(tmp_path: Path):
    torch.manual_seed(0)
    ensemble = Ensemble([pruned(), pruned()]).eval()
    ensemble.save_pretrained(tmp_path)
    x = torch.rand(1, 1, 16, 16)
    assert torch.equal(load_model(tmp_path)(x), ensemble(x))


def test_kept_channels_are_the_first():
    full = build_full()
    model = copy.deepcopy(full)
    narrow(model, COARSEST)
    theirs, own = full.get_submodule("decoder.blocks.0.up"), model.get_submodule("decoder.blocks.0.up")
    assert torch.equal(own.weight, theirs.weight[:8])  # a transposed convolution's weight is (in, out, …)
    assert widths_of(model)["encoder.levels.2.0.conv2"] == (32, 8)
    assert torch.equal(model.encoder.levels[2][0].conv2.weight, full.encoder.levels[2][0].conv2.weight[:8])


@pytest.mark.parametrize(
    ("widths", "said"),
    [
        ({"encoder.levels.9.conv": (1, 1)}, "no such layers"),
        ({"head": (16, 1)}, r"at most those of the full one, \[8, 1\]"),
        ({"head": (0, 1)}, "at least 1 channel"),
        ({"encoder.levels.0.0.norm1": (4, 8)}, "as many channels out as in"),
        ({"encoder.levels.0.0.conv1": (1, 4)}, "do not fit together"),
    ],
)
def test_widths_that_cannot_be_are_refused(widths, said):
    with pytest.raises(InputError, match=said):
        build_model(ResUNetArchitecture(channels=(8, 16), widths=widths))


def test_groups_of_a_norm_divide_its_channels():
    with pytest.raises(InputError, match="8 groups do not divide"):
        build_model(UNetArchitecture(channels=(16, 32), norm="group", widths={"down.0.1": (12, 12)}))


def test_architectures_of_before_have_no_widths():
    old = {"name": "residual_encoder", "channels": [4, 8], "units": 1}
    assert EncoderArchitecture.model_validate(old).widths == {}
    config = ModelConfig(architecture=ResUNetArchitecture(channels=(8, 16, 32), widths=COARSEST))
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config
