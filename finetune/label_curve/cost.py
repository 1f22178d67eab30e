"""What an arm cost: hours of fine-tuning, and of the pretraining, and the training of a teacher, that it rests on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.label_curve.cells import Point
from resunet.checkpoint import model_folder


@dataclass(frozen=True)
class Cost:
    """Hours of one device: of a GPU, or of one CPU thread.

    finetuning: all cells of the arm. chosen: those that val chose, which is what one takes who knows how long to train.
    pretraining: with the training of a teacher; 0 where there was neither, None where a directory of theirs does not say.
    a_network: at every budget, the mean over draws of all cells of a draw, which is what one network takes.
    """

    device: str
    finetuning: float
    chosen: float
    pretraining: float | None
    a_network: tuple[float, ...]

    def record(self) -> dict[str, Any]:
        hours = {"finetuning_hours": self.finetuning, "chosen_hours": self.chosen, "pretraining_hours": self.pretraining}
        rounded = {name: None if its is None else round(its, 4) for name, its in hours.items()}
        return {"device": self.device, **rounded, "hours_a_network": [round(its, 4) for its in self.a_network]}


def cost_of(points: Sequence[Point]) -> Cost:
    """The cost of one arm."""
    recipe = points[0].cells[0].recipe
    behind = [_training(one) for one in (recipe.encoder, recipe.start, recipe.teacher) if one is not None]
    by_budget: dict[int, list[float]] = {}
    for point in points:
        by_budget.setdefault(point.labelled, []).append(sum(_hours(cell.record) for cell in point.cells))
    return Cost(
        device="GPU" if points[0].cells[0].record["machine"]["gpus"] else "CPU thread",
        finetuning=sum(map(sum, by_budget.values())),
        chosen=sum(_hours(point.chosen.record) for point in points),
        pretraining=None if None in behind else sum((one for one in behind if one is not None), 0.0),
        a_network=tuple(sum(its) / len(its) for _, its in sorted(by_budget.items())),
    )


def _training(model: Path) -> float | None:
    run = model_folder(model).parent
    if not (run / "run.json").is_file() or not (run / "config.json").is_file():
        return None
    record, recipe = (json.loads((run / name).read_text(encoding="utf-8")) for name in ("run.json", "config.json"))
    if "seconds" not in record:
        step = record.get("seconds_per_step")
        if step is None:
            return None
        record["seconds"] = step * record["step"]
    return _hours(record, recipe["processes"])


def _hours(record: Mapping[str, Any], processes: int = 1) -> float:
    """Hours of one device: every process has a GPU, or its threads."""
    machine = record["machine"]
    return float(record["seconds"]) / 3600 * processes * (1 if machine["gpus"] else machine["threads"])
