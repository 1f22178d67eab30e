"""MobileNetV3 as an encoder: timm's network cut into levels, behind the interface that a decoder asks.

Howard et al. 2019 (arXiv 1905.02244). The finest level is at half the size: nothing of it is computed at full resolution. timm is
imported when a network is built, not before.
"""

from functools import cache
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from resunet.architecture import MOBILE_BACKBONE, MobileEncoderArchitecture, OutputStride
from resunet.blocks import NormKind
from resunet.checkpoint import Checkpointed, ModelConfig
from resunet.encoder import Levels
from resunet.errors import InputError


class MobileEncoder(Levels, Checkpointed):
    """Five levels of timm's `features_only` network; the first of `levels` begins with the stem.

    Args:
        in_channels: channels of the scan.
        backbone: of timm's registered `mobilenetv3_*`, such as mobilenetv3_small_050 or mobilenetv3_large_100: small or large, and
            the width multiplier in percent.
        output_stride: of the coarsest level; below 32 the last stages are dilated instead of strided, and cost more.
        norm: 'batch'.
        spatial_dims: 2.

    Raises:
        InputError: a backbone that timm does not have, another norm or another dimension.
    """

    kind: ClassVar[str] = "mobile_encoder"

    def __init__(
        self,
        in_channels: int = 1,
        backbone: str = MOBILE_BACKBONE,
        output_stride: OutputStride = 32,
        norm: NormKind = "batch",
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        if spatial_dims != 2:
            raise InputError(f"spatial_dims={spatial_dims}: MobileNetV3 is of two dimensions. For volumes use the Res-UNet.")
        if backbone not in backbones():
            raise InputError(f"backbone={backbone!r}: is none of timm's MobileNetV3: {', '.join(backbones())}.")
        if norm != "batch":
            raise InputError(f"norm={norm!r}: MobileNetV3 has batch norm.")
        if in_channels < 1 or output_stride not in (8, 16, 32):
            raise InputError(
                f"in_channels={in_channels}, output_stride={output_stride}: at least 1 channel; a stride of 8, 16 or 32."
            )
        import timm

        network: Any = timm.create_model(backbone, features_only=True, in_chans=in_channels, output_stride=output_stride)
        self.spatial_dims: int = 2
        self.in_channels = in_channels
        self.strides: tuple[int, ...] = tuple(network.feature_info.reduction())
        parts = {name: getattr(network, name) for name in ("conv_stem", "bn1", "act1")}
        parts |= {f"blocks.{number}": stage for number, stage in enumerate(network.blocks)}
        self.levels = nn.ModuleList()
        self._timm_names: dict[str, str] = {}
        names = list(parts)
        for level, last in enumerate(network.feature_info.module_name()):
            last = "act1" if last == "bn1" else last  # timm names the norm whose activated output it gives
            end = names.index(last) + 1
            self.levels.append(nn.Sequential(*(parts[name] for name in names[:end])))
            self._timm_names |= {f"levels.{level}.{place}.": f"{name}." for place, name in enumerate(names[:end])}
            names = names[end:]
        self.config = ModelConfig(
            architecture=MobileEncoderArchitecture(in_channels=in_channels, backbone=backbone, output_stride=output_stride)
        )

    @property
    def channels(self) -> tuple[int, ...]:
        """Of every level, as they are: a pruned one has fewer than it was made with."""
        norms = [[part for part in level.modules() if isinstance(part, _BatchNorm)] for level in self.levels]
        return tuple(its[-1].num_features for its in norms)

    def input_convolutions(self) -> list[str]:
        """Names of the weights that see the scan's channels; they alone change with `in_channels`."""
        return ["levels.0.0.weight"]

    def blocks(self) -> list[nn.Module]:
        """Its inverted residual units, and the convolution at the end."""
        return [
            block for level in self.levels for stage in level.children() if isinstance(stage, nn.Sequential) for block in stage
        ]

    def timm_name(self, name: str) -> str:
        """What timm calls a tensor: 'levels.0.0.weight' → 'conv_stem.weight'."""
        prefix = ".".join(name.split(".")[:3]) + "."
        return self._timm_names[prefix] + name.removeprefix(prefix)


@cache
def channels_of(backbone: str) -> tuple[int, ...]:
    """The widths of a backbone's levels, finest first."""
    with torch.device("meta"):
        return MobileEncoder(1, backbone).channels


@cache
def backbones() -> tuple[str, ...]:
    """timm's MobileNetV3 with its own padding; those ported from TensorFlow pad by the size of the image."""
    import timm

    return tuple(timm.list_models("mobilenetv3_*"))
