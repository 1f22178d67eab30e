"""MobileNetV3 as an encoder, its weights, and the light network on it."""

import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from finetune.settings import NetworkSettings
from pretrain.network import PretrainingNetwork, synchronised
from pretrain.recipe import HeadSettings
from pretrain.save import save_with_decoder
from resunet import FeatureExtractor, MobileEncoder, MobileResUNet, load_model
from resunet.checkpoint import ModelConfig, write_weights
from resunet.decoders import decoder_of
from resunet.ensemble import Ensemble
from resunet.errors import CheckFailed, InputError
from resunet.files import sha256
from resunet.fingerprint import describe_decoder, fingerprint
from resunet.gradients import gradient_norms
from resunet.light_weights import load_weights, weights_input
from resunet.mobile import backbones, channels_of
from resunet.model import ResUNet, build_model
from resunet.transfer import transfer_encoder

TINY = "mobilenetv3_small_050"


def settled(network: nn.Module, channels: int = 1) -> nn.Module:
    """With running statistics and affine weights as after some training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, one in [*network.named_parameters(), *network.named_buffers()]:
            if one.ndim == 1 and one.is_floating_point():
                scale = torch.rand(one.shape, generator=generator)
                one.copy_(0.5 + scale if name.endswith(("weight", "var")) else scale - 0.5)
    return network.eval()


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("backbone", [TINY, "mobilenetv3_large_075"])
def test_every_level_is_as_declared_at_odd_sizes(backbone, output_stride):
    encoder = MobileEncoder(2, backbone, output_stride).eval()
    assert encoder.strides == tuple(min(stride, output_stride) for stride in (2, 4, 8, 16, 32))
    assert encoder.channels == channels_of(backbone)
    with torch.no_grad():
        levels = encoder(torch.randn(2, 2, 45, 70))
    for level, width, stride in zip(levels, encoder.channels, encoder.strides, strict=True):
        assert level.shape == (2, width, -(-45 // stride), -(-70 // stride))


@pytest.mark.parametrize(("backbone", "output_stride"), [(TINY, 32), ("mobilenetv3_large_075", 16)])
def test_its_features_are_those_of_timm(backbone, output_stride):
    encoder = settled(MobileEncoder(1, backbone, output_stride))
    theirs = timm.create_model(backbone, features_only=True, in_chans=1, output_stride=output_stride)
    theirs.load_state_dict({encoder.timm_name(name): tensor for name, tensor in encoder.state_dict().items()}, strict=True)
    x = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        found, wanted = encoder(x), theirs.eval()(x)
        assert len(found) == len(wanted) and all(torch.equal(ours, its) for ours, its in zip(found, wanted, strict=True))
        assert torch.equal(encoder.embed(x), wanted[-1].mean(dim=(2, 3)))


def test_only_the_named_weights_change_with_the_channels():
    one, three = (MobileEncoder(channels, TINY).state_dict() for channels in (1, 3))
    assert [name for name in one if one[name].shape != three[name].shape] == MobileEncoder(1, TINY).input_convolutions()


def test_what_no_mobilenet_is():
    assert {"mobilenetv3_small_050", "mobilenetv3_small_100", "mobilenetv3_large_075", "mobilenetv3_large_100"} <= set(
        backbones()
    )
    with pytest.raises(InputError, match="two dimensions"):
        MobileEncoder(spatial_dims=3)
    with pytest.raises(InputError, match=r"backbone='resnet18': is none of timm's MobileNetV3: .*mobilenetv3_small_050"):
        MobileEncoder(backbone="resnet18")
    with pytest.raises(InputError, match="batch norm"):
        MobileEncoder(norm="group")
    with pytest.raises(InputError, match="a stride of 8, 16 or 32"):
        MobileEncoder(output_stride=4)


# ---- weights


def timm_file(folder: Path, backbone: str = TINY) -> tuple[nn.Module, Path]:
    """timm's whole classifier as after training, of colours, and its file."""
    network = settled(timm.create_model(backbone))
    save_file(network.state_dict(), folder / "model.safetensors")
    return network, folder / "model.safetensors"


def test_weights_of_colours_see_a_grey_image_as_three_equal_colours(tmp_path):
    network, file = timm_file(tmp_path)
    grey, colours = MobileEncoder(1, TINY).eval(), MobileEncoder(3, TINY).eval()
    assert load_weights(grey, file) == file
    load_weights(colours, file)
    x = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        wanted = network.forward_features(x.expand(-1, 3, -1, -1))
        assert torch.allclose(colours(x.expand(-1, 3, -1, -1))[-1], wanted, atol=1e-5) and wanted.abs().max() > 0.01
        assert torch.allclose(grey(x)[-1], wanted, atol=1e-5)
    load_weights(five := MobileEncoder(5, TINY), file)
    given = network.conv_stem.weight
    assert torch.allclose(five.levels[0][0].weight, given[:, [0, 1, 2, 0, 1]] * 3 / 5)


def test_weights_of_another_network_load_nothing(tmp_path):
    _, file = timm_file(tmp_path, "mobilenetv3_small_075")
    encoder = MobileEncoder(1, TINY)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    fault = r"are not those of timm's mobilenetv3_small_050[\s\S]*of another shape[\s\S]*set model.backbone"
    with pytest.raises(InputError, match=fault):
        load_weights(encoder, file)
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())
    state = timm.create_model(TINY).state_dict() | {"blocks.9.bn.weight": torch.ones(2)}
    save_file(state, file)
    with pytest.raises(InputError, match=r"unexpected \(1\): blocks.9.bn.weight"):
        load_weights(encoder, file)


class _Trap:
    def __reduce__(self):
        return Path.touch, (Path("trapped"),)


def test_a_pytorch_file_is_read_and_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network, _ = timm_file(tmp_path)
    torch.save({"state_dict": {f"module.{name}": one for name, one in network.state_dict().items()}}, "net.pth")
    load_weights(encoder := MobileEncoder(3, TINY), Path("net.pth"))
    assert torch.equal(encoder.levels[0][0].weight, network.conv_stem.weight)
    Path("trap.pth").write_bytes(pickle.dumps(_Trap(), protocol=2))
    for name, fault in (("trap.pth", "cannot be read as a PyTorch file"), ("none.pth", "no such file")):
        with pytest.raises(InputError, match=fault):
            load_weights(encoder, Path(name))
    assert not Path("trapped").exists()
    torch.save({"epoch": 3}, "other.pth")
    with pytest.raises(InputError, match="holds no state_dict"):
        load_weights(encoder, Path("other.pth"))


def test_imagenet_without_a_network_says_how_to_give_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    encoder, asked = MobileEncoder(1, TINY), NetworkSettings(name="mobile_resunet", backbone=TINY, weights="imagenet")
    with pytest.raises(
        InputError, match=r"huggingface.co/timm/mobilenetv3_small_050.lamb_in1k/resolve/main/.*model.weights=FILE"
    ):
        load_weights(encoder, "imagenet")
    with pytest.raises(InputError, match=r"timm has none of mobilenetv3_large_075; it has some of .*mobilenetv3_small_100"):
        load_weights(MobileEncoder(1, "mobilenetv3_large_075"), "imagenet")
    known = tmp_path / "hub" / "models--timm--mobilenetv3_small_050.lamb_in1k"  # as after a download
    (known / "refs").mkdir(parents=True)
    (known / "refs" / "main").write_text("abc")
    (known / "snapshots" / "abc").mkdir(parents=True)
    network, file = timm_file(known / "snapshots" / "abc")
    assert load_weights(encoder, "imagenet") == file and weights_input(asked) == {"weights": sha256(file)}
    assert torch.equal(encoder.levels[1][0][0].conv_dw.weight, network.blocks[0][0].conv_dw.weight)


# ---- the whole network


def test_it_is_saved_and_loaded_exactly_and_takes_any_size(tmp_path):
    model = settled(MobileResUNet(2, 4, TINY, (8, 8, 12, 16), output_stride=16, squeeze_excite=True))
    nn.init.normal_(model.head[0].weight)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert isinstance(again, MobileResUNet) and again.config.architecture == model.config.architecture
    for size in ((1, 1), (33, 47), (64, 30)):
        x = torch.randn(2, 2, *size)
        with torch.no_grad():
            assert torch.equal(again(x), model(x)) and again(x).shape == (2, 4, *size)
    pair = Ensemble([model, again]).eval()
    with torch.no_grad():
        assert torch.allclose(pair(x).softmax(1), model(x).softmax(1), atol=1e-6)


def test_levels_are_what_the_head_and_a_feature_extractor_see(tmp_path):
    model = settled(MobileResUNet(1, 2, TINY))
    nn.init.normal_(model.head[0].weight)
    model.save_pretrained(tmp_path)
    x = torch.randn(1, 1, 37, 50)
    extractor = FeatureExtractor.from_pretrained(tmp_path, (0, -1))
    assert extractor.feature_info.reduction() == [2, 32] and extractor.feature_info.module_name() == ["levels.0", "levels.4"]
    with torch.no_grad():
        levels = model.levels(x)
        assert [level.shape[2:] for level in levels] == [(19, 25), (10, 13), (5, 7), (3, 4)]
        assert [level.shape[1] for level in levels] == list(model.decoder.widths) == [32, 32, 32, 32]
        assert torch.equal(model.head(levels[0])[:, :, :37, :50], model(x))
        for found, level in zip(extractor(x), (0, 4), strict=True):
            assert torch.equal(found, model.encoder(x)[level])


def test_the_head_is_a_transposed_convolution():
    model = MobileResUNet(1, 3, TINY)
    convolution, features = model.head[0], torch.randn(2, 32, 5, 6)
    nn.init.normal_(convolution.bias)
    weight = convolution.weight.reshape(3, 2, 2, 32).permute(
        3, 0, 1, 2
    )  # output channel 4 k + 2 i + j is pixel (i, j) of class k
    wanted = nn.functional.conv_transpose2d(features, weight, stride=2) + convolution.bias.reshape(1, 3, 2, 2).repeat(
        1, 1, 5, 6
    )
    assert torch.allclose(model.head(features), wanted, atol=1e-6)


def test_every_weight_learns_and_every_unit_is_watched():
    model = build_model(MobileResUNet(1, 2, TINY).config.architecture).train()
    nn.init.normal_(model.head[0].weight)
    model(torch.randn(4, 1, 64, 64)).square().mean().backward()
    assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in model.parameters())
    units = gradient_norms(model)["units"]
    assert {f"decoder.blocks.{level}.unit" for level in range(4)} | {"encoder.levels.3.0.1"} <= set(units)
    assert len(units) == 4 + 12 and min(units.values()) > 0


def test_depthwise_weights_begin_as_large_as_their_inputs_want():
    torch.manual_seed(0)
    convolution = MobileResUNet(1, 2, TINY, (8, 8, 8, 512)).decoder.blocks[0].unit.conv1[0]
    assert convolution.groups == 512 and float(convolution.weight.detach().std()) == pytest.approx((2 / 9) ** 0.5, rel=0.05)


def test_synchronised_norms_keep_their_activations():
    network = PretrainingNetwork(settled(MobileEncoder(1, TINY)), HeadSettings(hidden=8, output=4)).eval()
    x = torch.randn(2, 1, 40, 40)
    with torch.no_grad():
        wanted = network(x)
        converted = synchronised(network)
        kinds = {type(one).__name__ for one in converted.modules()}
        assert {"SyncBatchNorm", "SyncBatchNormAct"} <= kinds and not {"BatchNorm1d", "BatchNorm2d", "BatchNormAct2d"} & kinds
        assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(wanted[:2], converted(x)[:2], strict=True))
        assert converted.encoder.channels == channels_of(TINY)


# ---- transfer


def pretrained(folder: Path, in_channels: int = 1, finest: int = 1) -> MobileResUNet:
    """A model directory of an encoder and its decoder down to a level; the network that they are of."""
    network = settled(MobileResUNet(in_channels, 2, TINY, (8, 8, 12, 16)))
    encoder = network.encoder
    decoder = decoder_of(encoder, False, finest, (8, 8, 12, 16))
    decoder.load_state_dict({name: one for name, one in network.decoder.state_dict().items() if name in decoder.state_dict()})
    encoder.config = ModelConfig(
        architecture=encoder.config.architecture,
        feature_check=fingerprint(encoder),
        decoder=describe_decoder(encoder, decoder, squeeze_excite=False),
    )
    save_with_decoder(folder, encoder, decoder)
    return network


def test_encoder_and_decoder_arrive_bit_for_bit(tmp_path):
    given, model = pretrained(tmp_path), MobileResUNet(1, 3, TINY, (8, 8, 12, 16))
    receipt = transfer_encoder(tmp_path, model)
    states = {one.name: one.state for one in receipt.tensors}
    for name, tensor in model.state_dict().items():
        old = name.startswith(("encoder.", *(f"decoder.blocks.{place}." for place in range(3))))
        assert states[name] == ("loaded" if old else "fresh")
        assert not old or torch.equal(tensor, given.state_dict()[name])
    assert receipt.encoder_share_loaded == 1 and receipt.feature_error < 1e-12 and receipt.decoder_feature_error < 1e-12


def test_other_input_channels_are_adapted_by_name(tmp_path):
    pretrained(tmp_path)
    with pytest.raises(InputError, match=r"in_channels: encoder 1, network 3[\s\S]*allow=\[input_channels\]"):
        transfer_encoder(tmp_path, MobileResUNet(3, 2, TINY, (8, 8, 12, 16)))
    receipt = transfer_encoder(tmp_path, MobileResUNet(3, 2, TINY, (8, 8, 12, 16)), allow_input_channels=True)
    assert [one.name for one in receipt.tensors if one.state == "adapted"] == ["encoder.levels.0.0.weight"]


def test_what_does_not_fit_is_refused(tmp_path):
    pretrained(tmp_path)
    with pytest.raises(InputError, match="holds a 'mobile_encoder', and a 'resunet' has a 'residual_encoder'"):
        transfer_encoder(tmp_path, ResUNet())
    with pytest.raises(InputError, match="backbone: encoder mobilenetv3_small_050, network mobilenetv3_small_075"):
        transfer_encoder(tmp_path, MobileResUNet(1, 2, "mobilenetv3_small_075", (8, 8, 12, 16)))
    with pytest.raises(InputError, match=r"channels: decoder \[8, 12, 16\], network \[8, 12, 24\][\s\S]*transfer=encoder"):
        transfer_encoder(tmp_path, MobileResUNet(1, 2, TINY, (8, 8, 12, 24)))
    assert transfer_encoder(tmp_path, MobileResUNet(1, 2, TINY, (8, 8, 12, 24)), parts="encoder").decoder_feature_error is None
    assert transfer_encoder(tmp_path, MobileResUNet(1, 2, TINY, (16, 8, 12, 16)))  # its finest level was not trained


def test_changed_weights_are_noticed(tmp_path):
    network = pretrained(tmp_path)
    with torch.no_grad():
        network.encoder.levels[2][0][0].conv_dw.weight[0, 0, 1, 1] += 0.1
    write_weights(tmp_path / "model.safetensors", network.encoder.state_dict())
    with pytest.raises(CheckFailed, match="does not give the features"):
        transfer_encoder(tmp_path, MobileResUNet(1, 2, TINY, (8, 8, 12, 16)))
