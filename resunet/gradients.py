"""Gradient norms by layer and by residual unit: whether every part of the network learns.

Written to gradients.json in the run directory, beside metrics.jsonl: records of some hundred numbers.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import nn

from resunet.blocks import ResidualUnit
from resunet.config import Recipe
from resunet.files import write_text
from resunet.light_decoder import LightResidualUnit
from resunet.mirror import Mirror
from resunet.mobile import MobileEncoder
from resunet.progress import say
from resunet.report import COLOURS, Section, svg

FIRST_STEPS = 50
LOWEST_NORM = 0.01
FILE = "gradients.json"
_FEWEST = 10  # steps that say anything about a unit
_LISTED = 4  # of the units in the warning
_LEAST = 1e-8  # a log axis has no 0
_COLUMNS = 60


def residual_units(model: nn.Module) -> set[nn.Module]:
    """Those of the Res-UNet, of the light decoder, and the blocks of MobileNetV3."""
    found: set[nn.Module] = set()
    for one in model.modules():
        if isinstance(one, ResidualUnit | LightResidualUnit):
            found.add(one)
        elif isinstance(one, MobileEncoder):
            found.update(one.blocks())
    return found


def gradient_norms(model: nn.Module) -> dict[str, dict[str, float]]:
    """{"layers": {name: norm}, "units": {name: norm}}: L2 norms of the gradients of every layer that has weights of its own, and
    of every residual unit as a whole; what has no gradient has 0. One transfer from the device for all."""
    named = [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None]
    gradients = [gradient.float() for _, gradient in named]
    squares = torch.stack([gradient.square().sum() for gradient in gradients]).tolist() if gradients else []
    square = {name: value for (name, _), value in zip(named, squares, strict=True)}

    def norm(module_name: str, module: nn.Module, recurse: bool) -> float:
        prefix = f"{module_name}." if module_name else ""
        return math.sqrt(sum(square.get(prefix + name, 0.0) for name, _ in module.named_parameters(recurse=recurse)))

    modules, units = list(model.named_modules()), residual_units(model)
    return {
        "layers": {name: norm(name, one, False) for name, one in modules if any(True for _ in one.parameters(recurse=False))},
        "units": {name: norm(name, one, True) for name, one in modules if one in units},
    }


def quiet_units(records: Sequence[dict[str, Any]], lowest: float = LOWEST_NORM) -> list[str]:
    """Residual units whose norm is below `lowest` in every record: one step alone says little, the head starts near 0."""
    if not records:
        return []
    return [unit for unit in records[0]["units"] if all(record["units"][unit] < lowest for record in records)]


class GradientRecord:
    """gradients.json of a run: the first steps as often as they are logged, later ones as often as a checkpoint is written. What a
    resumed run does again is written again."""

    def __init__(
        self, folder: Path, recipe: Recipe, clip: float, first: int, writes: bool, mirror: Mirror | None = None
    ) -> None:
        """clip: of the gradient's norm; what is recorded is the norm before it. first: steps that are done."""
        self._path, self._recipe, self._clip, self._writes, self._mirror = folder / FILE, recipe, clip, writes, mirror
        self._records: list[dict[str, Any]] = []
        self._early = min(FIRST_STEPS, recipe.steps)
        self._told = first >= self._early
        if writes and first and self._path.exists():
            self._records = [
                one for one in json.loads(self._path.read_text(encoding="utf-8"))["records"] if one["step"] <= first
            ]

    def take(self, step: int, model: nn.Module, total: float) -> None:
        """At a step that is `due`: the gradients that stand in the model after clipping.

        Args:
            step: how many are done with this one.
            total: the norm of all of them before clipping; where it is not finite nothing is recorded.
        """
        if not self._writes:
            return
        if math.isfinite(total):
            factor = max(1.0, total / self._clip)
            norms = gradient_norms(model)
            scaled = {kind: {name: _round(norm * factor) for name, norm in its.items()} for kind, its in norms.items()}
            self._records.append({"step": step, "total": _round(total), **scaled})
            write_text(self._path, json.dumps({"lowest": LOWEST_NORM, "records": self._records}) + "\n")
            if self._mirror is not None:
                self._mirror.log(step, {f"gradients/{name}": norm for name, norm in scaled["units"].items()})
        if step >= self._early >= _FEWEST and not self._told:
            self._told = True
            self._warn()

    def due(self, step: int) -> bool:
        """Whether this one is recorded; on every rank the same."""
        every = self._recipe.log_every if step <= self._early else self._recipe.checkpoint_every
        return step % every == 0 or step in (1, self._early, self._recipe.steps)

    def _warn(self) -> None:
        quiet = quiet_units(self._records)
        if quiet:
            more = f" and {len(quiet) - _LISTED} more" if len(quiet) > _LISTED else ""
            say(
                f"gradients: {len(quiet)} of {len(self._records[0]['units'])} residual units have norms below {LOWEST_NORM} in the "
                f"first {self._early} steps ({', '.join(quiet[:_LISTED])}{more}): they hardly learn. See {FILE}, "
                'and "Before training, and when it goes wrong" in the README.'
            )


def gradients_section(folder: Path) -> Section | None:
    """The report's pictures of residual units and of layers over the steps; None for a run without any record."""
    path = folder / FILE
    records = json.loads(path.read_text(encoding="utf-8"))["records"] if path.exists() else []
    if not records:
        return None
    pictures = [svg(_map(records, "layers"), "Gradient norm by layer and step")]
    if not records[0]["units"]:
        return Section("Gradients", pictures=pictures)
    early = [record for record in records if record["step"] <= FIRST_STEPS]
    text = []
    if early:  # none: they were left out, or not recorded yet
        quiet = quiet_units(early)
        text = [
            f"Below {LOWEST_NORM} in all of the first steps: {', '.join(quiet)}."
            if quiet
            else f"Every unit was above {LOWEST_NORM} in some of the first {early[-1]['step']} steps."
        ]
    return Section("Gradients", text=text, pictures=[svg(_drawn(records), "Gradient norm by residual unit"), *pictures])


def _drawn(records: Sequence[dict[str, Any]]) -> Figure:
    units = list(records[0]["units"])
    figure = Figure(figsize=(5.6, 0.9 + 0.22 * len(units)), layout="constrained")
    axes = figure.subplots()
    ends = [records[0], records[-1]] if len(records) > 1 else records
    for record, colour in zip(ends, COLOURS, strict=False):
        norms = [max(record["units"][unit], _LEAST) for unit in units]
        axes.plot(norms, range(len(units)), "o", color=colour, label=f"step {record['step']}")
    axes.axvline(LOWEST_NORM, color="#999999", linestyle="--", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())  # within a decade their labels would overlap
    axes.set_yticks(range(len(units)), units, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("norm of the gradient")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def _map(records: Sequence[dict[str, Any]], kind: str) -> Figure:
    """Rows are the layers in the network's order, columns the recorded steps; white is LOWEST_NORM."""
    names = list(records[0][kind])
    shown = [records[place] for place in sorted({round(i * (len(records) - 1) / _COLUMNS) for i in range(_COLUMNS + 1)})]
    norms = np.array([[max(record[kind][name], _LEAST) for record in shown] for name in names])
    figure = Figure(figsize=(5.6, 0.9 + 0.17 * len(names)), layout="constrained")
    axes = figure.subplots()
    decades = max(1.0, float(np.abs(np.log10(norms / LOWEST_NORM)).max()))
    image = axes.imshow(np.log10(norms), cmap="RdBu", aspect="auto", interpolation="nearest")
    image.set_clim(math.log10(LOWEST_NORM) - decades, math.log10(LOWEST_NORM) + decades)
    ticks = sorted({0, len(shown) // 2, len(shown) - 1})
    axes.set_xticks(ticks, [f"{shown[tick]['step']:,}" for tick in ticks])
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel(f"step; blue is above {LOWEST_NORM}, red below")
    figure.colorbar(image, ax=axes, label="log10 of the gradient's norm", shrink=0.5)
    return figure


def _round(value: float) -> float:
    return float(f"{value:.4g}")
