"""Pretraining of the light network's encoder, and of its decoder with it."""

import json

import pytest
import torch

from pretrain.dense import DenseBranch
from pretrain.loop import pretrain
from pretrain.network import build_network
from pretrain.recipe import DenseSettings, EncoderSettings
from resunet.architecture import MobileEncoderArchitecture
from resunet.checkpoint import read_config
from resunet.config import validate
from resunet.decoders import decoder_of
from resunet.errors import InputError
from resunet.light_model import MobileResUNet
from resunet.mobile import MobileEncoder
from resunet.training import start_ranks
from resunet.transfer import DECODER, transfer_encoder

TINY = "mobilenetv3_small_050"
LIGHT = {"name": "mobile_resunet", "backbone": TINY, "channels": None, "units": 2}
DENSE = {"level": 0, "points": 6, "pairs": 16, "hidden": 8, "output": 5}


def test_the_settings_describe_the_encoder():
    settings = validate(EncoderSettings, {"name": "mobile_resunet", "backbone": TINY, "output_stride": 16}, "model")
    assert settings.channels is None and settings.widths == (16, 8, 16, 24, 288)
    assert settings.architecture(3) == MobileEncoderArchitecture(in_channels=3, backbone=TINY, output_stride=16)
    assert [settings.decoder_stride(level) for level in range(4)] == [2, 4, 8, 16]
    full = validate(EncoderSettings, {}, "model")
    assert full.widths == (32, 64, 128, 256, 512) and full.decoder_stride(0) == 1
    again = validate(EncoderSettings, json.loads(settings.model_dump_json()), "model")
    assert again == settings


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"model": LIGHT | {"spatial_dims": 3}, "views": {"size": 8}}, "MobileNetV3 is of two dimensions"),
        ({"model": LIGHT | {"norm": "group"}}, "norm='group' is none of MobileNetV3's choices"),
        ({"model": LIGHT | {"channels": [8, 8, 8, 8]}}, "are of the decoder that dense trains; set dense"),
        ({"model": {"name": "resunet", "channels": None}}, "channels=null: only name='mobile_resunet' has"),
        ({"model": LIGHT, "dense": DENSE | {"level": 4}}, "dense.level=4: the decoder of 5 levels .* has 0 to 3"),
        ({"model": {"backbone": TINY}}, "only name='mobile_resunet' has it"),
    ],
)
def test_what_is_refused(recipe, changes, fault):
    with pytest.raises(InputError, match=fault):
        recipe(**changes)


def test_the_encoder_begins_with_given_weights(recipe, tmp_path):
    first = MobileEncoder(1, TINY)
    torch.save({first.timm_name(name): one for name, one in first.state_dict().items()}, tmp_path / "net.pth")
    asked = recipe(model=LIGHT | {"weights": str(tmp_path / "net.pth")})
    network = build_network(asked, start_ranks(asked, asked.batch, "scans"))
    assert all(torch.equal(one, network.encoder.state_dict()[name]) for name, one in first.state_dict().items())


def test_places_are_read_at_the_levels_own_stride():
    """A feature of level 0, at half the size, that says where its pixel is, is read where the place is."""
    encoder = MobileEncoder(1, TINY)
    branch = DenseBranch(encoder, decoder_of(encoder, channels=(2, 8, 8, 8)), DenseSettings(level=0, hidden=2, output=2))
    branch.projection = torch.nn.Identity()
    position = 2.0 * torch.arange(16)
    level = torch.stack(torch.meshgrid(position, position, indexing="ij"))[None]
    places = torch.tensor([[[-0.5, 0.25], [0.0, 0.0]]])  # (x, y)
    read = branch(level, (32, 32), places)
    assert torch.allclose(read, ((places.flip(2) + 1) * 32 / 2 - 0.5), atol=1e-4)


def test_a_run_and_what_it_gives(recipe, tmp_path):
    run = pretrain(recipe(model=LIGHT, dense=DENSE, views={"size": 40}))
    config = read_config(run / "model")
    assert config.decoder.channels == (32, 32, 32, 32) and config.decoder.finest == 0 and (run / "model" / DECODER).is_file()
    assert "1/2 resolution" in (run / "report.html").read_text(encoding="utf-8")
    model = MobileResUNet(1, 2, TINY)
    receipt = transfer_encoder(run, model, parts="both")
    assert {one.name for one in receipt.tensors if one.state == "fresh"} == {"head.0.weight", "head.0.bias"}
    assert receipt.decoder_parameters == receipt.decoder_parameters_loaded
