"""Grad-CAM of a segmenter: where in the image a layer finds what a class is decided by.

Selvaraju et al. 2017 (arXiv 1610.02391), with the target of Seg-Grad-CAM (Vinogradova et al. 2020, arXiv 2002.11434): the sum
of a class's logits over a region. In a large image the logits are those that inference stitches from windows, and the maps of
the windows are stitched with the same weights; the weight of a channel is one for all windows, so that their maps compare.

One thing is added: where the target does not depend on a position, because no gradient reaches it, the map is 0. A classifier
has no such place; of a region of a segmentation the plain map lights up objects far outside its receptive field.
"""

import copy
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from resunet.encoder import initialise, initialise_head
from resunet.layout import spatial_dims_of

_PROBE = {2: (128, 128), 3: (64, 64, 64)}  # larger than any stride
_DEFAULT_STRIDE = 4
_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm)
_SMOOTH = {2: "bilinear", 3: "trilinear"}

Place = tuple[slice, ...]


@dataclass(frozen=True)
class Layer:
    """A module that gives one map a forward pass: (N, channels, *ceil(size / stride))."""

    name: str
    channels: int
    stride: int


@dataclass(frozen=True)
class Tiling:
    """The windows that inference cuts an image into, all of one size, and the weight (*size) of each one's pixels."""

    places: Sequence[Place]
    weight: Tensor


@dataclass(frozen=True)
class Explanation:
    """What a layer says of a target.

    heat: (*size) of the image, not negative, in no unit: compare within a map.
    mean_logit: of the class over the region.
    """

    heat: NDArray[np.float32]
    mean_logit: float


def layers_of(model: nn.Module, in_channels: int) -> dict[str, Layer]:
    """The layers that can be explained, in order: every module that gives one feature map of more than one pixel."""
    found: dict[str, list[object]] = {}
    device, probe = next(model.parameters()).device, _PROBE[spatial_dims_of(model)]

    def record(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: found.setdefault(name, []).append(output)

    modules = [(name, module) for name, module in model.named_modules() if name and not isinstance(module, nn.Identity)]
    handles = [module.register_forward_hook(record(name)) for name, module in modules]
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, in_channels, *probe, device=device))
    finally:
        for handle in handles:
            handle.remove()
    layers = {}
    for name, _ in modules:  # as they are declared: a level before its units
        outputs = found.get(name, [])
        if len(outputs) != 1 or not isinstance(outputs[0], Tensor) or outputs[0].ndim != 2 + len(probe):
            continue
        if min(outputs[0].shape[2:]) > 1:
            layers[name] = Layer(name, outputs[0].shape[1], probe[0] // outputs[0].shape[2])
    return layers


def default_layer(layers: dict[str, Layer]) -> Layer:
    """The outermost layer at a quarter of the size, of several the last: of a U-Net the decoder's stage there.

    Finer stages repeat the prediction. The bottleneck is the usual choice, but in Res-UNets of five levels its mean gradient
    often speaks against the class, and its map is 0: of two models of brain_tumor_128 in 50 of 50 slices, of one of neu_seg in
    21 of 51, where the decoder's stage at a quarter was empty in 17 and 7.
    """
    stride = max(layer.stride for layer in layers.values() if layer.stride <= _DEFAULT_STRIDE)
    found = [one for one in layers.values() if one.stride == stride]
    depth = min(one.name.count(".") for one in found)
    return [one for one in found if one.name.count(".") == depth][-1]


def class_logits(logits: Tensor, index: int) -> Tensor:
    """(N, 1 or K, *size) → the logits (N, *size) of a class; the one logit of two classes is against the background."""
    if logits.shape[1] == 1:
        return logits[:, 0] if index else -logits[:, 0]
    return logits[:, index]


def grad_cam(
    model: nn.Module, layer: Layer, image: Tensor, index: int, region: NDArray[np.bool_], tiling: Tiling | None = None
) -> Explanation:
    """Explain the logits of class `index` over a region.

    Args:
        model: in evaluation mode. Set its parameters' requires_grad to False, and no more memory is used than from the layer on.
        image: (C, *size), normalised, on the model's device: a slice, or for a 3D network a volume.
        region: (*size), somewhere True.
        tiling: None: the image goes through the network whole.
    """
    assert region.shape == image.shape[1:] and region.any()
    tiling = tiling or _whole(image)
    total = torch.zeros(image.shape[1:], device=image.device)
    for place in tiling.places:
        total[place] += tiling.weight
    wanted = torch.from_numpy(region).to(image.device)
    reached = [place for place in tiling.places if wanted[place].any()]
    channels = torch.zeros(layer.channels, device=image.device)
    score, positions, felt = 0.0, 0, []
    for place in reached:
        with tapped(model, layer) as tap:
            logits = class_logits(model(image[:, *place][None]), index)[0]
        target = (logits * wanted[place] * tiling.weight / total[place]).sum()
        (gradient,) = torch.autograd.grad(target, tap.activations)
        channels += gradient[0].flatten(1).sum(dim=1)
        score, positions = score + float(target.detach()), positions + gradient[0, 0].numel()
        felt.append((gradient[0] != 0).any(dim=0))
    heat = torch.zeros_like(total)
    for place, depends in zip(reached, felt, strict=True):
        if len(reached) > 1:  # the activations of one window are at hand, those of all may be too many to keep
            with torch.no_grad(), tapped(model, layer) as tap:
                model(image[:, *place][None])
        activations = tap.activations.detach()[0]
        coarse = F.relu(torch.einsum("c,c...->...", channels / positions, activations)) * depends
        heat[place] += _enlarge(coarse, layer.stride, tiling.weight.shape) * tiling.weight
    return Explanation((heat / total).cpu().numpy(), score / int(region.sum()))


def tile(size: Sequence[int], window: int, overlap: float, device: torch.device) -> Tiling:
    """The windows and the Gaussian weights of MONAI's sliding window, which inference uses, for an image of `size`."""
    from monai.data.utils import compute_importance_map, dense_patch_slices  # seconds, for large images only

    sides = [min(window, n) for n in size]
    steps = [side if side == n else max(1, int(side * (1 - overlap))) for side, n in zip(sides, size, strict=True)]
    return Tiling(
        dense_patch_slices(tuple(size), tuple(sides), tuple(steps)),
        compute_importance_map(tuple(sides), mode="gaussian", device=device),
    )


@dataclass
class _Tap:
    """What went through a layer: a leaf of the graph, from which on gradients are kept."""

    activations: Tensor = field(default_factory=lambda: torch.empty(0))


@contextmanager
def tapped(model: nn.Module, layer: Layer) -> Iterator[_Tap]:
    """Within the block a forward pass leaves the layer's output in the tap, cut off from all that comes before it."""
    tap = _Tap()

    def keep(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        tap.activations = output.detach().requires_grad_()
        return tap.activations.clone()  # an in-place ReLU may follow

    handle = model.get_submodule(layer.name).register_forward_hook(keep)
    try:
        yield tap
    finally:
        handle.remove()


def share_inside(heat: NDArray[np.float32], region: NDArray[np.bool_]) -> float | None:
    """The share of a map's sum that lies in a region; None of a map that is 0."""
    total = float(heat.sum(dtype=np.float64))
    return float(heat[region].sum(dtype=np.float64)) / total if total > 0 else None


def rank_correlation(first: NDArray[np.float32], second: NDArray[np.float32]) -> float | None:
    """Spearman's, over the pixels where one of two maps is not 0; None where one of them is constant.

    What the region cannot depend on is 0 in both, whatever the weights: it would pass for agreement.
    """
    somewhere = (first != 0) | (second != 0)
    first, second = first[somewhere], second[somewhere]
    if not len(first) or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(spearmanr(first, second).statistic)


def randomised(model: nn.Module, seed: int) -> Iterator[tuple[str, nn.Module]]:
    """Cascading randomisation (Adebayo et al. 2018, arXiv 1810.03292, section 4.1): a map that explains must change with it.

    Yields a stage's name and a copy of the model in which it and all stages after it have fresh weights; from the head down
    to the first level. The copy goes on changing.
    """
    changing = copy.deepcopy(model)
    stages = dict.fromkeys(_stage(name) for name, _ in model.named_parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for stage in reversed(stages):
            module = changing.get_submodule(stage)
            initialise(module)
            if stage.split(".")[0] == "head":
                initialise_head(module)
            for one in module.modules():
                if isinstance(one, _NORMS):
                    one.reset_parameters()
            yield stage, changing


def cascade(
    model: nn.Module,
    layer: Layer,
    image: Tensor,
    index: int,
    region: NDArray[np.bool_],
    tiling: Tiling | None = None,
    seed: int = 0,
) -> dict[str, float | None]:
    """Stage → rank correlation of the model's map with that of the model randomised so far; None where that map is empty.

    Arguments as `grad_cam`; the region stays what it is.
    """
    heat = grad_cam(model, layer, image, index, region, tiling).heat
    return {
        stage: rank_correlation(heat, grad_cam(other, layer, image, index, region, tiling).heat)
        for stage, other in randomised(model, seed)
    }


def describe_layers(layers: dict[str, Layer]) -> str:
    """All layers, a line a stage, with what is inside it."""
    inside: dict[str, list[str]] = {}
    for name in layers:
        stage = _stage(name)
        inside.setdefault(stage, [])
        if name != stage:
            inside[stage].append(name.removeprefix(stage))
    lines = []
    for stage, names in inside.items():
        one = layers.get(stage)
        about = f"{stage} (1/{one.stride} of the size, {one.channels} channels)" if one else f"inside {stage}"
        lines.append(f"  {about}" + (f": {' '.join(names)}" if names else ""))
    return "\n".join(lines)


def _stage(name: str) -> str:
    """'encoder.levels.4.0.conv1.weight' → 'encoder.levels.4'; 'head.weight' → 'head'."""
    found = re.match(r"\D+?\.\d+(?=\.|$)", name)
    return found.group() if found else name.split(".")[0]


def _whole(image: Tensor) -> Tiling:
    size = image.shape[1:]
    return Tiling([tuple(slice(0, n) for n in size)], torch.ones(size, device=image.device))


def _enlarge(coarse: Tensor, stride: int, size: Sequence[int]) -> Tensor:
    """A layer's map at the size of its input: linear, each position the middle of the pixels it is decoded to."""
    grown = F.interpolate(coarse[None, None], scale_factor=float(stride), mode=_SMOOTH[len(size)], align_corners=False)[0, 0]
    assert all(math.ceil(n / stride) == small for n, small in zip(size, coarse.shape, strict=True)), (size, coarse.shape)
    return grown[tuple(slice(n) for n in size)]
