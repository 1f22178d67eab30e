import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resunet.blocks import ResidualUnit, SqueezeExcite, UpBlock, convolution, crop_to, normalisation_layer
from resunet.errors import InputError

CONV = {2: F.conv2d, 3: F.conv3d}
SIZES = {2: (9, 12), 3: (5, 6, 7)}


def images(spatial_dims: int, channels: int, seed: int = 0) -> Tensor:
    return torch.randn(3, channels, *SIZES[spatial_dims], generator=torch.Generator().manual_seed(seed))


def with_random_norms(module: nn.Module) -> nn.Module:
    """Norms are the identity when they are new; random ones show whether they are applied, and in which order."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in module.state_dict().items():
        if "norm" in name or "shortcut.1" in name or "skip.1" in name:
            if name.endswith(("weight", "running_var")):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.is_floating_point():
                tensor.normal_(generator=generator)
    return module


def batch_norm(x: Tensor, norm: nn.Module, training: bool) -> Tensor:
    """(x - mean) / sqrt(var + eps) · weight + bias, from the batch or from what was running."""
    shape = (1, -1, *[1] * (x.ndim - 2))
    if training:
        over = (0, *range(2, x.ndim))
        mean, variance = x.mean(over), x.var(over, unbiased=False)
    else:
        mean, variance = norm.running_mean, norm.running_var
    scaled = (x - mean.view(shape)) / (variance.view(shape) + norm.eps).sqrt()
    return scaled * norm.weight.view(shape) + norm.bias.view(shape)


def residual_unit(x: Tensor, unit: ResidualUnit, stride: int, training: bool) -> Tensor:
    """The formula of the docstring, written out."""
    conv = CONV[x.ndim - 2]
    residual = F.relu(batch_norm(conv(x, unit.conv1.weight, stride=stride, padding=1), unit.norm1, training))
    residual = batch_norm(conv(residual, unit.conv2.weight, padding=1), unit.norm2, training)
    shortcut = x
    if isinstance(unit.shortcut, nn.Sequential):
        shortcut = batch_norm(conv(x, unit.shortcut[0].weight, stride=stride), unit.shortcut[1], training)
    return F.relu(residual + shortcut)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("out_channels", [4, 6])
@pytest.mark.parametrize("training", [False, True])
def test_a_residual_unit_is_its_formula(spatial_dims, stride, out_channels, training):
    unit = with_random_norms(ResidualUnit(spatial_dims, 4, out_channels, stride)).train(training)
    x = images(spatial_dims, 4)
    expected = residual_unit(x, unit, stride, training)
    found = unit(x.clone())
    assert found.shape == (3, out_channels, *(-(-n // stride) for n in SIZES[spatial_dims]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("in_channels, out_channels, stride", [(4, 4, 1), (4, 4, 2), (4, 6, 1), (4, 6, 2)])
def test_the_shortcut_is_the_identity_exactly_where_nothing_changes(spatial_dims, in_channels, out_channels, stride):
    unit = ResidualUnit(spatial_dims, in_channels, out_channels, stride)
    unchanged = in_channels == out_channels and stride == 1
    assert isinstance(unit.shortcut, nn.Identity) == unchanged
    if not unchanged:
        assert unit.shortcut[0].kernel_size == (1,) * spatial_dims
        assert unit.stride == stride


def test_a_residual_unit_does_not_change_its_input():
    for stride in (1, 2):
        x = images(2, 4)
        before = x.clone()
        ResidualUnit(2, 4, 4, stride)(x).sum()
        assert torch.equal(x, before)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_squeeze_and_excitation_is_its_formula(spatial_dims):
    layer = SqueezeExcite(spatial_dims, 64)
    x = images(spatial_dims, 64)
    pooled = x.flatten(2).mean(2)
    hidden = F.relu(F.linear(pooled, layer.reduce.weight.flatten(1), layer.reduce.bias))
    weight = torch.sigmoid(F.linear(hidden, layer.expand.weight.flatten(1), layer.expand.bias))
    torch.testing.assert_close(layer(x), x * weight.view(3, 64, *[1] * spatial_dims))
    assert hidden.shape[1] == 4  # 64 / 16


def test_squeeze_and_excitation_keeps_a_hidden_layer_in_narrow_levels():
    assert SqueezeExcite(2, 8).reduce.out_channels == 4
    assert SqueezeExcite(2, 256).reduce.out_channels == 16
    assert SqueezeExcite(2, 256, reduction=8).reduce.out_channels == 32


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("squeeze_excite", [False, True])
def test_an_up_block_adds_its_skip(spatial_dims, squeeze_excite):
    block = with_random_norms(UpBlock(spatial_dims, 8, 6, 5, squeeze_excite=squeeze_excite)).eval()
    skip = images(spatial_dims, 6)
    size = tuple(-(-n // 2) for n in SIZES[spatial_dims])
    x = torch.randn(3, 8, *size, generator=torch.Generator().manual_seed(2))
    transposed = F.conv_transpose2d if spatial_dims == 2 else F.conv_transpose3d
    up = transposed(x, block.up.weight, block.up.bias, stride=2)
    up = up[(..., *(slice(n) for n in SIZES[spatial_dims]))]
    projected = batch_norm(CONV[spatial_dims](skip, block.skip[0].weight), block.skip[1], training=False)
    if squeeze_excite:
        projected = block.excite(projected)
    expected = residual_unit(up + projected, block.unit, 1, training=False)
    torch.testing.assert_close(block(x, skip), expected, rtol=1e-5, atol=1e-5)
    assert block.unit.conv1.in_channels == 5  # a concatenation would be wider


@pytest.mark.parametrize("size", [(7, 8), (8, 7), (1, 1), (15, 3)])
def test_an_up_block_gives_the_size_of_its_skip(size):
    block = UpBlock(2, 4, 3, 2).eval()
    coarse = [-(-n // 2) for n in size]
    assert block(torch.zeros(1, 4, *coarse), torch.zeros(1, 3, *size)).shape == (1, 2, *size)


def test_every_output_of_the_transposed_convolution_has_one_source():
    block = UpBlock(2, 1, 1, 1)
    nn.init.ones_(block.up.weight)
    nn.init.zeros_(block.up.bias)
    values = torch.arange(6.0).view(1, 1, 2, 3)
    assert torch.equal(block.up(values), values.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_a_convolution_keeps_or_halves_the_size_rounded_up(kernel):
    for n in range(1, 12):
        x = torch.zeros(1, 1, n, n + 1)
        assert convolution(2, 1, 2, kernel)(x).shape[2:] == (n, n + 1)
        assert convolution(2, 1, 2, kernel, stride=2)(x).shape[2:] == (-(-n // 2), -(-(n + 1) // 2))


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_norm_kinds(spatial_dims):
    x = images(spatial_dims, 12) * 3 + 5
    over_sample = tuple(range(2, x.ndim))
    batch = normalisation_layer("batch", spatial_dims, 12)(x)
    torch.testing.assert_close(batch.mean((0, *over_sample)), torch.zeros(12), atol=1e-5, rtol=0)
    instance = normalisation_layer("instance", spatial_dims, 12)
    torch.testing.assert_close(instance(x).mean(over_sample), torch.zeros(3, 12), atol=1e-5, rtol=0)
    assert instance.weight.shape == (12,)  # affine
    group = normalisation_layer("group", spatial_dims, 12)
    torch.testing.assert_close(
        group(x).view(3, group.num_groups, -1).mean(2), torch.zeros(3, group.num_groups), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("channels, groups", [(1, 1), (4, 4), (8, 8), (12, 6), (13, 1), (32, 8), (36, 6)])
def test_group_normalisation_takes_the_most_groups_that_divide_the_channels(channels, groups):
    assert normalisation_layer("group", 2, channels).num_groups == groups


def test_an_unknown_norm_is_the_users_fault():
    with pytest.raises(InputError, match=r"norm='layer'.*'batch', 'instance' and 'group'"):
        normalisation_layer("layer", 2, 4)


def test_crop_to_takes_the_first_elements():
    x = torch.arange(24).view(1, 1, 2, 3, 4)
    assert torch.equal(crop_to(x, (1, 3, 2)), x[:, :, :1, :3, :2])
