"""The blocks both halves of a Res-UNet are made of, in 2D and in 3D from one definition.

Nothing here knows how deep or how wide a network is; `spatial_dims` picks the layers and that is all that differs.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resunet.errors import InputError

NormKind = Literal["batch", "instance", "group"]

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_BATCH = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_INSTANCE = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
_GROUPS = 8


def convolution(
    spatial_dims: int, in_channels: int, out_channels: int, kernel: int, stride: int = 1, bias: bool = False
) -> nn.Module:
    """A convolution that keeps the size at stride 1 and gives ceil(size / 2) at stride 2 (odd kernels)."""
    return _CONV[spatial_dims](in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=bias)


def normalisation_layer(kind: NormKind, spatial_dims: int, channels: int) -> nn.Module:
    """Batch, instance (affine) or group normalisation (8 groups, fewer where 8 does not divide the channels)."""
    if kind == "batch":
        return _BATCH[spatial_dims](channels)
    if kind == "instance":
        return _INSTANCE[spatial_dims](channels, affine=True)
    if kind == "group":
        groups = next(g for g in range(min(_GROUPS, channels), 0, -1) if channels % g == 0)
        return nn.GroupNorm(groups, channels)
    raise InputError(f"norm={kind!r}: allowed are 'batch', 'instance' and 'group'.")


def full_precision_if_small(x: Tensor, stride: int = 1) -> tuple[AbstractContextManager[object], Tensor]:
    """Under which 3×3 convolutions of x are computed, and x for it: no autocast on a CPU where a side has 2 positions or fewer.

    There the gradients of bfloat16 convolutions are memory that nobody wrote, in torch 2.14.1: of a side of 2 in 3D, and of a side
    of 1 with stride 2 in 2D and 3D (benchmarks/LOG.md).
    """
    if torch.is_autocast_enabled("cpu") and x.device.type == "cpu" and min(x.shape[2:]) <= 2 * stride:
        return torch.autocast("cpu", enabled=False), x.float()
    return nullcontext(), x


class ResidualUnit(nn.Module):
    """ReLU(norm(conv3(ReLU(norm(conv3(x))))) + shortcut(x)).

    The shortcut is the identity, or a 1×1 convolution with norm where channels or stride change (He et al. 2016,
    arXiv 1512.03385, section 3.3, option B; post-activation). (N, C_in, *size) → (N, C_out, *ceil(size / stride)).
    """

    def __init__(
        self, spatial_dims: int, in_channels: int, out_channels: int, stride: int = 1, norm: NormKind = "batch"
    ) -> None:
        super().__init__()
        self.conv1 = convolution(spatial_dims, in_channels, out_channels, 3, stride)
        self.norm1 = normalisation_layer(norm, spatial_dims, out_channels)
        self.conv2 = convolution(spatial_dims, out_channels, out_channels, 3)
        self.norm2 = normalisation_layer(norm, spatial_dims, out_channels)
        self.stride = stride
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                convolution(spatial_dims, in_channels, out_channels, 1),
                normalisation_layer(norm, spatial_dims, out_channels),
            )
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        precision, x = full_precision_if_small(x, self.stride)
        with precision:
            residual = self.activation(self.norm1(self.conv1(x)))
            residual = self.norm2(self.conv2(residual))
            # The stride of the 1×1 convolution, taken as a slice. The same numbers; a strided one corrupts memory in its
            # backward pass on CPUs (torch 2.14.1, channels_last, float32, 8 input channels).
            skipped = x[(slice(None), slice(None), *[slice(None, None, self.stride)] * (x.ndim - 2))]
            out: Tensor = self.activation(residual + self.shortcut(skipped))
        return out


class SqueezeExcite(nn.Module):
    """x · sigmoid(W2 ReLU(W1 mean(x))), per channel (Hu et al. 2018, arXiv 1709.01507, section 3)."""

    def __init__(self, spatial_dims: int, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(channels // reduction, 4)
        self.reduce = convolution(spatial_dims, channels, hidden, 1, bias=True)
        self.expand = convolution(spatial_dims, hidden, channels, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean(dim=tuple(range(2, x.ndim)), keepdim=True)  # (N, C, 1, …)
        weight: Tensor = self.expand(F.relu(self.reduce(pooled))).sigmoid()
        return x * weight


class UpBlock(nn.Module):
    """One level up: transposed convolution ×2, plus the skip through a 1×1 convolution, then a residual unit.

    The skip is added, not concatenated; squeeze-and-excitation on the skip is optional. The result has the skip's
    size: an encoder level halves n to ceil(n / 2), so that the doubled size is at most one too large and is cropped.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        skip_channels: int,
        out_channels: int,
        norm: NormKind = "batch",
        squeeze_excite: bool = False,
    ) -> None:
        super().__init__()
        self.up = transposed_convolution(spatial_dims, in_channels, out_channels)
        self.skip = nn.Sequential(
            convolution(spatial_dims, skip_channels, out_channels, 1),
            normalisation_layer(norm, spatial_dims, out_channels),
        )
        self.excite: nn.Module = SqueezeExcite(spatial_dims, out_channels) if squeeze_excite else nn.Identity()
        self.unit = ResidualUnit(spatial_dims, out_channels, out_channels, norm=norm)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        up = crop_to(self.up(x), skip.shape[2:])
        out: Tensor = self.unit(up + self.excite(self.skip(skip)))
        return out


def transposed_convolution(spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """Doubles every spatial size: kernel 2, stride 2, so that no output pixel is written twice."""
    return _TRANSPOSED[spatial_dims](in_channels, out_channels, 2, stride=2)


def crop_to(x: Tensor, size: Sequence[int]) -> Tensor:
    """The first `size` elements of every spatial dimension of (N, C, *spatial)."""
    return x[(slice(None), slice(None), *(slice(n) for n in size))]
