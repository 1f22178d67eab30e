"""What `resunet explain` is asked to explain: its request, and the classes, scans and masks that it comes to."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import Field

from finetune.evaluation.targets import targets_of
from finetune.inference.window import Inference
from resunet.checkpoint import ModelConfig
from resunet.config import Frozen
from resunet.data.cases import Case
from resunet.data.identity import load_salt
from resunet.data.images import READABLE, stem_of, suffix_of
from resunet.data.nnunet import is_nnunet
from resunet.errors import InputError
from resunet.inference.inputs import NNUNET_IMAGES, list_inputs
from resunet.progress import say


class ExplainRequest(Frozen):
    """What `resunet explain` takes beside the model."""

    inputs: tuple[Path, ...] = Field(min_length=1)
    layer: str | None = None
    class_name: str | None = Field(None, description="null: every foreground class that is predicted")
    masks: Path | None = Field(
        None, description="masks with the inputs' names; null: masks/ beside an input folder's images/, nnU-Net's labels"
    )
    slices: int | None = Field(3, ge=1, description="of a volume, those with most of the class; null: all")
    lesions: int = Field(12, ge=0, description="missed lesions that are explained, the largest first, and as many false ones")
    sanity: bool = Field(False, description="compare the maps with those of randomised weights")
    names: Literal["hash", "keep"] = "hash"
    salt_file: Path | None = None
    inference: Inference = Inference()


def classes_of(names: Sequence[str], regions: Collection[str], wanted: str | None) -> list[int]:
    """The class that is asked for, or every foreground class: indices.

    Raises:
        InputError: no such class.
    """
    if wanted is None:
        return list(range(1, len(names)))
    if wanted not in names:
        of_class = f" {wanted!r} is a region: explain one of its classes." if wanted in regions else ""
        raise InputError(f"--class {wanted}: is no class of this model.{of_class} Its classes: {', '.join(names)}.")
    return [list(names).index(wanted)]


def remarks_of(config: ModelConfig) -> list[str]:
    """What a reader has to know of a model that was trained on regions."""
    if config.regions is None:
        return []
    assert config.classes is not None
    described = targets_of(config.classes, config.regions).described()
    return [
        f"The model was trained on regions ({described}). Maps and lesions here are of its classes, one at a time; what is taken "
        "for another class of the same region counts as missed and as false here, and as right in the evaluation."
    ]


def cases_of(request: ExplainRequest, config: ModelConfig) -> tuple[list[Case], list[str]]:
    """The inputs as cases, with ids that a record may show and masks where there are any; and what a reader has to know.

    Raises:
        InputError: no inputs, or masks that belong to none of them.
    """
    inputs = list_inputs(request.inputs, config.input_channels)
    for fault in inputs.faults:
        say(fault)
    notes = [f"{len(inputs.faults)} inputs cannot be read and are left out."] if inputs.faults else []
    salt = load_salt(request.salt_file, "--salt-file ")
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
    if bare:
        notes.append(f"{bare} of {len(cases)} inputs have no mask: what is missed or false in them is not looked at.")
    return cases, notes


def _mask_folders(root: Path) -> list[Path]:
    """Where masks of an input lie, if it is a folder with images/, an nnU-Net raw data set or one of its folders of images."""
    if (root / "images").is_dir():
        return [root / "masks"]
    if is_nnunet(root):
        return [root / "labelsTr", root / "labelsTs"]
    return [root.parent / root.name.replace("images", "labels")] if root.name in NNUNET_IMAGES else []


def _masks(request: ExplainRequest) -> dict[str, Path]:
    """Name of an input → its mask."""
    folders = [folder for root in request.inputs for folder in _mask_folders(root.absolute()) if folder.is_dir()]
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
