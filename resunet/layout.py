"""How tensors lie in memory: channels last, in 2D and in 3D. On CPUs and GPUs convolutions are faster so.

In 3D on one thread a training step of the Res-UNet took 10 to 35 % less time than with channels first (width 8 and 16, float32;
bfloat16: 35 % less and 10 % more).
"""

from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

_FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}


def spatial_dims_of(network: nn.Module) -> int:
    """2 or 3, as the network's convolutions have it."""
    return next(weight.ndim - 2 for weight in network.parameters() if weight.ndim in (4, 5))


def place(network: M, device: torch.device) -> M:
    """The network on a device, its weights with channels last; changed in place."""
    return network.to(device, memory_format=_FORMATS[spatial_dims_of(network)])  # type: ignore[call-overload, no-any-return]


def channels_last(x: Tensor) -> Tensor:
    """(N, C, *size) with channels last in memory."""
    return x.contiguous(memory_format=_FORMATS[x.ndim - 2])
