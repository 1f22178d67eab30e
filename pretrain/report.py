"""The report of a pretraining run: did the loss fall, did the features collapse, what did the network see?"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pretrain.archive import Archive
from pretrain.recipe import PretrainRecipe
from resunet.report import Section, curves, image, read_metrics, write_page


def write_report(recipe: PretrainRecipe, archive: Archive, examples: Sequence[NDArray[np.float32]]) -> None:
    """report.html of a finished run; `examples` are rows of scan, first view, second view in [0, 1]."""
    metrics = read_metrics(recipe.out)
    chance = math.log(2 * recipe.batch - 1)
    final = metrics["loss"][1][-1]
    std = metrics["projection_std"][1][-1]
    healthy = 1 / math.sqrt(recipe.head.output)
    spread = {
        "projections": metrics["projection_std"],
        "healthy": (metrics["projection_std"][0], [healthy] * len(metrics["projection_std"][0])),
    }
    sections = [
        Section(
            lead=[
                f"SimCLR on {archive.scans.num_slices:,} slices of {len(archive.scans.cases):,} scans "
                f"({archive.num_groups:,} groups): "
                f"{recipe.steps} steps of {recipe.batch} scans."
            ],
            notes=archive.notes + archive.allowed,
            text=[
                f"Last loss {final:.3f}; a network that tells nothing apart has ln(2N − 1) = {chance:.3f}.",
                f"Spread of the projections {std:.4f}; healthy is about 1/√d = {healthy:.4f}, collapsed is 0.",
            ],
        ),
        Section("Loss", pictures=[curves({"NT-Xent": metrics["loss"]}, "Contrastive loss by step", "step", "NT-Xent")]),
        Section("Collapse", pictures=[curves(spread, "Spread of the normalised projections by step", "step", "std", True)]),
        Section(
            "What the network saw",
            text=["Each row: the scan, its first view, its second view."],
            pictures=[
                image((row * 255).astype(np.uint8), f"Scan {i + 1} and its two views", scale=max(1, 160 // row.shape[0]))
                for i, row in enumerate(examples)
            ],
        ),
    ]
    write_page(recipe.out / "report.html", "Pretraining", sections)
