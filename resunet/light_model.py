"""The light variant: MobileNetV3 as encoder, the light decoder, and logits at full resolution straight from half of it."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from resunet.architecture import MOBILE_BACKBONE, MobileResUNetArchitecture, OutputStride
from resunet.blocks import NormKind, convolution, crop_to
from resunet.checkpoint import Checkpointed, ModelConfig
from resunet.encoder import initialise, initialise_head
from resunet.errors import InputError
from resunet.light_decoder import LightDecoder
from resunet.mobile import MobileEncoder

MIN_WIDTH = 32


class MobileResUNet(nn.Module, Checkpointed):
    """`MobileEncoder`, `LightDecoder`, and a head that gives every position of the finest level the logits of its 2×2 pixels.

    The last is a 1×1 convolution and a shuffle of pixels (Shi et al. 2016, arXiv 1609.05158, section 3.2), which is a transposed
    convolution of kernel 2 and stride 2.

    Args:
        in_channels: channels of the scan.
        num_classes: classes, background included; two give one logit a pixel.
        backbone: as `MobileEncoder`.
        channels: of the decoder, the width of each level but the coarsest, finest first (at 1/2, 1/4, 1/8 and 1/16). None: as wide
            as the encoder's levels, and `MIN_WIDTH` at least.
        output_stride: as `MobileEncoder`.
        norm: 'batch'.
        squeeze_excite: squeeze-and-excitation on every skip.
        spatial_dims: 2.
    """

    kind: ClassVar[str] = "mobile_resunet"

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 2,
        backbone: str = MOBILE_BACKBONE,
        channels: Sequence[int] | None = None,
        output_stride: OutputStride = 32,
        norm: NormKind = "batch",
        squeeze_excite: bool = False,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise InputError(f"num_classes={num_classes}: at least 2, the background included.")
        self.encoder = MobileEncoder(in_channels, backbone, output_stride, norm, spatial_dims)
        widths = decoder_widths(self.encoder.channels) if channels is None else tuple(channels)
        self.decoder = LightDecoder(self.encoder, widths, squeeze_excite)
        self.head = shuffling_head(widths[0], 1 if num_classes == 2 else num_classes)
        initialise(self.decoder)
        initialise_head(self.head)
        self.config = ModelConfig(
            architecture=MobileResUNetArchitecture(
                in_channels=in_channels,
                num_classes=num_classes,
                backbone=backbone,
                channels=widths,
                output_stride=output_stride,
                squeeze_excite=squeeze_excite,
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) → logits (N, 1 or num_classes, H, W)."""
        return crop_to(self.head(self.decoder(self.encoder(x))), x.shape[2:])

    def levels(self, x: Tensor) -> list[Tensor]:
        """The decoder's features, finest first; the head makes the logits of the first."""
        return self.decoder.levels(self.encoder(x))


def shuffling_head(channels: int, logits: int) -> nn.Sequential:
    """(N, channels, H, W) → (N, logits, 2 H, 2 W)."""
    return nn.Sequential(convolution(2, channels, 4 * logits, 1, bias=True), nn.PixelShuffle(2))


def decoder_widths(channels: Sequence[int]) -> tuple[int, ...]:
    """Of a light decoder, finest first, where nobody says. channels: of the encoder's levels."""
    return tuple(max(width, MIN_WIDTH) for width in channels[:-1])
