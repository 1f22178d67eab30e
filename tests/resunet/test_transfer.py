import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from resunet.checkpoint import CONFIG, WEIGHTS, ModelConfig
from resunet.encoder import ResidualEncoder
from resunet.errors import CheckFailed, InputError
from resunet.files import sha256
from resunet.fingerprint import feature_error, fingerprint
from resunet.model import ResUNet
from resunet.transfer import adapt_input, transfer_encoder

WIDTHS = (4, 6, 8)


def live_encoder(**arguments) -> ResidualEncoder:
    """An encoder whose running statistics and affine weights are those of some training."""
    torch.manual_seed(5)
    encoder = ResidualEncoder(**(dict(channels=WIDTHS) | arguments))
    with torch.no_grad():
        for _ in range(5):
            encoder(torch.randn(4, encoder.in_channels, *[16] * encoder.spatial_dims) * 2 + 1)
        for name, parameter in encoder.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return encoder.train()


def save(encoder: ResidualEncoder, folder: Path) -> Path:
    encoder.config = ModelConfig(architecture=encoder.config.architecture, feature_check=fingerprint(encoder))
    encoder.save_pretrained(folder)
    return folder


def edit_weights(folder: Path, edit) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture
def folder(tmp_path) -> Path:
    return save(live_encoder(), tmp_path / "run" / "model")


@pytest.mark.parametrize(
    "arguments",
    [{}, {"norm": "instance"}, {"norm": "group", "units": 3}, {"in_channels": 3}, {"spatial_dims": 3}, {"in_channels": 4}],
)
def test_every_tensor_of_the_encoder_arrives_bit_for_bit(arguments, tmp_path):
    encoder = live_encoder(**arguments)
    save(encoder, tmp_path)
    model = ResUNet(**(dict(channels=WIDTHS) | arguments))
    before = state_of(model)
    receipt = transfer_encoder(tmp_path, model)
    saved = load_file(tmp_path / WEIGHTS)
    assert same(saved, model.encoder.state_dict())
    assert same(saved, encoder.state_dict())
    for name, tensor in model.state_dict().items():
        if not name.startswith("encoder."):
            assert torch.equal(tensor, before[name])
    assert receipt.feature_error <= receipt.feature_tolerance == 1e-9
    x = torch.randn(2, encoder.in_channels, *[11] * encoder.spatial_dims)
    assert all(torch.equal(a, b) for a, b in zip(encoder.eval()(x), model.encoder.eval()(x), strict=True))


def test_the_receipt_names_every_tensor(folder):
    model = ResUNet(channels=WIDTHS, squeeze_excite=True)
    receipt = transfer_encoder(folder, model)
    state = model.state_dict()
    assert [tensor.name for tensor in receipt.tensors] == list(state)
    for tensor in receipt.tensors:
        assert tensor.shape == tuple(state[tensor.name].shape)
        assert tensor.norm == pytest.approx(math.sqrt(float(state[tensor.name].double().square().sum())), rel=1e-12)
        if tensor.name.startswith("encoder."):
            assert (tensor.state, tensor.source) == ("loaded", tensor.name.removeprefix("encoder."))
        else:
            assert (tensor.state, tensor.source) == ("fresh", None)
    sources = [tensor.source for tensor in receipt.tensors if tensor.source]
    assert sorted(sources) == sorted(load_file(folder / WEIGHTS))
    parameters = sum(p.numel() for p in model.encoder.parameters())
    assert receipt.encoder_parameters == receipt.encoder_parameters_loaded == parameters
    assert receipt.encoder_share_loaded == 1.0
    assert receipt.allowed == []
    assert receipt.encoder_sha256 == {name: sha256(folder / name) for name in (CONFIG, WEIGHTS)}


def test_the_receipt_in_a_sentence(folder):
    model = ResUNet(channels=WIDTHS)
    line = transfer_encoder(folder, model).line()
    loaded = len(model.encoder.state_dict())
    assert line.startswith(f"{loaded} tensors loaded, 0 adapted, {len(model.state_dict()) - loaded} fresh; 100.0% of the")


def test_a_run_directory_is_taken_too(folder):
    model = ResUNet(channels=WIDTHS)
    transfer_encoder(folder.parent, model)
    assert same(load_file(folder / WEIGHTS), model.encoder.state_dict())


def test_a_renamed_tensor_is_refused_with_both_names(folder):
    name = "levels.2.1.norm2.running_var"
    edit_weights(folder, lambda t: t.update({"levels.2.1.norm2.variance": t.pop(name)}))
    model = ResUNet(channels=WIDTHS)
    before = state_of(model)
    with pytest.raises(InputError) as error:
        transfer_encoder(folder, model)
    assert f"missing (1): {name}" in str(error.value)
    assert "unexpected (1): levels.2.1.norm2.variance" in str(error.value)
    assert same(before, model.state_dict())


@pytest.mark.parametrize(
    "name",
    [
        "levels.0.0.conv1.weight",
        "levels.0.0.shortcut.0.weight",
        "levels.0.1.norm2.bias",
        "levels.1.0.shortcut.1.running_mean",
        "levels.1.1.norm1.running_var",
        "levels.2.0.conv2.weight",
        "levels.2.1.conv2.weight",
        "levels.2.1.norm2.weight",
    ],
)
def test_one_altered_value_is_noticed(name, folder):
    edit_weights(folder, lambda t: t[name].view(-1)[0].add_(1e-3))
    model = ResUNet(channels=WIDTHS)
    before = state_of(model)
    with pytest.raises(CheckFailed, match="does not give the features it gave when it was saved"):
        transfer_encoder(folder, model)
    assert same(before, model.state_dict())


def test_a_weight_that_is_not_a_number_is_noticed(folder):
    edit_weights(folder, lambda t: t["levels.1.0.conv1.weight"].view(-1)[0].fill_(math.nan))
    with pytest.raises(CheckFailed):
        transfer_encoder(folder, ResUNet(channels=WIDTHS))


@pytest.mark.parametrize(
    "network, line",
    [
        (dict(channels=(4, 6, 9)), "channels: encoder [4, 6, 8], network [4, 6, 9]"),
        (dict(channels=(4, 6)), "channels: encoder [4, 6, 8], network [4, 6]"),
        (dict(units=3), "units: encoder 2, network 3"),
        (dict(norm="group"), "norm: encoder batch, network group"),
        (dict(norm="instance"), "norm: encoder batch, network instance"),
        (dict(spatial_dims=3), "spatial_dims: encoder 2, network 3"),
    ],
)
@pytest.mark.parametrize("allowed", [False, True])
def test_another_architecture_is_refused_with_key_and_both_values(network, line, allowed, folder):
    model = ResUNet(**(dict(channels=WIDTHS) | network))
    before = state_of(model)
    with pytest.raises(InputError) as error:
        transfer_encoder(folder, model, allow_input_channels=allowed)
    assert line in str(error.value).splitlines()[1]
    assert same(before, model.state_dict())


def test_every_difference_is_listed_at_once(folder):
    with pytest.raises(InputError) as error:
        transfer_encoder(folder, ResUNet(channels=(4, 6), norm="group", units=1))
    assert all(f"  {key}: encoder" in str(error.value) for key in ("channels", "norm", "units"))


@pytest.mark.parametrize("theirs, ours", [(1, 3), (3, 1), (2, 5)])
def test_other_input_channels_are_refused_unless_allowed(theirs, ours, tmp_path):
    encoder = live_encoder(in_channels=theirs)
    save(encoder, tmp_path)
    model = ResUNet(in_channels=ours, channels=WIDTHS)
    before = state_of(model)
    with pytest.raises(InputError, match=rf"in_channels: encoder {theirs}, network {ours}(?s:.*)allow=\[input_channels\]"):
        transfer_encoder(tmp_path, model)
    assert same(before, model.state_dict())

    receipt = transfer_encoder(tmp_path, model, allow_input_channels=True)
    adapted = {"encoder.levels.0.0.conv1.weight", "encoder.levels.0.0.shortcut.0.weight"}
    assert {tensor.name for tensor in receipt.tensors if tensor.state == "adapted"} == adapted
    assert len(receipt.allowed) == 2 and all("input channels adapted" in line for line in receipt.allowed)
    of_adapted = sum(model.state_dict()[name].numel() for name in adapted)
    assert receipt.encoder_share_loaded == pytest.approx(1 - of_adapted / receipt.encoder_parameters)
    plane = torch.randn(2, 1, 13, 15)
    original = encoder.eval()(plane.expand(-1, theirs, -1, -1))
    found = model.encoder.eval()(plane.expand(-1, ours, -1, -1))
    for one, other in zip(original, found, strict=True):  # float32, summed over another number of channels
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_allowing_other_input_channels_does_not_forgive_an_altered_weight(folder):
    edit_weights(folder, lambda t: t["levels.0.0.conv1.weight"].view(-1)[0].add_(1e-3))
    with pytest.raises(CheckFailed):
        transfer_encoder(folder, ResUNet(in_channels=3, channels=WIDTHS), allow_input_channels=True)


def test_allowing_other_input_channels_changes_nothing_where_they_are_equal(folder):
    receipt = transfer_encoder(folder, ResUNet(channels=WIDTHS), allow_input_channels=True)
    assert receipt.allowed == [] and receipt.encoder_share_loaded == 1.0


def test_adapt_input_is_the_sum_shared_out():
    weight = torch.randn(4, 3, 3, 3)
    for channels in (1, 2, 7):
        adapted = adapt_input(weight, channels)
        assert adapted.shape == (4, channels, 3, 3)
        torch.testing.assert_close(adapted.sum(1), weight.sum(1))
        assert torch.equal(adapted, adapted[:, :1].expand_as(adapted))


def test_a_segmenter_and_an_encoder_without_features_are_refused(tmp_path):
    model = ResUNet(channels=WIDTHS)
    model.save_pretrained(tmp_path / "segmenter")
    with pytest.raises(InputError, match="'resunet', not an encoder"):
        transfer_encoder(tmp_path / "segmenter", model)
    model.encoder.save_pretrained(tmp_path / "encoder")
    with pytest.raises(InputError, match="no feature_check"):
        transfer_encoder(tmp_path / "encoder", model)


def test_the_fingerprint_is_of_the_evaluated_network_and_leaves_it_alone():
    encoder = live_encoder()
    before = state_of(encoder)
    check = fingerprint(encoder)
    assert check == fingerprint(encoder)
    assert encoder.training and same(before, encoder.state_dict())
    assert feature_error(encoder, check) == 0
    assert {kind: len(values) for kind, values in check.features.items()} == {"equal": 36, "own": 36}  # (4+6+8) × 2


def test_the_fingerprint_is_the_mean_and_the_root_mean_square_of_each_channel():
    encoder = live_encoder(in_channels=2)
    check = fingerprint(encoder)
    generator = torch.Generator().manual_seed(check.seed)
    x = torch.rand((2, 2, check.size, check.size), generator=generator, dtype=torch.float64) * 4 - 2
    with torch.no_grad():
        first = encoder.double().eval()(x)[0]
    expected = torch.cat([first.mean((0, 2, 3)), (first**2).mean((0, 2, 3)) ** 0.5])
    torch.testing.assert_close(torch.tensor(check.features["own"][:8], dtype=torch.float64), expected)


def test_features_of_another_number_are_infinitely_far():
    assert feature_error(live_encoder(channels=(4, 6)), fingerprint(live_encoder())) == math.inf
