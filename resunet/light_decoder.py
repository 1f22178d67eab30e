"""The light decoder: the progressive decoder's family with depthwise-separable units, down to the encoder's finest level.

Of a network that ends at half the size nothing is computed at full resolution but the head's logits, because that is where the time
went: see benchmarks/light_levels.py and benchmarks/LOG.md.
"""

import itertools
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from resunet.blocks import SqueezeExcite, convolution, crop_to, normalisation_layer
from resunet.encoder import Encoder
from resunet.errors import InputError


class SeparableConvolution(nn.Sequential):
    """A depthwise 3×3 convolution, a 1×1 convolution, and batch norm; nothing in between (Chollet 2017, arXiv 1610.02357, section
    4.7: a non-linearity there did harm)."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            convolution(2, channels, channels, 1),
            normalisation_layer("batch", 2, channels),
        )


class LightResidualUnit(nn.Module):
    """`resunet.blocks.ResidualUnit` with depthwise-separable convolutions, of one width: (N, C, H, W) → (N, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = SeparableConvolution(channels)
        self.conv2 = SeparableConvolution(channels)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.activation(self.conv2(self.activation(self.conv1(x))) + x)
        return out


class LightUpBlock(nn.Module):
    """One level up: a 1×1 convolution, resized ×2, plus the skip through a 1×1 convolution, then a residual unit.

    As `resunet.blocks.UpBlock`; a level of the same stride as the one below (a dilated encoder) is not resized. The result has the
    skip's size.
    """

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int, step: int, squeeze_excite: bool) -> None:
        super().__init__()
        assert step in (1, 2)
        self.step = step
        self.up = convolution(2, in_channels, out_channels, 1, bias=True)
        self.skip = nn.Sequential(convolution(2, skip_channels, out_channels, 1), normalisation_layer("batch", 2, out_channels))
        self.excite: nn.Module = SqueezeExcite(2, out_channels) if squeeze_excite else nn.Identity()
        self.unit = LightResidualUnit(out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        up = self.up(x)  # before it is resized: a quarter of the work
        if self.step == 2:
            up = crop_to(F.interpolate(up, scale_factor=2.0, mode="bilinear", align_corners=False), skip.shape[2:])
        out: Tensor = self.unit(up + self.excite(self.skip(skip)))
        return out


class LightDecoder(nn.Module):
    """One `LightUpBlock` a level, from the encoder's coarsest to its level `finest`, as `ProgressiveDecoder`.

    Args:
        encoder: whose `channels` and `strides` shape the decoder; it is not kept.
        channels: width of each level but the coarsest, finest first.
        squeeze_excite: squeeze-and-excitation on every skip.
        finest: the level that it climbs to.

    Raises:
        InputError: not one width a level.
    """

    def __init__(self, encoder: Encoder, channels: Sequence[int], squeeze_excite: bool = False, finest: int = 0) -> None:
        super().__init__()
        levels = len(encoder.channels) - 1
        if len(channels) != levels:
            raise InputError(
                f"channels={list(channels)}: the light decoder takes {levels} widths, one for each of the encoder's levels but the "
                f"coarsest (strides {', '.join(map(str, encoder.strides[:-1]))})."
            )
        assert 0 <= finest < levels, f"finest={finest}: of {levels} levels"
        self.finest = finest
        self.widths = tuple(channels)
        below = (*channels[1:], encoder.channels[-1])
        steps = [coarse // fine for fine, coarse in itertools.pairwise(encoder.strides)]
        self.blocks = nn.ModuleList(
            LightUpBlock(below[level], encoder.channels[level], channels[level], steps[level], squeeze_excite)
            for level in reversed(range(finest, levels))
        )

    def forward(self, features: Sequence[Tensor], finest: int | None = None) -> Tensor:
        """Features finest first, as an encoder returns them → (N, channels[finest], *size of level `finest`).

        Args:
            finest: a coarser level to stop at; None: its own finest.
        """
        finest = self.finest if finest is None else finest
        x = features[-1]
        for block, skip in zip(self.blocks, reversed(features[finest:-1]), strict=finest == self.finest):
            x = block(x, skip)
        return x

    def levels(self, features: Sequence[Tensor]) -> list[Tensor]:
        """What every block gives, finest first: (N, channels[i], *size of level i); the first is `forward`'s."""
        x, found = features[-1], []
        for block, skip in zip(self.blocks, reversed(features[self.finest : -1]), strict=True):
            x = block(x, skip)
            found.append(x)
        return found[::-1]
