"""What the live network makes of a scan; whole or by windows, as `resunet.inference.window` plans it.

The window's scores are blended by MONAI's sliding window, which a bundle does in numpy alike (`resunet.bundle.scorer`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from resunet.arithmetic import autocast
from resunet.config import Frozen, Precision
from resunet.inference.window import Floats, Footprint, Plan, Scorer, mirrors, plan_slices
from resunet.inference.window import predict_scores as scores_with
from resunet.inference.window import predict_values as predict_with
from resunet.layout import channels_last, spatial_dims_of
from resunet.runtime import Intensity

__all__ = [
    "Footprint",
    "Inference",
    "LiveNetwork",
    "Plan",
    "footprint",
    "plan_slices",
    "predict_scores",
    "predict_values",
]

# What a network's footprint is measured with: long in one direction, so that the coarsest level has several positions.
_PROBE = {2: (128, 128), 3: (16, 16, 128)}

# Measured by benchmarks/predict_memory.py: what is alive at the peak of a forward pass, for each value that its largest layer
# reads and writes: 4.0 of a Res-UNet, 2.5 of a U-Net.
_ALIVE = 5


class Inference(Frozen):
    """How a scan is predicted.

    Its own values, while it is read and after, come out of `memory` too: a scan takes about four times its decoded size.
    """

    memory: float = Field(4.0, gt=0, description="GiB that a process may take: decides what is seen whole, and batches")
    window: int = Field(512, ge=64, description="pixels a side of the sliding window, at most, for what does not fit whole")
    overlap: float = Field(0.25, ge=0, le=0.75, description="share of a window that the next one sees again")
    flips: bool = Field(
        False, description="test-time augmentation: the mean over all mirror images, 4 of a slice, 8 of a volume"
    )


@dataclass(frozen=True)
class LiveNetwork:
    """A network in evaluation mode as a `resunet.inference.window.Scorer`. channels: of the scans that it is given."""

    network: nn.Module
    channels: int
    device: torch.device
    precision: Precision = "fp32"
    flips: bool = False

    @property
    def footprint(self) -> Footprint:
        return footprint(self.network, self.channels, self.device)

    @property
    def spatial_dims(self) -> int:
        return spatial_dims_of(self.network)

    def __call__(self, images: Floats) -> Floats:
        return np.asarray(self._logits(torch.from_numpy(images).to(self.device)).cpu().numpy(), np.float32)

    def slide(self, image: Floats, plan: Plan, overlap: float) -> Floats:
        from monai.inferers import sliding_window_inference  # seconds and half a GiB, for large images only

        window = [min(plan.window, length) for length in image.shape[2:]]
        given, cpu = torch.from_numpy(image), torch.device("cpu")
        logits = sliding_window_inference(
            given, window, plan.windows, self._logits, overlap, "gaussian", sw_device=self.device, device=cpu
        )
        assert isinstance(logits, Tensor)
        return np.asarray(logits.numpy(), np.float32)

    @torch.no_grad()
    def _logits(self, x: Tensor) -> Tensor:
        """(N, C, *size) → float32 (N, K, *size)."""
        mirrored = mirrors(x.ndim - 2, self.flips)
        total: Tensor | None = None
        for dims in mirrored:
            with autocast(self.precision, x.device):
                logits = self.network(channels_last(x.flip(dims)))
            logits = logits.float().flip(dims)
            total = logits if total is None else total.add_(logits)
        assert total is not None
        return total.div_(len(mirrored)) if self.flips else total


def predict_values(
    network: nn.Module | Scorer,
    values: NDArray,
    axis: int | None,
    intensities: Sequence[Intensity],
    device: torch.device,
    precision: Precision = "fp32",
    inference: Inference = Inference(),  # noqa: B008
    probabilities: bool = False,
    plan: Plan | None = None,
) -> NDArray:
    """`resunet.inference.window.predict_values` of a network, which is put into evaluation mode; or of a bundle's scorer, whose
    device, precision and flips are its own."""
    live = _scorer(network, values.shape[0], device, precision, inference)
    return predict_with(live, values, axis, intensities, inference, probabilities, plan)


def predict_scores(
    network: nn.Module | Scorer,
    values: NDArray,
    axis: int | None,
    intensities: Sequence[Intensity],
    device: torch.device,
    precision: Precision = "fp32",
    inference: Inference = Inference(),  # noqa: B008
) -> tuple[NDArray[np.uint8], Floats]:
    """`resunet.inference.window.predict_scores` of a network or a bundle's scorer, as `predict_values`."""
    live = _scorer(network, values.shape[0], device, precision, inference)
    return scores_with(live, values, axis, intensities, inference)


def _scorer(
    network: nn.Module | Scorer, channels: int, device: torch.device, precision: Precision, inference: Inference
) -> Scorer:
    if isinstance(network, nn.Module):
        return LiveNetwork(network.eval(), channels, device, precision, inference.flips)
    return network


_footprints: WeakKeyDictionary[nn.Module, Footprint] = WeakKeyDictionary()  # one forward pass each, not one a scan


@torch.no_grad()
def footprint(network: nn.Module, channels: int, device: torch.device) -> Footprint:
    """Measure a network, in evaluation mode, by what its layers say of a small image."""
    if (known := _footprints.get(network)) is not None:
        return known
    probe = _PROBE[spatial_dims_of(network)]
    largest, smallest = 0, max(probe)

    def look(layer: nn.Module, given: tuple[Any, ...], made: Any) -> None:
        nonlocal largest, smallest
        tensors = [one for one in (*given, made) if isinstance(one, Tensor) and one.ndim == 2 + len(probe)]
        largest = max(largest, sum(one.numel() for one in tensors))
        smallest = min([smallest, *(max(one.shape[2:]) for one in tensors if max(one.shape[2:]) > 1)])

    hooks = [layer.register_forward_hook(look) for layer in network.modules() if not list(layer.children())]
    try:
        logits = network(torch.zeros(1, channels, *probe, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    found = Footprint(_ALIVE * largest / math.prod(probe), logits.shape[1], max(probe) // smallest)
    _footprints[network] = found
    return found
