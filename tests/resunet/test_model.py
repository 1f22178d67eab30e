import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from resunet.architecture import EncoderArchitecture, ResUNetArchitecture, UNetArchitecture
from resunet.encoder import ResidualEncoder
from resunet.errors import InputError
from resunet.model import NETWORKS, ResUNet, UNet, build_model, load_model, logit_channels

NARROW = (2, 3, 4, 5, 6)
BOTH = [ResUNet, UNet]


def test_the_default_network_has_the_published_size_and_cost():
    model = ResUNet().eval()
    assert sum(p.numel() for p in model.parameters()) == 13_532_481
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, 128, 128))
    assert counter.get_total_flops() / 1e9 == pytest.approx(8.03, abs=0.005)


@pytest.mark.parametrize("network", BOTH)
@torch.no_grad()
def test_the_output_has_the_size_of_the_input_in_2d(network):
    model = network(channels=NARROW).eval()
    for n in range(17, 41):
        for size in ((n, n), (n, 57 - n)):
            assert model(torch.zeros(1, 1, *size)).shape == (1, 1, *size)


@pytest.mark.parametrize("network", BOTH)
@torch.no_grad()
def test_the_output_has_the_size_of_the_input_in_3d(network):
    model = network(channels=NARROW, spatial_dims=3).eval()
    for size in [(17, 17, 17), (18, 21, 25), (31, 19, 32), (33, 17, 29)]:
        assert model(torch.zeros(1, 1, *size)).shape == (1, 1, *size)


@pytest.mark.parametrize("network", BOTH)
@torch.no_grad()
def test_any_size_down_to_one_pixel(network):
    model = network(channels=NARROW).eval()
    for size in itertools.product((1, 2, 3, 16), repeat=2):
        assert model(torch.zeros(1, 1, *size)).shape == (1, 1, *size)


@pytest.mark.parametrize("network", BOTH)
@pytest.mark.parametrize("in_channels, num_classes, out", [(1, 2, 1), (3, 2, 1), (2, 3, 3), (4, 5, 5)])
def test_two_classes_are_one_logit_and_more_take_one_each(network, in_channels, num_classes, out):
    model = network(in_channels=in_channels, num_classes=num_classes, channels=(4, 6))
    assert model(torch.zeros(2, in_channels, 9, 8)).shape == (2, out, 9, 8)


@pytest.mark.parametrize("network", BOTH)
@pytest.mark.parametrize("levels", [1, 2, 3, 6])
def test_any_number_of_levels(network, levels):
    assert network(channels=(3,) * levels)(torch.zeros(2, 1, 40, 33)).shape == (2, 1, 40, 33)


@pytest.mark.parametrize("network", BOTH)
@pytest.mark.parametrize("norm, layer", [("batch", nn.BatchNorm2d), ("instance", nn.InstanceNorm2d), ("group", nn.GroupNorm)])
def test_every_norm_of_a_network_is_of_the_kind_asked_for(network, norm, layer):
    norms = [m for m in network(channels=(4, 8), norm=norm).modules() if "Norm" in type(m).__name__]
    assert norms and all(isinstance(m, layer) for m in norms)


@pytest.mark.parametrize("network", BOTH)
@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
@torch.no_grad()
def test_a_batch_of_one_gives_what_a_batch_of_many_gives(network, norm):
    model = network(channels=(4, 6, 8), norm=norm)
    x = torch.randn(5, 1, 21, 18, generator=torch.Generator().manual_seed(0))
    model.train()(x)  # running statistics other than 0 and 1
    model.eval()
    # another batch size may be summed in another order by the convolution
    torch.testing.assert_close(torch.cat([model(one[None]) for one in x]), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("network", BOTH)
def test_the_input_is_not_mutated(network):
    for in_channels in (1, 4):  # 4: the first shortcut is the identity
        model = network(in_channels=in_channels, channels=(4, 6))
        x = torch.randn(2, in_channels, 12, 12)
        before = x.clone()
        model(x).sum().backward()
        assert torch.equal(x, before)


@pytest.mark.parametrize(
    "network, arguments",
    [(ResUNet, {}), (ResUNet, {"squeeze_excite": True}), (ResUNet, {"norm": "group", "units": 1}), (UNet, {})],
)
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_gradients_reach_every_parameter(network, arguments, spatial_dims):
    torch.manual_seed(0)
    model = network(channels=(8, 8, 8), spatial_dims=spatial_dims, num_classes=3, **arguments)
    logits = model(torch.randn(2, 1, *[14] * spatial_dims))
    (logits * torch.randn_like(logits)).sum().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


def test_the_first_logits_are_near_zero():
    assert ResUNet(channels=(32, 32)).eval()(torch.randn(1, 1, 32, 32)).abs().max() < 1


@pytest.mark.parametrize(
    "architecture",
    [
        EncoderArchitecture(in_channels=3, channels=(4, 6), units=1, norm="group"),
        ResUNetArchitecture(in_channels=2, num_classes=4, channels=(4, 6), units=3, norm="instance", squeeze_excite=True),
        ResUNetArchitecture(spatial_dims=3, channels=(4, 6)),
        UNetArchitecture(in_channels=2, num_classes=4, channels=(4, 6), norm="instance"),
    ],
)
def test_build_model_builds_what_is_described(architecture):
    model = build_model(architecture)
    assert type(model) is NETWORKS[architecture.name]
    assert model.config.architecture == architecture


@pytest.mark.parametrize("network", BOTH)
def test_fewer_than_two_classes_are_the_users_fault(network):
    with pytest.raises(InputError, match="num_classes=1"):
        network(num_classes=1, channels=(4,)) if network is ResUNet else logit_channels(1)


@pytest.mark.parametrize("arguments", [dict(channels=()), dict(channels=(4, 0)), dict(spatial_dims=1), dict(in_channels=0)])
@pytest.mark.parametrize("network", BOTH)
def test_an_impossible_network_is_the_users_fault(network, arguments):
    with pytest.raises(InputError, match=next(iter(arguments))):
        network(**arguments)


@pytest.mark.parametrize("network", BOTH)
def test_load_model_takes_a_run_and_a_model_directory(network, tmp_path):
    model = network(channels=(4, 6)).eval()
    model.save_pretrained(tmp_path / "run" / "model")
    x = torch.randn(1, 1, 9, 9)
    for path in (tmp_path / "run", tmp_path / "run" / "model", str(tmp_path / "run")):
        loaded = load_model(path)
        assert type(loaded) is network and not loaded.training
        assert torch.equal(loaded(x), model(x))


def test_an_encoder_is_not_a_segmenter(tmp_path):
    ResidualEncoder(channels=(4, 6)).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=r"holds an encoder, not a segmenter.*resunet finetune"):
        load_model(tmp_path)


def test_load_model_of_what_is_not_there(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        load_model(tmp_path / "none")
    with pytest.raises(InputError, match="not a model directory"):
        load_model(tmp_path)


@pytest.mark.parametrize(("dims", "size"), [(2, (16, 2)), (3, (4, 8, 8)), (3, (8, 8, 8))])
@pytest.mark.parametrize("network", [ResUNet, UNet])
def test_gradients_in_bf16_are_those_of_float32_however_small_the_coarsest_level(network, dims, size):
    """torch's own are memory that nobody wrote, where a side has one or two positions; see benchmarks/LOG.md."""
    torch.manual_seed(0)
    model = network(channels=(8, 16, 16), spatial_dims=dims)
    x = torch.randn(2, 1, *size)

    def gradients(bf16: bool) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(x)
        weights = [one.weight for one in model.modules() if isinstance(one, nn.Conv2d | nn.Conv3d) and one.kernel_size[0] == 3]
        return list(torch.autograd.grad(logits.float().square().mean(), weights))

    for _ in range(3):
        for exact, found in zip(gradients(False), gradients(True), strict=True):
            assert found.isfinite().all() and (found - exact).norm() < 0.3 * exact.norm() + 1e-3
