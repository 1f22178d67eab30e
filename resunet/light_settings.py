"""What both recipes say of the light network, and what it refuses of the full one's."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from resunet.architecture import OutputStride
from resunet.config import Frozen

LIGHT = "mobile_resunet"
_OF_FULL = {"units": 2, "norm": "batch", "spatial_dims": 2}
_LEVELS = 4  # of the decoder


class LightSettings(Frozen):
    """Keys of a model that only model.name=mobile_resunet has."""

    backbone: str | None = Field(
        None,
        description="mobile_resunet: timm's mobilenetv3_*, small or large with a width in percent; null: mobilenetv3_small_100",
    )
    output_stride: OutputStride | None = Field(
        None, description="mobile_resunet: of the coarsest level; 16 and 8 dilate the last stages, and cost more; null: 32"
    )
    weights: Literal["imagenet"] | Path | None = Field(
        None,
        description="mobile_resunet: what its encoder begins with. imagenet: timm's, from the Hugging Face Hub; or a file of a "
        "timm network, .safetensors or .pth; null: random",
    )

    @field_validator("backbone")
    @classmethod
    def _exists(cls, value: str | None) -> str | None:
        from resunet.mobile import backbones

        if value is not None and value not in backbones():
            raise ValueError(f"timm has {', '.join(backbones())}")
        return value

    @model_validator(mode="after")
    def _only_what_the_network_has(self) -> "LightSettings":
        values: dict[str, Any] = dict(self)
        if values["name"] != LIGHT:
            given = [key for key in LightSettings.model_fields if values[key] is not None]
            if given:
                raise ValueError(f"{given[0]}={values[given[0]]}: only name='{LIGHT}' has it; leave it out")
            return self
        if values["spatial_dims"] == 3:
            raise ValueError(f"name='{LIGHT}': MobileNetV3 is of two dimensions; for volumes use 'resunet', or spatial_dims=2")
        for key, only in _OF_FULL.items():
            if values[key] not in (only, None):
                raise ValueError(f"name='{LIGHT}': {key}={values[key]!r} is none of MobileNetV3's choices; leave it out")
        if values["channels"] is not None and len(values["channels"]) != _LEVELS:
            raise ValueError(
                f"name='{LIGHT}': channels={list(values['channels'])} are of its decoder, {_LEVELS} widths: at 1/2, 1/4, 1/8 "
                "and 1/16 of the size"
            )
        return self
