import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from resunet.architecture import EnsembleArchitecture
from resunet.checkpoint import WEIGHTS, Checkpointed, ModelConfig, read_config
from resunet.ensemble import Ensemble
from resunet.errors import InputError
from resunet.model import NETWORKS, ResUNet, UNet, build_model, load_finetuned, load_model


class Constant(nn.Module, Checkpointed):
    """A member that gives the logits it was made with."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.config = ResUNet(num_classes=max(2, logits.shape[1]), channels=(2,)).config

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


def members(count: int, seed: int = 0, **shape) -> list[ResUNet]:
    torch.manual_seed(seed)
    found = [ResUNet(channels=(4, 6), units=1, **shape) for _ in range(count)]
    for member in found:
        nn.init.normal_(member.head.weight)
    return found


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("scale", [0.1, 3, 15])
def test_probabilities_are_the_mean_of_the_members(count, scale):
    rng = np.random.default_rng(count)
    for channels in (1, 3):
        given = rng.normal(0, scale, (count, 2, channels, 5, 4)).astype(np.float32)
        logits = Ensemble([Constant(torch.from_numpy(one)) for one in given])(torch.zeros(1))
        wide = given.astype(np.float64)
        if channels == 1:
            expected, found = (1 / (1 + np.exp(-wide))).mean(0), logits.sigmoid()
        else:
            powers = np.exp(wide)
            expected, found = (powers / powers.sum(axis=2, keepdims=True)).mean(0), logits.softmax(dim=1)
        assert logits.shape == given.shape[1:] and logits.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), expected, rtol=2e-5, atol=1e-7)


def test_it_is_not_the_mean_of_logits():
    one_is_sure = Ensemble([Constant(torch.full((1, 1, 1, 1), value)) for value in (20.0, -1.0, -1.0)])
    assert one_is_sure(torch.zeros(1)).sigmoid().item() == pytest.approx((1 + 2 / (1 + np.exp(1.0))) / 3, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sure_members_give_finite_logits(dtype):
    """The closed form: of n members that say ±z, z large, all agree: ±z; all but one: ±log(n − 1)."""
    for channels in (1, 2 + 1):
        for signs in ((1, 1, 1), (-1, -1, -1), (1, 1, -1), (1, -1, -1)):
            given = [torch.zeros(1, channels, 1, 1, dtype=dtype) for _ in signs]
            for one, sign in zip(given, signs, strict=True):
                one[:, 0] = 2000 * sign
            logits = Ensemble([Constant(one) for one in given])(torch.zeros(1))
            assert logits.dtype == torch.float32 and torch.isfinite(logits).all()
            agree = abs(sum(signs)) == 3
            if channels == 1:
                expected = 2000.0 if agree else np.log(2)
                assert logits.item() == pytest.approx(np.sign(sum(signs)) * expected, rel=1e-6)
            else:
                share = sum(sign > 0 for sign in signs) / 3
                assert logits.softmax(dim=1)[0, 0].item() == pytest.approx(share, abs=1e-6)


def test_members_that_agree_give_their_own_logits():
    for channels in (1, 4):
        given = torch.linspace(-60, 60, 241).repeat(channels).reshape(1, channels, 241, 1)
        same = Ensemble([Constant(given)] * 5)(torch.zeros(1))
        expected = given if channels == 1 else given.log_softmax(dim=1)
        torch.testing.assert_close(same, expected, rtol=1e-6, atol=2e-6)


def test_it_takes_any_size_and_the_precision_of_its_caller():
    ensemble = Ensemble(members(2)).eval()
    x = torch.randn(1, 1, 13, 21)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = ensemble(x)
    with torch.no_grad():
        assert half.dtype == torch.float32 and ensemble(x).shape == (1, 1, 13, 21)
        torch.testing.assert_close(half, ensemble(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("shape", [{}, {"num_classes": 3, "in_channels": 2}, {"spatial_dims": 3, "squeeze_excite": True}])
def test_saved_and_loaded_is_the_same_bit_for_bit(tmp_path, shape):
    ensemble = Ensemble(members(3, **shape)).eval()
    classes = {i: f"class {i}" for i in range(shape.get("num_classes", 2))}
    ensemble.config = ModelConfig(architecture=ensemble.config.architecture, classes=classes, allowed=["leak"])
    ensemble.save_pretrained(tmp_path / "model")
    names = load_file(tmp_path / "model" / WEIGHTS).keys()
    assert {name.split(".")[1] for name in names} == {"0", "1", "2"} and all(name.startswith("members.") for name in names)
    loaded = load_model(tmp_path / "model")
    assert type(loaded) is Ensemble and loaded.config == ensemble.config and not loaded.training
    x = torch.randn(1, shape.get("in_channels", 1), *([9] * shape.get("spatial_dims", 2)))
    with torch.no_grad():
        assert torch.equal(loaded(x), ensemble(x))
    if shape.get("spatial_dims", 2) == 2:
        assert load_finetuned(tmp_path / "model")[1] == ensemble.config


def test_loading_is_exact(tmp_path):
    Ensemble(members(2)).save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / WEIGHTS)
    del tensors["members.1.head.bias"]
    save_file(tensors, tmp_path / "model" / WEIGHTS)
    with pytest.raises(InputError, match=r"not those of this Ensemble:\n  missing \(1\): members\.1\.head\.bias"):
        load_model(tmp_path / "model")
    with pytest.raises(InputError, match=r"'ensemble' is not a ResUNet"):
        ResUNet.from_pretrained(tmp_path / "model")
    assert read_config(tmp_path / "model").architecture == Ensemble(members(2)).config.architecture


def test_an_architecture_is_built():
    architecture = EnsembleArchitecture(member=UNet(channels=(3, 4), in_channels=2, num_classes=4).config.architecture, count=2)
    ensemble = build_model(architecture)
    assert type(ensemble) is Ensemble is NETWORKS["ensemble"] and ensemble.config.architecture == architecture
    assert [type(member) for member in ensemble.members] == [UNet, UNet]
    assert (architecture.in_channels, architecture.num_classes, architecture.spatial_dims) == (2, 4, 2)
