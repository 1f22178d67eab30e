"""`resunet explain`: Grad-CAM maps of a segmenter, of its predictions and of the lesions that it got wrong."""

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from finetune.evaluation.overlay import grey_picture
from finetune.evaluation.targets import targets_of
from finetune.evaluation.wrong import Kind, WrongLesion, wrong_lesions
from finetune.explanation.gradcam import (
    Layer,
    Tiling,
    cascade,
    default_layer,
    describe_layers,
    grad_cam,
    layers_of,
    share_inside,
    tile,
)
from finetune.explanation.heatmap import heat_picture
from finetune.explanation.page import sanity_table, write_explain_page
from finetune.inference.window import Footprint, Inference, footprint, plan_slices, predict_values
from resunet.checkpoint import ModelConfig, model_folder
from resunet.config import Frozen
from resunet.data.cases import Case, LoadedCase, load_cases, refuse_images, take_slice
from resunet.data.identity import load_salt
from resunet.data.images import READABLE, stem_of, suffix_of
from resunet.ensemble import Ensemble
from resunet.errors import InputError
from resunet.files import folder_aside
from resunet.inference.inputs import list_inputs
from resunet.model import Segmenter, load_finetuned
from resunet.progress import progress, say
from resunet.runtime import normalise, remove_objects

SCHEMA_VERSION = 1
_BACKWARD = 2.5  # times the values that are alive at the peak of a forward pass: a backward pass keeps them
_SANITY_MAPS = 8
WHOLE, PREDICTED = "whole image", "predicted region"
LESION = {"missed": "missed lesion", "false": "false lesion"}

Region = NDArray[np.bool_]
Wrong = dict[Kind, list[tuple[int, WrongLesion]]]  # with the number of their case


class ExplainRequest(Frozen):
    """What `resunet explain` takes beside the model."""

    inputs: tuple[Path, ...] = Field(min_length=1)
    layer: str | None = None
    class_name: str | None = Field(None, description="null: every foreground class that is predicted")
    masks: Path | None = Field(None, description="masks with the inputs' names; null: masks/ beside an input folder's images/")
    slices: int | None = Field(3, ge=1, description="of a volume, those with most of the class; null: all")
    lesions: int = Field(12, ge=0, description="missed lesions that are explained, the largest first, and as many false ones")
    sanity: bool = Field(False, description="compare the maps with those of randomised weights")
    names: Literal["hash", "keep"] = "hash"
    salt_file: Path | None = None
    inference: Inference = Inference()


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


def explain(model: Path, request: ExplainRequest, out: Path) -> Path:
    """Explain a segmenter on scans: overlays/, lesions/, explain.json and explain.html in a new folder; `out`.

    A slice in which a class is not predicted is explained by the class's logits in the whole image, and says so, where the
    class or the slice was asked for or nothing at all is predicted in the scan; else it is left out.

    Raises:
        InputError: the model, an input, its mask, the layer, the class or `out`.
    """
    if out.exists():
        raise InputError(f"--out {out}: exists already. Name another folder, or delete it.")
    explainer = open_explainer(model, request)
    classes = _classes(explainer.classes, explainer.config.regions or (), request.class_name)
    cases, notes = _cases(request, explainer.config)
    notes += _of_classes(explainer.config)
    for note in notes:
        say(note)
    with folder_aside(out) as aside:
        entries, wrong, checks = _explain_cases(explainer, cases, classes, request, aside)
        record: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "layer": explainer.layer.name,
            "layer_stride": explainer.layer.stride,
            "notes": notes,
            "cases": entries,
            "lesions_found": {kind: len(found) for kind, found in wrong.items()} if any(case.mask for case in cases) else None,
            "lesions": _explain_lesions(explainer, cases, wrong, request.lesions, aside),
            "sanity": _summary(checks) if request.sanity else None,
        }
        (aside / "explain.json").write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
        write_explain_page(aside, record)
    if request.sanity:
        for row in sanity_table(record["sanity"]):
            say("  ".join(f"{cell:<20}" for cell in row).rstrip())
    return out


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


def chosen_slices(there: NDArray[np.bool_], axis: int | None, most: int | None) -> list[int]:
    """The slices with most of a class, in order, the middle one where there is none of it; all for None; 0 of an image."""
    if axis is None:
        return [0]
    counts = there.sum(axis=tuple(i for i in range(there.ndim) if i != axis))
    if most is None:
        return list(range(len(counts)))
    order = [int(i) for i in np.argsort(-counts, kind="stable")[:most] if counts[i]]
    return sorted(order) or [len(counts) // 2]


def _explain_cases(
    explainer: Explainer, cases: Sequence[Case], classes: Sequence[int], request: ExplainRequest, aside: Path
) -> tuple[list[dict[str, Any]], Wrong, list[dict[str, float | None]]]:
    """What explain.json says of the cases, the lesions that are wrong, and checks of the first maps."""
    (aside / "overlays").mkdir()
    entries: list[dict[str, Any]] = []
    wrong: Wrong = {"missed": [], "false": []}
    checks: list[dict[str, float | None]] = []
    for number in progress(range(len(cases)), len(cases), "explain"):
        case = explainer.load(cases[number])
        predicted = explainer.predict(case)
        tiling = explainer.tiling(case)
        asked = request.class_name is not None or not np.isin(predicted, classes).any()
        for class_index in classes:
            there = predicted == class_index
            if not there.any() and not asked:
                continue
            for index in chosen_slices(there, case.axis, request.slices):
                region = np.take(there, index, axis=case.axis) if case.axis is not None else there
                wanted, target = (region, PREDICTED) if region.any() else (np.ones_like(region), WHOLE)
                entry, picture = explainer.entry(case, predicted, index, class_index, wanted, target, tiling)
                name = f"overlays/{len(entries) + 1:04}-{_file_name(case, index)}.png"
                Image.fromarray(picture).save(aside / name)
                entries.append(entry | {"picture": name})
                if request.sanity and target == PREDICTED and entry["largest"] > 0 and len(checks) < _SANITY_MAPS:
                    image, wanted = explainer.seen(case, index, region)
                    checks.append(
                        cascade(explainer.model, explainer.layer, image, class_index, wanted, tiling, seed=len(checks))
                    )
        if case.labels is not None:
            for one in wrong_lesions(case.labels, predicted, case.axis):
                if one.class_index in classes:
                    wrong[one.kind].append((number, one))
    return entries, wrong, checks


def _explain_lesions(explainer: Explainer, cases: Sequence[Case], wrong: Wrong, most: int, aside: Path) -> list[dict[str, Any]]:
    """The largest missed and false lesions; missed ones first, by rank. Each scan is read and predicted once more."""
    ranked = {kind: list(enumerate(sorted(found, key=lambda pair: -pair[1].voxels)[:most], 1)) for kind, found in wrong.items()}
    by_case: dict[int, list[tuple[int, WrongLesion]]] = {}
    for found in ranked.values():
        for rank, (number, lesion) in found:
            by_case.setdefault(number, []).append((rank, lesion))
    if by_case:
        (aside / "lesions").mkdir()
    entries = []
    for number in progress(sorted(by_case), len(by_case), "explain lesions"):
        case = explainer.load(cases[number])
        predicted = explainer.predict(case)
        tiling = explainer.tiling(case)
        for rank, lesion in by_case[number]:
            region = lesion.region(take_slice(predicted, case.axis, lesion.index).shape)
            target = LESION[lesion.kind]
            entry, picture = explainer.entry(case, predicted, lesion.index, lesion.class_index, region, target, tiling, True)
            name = f"lesions/{lesion.kind}-{rank:02}-{lesion.voxels}-voxels-{_file_name(case, lesion.index)}.png"
            Image.fromarray(picture).save(aside / name)
            entries.append({"kind": lesion.kind, "rank": rank, "voxels": lesion.voxels, **entry, "picture": name})
    return sorted(entries, key=lambda one: (one["kind"] != "missed", one["rank"]))


def _summary(checks: Sequence[dict[str, float | None]]) -> list[dict[str, Any]]:
    """A row a stage, head first: the mean rank correlation with the trained maps, over those that are not empty."""
    rows = []
    for stage in checks[0] if checks else ():
        found = [one[stage] for one in checks]
        values = [value for value in found if value is not None]
        mean = math.fsum(values) / len(values) if values else None
        rows.append(
            {"randomised_from_head_to": stage, "rank_correlation": mean, "maps": len(found), "empty": len(found) - len(values)}
        )
    return rows


def _classes(names: Sequence[str], regions: Collection[str], wanted: str | None) -> list[int]:
    if wanted is None:
        return list(range(1, len(names)))
    if wanted not in names:
        of_class = f" {wanted!r} is a region: explain one of its classes." if wanted in regions else ""
        raise InputError(f"--class {wanted}: is no class of this model.{of_class} Its classes: {', '.join(names)}.")
    return [list(names).index(wanted)]


def _of_classes(config: ModelConfig) -> list[str]:
    """What a reader has to know of a model that was trained on regions."""
    if config.regions is None:
        return []
    assert config.classes is not None
    described = targets_of(config.classes, config.regions).described()
    return [
        f"The model was trained on regions ({described}). Maps and lesions here are of its classes, one at a time; what is taken "
        "for another class of the same region counts as missed and as false here, and as right in the evaluation."
    ]


def _cases(request: ExplainRequest, config: ModelConfig) -> tuple[list[Case], list[str]]:
    """The inputs as cases, with ids that a record may show and masks where there are any; and what a reader has to know."""
    inputs = list_inputs(request.inputs, config.input_channels)
    for fault in inputs.faults:
        say(fault)
    notes = [f"{len(inputs.faults)} inputs cannot be read and are left out."] if inputs.faults else []
    salt = load_salt(request.salt_file)
    masks = _masks(request)
    cases = []
    for one in inputs.scans:
        name = one.name if request.names == "keep" else one.case.id or salt.identify("file", one.name)
        cases.append(replace(one.case, id=name, mask=masks.get(one.name, one.case.mask)))
    bare = sum(case.mask is None for case in cases)
    if request.masks is not None and bare == len(cases):
        raise InputError(
            f"--masks {request.masks}: holds no mask with the name of an input, such as {inputs.scans[0].name}.png."
        )
    if 0 < bare < len(cases):
        notes.append(f"{bare} of {len(cases)} inputs have no mask: their lesions are not looked at.")
    return cases, notes


def _masks(request: ExplainRequest) -> dict[str, Path]:
    """Name of an input → its mask."""
    folders = [root / "masks" for root in request.inputs if (root / "images").is_dir() and (root / "masks").is_dir()]
    if request.masks is not None:
        if not request.masks.is_dir():
            raise InputError(f"--masks {request.masks}: no such folder. Give one with masks that are called as the inputs.")
        folders = [request.masks]
    return {
        str(path.parent.relative_to(folder) / stem_of(path)): path
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file() and suffix_of(path) in READABLE and not path.name.startswith(".")
    }


def _file_name(case: LoadedCase, index: int) -> str:
    name = case.case.id.replace("/", "_")
    return name if case.axis is None else f"{name}-slice{index}"
