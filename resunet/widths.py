"""Layers of other widths than their architecture's: how a pruned network is described, built and read.

An architecture names every layer that is narrower than in the full network, with its channels in and out. The full network is built
and those layers are narrowed in place, whatever class they are of, so that every network can be pruned and none need know of it.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from resunet.errors import InputError
from resunet.layout import spatial_dims_of

Width = tuple[int, int]  # channels in and out; of a norm twice the same

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)
_PROBE = 256  # positions a side of what a network is tried with: more than one at its coarsest level, which instance norm needs


def widths_of(network: nn.Module) -> dict[str, Width]:
    """Every layer that has channels, by name."""
    return {name: _width(layer) for name, layer in network.named_modules() if has_width(layer)}


def different_widths(network: nn.Module, full: nn.Module) -> dict[str, Width]:
    """The layers of a network that are not as wide as in the full one, by name: what its architecture says."""
    theirs = widths_of(full)
    return {name: width for name, width in widths_of(network).items() if theirs[name] != width}


def narrow(network: nn.Module, widths: Mapping[str, Width]) -> None:
    """Narrow layers of a full network in place; each keeps the first of its channels.

    Raises:
        InputError: no layer of that name, a width that it cannot have, or layers that do not fit together any more.
    """
    layers = {name: layer for name, layer in network.named_modules() if has_width(layer)}
    if unknown := sorted(set(widths) - set(layers)):
        raise InputError(f"architecture.widths names {', '.join(unknown)}: the {type(network).__name__} has no such layers.")
    for name, width in widths.items():
        if fault := _fault(layers[name], width):
            raise InputError(f"architecture.widths.{name}={list(width)}: {fault}.")
        _narrow(layers[name], width)
    _refuse_misfits(network)


def has_width(layer: nn.Module) -> bool:
    """Whether a layer can be narrowed."""
    return isinstance(layer, CONVOLUTIONS + TRANSPOSED + NORMS)


def is_depthwise(layer: nn.Module) -> bool:
    """A convolution of every channel by itself."""
    return isinstance(layer, CONVOLUTIONS) and layer.groups > 1 and layer.groups == layer.in_channels == layer.out_channels


def _width(layer: nn.Module) -> Width:
    if isinstance(layer, CONVOLUTIONS + TRANSPOSED):
        return layer.in_channels, layer.out_channels
    channels = layer.num_channels if isinstance(layer, nn.GroupNorm) else layer.num_features
    assert isinstance(channels, int)
    return channels, channels


def _fault(layer: nn.Module, width: Width) -> str | None:
    full = _width(layer)
    if not (1 <= width[0] <= full[0] and 1 <= width[1] <= full[1]):
        return f"a pruned layer has at least 1 channel and at most those of the full one, {list(full)}"
    if width[0] != width[1] and (isinstance(layer, NORMS) or is_depthwise(layer)):
        return "has as many channels out as in"
    if isinstance(layer, nn.GroupNorm) and width[0] % layer.num_groups:
        return f"its {layer.num_groups} groups do not divide the channels"
    if isinstance(layer, CONVOLUTIONS + TRANSPOSED) and layer.groups > 1 and not is_depthwise(layer):
        return f"a convolution of {layer.groups} groups is not pruned"
    return None


@torch.no_grad()
def _narrow(layer: nn.Module, width: Width) -> None:
    before, after = width
    if isinstance(layer, NORMS):
        if isinstance(layer, nn.GroupNorm):
            layer.num_channels = after
        else:
            layer.num_features = after
        for name in ("weight", "bias", "running_mean", "running_var"):
            _keep(layer, name, slice(after))
        return
    assert isinstance(layer, CONVOLUTIONS + TRANSPOSED)
    kept: tuple[slice, ...] = (slice(before), slice(after)) if isinstance(layer, TRANSPOSED) else (slice(after), slice(before))
    if is_depthwise(layer):
        layer.groups, kept = after, (slice(after),)
    layer.in_channels, layer.out_channels = before, after
    _keep(layer, "weight", kept)
    _keep(layer, "bias", slice(after))


def _keep(layer: nn.Module, name: str, kept: slice | tuple[slice, ...]) -> None:
    tensor = getattr(layer, name, None)
    if tensor is None:
        return
    first = tensor.detach()[kept].clone()
    setattr(layer, name, nn.Parameter(first, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else first)


def level_channels(network: nn.Module) -> tuple[int, ...]:
    """Of what a segmenter's `levels` gives, finest first, as they are: a pruned one has fewer than it was made with."""
    trial, x = _without_numbers(network)
    return tuple(int(level.shape[1]) for level in trial.levels(x))  # type: ignore[operator]


def _refuse_misfits(network: nn.Module) -> None:
    """Every layer is given what it takes: a forward pass without numbers."""
    trial, x = _without_numbers(network)
    try:
        trial(x)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"architecture.widths: the layers do not fit together: {error}") from error


def _without_numbers(network: nn.Module) -> tuple[nn.Module, Tensor]:
    """A copy on the meta device, and an input for it."""
    trial = copy.deepcopy(network).to("meta").eval()
    channels = next(layer.in_channels for layer in network.modules() if isinstance(layer, CONVOLUTIONS))
    return trial, torch.empty(1, channels, *[_PROBE] * spatial_dims_of(network), device="meta")
