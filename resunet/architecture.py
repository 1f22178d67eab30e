"""Networks without their weights: what a recipe chooses and a model directory's config.json records."""

from typing import Annotated, Literal

from pydantic import Field

from resunet.blocks import NormKind
from resunet.config import Frozen

Widths = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
OutputStride = Literal[8, 16, 32]
MOBILE_BACKBONE = "mobilenetv3_small_100"
# of a pruned network: layer → channels in and out, where they are not those of the full one; see `resunet.widths`
LayerWidths = dict[str, tuple[int, int]]


class EncoderArchitecture(Frozen):
    """`resunet.encoder.ResidualEncoder`."""

    name: Literal["residual_encoder"] = "residual_encoder"
    spatial_dims: Literal[2, 3] = 2
    in_channels: int = Field(1, ge=1)
    channels: Widths = (32, 64, 128, 256, 512)
    units: int = Field(2, ge=1)
    norm: NormKind = "batch"
    widths: LayerWidths = {}


class ResUNetArchitecture(Frozen):
    """`resunet.model.ResUNet`."""

    name: Literal["resunet"] = "resunet"
    spatial_dims: Literal[2, 3] = 2
    in_channels: int = Field(1, ge=1)
    num_classes: int = Field(2, ge=2)
    channels: Widths = (32, 64, 128, 256, 512)
    units: int = Field(2, ge=1)
    norm: NormKind = "batch"
    squeeze_excite: bool = False
    widths: LayerWidths = {}


class UNetArchitecture(Frozen):
    """`resunet.model.UNet`."""

    name: Literal["unet"] = "unet"
    spatial_dims: Literal[2, 3] = 2
    in_channels: int = Field(1, ge=1)
    num_classes: int = Field(2, ge=2)
    channels: Widths = (64, 128, 256, 512, 1024)
    norm: NormKind = "batch"
    widths: LayerWidths = {}


class MobileEncoderArchitecture(Frozen):
    """`resunet.mobile.MobileEncoder`."""

    name: Literal["mobile_encoder"] = "mobile_encoder"
    spatial_dims: Literal[2] = 2
    in_channels: int = Field(1, ge=1)
    backbone: str = MOBILE_BACKBONE
    output_stride: OutputStride = 32
    norm: Literal["batch"] = "batch"
    widths: LayerWidths = {}


class MobileResUNetArchitecture(Frozen):
    """`resunet.light_model.MobileResUNet`."""

    name: Literal["mobile_resunet"] = "mobile_resunet"
    spatial_dims: Literal[2] = 2
    in_channels: int = Field(1, ge=1)
    num_classes: int = Field(2, ge=2)
    backbone: str = MOBILE_BACKBONE
    channels: Widths = Field(description="of the decoder: every level but the coarsest, finest first")
    output_stride: OutputStride = 32
    norm: Literal["batch"] = "batch"
    squeeze_excite: bool = False
    widths: LayerWidths = {}


MemberArchitecture = ResUNetArchitecture | UNetArchitecture | MobileResUNetArchitecture
SegmenterArchitecture = Annotated[MemberArchitecture, Field(discriminator="name")]


class EnsembleArchitecture(Frozen):
    """`resunet.ensemble.Ensemble`: so many networks of one architecture."""

    name: Literal["ensemble"] = "ensemble"
    member: SegmenterArchitecture
    count: int = Field(ge=2)

    @property
    def spatial_dims(self) -> Literal[2, 3]:
        return self.member.spatial_dims

    @property
    def in_channels(self) -> int:
        return self.member.in_channels

    @property
    def num_classes(self) -> int:
        return self.member.num_classes

    @property
    def channels(self) -> Widths:
        return self.member.channels


Architecture = Annotated[
    EncoderArchitecture
    | ResUNetArchitecture
    | UNetArchitecture
    | MobileEncoderArchitecture
    | MobileResUNetArchitecture
    | EnsembleArchitecture,
    Field(discriminator="name"),
]
