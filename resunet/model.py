"""Segmentation networks: the Res-UNet, and the plain U-Net it is compared with.

Both take (N, in_channels, *size) of any size, odd ones too (with instance norm: larger than the coarsest stride), and give
logits (N, out, *size): one channel for a binary task (sigmoid), one a class otherwise (softmax).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resunet.architecture import Architecture, ResUNetArchitecture, UNetArchitecture
from resunet.blocks import NormKind, convolution, crop_to, full_precision_if_small, normalisation_layer, transposed_convolution
from resunet.checkpoint import Checkpointed, ModelConfig, model_folder, read_config
from resunet.decoder import ProgressiveDecoder
from resunet.encoder import ResidualEncoder, initialise, initialise_head
from resunet.ensemble import Ensemble
from resunet.errors import InputError
from resunet.light_model import MobileResUNet
from resunet.mobile import MobileEncoder


class ResUNet(nn.Module, Checkpointed):
    """A U-Net of residual units: `ResidualEncoder`, `ProgressiveDecoder` and a 1×1 head.

    After Ronneberger et al. 2015 (arXiv 1505.04597) and Zhang et al. 2018 (arXiv 1711.10684), with skips added
    instead of concatenated.

    Args:
        in_channels: channels of the scan.
        num_classes: classes, background included; two give one logit a pixel.
        channels: width of each level, finest first.
        units: residual units a level of the encoder.
        norm: 'batch', 'instance' or 'group'.
        squeeze_excite: squeeze-and-excitation on every skip.
        spatial_dims: 2 or 3.
    """

    kind: ClassVar[str] = "resunet"

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 2,
        channels: Sequence[int] = (32, 64, 128, 256, 512),
        units: int = 2,
        norm: NormKind = "batch",
        squeeze_excite: bool = False,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        self.encoder = ResidualEncoder(in_channels, channels, units, norm, spatial_dims)
        self.decoder = ProgressiveDecoder(self.encoder, norm, squeeze_excite)
        self.head = convolution(spatial_dims, self.encoder.channels[0], logit_channels(num_classes), 1, bias=True)
        initialise(self.decoder)
        initialise_head(self.head)
        self.config = ModelConfig(
            architecture=ResUNetArchitecture.model_validate(
                dict(self.encoder.config.architecture.model_dump(exclude={"name"}))
                | dict(num_classes=num_classes, squeeze_excite=squeeze_excite)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, *size) → logits (N, 1 or num_classes, *size)."""
        logits: Tensor = self.head(self.decoder(self.encoder(x)))
        return logits

    def levels(self, x: Tensor) -> list[Tensor]:
        """The decoder's features, finest first; the head makes the logits of the first."""
        return self.decoder.levels(self.encoder(x))


class UNet(nn.Module, Checkpointed):
    """The plain U-Net, the baseline: double convolutions, max-pooling, transposed convolutions, concatenation.

    Ronneberger et al. 2015 (arXiv 1505.04597), with padding and normalisation layers, as it is used today. Arguments
    as `ResUNet`.
    """

    kind: ClassVar[str] = "unet"

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 2,
        channels: Sequence[int] = (64, 128, 256, 512, 1024),
        norm: NormKind = "batch",
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3) or not channels or min(channels) < 1 or in_channels < 1:
            raise InputError(
                f"spatial_dims={spatial_dims}, in_channels={in_channels}, channels={list(channels)}: 2 or 3 dimensions, "
                "and at least one channel a level."
            )
        widths = tuple(channels)
        self.pool = F.max_pool2d if spatial_dims == 2 else F.max_pool3d
        self.down = nn.ModuleList(
            _DoubleConvolution(spatial_dims, before, width, norm)
            for before, width in zip((in_channels, *widths), widths, strict=False)
        )
        pairs = list(zip(widths[::-1], widths[-2::-1], strict=False))  # (coarser, finer), coarsest first
        self.up = nn.ModuleList(transposed_convolution(spatial_dims, coarse, fine) for coarse, fine in pairs)
        self.merge = nn.ModuleList(_DoubleConvolution(spatial_dims, 2 * fine, fine, norm) for _, fine in pairs)
        self.head = convolution(spatial_dims, widths[0], logit_channels(num_classes), 1, bias=True)
        self.config = ModelConfig(
            architecture=UNetArchitecture.model_validate(
                dict(
                    spatial_dims=spatial_dims,
                    in_channels=in_channels,
                    num_classes=num_classes,
                    channels=widths,
                    norm=norm,
                )
            )
        )
        initialise(self)
        initialise_head(self.head)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, *size) → logits (N, 1 or num_classes, *size)."""
        *skips, x = self._descend(x)
        for up, merge, skip in zip(self.up, self.merge, reversed(skips), strict=True):
            x = merge(torch.cat([skip, crop_to(up(x), skip.shape[2:])], dim=1))
        logits: Tensor = self.head(x)
        return logits

    def levels(self, x: Tensor) -> list[Tensor]:
        """The features of the way up, finest first; the head makes the logits of the first."""
        *skips, x = self._descend(x)
        found = []
        for up, merge, skip in zip(self.up, self.merge, reversed(skips), strict=True):
            x = merge(torch.cat([skip, crop_to(up(x), skip.shape[2:])], dim=1))
            found.append(x)
        return found[::-1]

    def _descend(self, x: Tensor) -> list[Tensor]:
        """The features of the way down, finest first."""
        features: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else self.pool(x, 2, ceil_mode=True))
            features.append(x)
        return features


Segmenter = ResUNet | UNet | MobileResUNet | Ensemble
WithEncoder = ResUNet | MobileResUNet  # that is pretrained by itself


def logit_channels(num_classes: int) -> int:
    """One logit decides between two classes; more classes take one each."""
    if num_classes < 2:
        raise InputError(f"num_classes={num_classes}: at least 2, the background included.")
    return 1 if num_classes == 2 else num_classes


def build_model(architecture: Architecture) -> nn.Module:
    """The network that an architecture describes, with fresh weights."""
    return NETWORKS[architecture.name].build(architecture)


def load_model(path: str | Path) -> Segmenter:
    """The segmenter in a run directory or a model directory, in evaluation mode, loaded exactly.

    Raises:
        InputError: not a model directory, weights that do not match, or an encoder without a decoder.
    """
    folder = model_folder(Path(path))
    name = read_config(folder).architecture.name
    if name in (ResidualEncoder.kind, MobileEncoder.kind):
        raise InputError(f"{folder}: holds an encoder, not a segmenter. Fine-tune it: resunet finetune RECIPE encoder={path}")
    model = NETWORKS[name].from_pretrained(folder)
    assert isinstance(model, Segmenter)
    return model


def load_finetuned(folder: Path) -> tuple[Segmenter, ModelConfig]:
    """A segmenter that can be used on scans, and its config, which names classes.

    Raises:
        InputError: as `load_model`; or a segmenter without classes.
    """
    model, config = load_model(folder), read_config(folder)
    if config.classes is None:
        raise InputError(f"{folder}: its config.json names no classes; a model that resunet finetune wrote is needed.")
    return model, config


NETWORKS: dict[
    str,
    type[ResidualEncoder] | type[ResUNet] | type[UNet] | type[MobileEncoder] | type[MobileResUNet] | type[Ensemble],
] = {network.kind: network for network in (ResidualEncoder, ResUNet, UNet, MobileEncoder, MobileResUNet, Ensemble)}


class _DoubleConvolution(nn.Sequential):
    """Twice a 3×3 convolution, norm and ReLU."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, norm: NormKind) -> None:
        layers: list[nn.Module] = []
        for before in (in_channels, out_channels):
            layers += [
                convolution(spatial_dims, before, out_channels, 3),
                normalisation_layer(norm, spatial_dims, out_channels),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers)

    def forward(self, x: Tensor) -> Tensor:
        precision, x = full_precision_if_small(x)
        with precision:
            out: Tensor = super().forward(x)
        return out
