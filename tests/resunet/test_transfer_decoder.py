"""The trained part of a decoder: saved beside an encoder, and transferred with it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.save import save_with_decoder
from resunet.checkpoint import CONFIG, WEIGHTS, ModelConfig, read_config
from resunet.decoder import ProgressiveDecoder
from resunet.encoder import ResidualEncoder
from resunet.errors import CheckFailed, InputError
from resunet.feature_extractor import FeatureExtractor
from resunet.files import sha256
from resunet.fingerprint import describe_decoder, fingerprint
from resunet.model import ResUNet
from resunet.transfer import DECODER, transfer_encoder

WIDTHS = (4, 6, 8)


def trained(finest: int = 1, squeeze_excite: bool = False, **arguments) -> tuple[ResidualEncoder, ProgressiveDecoder]:
    """With running statistics and affine weights as after some training."""
    torch.manual_seed(5)
    encoder = ResidualEncoder(**(dict(channels=WIDTHS) | arguments))
    decoder = ProgressiveDecoder(encoder, encoder.config.architecture.norm, squeeze_excite, finest)
    with torch.no_grad():
        for _ in range(5):
            decoder(encoder(torch.randn(4, encoder.in_channels, *[16] * encoder.spatial_dims) * 2 + 1))
        for name, parameter in [*encoder.named_parameters(), *decoder.named_parameters()]:
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return encoder, decoder


def save(encoder: ResidualEncoder, decoder: ProgressiveDecoder, folder: Path, squeeze_excite: bool = False) -> Path:
    part = describe_decoder(encoder, decoder, squeeze_excite)
    encoder.config = ModelConfig(architecture=encoder.config.architecture, feature_check=fingerprint(encoder), decoder=part)
    save_with_decoder(folder, encoder, decoder)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return save(*trained(), tmp_path / "run" / "model")


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"finest": 0},
        {"squeeze_excite": True},
        {"norm": "group", "units": 1},
        {"spatial_dims": 3, "channels": (4, 4, 6, 8), "finest": 2},
    ],
)
def test_every_tensor_of_the_decoder_arrives_bit_for_bit(arguments, tmp_path):
    encoder, decoder = trained(**arguments)
    excite = arguments.get("squeeze_excite", False)
    save(encoder, decoder, tmp_path, excite)
    network = {"channels": WIDTHS} | {key: value for key, value in arguments.items() if key != "finest"}
    model = ResUNet(**network)
    before = state_of(model)
    receipt = transfer_encoder(tmp_path, model)
    given, after = load_file(tmp_path / DECODER), model.state_dict()
    assert given and all(torch.equal(tensor, after[f"decoder.{name}"]) for name, tensor in given.items())
    for tensor in receipt.tensors:
        source = tensor.name.partition(".")[2]
        if tensor.name.startswith("encoder.") or source in given:
            assert (tensor.state, tensor.source) == ("loaded", source)
        else:
            assert (tensor.state, tensor.source) == ("fresh", None)
            assert torch.equal(after[tensor.name], before[tensor.name])
    fresh = [tensor for tensor in receipt.tensors if tensor.state == "fresh"]
    assert {tensor.name.split(".")[0] for tensor in fresh} == ({"decoder", "head"} if decoder.finest else {"head"})
    sizes = {name: one.numel() for name, one in decoder.named_parameters()}
    assert receipt.decoder_parameters_loaded == sum(sizes.values())
    assert receipt.decoder_parameters == sum(one.numel() for one in model.decoder.parameters())
    assert receipt.encoder_sha256 == {name: sha256(tmp_path / name) for name in (CONFIG, WEIGHTS, DECODER)}
    x = torch.randn(2, 1, *[11] * encoder.spatial_dims)
    with torch.no_grad():
        wanted = decoder.eval()(encoder.eval()(x))
        torch.testing.assert_close(model.eval().levels(x)[decoder.finest], wanted, atol=1e-6, rtol=1e-6)


def test_the_receipt_in_a_sentence(folder):
    model = ResUNet(channels=WIDTHS)
    receipt = transfer_encoder(folder, model)
    loaded = len(load_file(folder / WEIGHTS)) + len(load_file(folder / DECODER))
    share = receipt.decoder_parameters_loaded / receipt.decoder_parameters
    line = receipt.line()
    assert line.startswith(
        f"{loaded} tensors loaded, 0 adapted, {len(model.state_dict()) - loaded} fresh; 100.0% of the encoder's"
    )
    assert f"so did {share:.1%} of the decoder's {receipt.decoder_parameters:,}, features equal to" in line and 0.5 < share < 1
    assert receipt.decoder_feature_error < 1e-12


def test_the_encoder_alone_if_asked(folder):
    model = ResUNet(channels=WIDTHS, squeeze_excite=True)  # of no decoder that is there
    before = state_of(model)
    receipt = transfer_encoder(folder, model, parts="encoder")
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items() if not name.startswith("encoder."))
    assert receipt.decoder_feature_error is None and "decoder" not in receipt.line()
    assert {tensor.state for tensor in receipt.tensors if tensor.name.startswith("decoder.")} == {"fresh"}


def test_a_loaded_encoder_that_is_saved_again_is_an_encoder_alone(folder, tmp_path):
    assert read_config(folder).decoder is not None
    again = tmp_path / "again"
    ResidualEncoder.from_pretrained(folder).save_pretrained(again)
    assert read_config(again).decoder is None and not (again / DECODER).exists()
    network = ResUNet(channels=WIDTHS)
    before = state_of(network.decoder)
    transfer_encoder(again, network)
    assert same(before, state_of(network.decoder))
    assert same(state_of(ResidualEncoder.from_pretrained(folder)), state_of(network.encoder))


def test_an_encoder_without_decoder_is_as_before_unless_both_are_asked_for(folder):
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    del config["decoder"]  # as before there was such a key
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    (folder / DECODER).unlink()
    receipt = transfer_encoder(folder, ResUNet(channels=WIDTHS))
    assert receipt.encoder_share_loaded == 1 and receipt.decoder_feature_error is None
    with pytest.raises(InputError, match=r"transfer=both: .* holds an encoder alone(?s:.*)dense\.weight=1"):
        transfer_encoder(folder, ResUNet(channels=WIDTHS), parts="both")


@pytest.mark.parametrize(
    "key", ["up.weight", "up.bias", "skip.0.weight", "skip.1.running_var", "unit.conv2.weight", "unit.norm2.bias"]
)
def test_one_altered_value_is_noticed(key, folder):
    tensors = load_file(folder / DECODER)
    tensors[f"blocks.0.{key}"].view(-1)[0].add_(1e-3)
    save_file(tensors, folder / DECODER)
    model = ResUNet(channels=WIDTHS)
    before = state_of(model)
    with pytest.raises(
        CheckFailed, match=r"the decoder does not give the features it gave(?s:.*)decoder\.safetensors was changed"
    ):
        transfer_encoder(folder, model)
    assert same(before, model.state_dict())
    transfer_encoder(folder, model, parts="encoder")


def test_other_names_and_shapes_are_listed_at_once(folder):
    tensors = load_file(folder / DECODER)
    tensors["blocks.0.upwards.weight"] = tensors.pop("blocks.0.up.weight")
    tensors["blocks.0.up.bias"] = torch.zeros(7)
    save_file(tensors, folder / DECODER)
    model = ResUNet(channels=WIDTHS)
    before = state_of(model)
    with pytest.raises(InputError) as error:
        transfer_encoder(folder, model)
    for line in (
        "missing (1): blocks.0.up.weight",
        "unexpected (1): blocks.0.upwards.weight",
        "blocks.0.up.bias: (7,) in the file",
    ):
        assert line in str(error.value)
    assert same(before, model.state_dict())


def test_a_decoder_that_is_gone_is_an_error_with_a_way_out(folder):
    (folder / DECODER).unlink()
    with pytest.raises(InputError, match=r"no such file(?s:.*)transfer=encoder"):
        transfer_encoder(folder, ResUNet(channels=WIDTHS))


def test_another_squeeze_and_excitation_is_refused_with_all_that_differs(folder):
    model = ResUNet(channels=(4, 6, 9), squeeze_excite=True)
    before = state_of(model)
    with pytest.raises(InputError) as error:
        transfer_encoder(folder, model)
    lines = str(error.value).splitlines()
    assert lines[1:3] == ["  channels: encoder [4, 6, 8], network [4, 6, 9]", "  squeeze_excite: decoder False, network True"]
    assert "transfer=encoder leaves the decoder out" in lines[3] and same(before, model.state_dict())


def test_input_channels_may_be_adapted_below_it(folder):
    receipt = transfer_encoder(folder, ResUNet(in_channels=3, channels=WIDTHS), allow_input_channels=True)
    assert receipt.decoder_feature_error is not None and receipt.decoder_feature_error <= receipt.feature_tolerance == 1e-6
    assert {tensor.state for tensor in receipt.tensors} == {"loaded", "adapted", "fresh"}


def test_what_reads_encoders_does_not_mind(folder):
    encoder = ResidualEncoder.from_pretrained(folder)
    assert same(load_file(folder / WEIGHTS), encoder.state_dict())
    x = torch.randn(1, 1, 16, 16)
    assert torch.equal(FeatureExtractor.from_pretrained(folder)(x)[-1], encoder(x)[-1])
