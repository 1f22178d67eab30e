"""A segmenter with the layer by which it is explained: reading, predicting, and the map of one region of a scan."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from finetune.evaluation.overlay import grey_picture
from finetune.explanation.gradcam import (
    Layer,
    Tiling,
    default_layer,
    describe_layers,
    grad_cam,
    layers_of,
    share_inside,
    tile,
)
from finetune.explanation.heatmap import heat_picture
from finetune.explanation.request import ExplainRequest
from finetune.inference.window import Footprint, Inference, footprint, plan_slices, predict_values
from resunet.checkpoint import ModelConfig, model_folder
from resunet.data.cases import Case, LoadedCase, load_cases, refuse_images, take_slice
from resunet.ensemble import Ensemble
from resunet.errors import InputError
from resunet.model import Segmenter, load_finetuned
from resunet.runtime import normalise, remove_objects

_BACKWARD = 2.5  # times the values that are alive at the peak of a forward pass: a backward pass keeps them
WHOLE, PREDICTED = "whole image", "predicted region"

Region = NDArray[np.bool_]


@dataclass(frozen=True)
class Explainer:
    """A segmenter, and the layer by which it is explained."""

    model: Segmenter
    config: ModelConfig
    layer: Layer
    device: torch.device
    inference: Inference

    @property
    def whole(self) -> bool:
        """The network sees volumes as they are; targets are the same, a class or a lesion within a slice."""
        return self.config.architecture.spatial_dims == 3

    @property
    def classes(self) -> list[str]:
        assert self.config.classes is not None
        return list(self.config.classes.values())

    def load(self, case: Case) -> LoadedCase:
        classes = self.config.classes if case.mask is not None else None
        loaded = load_cases([case], self.config.input_channels, self.config.normalisation, classes, self.config.ignore)
        refuse_images(loaded, self.config.architecture.spatial_dims)
        return loaded[0]

    def predict(self, case: LoadedCase) -> NDArray[np.uint8]:
        """As evaluation judges it: a lesion that post-processing removed is missed."""
        found = predict_values(self.model, case.values, case.axis, case.intensities, self.device, inference=self.inference)
        return remove_objects(found, self.config.object_rules())

    def tiling(self, case: LoadedCase) -> Tiling | None:
        """The windows of inference; None where a slice's backward pass fits into `inference.memory` whole."""
        forward = footprint(self.model, case.values.shape[0], self.device)
        plane = [n for axis, n in enumerate(case.size) if self.whole or axis != case.axis]
        backward = Footprint(_BACKWARD * forward.floats, forward.logits, forward.stride)
        plan = plan_slices(backward, case.values, plane, 4 * math.prod(plane), self.inference)
        return None if plan.at_once else tile(plane, plan.window, self.inference.overlap, self.device)

    def seen(self, case: LoadedCase, index: int, region: Region) -> tuple[Tensor, Region]:
        """What the network sees, slice `index` or the volume, and a region of the slice in it.

        What the coarsest level would see as one position is continued, as in prediction.
        """
        if self.whole:
            assert case.axis is not None
            values, wanted = normalise(case.values, case.intensities), np.zeros(case.size, bool)
            np.moveaxis(wanted, case.axis, 0)[index] = region
        else:
            values, wanted = case.image_slice(index), region
        image = torch.from_numpy(values).to(self.device)
        least = footprint(self.model, len(image), self.device).stride + 1
        if max(wanted.shape) >= least:
            return image, wanted
        beyond = [(0, least - n) for n in wanted.shape]
        sides = [side for pair in reversed(beyond) for side in pair]  # F.pad begins with the last axis
        return F.pad(image[None], sides, mode="replicate")[0], np.pad(wanted, beyond)

    def entry(
        self,
        case: LoadedCase,
        predicted: NDArray[np.uint8],
        index: int,
        class_index: int,
        region: Region,
        target: str,
        tiling: Tiling | None,
        close_up: bool = False,
    ) -> tuple[dict[str, Any], NDArray[np.uint8]]:
        """What explain.json says of one map, and its picture."""
        image, wanted = self.seen(case, index, region)
        found = grad_cam(self.model, self.layer, image, class_index, wanted, tiling)
        heat = found.heat[tuple(slice(n) for n in (case.size if self.whole else region.shape))]
        if self.whole:
            assert case.axis is not None
            heat = np.moveaxis(heat, case.axis, 0)[index]
        here = take_slice(predicted, case.axis, index) == class_index
        truth = case.label_slice(index) == class_index if case.labels is not None else None
        name = self.classes[class_index]
        title = f"{name}: {target}, {int(region.sum()):,} pixels; layer {self.layer.name}"
        picture = heat_picture(grey_picture(case, index), heat, here, truth, title, region if close_up else None)
        return {
            "id": case.case.id,
            "slice": None if case.axis is None else index,
            "layer": self.layer.name,
            "class": name,
            "target": target,
            "pixels": int(region.sum()),
            "mean_logit": found.mean_logit,
            "share_inside": share_inside(heat, region) if target != WHOLE else None,
            "share_of_image": float(region.mean()),
            "largest": float(heat.max()),
            "windows": 1 if tiling is None else len(tiling.places),
        }, picture


def open_explainer(model: Path, request: ExplainRequest) -> Explainer:
    """The segmenter of a run or a model directory, ready for `request`.

    Raises:
        InputError: no segmenter with classes, or no such layer.
    """
    folder = model_folder(model)
    network, config = load_finetuned(folder)
    if isinstance(network, Ensemble):
        raise InputError(
            f"{folder}: is an ensemble, and Grad-CAM is of the layers of one network. Explain a member: of a cross-validation its "
            "fold-0, fold-1 and so on, else one of the runs that the ensemble was made of."
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network.to(device).requires_grad_(False)
    layers = layers_of(network, config.architecture.in_channels)
    if request.layer is not None and request.layer not in layers:
        raise InputError(
            f"--layer {request.layer}: is no layer of this network. Its layers, and what follows a dot is inside:\n"
            f"{describe_layers(layers)}\nFor example --layer {default_layer(layers).name}, the default."
        )
    layer = default_layer(layers) if request.layer is None else layers[request.layer]
    return Explainer(network, config, layer, device, request.inference)
