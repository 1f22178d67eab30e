"""The teacher: a fine-tuned segmenter or ensemble that sees what its student sees, and what it says of that."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from finetune.distillation.losses import Attentive, attention_loss, relative_difference, soft_target_loss
from finetune.inference.window import footprint
from finetune.recipe import FinetuneRecipe
from finetune.settings import DistillationSettings
from resunet.arithmetic import autocast, refuse_without_gpu
from resunet.checkpoint import WEIGHTS, LabelledGroups, model_folder, read_config
from resunet.config import Normalisation, Precision
from resunet.data.evidence import Evidence
from resunet.data.images import channel_count
from resunet.data.leakage import ARCHIVE, read_archive
from resunet.ensemble import Ensemble
from resunet.errors import InputError
from resunet.files import sha256
from resunet.layout import place
from resunet.model import Segmenter, load_finetuned
from resunet.training import sum_over_ranks


@dataclass(frozen=True)
class Teacher:
    """A network in evaluation mode whose parameters have no gradients. precision: it computes in. sha256: of its weights."""

    network: Segmenter
    settings: DistillationSettings
    precision: Precision
    sha256: str

    def terms(
        self, images: Tensor, logits: Tensor, maps: Sequence[Tensor] | None, inside: Tensor, accelerator: Accelerator
    ) -> dict[str, Tensor]:
        """distillation, the weighted sum, and its terms (soft_targets, soft_dice, attention): of the batch of all ranks, float32.

        Args:
            images: (N, C, *size), as the student saw them. logits, maps: what it made of them; maps None without attention.
            inside: (N, *size), the pixels of scans that nobody ignores: probabilities are learned there.
        """
        settings, total = self.settings, partial(sum_over_ranks, accelerator=accelerator)
        with torch.no_grad(), autocast(self.precision, accelerator.device):
            teacher_logits, shown = _seen(self.network, images, maps is not None)
        terms, weights = {}, {}
        if settings.logits_weight:
            terms["soft_targets"] = soft_target_loss(logits, teacher_logits, inside, settings.temperature, total)
            weights["soft_targets"] = settings.logits_weight
        if settings.dice_weight:
            terms["soft_dice"] = relative_difference(logits, teacher_logits, inside, total)
            weights["soft_dice"] = settings.dice_weight
        if maps is not None:
            terms["attention"] = attention_loss(maps, shown, total)
            weights["attention"] = settings.attention_weight
        return {"distillation": torch.stack([weights[name] * term for name, term in terms.items()]).sum()} | terms


def _seen(network: Segmenter, images: Tensor, attention: bool) -> tuple[Tensor, list[Tensor]]:
    """Logits, and with `attention` the maps of the decoder's levels; of an ensemble the means of its members' maps."""
    if not attention:
        return network(images), []
    if isinstance(network, Ensemble):
        answers, shown = zip(*(Attentive(member)(images) for member in network.members), strict=True)
        return network.mean_of(answers), [torch.stack(level).mean(dim=0) for level in zip(*shown, strict=True)]
    logits, maps = Attentive(network)(images)
    assert isinstance(logits, Tensor)
    return logits, maps


def load_teacher(recipe: FinetuneRecipe, device: torch.device) -> Teacher | None:
    """The recipe's teacher on a device; None if it has none.

    Raises:
        InputError: it is no segmenter, or its coarsest level would see a patch as one position.
        EnvironmentFault: fp16 without a GPU.
    """
    if recipe.teacher is None:
        return None
    precision = recipe.distillation.precision or recipe.precision
    refuse_without_gpu("distillation.precision=", precision)
    folder = model_folder(recipe.teacher)
    network, _ = load_finetuned(folder)
    network = place(network, device).requires_grad_(False).eval()
    stride = footprint(network, channel_count(recipe.data.channels), device).stride
    if max(recipe.patch) <= stride:
        raise InputError(
            f"patch={list(recipe.patch)}: the coarsest level of the teacher, 1/{stride} of the size, would see it as one position. "
            f"Set a side above {stride}, or name another teacher."
        )
    return Teacher(network, recipe.distillation, precision, sha256(folder / WEIGHTS))


def refuse_other_teacher(recipe: FinetuneRecipe) -> None:
    """Stop where a recipe's teacher sees scans, or answers, in another way than its student will.

    Raises:
        InputError: with all that differs; or the teacher is no segmenter, or has no record of what it has seen.
    """
    if recipe.teacher is None:
        return
    folder = model_folder(recipe.teacher)
    config = read_config(folder)
    if config.classes is None:
        raise InputError(f"teacher={recipe.teacher}: its config.json names no classes; a run of resunet finetune is needed.")
    if not (folder / ARCHIVE).is_file():
        raise InputError(
            f"teacher={recipe.teacher}: has no {ARCHIVE}, so that nobody could tell whether it has seen val or test images. Give a "
            "run of resunet finetune, or the model/ folder that it wrote."
        )
    ours = {
        "data.classes": list(recipe.data.classes.items()),  # in the order of the logits
        "data.regions": recipe.data.regions,
        "data.channels": recipe.data.channels,
        "normalisation": recipe.normalisation,
        "model.spatial_dims": recipe.model.spatial_dims,
    }
    theirs = {
        "data.classes": list(config.classes.items()),
        "data.regions": config.regions,
        "data.channels": config.input_channels,
        "normalisation": config.normalisation,
        "model.spatial_dims": config.architecture.spatial_dims,
    }
    differing = [f"  {key}: {_shown(theirs[key])} there, {_shown(ours[key])} here" for key in ours if ours[key] != theirs[key]]
    if differing:
        lines = "\n".join(differing)
        raise InputError(
            f"teacher={recipe.teacher}: sees scans or answers otherwise than its student would:\n{lines}\n"
            "Train the student with the teacher's, or name another teacher."
        )


def teacher_normalisation(recipe: FinetuneRecipe) -> Normalisation | None:
    """How the teacher normalises scans; None without one."""
    return None if recipe.teacher is None else read_config(model_folder(recipe.teacher)).normalisation


def teacher_archive(recipe: FinetuneRecipe) -> Evidence | None:
    """What the teacher was trained on, and its encoder; None without one."""
    return None if recipe.teacher is None else read_archive(model_folder(recipe.teacher))


def teacher_labels(teacher: Path | None) -> tuple[LabelledGroups, ...]:
    """The labelled groups behind a teacher; none where it does not know."""
    return () if teacher is None else read_config(model_folder(teacher)).provenance.labels


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "{" + ", ".join(f"{raw}: {name}" for raw, name in value) + "}"
    return str(value.model_dump(mode="json") if hasattr(value, "model_dump") else value)
