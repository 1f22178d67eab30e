"""Networks without their weights: what a recipe chooses and a model directory's config.json records."""

from typing import Annotated, Literal

from pydantic import Field

from resunet.blocks import NormKind
from resunet.config import Frozen

Widths = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]


class EncoderArchitecture(Frozen):
    """`resunet.encoder.ResidualEncoder`."""

    name: Literal["residual_encoder"] = "residual_encoder"
    spatial_dims: Literal[2, 3] = 2
    in_channels: int = Field(1, ge=1)
    channels: Widths = (32, 64, 128, 256, 512)
    units: int = Field(2, ge=1)
    norm: NormKind = "batch"


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


class UNetArchitecture(Frozen):
    """`resunet.model.UNet`."""

    name: Literal["unet"] = "unet"
    spatial_dims: Literal[2, 3] = 2
    in_channels: int = Field(1, ge=1)
    num_classes: int = Field(2, ge=2)
    channels: Widths = (64, 128, 256, 512, 1024)
    norm: NormKind = "batch"


SegmenterArchitecture = Annotated[ResUNetArchitecture | UNetArchitecture, Field(discriminator="name")]


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
    EncoderArchitecture | ResUNetArchitecture | UNetArchitecture | EnsembleArchitecture, Field(discriminator="name")
]
