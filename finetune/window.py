"""From a scan to its classes or their probabilities: slice by slice, whole where memory allows, else by a sliding window.

The window's scores are blended with Gaussian weights by MONAI's sliding window. What is blended, over windows and over flips,
are logits. All of it is settings and the scan's size: nothing depends on how much memory happens to be free, so that
evaluation and prediction, which both come here, agree.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from resunet.config import Frozen, Precision
from resunet.errors import InputError
from resunet.runtime import Intensity, normalise

_GIB = 2**30
_BATCH = 16  # slices at once
_WINDOWS = 4  # windows at once
_PROBE = 128  # pixels a side of the image that a network's footprint is measured with
_SMALLEST_WINDOW = 64
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

# Measured by benchmarks/predict_memory.py. A process with torch and MONAI, before a network sees anything; and what is alive
# at the peak of a forward pass, for each value that its largest layer reads and writes: 4.0 of a Res-UNet, 2.5 of a U-Net.
_PROCESS = 1.25 * _GIB
_ALIVE = 5


class Inference(Frozen):
    """How a scan is predicted.

    Its own values, while it is read and after, come out of `memory` too: a scan takes about four times its decoded size.
    """

    memory: float = Field(4.0, gt=0, description="GiB that a process may take: decides what is seen whole, and batches")
    window: int = Field(
        512, ge=_SMALLEST_WINDOW, description="pixels a side of the sliding window, for what does not fit whole"
    )
    overlap: float = Field(0.25, ge=0, le=0.75, description="share of a window that the next one sees again")
    flips: bool = Field(False, description="test-time augmentation: the mean over the slice and its mirror images, 4 in all")


class Footprint(NamedTuple):
    """What a network needs. floats: float32 values a pixel of a forward pass at its peak; stride: of its coarsest level."""

    floats: float
    logits: int
    stride: int


class Plan(NamedTuple):
    """How the slices of one scan are predicted. at_once: slices, 0 where not even one fits; else windows of size × size."""

    at_once: int
    window: int
    windows: int
    rows: int  # of windows whose scores are held together


def predict_values(
    network: nn.Module,
    values: NDArray,
    axis: int | None,
    intensities: Sequence[Intensity],
    device: torch.device,
    precision: Precision = "fp32",
    inference: Inference = Inference(),  # noqa: B008
    probabilities: bool = False,
    plan: Plan | None = None,
) -> NDArray:
    """The class index of every pixel, uint8 (*size); or float32 (M, *size), M = 1 (of the foreground) or one a class.

    Puts the network into evaluation mode.

    Args:
        values: (C, *size) of a scan, not normalised.
        axis: of size, along which a volume is sliced; None for an image.
        plan: instead of the one that `inference.memory` allows.

    Raises:
        InputError: `inference.memory` is too little for this scan and network.
    """
    network.eval()
    found = footprint(network, values.shape[0], device)
    size = values.shape[1:]
    out = np.empty((found.logits, *size), np.float32) if probabilities else np.empty(size, np.uint8)
    slices = _along(values, axis)  # (slices, C, y, x)
    places = _along(out if probabilities else out[None], axis)
    plan = plan or plan_slices(found, values, slices.shape[2:], out.nbytes, inference)

    def put(index: slice, rows: slice, logits: Tensor) -> None:
        made = probabilities_of(logits) if probabilities else decide(logits)[:, None]
        places[index, :, rows] = made.numpy()

    def run(x: Tensor) -> Tensor:
        return _logits(network, x.to(device), precision, inference.flips)

    if plan.at_once:
        for start in range(0, len(slices), plan.at_once):
            index = slice(start, min(start + plan.at_once, len(slices)))
            images = np.stack([normalise(one, list(intensities)) for one in slices[index]])
            put(index, slice(None), _padded(run, torch.from_numpy(images), found.stride).cpu())
        return out
    for number, one in enumerate(slices):
        for rows, core, band in _bands(slices.shape[2:], plan, inference.overlap):
            image = torch.from_numpy(normalise(one[:, rows], list(intensities)))[None]
            put(slice(number, number + 1), band, _slide(run, image, plan, inference.overlap, device)[:, :, core])
    return out


def _along(values: NDArray, axis: int | None) -> NDArray:
    """(C, *size) → a view (slices, C, y, x)."""
    return values[None] if axis is None else np.moveaxis(values, 1 + axis, 0)


def decide(logits: Tensor) -> Tensor:
    """Logits (N, 1 or K, *size) → class indices uint8 (N, *size): above probability 0.5, or the largest."""
    if logits.shape[1] == 1:
        return (logits[:, 0] > 0).to(torch.uint8)
    return logits.argmax(dim=1).to(torch.uint8)


def probabilities_of(logits: Tensor) -> Tensor:
    """Logits (N, 1 or K, *size) → the foreground's probability, or each class's."""
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=1)


def plan_slices(found: Footprint, values: NDArray, plane: Sequence[int], out_bytes: int, inference: Inference) -> Plan:
    """What fits into `inference.memory` beside the scan and what is made of it.

    Raises:
        InputError: not even the smallest window.
    """
    channels, pixels = values.shape[0], math.prod(plane)
    budget = inference.memory * _GIB - _PROCESS - values.nbytes - 2 * out_bytes
    a_pixel = 4 * (found.floats + 3 * channels + 4 * found.logits)
    if (at_once := int(budget // (a_pixel * max(pixels, found.stride**2)))) > 0:
        return Plan(min(at_once, _BATCH), 0, 0, 0)
    window = inference.window
    while True:
        # a quarter for a band of the slice: its values and their normalisation, its scores, their weights and decisions
        row_of_windows = 4 * (4 * channels + 2 * found.logits + 4) * window * plane[1]
        rows = int(budget / 4 // row_of_windows)
        windows = int(budget * 3 / 4 // (a_pixel * window**2))
        if windows and rows >= 4:
            return Plan(0, window, min(windows, _WINDOWS), rows)
        if window // 2 < max(_SMALLEST_WINDOW, 2 * found.stride):
            break
        window //= 2
    needed = (_PROCESS + values.nbytes + 2 * out_bytes + max(4 / 3 * a_pixel * window**2, 16 * row_of_windows)) / _GIB
    raise InputError(
        f"memory={inference.memory:g} GiB: too little for a scan of {' × '.join(map(str, values.shape))} {values.dtype} with this "
        f"network. Set at least --memory {math.ceil(needed * 10) / 10:g}."
    )


_footprints: WeakKeyDictionary[nn.Module, Footprint] = WeakKeyDictionary()  # one forward pass each, not one a scan


@torch.no_grad()
def footprint(network: nn.Module, channels: int, device: torch.device) -> Footprint:
    """Measure a network, in evaluation mode, by what its layers say of a small image."""
    if (known := _footprints.get(network)) is not None:
        return known
    largest, smallest = 0, _PROBE

    def look(layer: nn.Module, given: tuple[Any, ...], made: Any) -> None:
        nonlocal largest, smallest
        tensors = [one for one in (*given, made) if isinstance(one, Tensor) and one.ndim == 4]
        largest = max(largest, sum(one.numel() for one in tensors))
        smallest = min([smallest, *(max(one.shape[2:]) for one in tensors if max(one.shape[2:]) > 1)])

    hooks = [layer.register_forward_hook(look) for layer in network.modules() if not list(layer.children())]
    try:
        logits = network(torch.zeros(1, channels, _PROBE, _PROBE, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    found = Footprint(_ALIVE * largest / _PROBE**2, logits.shape[1], _PROBE // smallest)
    _footprints[network] = found
    return found


@torch.no_grad()
def _logits(network: nn.Module, x: Tensor, precision: Precision, flips: bool) -> Tensor:
    """(N, C, y, x) → float32 (N, K, y, x)."""
    autocast = torch.autocast(x.device.type, _DTYPES[precision]) if precision in _DTYPES else contextlib.nullcontext()
    mirrored: tuple[tuple[int, ...], ...] = ((), (2,), (3,), (2, 3)) if flips else ((),)
    total: Tensor | None = None
    for dims in mirrored:
        with autocast:
            logits = network(x.flip(dims).contiguous(memory_format=torch.channels_last))
        logits = logits.float().flip(dims)
        total = logits if total is None else total.add_(logits)
    assert total is not None
    return total.div_(len(mirrored)) if flips else total


def _padded(run: Callable[[Tensor], Tensor], images: Tensor, stride: int) -> Tensor:
    """Images that the coarsest level would see as one position, which has no variance to normalise by, are continued."""
    height, width = images.shape[2:]
    if max(height, width) > stride:
        return run(images)
    right, below = stride + 1 - width, stride + 1 - height
    return run(F.pad(images, (0, right, 0, below), mode="replicate"))[:, :, :height, :width]


def _slide(run: Callable[[Tensor], Tensor], image: Tensor, plan: Plan, overlap: float, device: torch.device) -> Tensor:
    """(1, C, y, x) → blended logits (1, K, y, x) on the CPU."""
    from monai.inferers import sliding_window_inference  # seconds and half a GiB, for large images only

    window = [min(plan.window, length) for length in image.shape[2:]]
    cpu = torch.device("cpu")
    logits = sliding_window_inference(image, window, plan.windows, run, overlap, "gaussian", sw_device=device, device=cpu)
    assert isinstance(logits, Tensor)
    return logits


def _bands(plane: Sequence[int], plan: Plan, overlap: float) -> Iterator[tuple[slice, slice, slice]]:
    """Horizontal bands whose scores are those of the whole slice, because they hold every window that touches their core.

    The windows of a band lie where those of the slice lie: each begins with a window, and the last one ends with the slice.
    Yields a band's rows, its core in the band, and its core in the slice. The cores make up the slice.
    """
    height = plane[0]
    window = min(plan.window, height)
    step = window if window == height else max(1, int(window * (1 - overlap)))  # as MONAI does
    starts = [*range(0, height - window, step), height - window]
    first, done = 0, 0
    while done < height:
        last = max(first + plan.rows, next(i for i, start in enumerate([*starts, height]) if start > done))
        last = min(last, len(starts))  # one beyond the band's last window
        core_end = starts[last] if last < len(starts) else height
        rows = slice(starts[first], starts[last - 1] + window)
        yield rows, slice(done - rows.start, core_end - rows.start), slice(done, core_end)
        done = core_end
        first = sum(start + window <= done for start in starts)
