"""From a scan to its classes or their probabilities: whole where memory allows, else by a sliding window.

A 2D network sees a volume slice by slice, a 3D network as it is. The window's scores are blended with Gaussian weights by MONAI's
sliding window. What is blended, over windows and over flips, are logits. All of it is settings and the scan's size: nothing depends
on how much memory happens to be free, so that evaluation and prediction, which both come here, agree.
"""

import contextlib
import itertools
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

from resunet.blocks import crop_to
from resunet.config import Frozen, Precision
from resunet.errors import InputError
from resunet.layout import channels_last, spatial_dims_of
from resunet.runtime import Intensity, normalise

_GIB = 2**30
_BATCH = 16  # slices at once
_WINDOWS = 4  # windows at once
# What a network's footprint is measured with: long in one direction, so that the coarsest level has several positions.
_PROBE = {2: (128, 128), 3: (16, 16, 128)}
_SMALLEST_WINDOW = {2: 64, 3: 32}
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
    window: int = Field(512, ge=64, description="pixels a side of the sliding window, at most, for what does not fit whole")
    overlap: float = Field(0.25, ge=0, le=0.75, description="share of a window that the next one sees again")
    flips: bool = Field(
        False, description="test-time augmentation: the mean over all mirror images, 4 of a slice, 8 of a volume"
    )


class Footprint(NamedTuple):
    """What a network needs. floats: float32 values a pixel of a forward pass at its peak; stride: of its coarsest level."""

    floats: float
    logits: int
    stride: int


class Plan(NamedTuple):
    """How one scan is predicted. at_once: slices, or 1 for a 3D network's volume; 0 where not even one fits; else by windows."""

    at_once: int
    window: int
    windows: int
    rows: int  # of windows along the first axis, whose scores are held together


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
        axis: of size, along which a volume is sliced for a 2D network; None for an image.
        plan: instead of the one that `inference.memory` allows.

    Raises:
        InputError: `inference.memory` is too little for this scan and network; an image, for a 3D network.
    """
    network.eval()
    if spatial_dims_of(network) == 3:
        axis = None
        refuse_image(values.shape[1:])
    found = footprint(network, values.shape[0], device)
    size = values.shape[1:]
    out = np.empty((found.logits, *size), np.float32) if probabilities else np.empty(size, np.uint8)
    slices = _along(values, axis)  # (slices, C, y, x), or (1, C, z, y, x)
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
    """(C, *size) → a view (slices, C, y, x), or without an axis (1, C, *size)."""
    return values[None] if axis is None else np.moveaxis(values, 1 + axis, 0)


def decide(logits: Tensor) -> Tensor:
    """Logits (N, 1 or K, *size) → class indices uint8 (N, *size): above probability 0.5, or the largest."""
    if logits.shape[1] == 1:
        return (logits[:, 0] > 0).to(torch.uint8)
    return logits.argmax(dim=1).to(torch.uint8)


def probabilities_of(logits: Tensor) -> Tensor:
    """Logits (N, 1 or K, *size) → the foreground's probability, or each class's."""
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=1)


def refuse_image(size: Sequence[int]) -> None:
    """Raises InputError unless `size` is a volume's."""
    if len(size) != 3:
        raise InputError(
            f"is an image of {' × '.join(map(str, size))} pixels; this model is of volumes (spatial_dims=3). Give it volumes, or "
            "use a model with spatial_dims=2, which takes both."
        )


def plan_slices(found: Footprint, values: NDArray, plane: Sequence[int], out_bytes: int, inference: Inference) -> Plan:
    """What fits into `inference.memory` beside the scan and what is made of it.

    Args:
        plane: what the network sees at once: (y, x) of a slice, or (z, y, x).

    Raises:
        InputError: not even the smallest window.
    """
    channels, pixels, dims = values.shape[0], math.prod(plane), len(plane)
    budget = inference.memory * _GIB - _PROCESS - values.nbytes - 2 * out_bytes
    a_pixel = 4 * (found.floats + 3 * channels + 4 * found.logits)
    if (at_once := int(budget // (a_pixel * max(pixels, found.stride**dims)))) > 0:
        return Plan(min(at_once, _BATCH), 0, 0, 0)
    # of a band: its values and their normalisation, its scores, their weights and decisions
    row = 4 * (4 * channels + 2 * found.logits + 4) * math.prod(plane[1:])
    enough = math.ceil(1 / (1 - inference.overlap)) if dims == 3 else 4  # windows that a row can be in; in 2D more cost little
    window = inference.window
    while True:
        side, step = min(window, plane[0]), _step(window, plane[0], inference.overlap)
        along = 1 + math.ceil((plane[0] - side) / step)
        fewest = min(enough, along)
        a_window = a_pixel * math.prod(min(window, n) for n in plane)
        for_band = budget / 4 if dims == 2 else budget - a_window
        rows = min(along, 1 + int((for_band / row - side) // step))
        windows = int((budget - row * (side + (rows - 1) * step)) // a_window)
        if windows >= 1 and rows >= fewest:
            return Plan(0, window, min(windows, _WINDOWS), rows)
        if window // 2 < max(_SMALLEST_WINDOW[dims], 2 * found.stride):
            break
        window //= 2
    a_band = row * (side + (fewest - 1) * step)
    together = max(4 * a_band, a_band + a_window) if dims == 2 else a_band + a_window
    needed = (_PROCESS + values.nbytes + 2 * out_bytes + together) / _GIB
    raise InputError(
        f"memory={inference.memory:g} GiB: too little for a scan of {' × '.join(map(str, values.shape))} {values.dtype} with this "
        f"network. Set at least --memory {math.ceil(needed * 10) / 10:g}."
    )


def _step(window: int, length: int, overlap: float) -> int:
    """From one window to the next, as MONAI has it."""
    return length if window >= length else max(1, int(window * (1 - overlap)))


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


@torch.no_grad()
def _logits(network: nn.Module, x: Tensor, precision: Precision, flips: bool) -> Tensor:
    """(N, C, *size) → float32 (N, K, *size)."""
    autocast = torch.autocast(x.device.type, _DTYPES[precision]) if precision in _DTYPES else contextlib.nullcontext()
    axes = range(2, x.ndim)
    mirrored = [dims for count in range(x.ndim - 1) for dims in itertools.combinations(axes, count)] if flips else [()]
    total: Tensor | None = None
    for dims in mirrored:
        with autocast:
            logits = network(channels_last(x.flip(dims)))
        logits = logits.float().flip(dims)
        total = logits if total is None else total.add_(logits)
    assert total is not None
    return total.div_(len(mirrored)) if flips else total


def _padded(run: Callable[[Tensor], Tensor], images: Tensor, stride: int) -> Tensor:
    """Images that the coarsest level would see as one position, which has no variance to normalise by, are continued."""
    size = images.shape[2:]
    if max(size) > stride:
        return run(images)
    beyond = [side for n in reversed(size) for side in (0, stride + 1 - n)]  # F.pad begins with the last axis
    return crop_to(run(F.pad(images, beyond, mode="replicate")), size)


def _slide(run: Callable[[Tensor], Tensor], image: Tensor, plan: Plan, overlap: float, device: torch.device) -> Tensor:
    """(1, C, *size) → blended logits (1, K, *size) on the CPU."""
    from monai.inferers import sliding_window_inference  # seconds and half a GiB, for large images only

    window = [min(plan.window, length) for length in image.shape[2:]]
    cpu = torch.device("cpu")
    logits = sliding_window_inference(image, window, plan.windows, run, overlap, "gaussian", sw_device=device, device=cpu)
    assert isinstance(logits, Tensor)
    return logits


def _bands(plane: Sequence[int], plan: Plan, overlap: float) -> Iterator[tuple[slice, slice, slice]]:
    """Bands across the first axis whose scores are those of the whole, because they hold every window that touches their core.

    The windows of a band lie where those of the whole lie: each begins with a window, and the last one ends with the whole.
    Yields a band's rows, its core in the band, and its core in the whole. The cores make up the whole.
    """
    height = plane[0]
    window = min(plan.window, height)
    step = _step(window, height, overlap)
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
