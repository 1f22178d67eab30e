"""The residual encoder, and the interface by which a decoder asks any encoder what it gives.

An encoder declares `channels` and `strides`, one per level, finest first, and returns one feature map a level. The
decoder builds itself from what is declared; nobody guesses.
"""

import math
from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from resunet.architecture import EncoderArchitecture
from resunet.blocks import NormKind, ResidualUnit
from resunet.checkpoint import Checkpointed, ModelConfig
from resunet.errors import InputError


class Encoder(Protocol):
    """What a decoder needs: level i is (N, channels[i], *ceil(size / strides[i]))."""

    spatial_dims: int
    in_channels: int
    strides: tuple[int, ...]

    @property
    def channels(self) -> tuple[int, ...]: ...

    def __call__(self, x: Tensor) -> list[Tensor]: ...


class Levels(nn.Module):
    """What all encoders do: one level after the other."""

    levels: nn.ModuleList

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, in_channels, *size) → one (N, channels[i], *ceil(size / strides[i])) a level."""
        features = []
        for level in self.levels:
            x = level(x)
            features.append(x)
        return features

    def embed(self, x: Tensor) -> Tensor:
        """The global average pool of the last level: (N, in_channels, *size) → (N, channels[-1])."""
        last: Tensor = self(x)[-1]
        return last.mean(dim=tuple(range(2, last.ndim)))


class ResidualEncoder(Levels, Checkpointed):
    """Levels of residual units; from the second level on, the first unit of a level halves the size.

    Args:
        in_channels: channels of the scan.
        channels: width of each level, finest first; their number is the number of levels.
        units: residual units a level.
        norm: 'batch', 'instance' or 'group'.
        spatial_dims: 2 or 3.

    Raises:
        InputError: a level, width or dimension that no network can have.
    """

    kind: ClassVar[str] = "residual_encoder"

    def __init__(
        self,
        in_channels: int = 1,
        channels: Sequence[int] = (32, 64, 128, 256, 512),
        units: int = 2,
        norm: NormKind = "batch",
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise InputError(f"spatial_dims={spatial_dims}: allowed are 2 and 3.")
        if in_channels < 1 or units < 1 or not channels or min(channels) < 1:
            raise InputError(
                f"in_channels={in_channels}, channels={list(channels)}, units={units}: each must be at least 1, "
                "and there must be at least one level."
            )
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.strides = tuple(2**level for level in range(len(channels)))
        self.levels = nn.ModuleList()
        width_before = in_channels
        for level, width in enumerate(channels):
            first = ResidualUnit(spatial_dims, width_before, width, stride=1 if level == 0 else 2, norm=norm)
            rest = [ResidualUnit(spatial_dims, width, width, norm=norm) for _ in range(units - 1)]
            self.levels.append(nn.Sequential(first, *rest))
            width_before = width
        architecture = EncoderArchitecture.model_validate(
            dict(spatial_dims=spatial_dims, in_channels=in_channels, channels=channels, units=units, norm=norm)
        )
        self.config = ModelConfig(architecture=architecture)
        initialise(self)

    @property
    def channels(self) -> tuple[int, ...]:
        """Of every level, as they are: a pruned one has fewer than it was made with."""
        return tuple(level[-1].conv2.out_channels for level in self.levels)  # type: ignore[index]

    def input_convolutions(self) -> list[str]:
        """Names of the weights that see the scan's channels; they alone change with `in_channels`."""
        names = ["levels.0.0.conv1.weight"]
        if isinstance(self.levels[0][0].shortcut, nn.Sequential):  # type: ignore[index]
            names.append("levels.0.0.shortcut.0.weight")
        return names


def initialise(module: nn.Module) -> None:
    """He initialisation of every convolution (He et al. 2015, arXiv 1502.01852, section 2.2).

    A transposed convolution of kernel 2 and stride 2 writes every output from one position, so that its fan-in is its
    number of input channels.
    """
    for layer in module.modules():
        if isinstance(layer, nn.ConvTranspose2d | nn.ConvTranspose3d):
            nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.in_channels))
        elif isinstance(layer, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.groups > 1:  # torch counts the outputs of all groups
                with torch.no_grad():
                    layer.weight.mul_(math.sqrt(layer.groups))
        if isinstance(layer, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d) and layer.bias is not None:
            nn.init.zeros_(layer.bias)


def initialise_head(head: nn.Module) -> None:
    """Small weights (Lin et al. 2017, arXiv 1708.02002, section 4.1) and, unlike there, no bias: logits start near 0."""
    head = head[0] if isinstance(head, nn.Sequential) else head
    assert isinstance(head, nn.Conv2d | nn.Conv3d) and head.bias is not None
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
