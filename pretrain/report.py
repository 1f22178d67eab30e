"""The report of a pretraining run: did the loss fall, did the features collapse, what did the network see?"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pretrain.archive import Archive
from pretrain.dense_section import dense_section
from pretrain.non_finite import FILE as SKIPPED
from pretrain.non_finite import skipped_steps
from pretrain.probe.probe import Probe
from pretrain.probe.section import probe_section
from pretrain.recipe import PretrainRecipe
from resunet.gradients import gradients_section
from resunet.plain import number_of
from resunet.report import Section, curves, image, read_metrics, write_page


def write_report(
    recipe: PretrainRecipe,
    archive: Archive,
    examples: Sequence[NDArray[np.float32]],
    archive_map: Sequence[Section],
    probe: Probe,
) -> None:
    """report.html of a finished run; `examples` are rows of a scan and its views in [0, 1]."""
    metrics, gradients = read_metrics(recipe.out), gradients_section(recipe.out)
    sections = [
        Section(
            lead=[
                f"{_objectives(recipe)} on {_items(archive)} ({number_of(archive.num_groups, 'group')}): {recipe.steps} steps of "
                f"{recipe.batch} scans."
            ],
            notes=archive.notes + archive.allowed + _skipped(recipe),
        ),
        *(_training(recipe, metrics) if recipe.objective.weight and "loss" in metrics else []),
        *(
            [dense_section(recipe.dense, recipe.model.decoder_stride(recipe.dense.level), metrics)]
            if recipe.dense is not None and "loss" in metrics
            else []
        ),
        *probe_section(recipe, probe, metrics),
        *([gradients] if gradients is not None else []),
        Section(
            "What the network saw",
            text=[_how_to_look(recipe)],
            pictures=[
                image((row * 255).astype(np.uint8), f"Scan {i + 1} and its views", scale=_scale(recipe, row.shape[0]))
                for i, row in enumerate(examples)
            ],
        ),
        *archive_map,
    ]
    write_page(recipe.out / "report.html", "Pretraining", sections)


def _objectives(recipe: PretrainRecipe) -> str:
    if recipe.dense is None:
        return "SimCLR"
    return "SimCLR and dense contrast" if recipe.objective.weight else "Dense contrast"


def _how_to_look(recipe: PretrainRecipe) -> str:
    shown = "the scan, first view, second view"
    if recipe.model.spatial_dims == 2:
        return f"Each row: {shown}."
    return (
        f"Each picture has {shown} beside one another, cut through the middle three times: across z (axial), y (coronal) and x "
        "(sagittal)."
    )


def _items(archive: Archive) -> str:
    scans = archive.scans
    of = f" of {len(scans.cases):,} scans" if scans.spatial_dims == 2 else ""
    return f"{scans.num_items:,} {scans.items}{of}"


def _scale(recipe: PretrainRecipe, height: int) -> int:
    planes = 1 if recipe.model.spatial_dims == 2 else 3
    return max(1, 160 * planes // height)


def _skipped(recipe: PretrainRecipe) -> list[str]:
    count = skipped_steps(recipe.out)
    return (
        [f"{count} of {recipe.steps} steps were left out: see {SKIPPED} for why and which scans were in them."] if count else []
    )


def _training(recipe: PretrainRecipe, metrics: Mapping[str, tuple[list[float], list[float]]]) -> list[Section]:
    formula, chance = _chance(recipe, metrics)
    losses = metrics["global_loss" if recipe.dense is not None else "loss"]
    final, std = losses[1][-1], metrics["projection_std"][1][-1]
    healthy = 1 / math.sqrt(recipe.head.output)
    spread = {
        "projections": metrics["projection_std"],
        "healthy": (metrics["projection_std"][0], [healthy] * len(metrics["projection_std"][0])),
    }
    name = "Decoupled loss" if recipe.objective.loss == "decoupled" else "NT-Xent"
    told = f"Last loss {final:.3f}; a network that tells nothing apart has {formula} = {chance:.3f}."
    if recipe.objective.knows_scans:
        told += f" A view has {metrics['positives'][1][-1]:.2f} positives on average."
    collapse = f"Spread of the projections {std:.4f}; healthy is about 1/√d = {healthy:.4f}, collapsed is 0."
    return [
        Section("Loss", text=[told], pictures=[curves({name: losses}, "Contrastive loss by step", "step", name)]),
        Section(
            "Collapse",
            text=[collapse],
            pictures=[curves(spread, "Spread of the normalised projections by step", "step", "std", True)],
        ),
    ]


def _chance(recipe: PretrainRecipe, metrics: Mapping[str, tuple[list[float], list[float]]]) -> tuple[str, float]:
    """The loss where all projections are the same: as a formula of N scans in a set, and its value."""
    objective = recipe.objective
    if objective.knows_scans:
        return "ln(number of views that it is contrasted with)", metrics["chance"][1][-1]
    if objective.memory_bank is not None:
        return "ln(memory bank + 1)", math.log(objective.memory_bank + 1)
    if objective.loss == "decoupled":
        return "ln(2N − 2)", math.log(2 * recipe.batch - 2)
    return "ln(2N − 1)", math.log(2 * recipe.batch - 1)
