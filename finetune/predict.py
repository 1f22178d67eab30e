"""From a case to its label map: slice by slice for a volume, each slice whole."""

import contextlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from resunet.config import Precision
from resunet.data.cases import LoadedCase

_BATCH = 16  # slices at once
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def predict_case(model: nn.Module, case: LoadedCase, device: torch.device, precision: Precision) -> NDArray[np.uint8]:
    """The class index of every pixel, (y, x) or (z, y, x). The model is put into evaluation mode."""
    model.eval()
    predicted: list[NDArray[np.uint8]] = []
    for start in range(0, case.num_slices, _BATCH):
        stop = min(start + _BATCH, case.num_slices)
        images = np.stack([case.image_slice(i) for i in range(start, stop)])
        predicted.extend(predict_slices(model, images, device, precision))
    return case.assemble(predicted)


@torch.no_grad()
def predict_slices(
    model: nn.Module, images: NDArray[np.float32], device: torch.device, precision: Precision
) -> NDArray[np.uint8]:
    """Class indices (N, y, x) of normalised images (N, C, y, x)."""
    x = torch.from_numpy(images).to(device).contiguous(memory_format=torch.channels_last)
    autocast = torch.autocast(device.type, _DTYPES[precision]) if precision in _DTYPES else contextlib.nullcontext()
    with autocast:
        logits = model(x)
    labels: NDArray[np.uint8] = decide(logits).cpu().numpy()
    return labels


def decide(logits: Tensor) -> Tensor:
    """Logits (N, 1 or K, *size) → class indices uint8 (N, *size): above probability 0.5, or the largest."""
    if logits.shape[1] == 1:
        return (logits[:, 0] > 0).to(torch.uint8)
    return logits.argmax(dim=1).to(torch.uint8)
