"""What an arm cost: hours of fine-tuning, and of every training that it rests on: of encoders, starts and teachers, and theirs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.label_curve.cells import Point
from resunet.checkpoint import model_folder

BOTH = " or one "  # between the devices of a curve that ran on both


@dataclass(frozen=True)
class Cost:
    """Hours of one device: of a GPU, or of one CPU thread.

    device: which of these, or both: their hours are added up, and do not compare.
    finetuning: all cells of the arm. chosen: those that val chose, which is what one takes who knows how long to train.
    pretraining: all trainings behind it; 0 where there was none, None where a directory of theirs does not say.
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
    behind = _behind(json.loads(points[0].cells[0].recipe.model_dump_json()))
    records: list[Mapping[str, Any]] = [cell.record for point in points for cell in point.cells]
    records += [training.record for training in behind if training is not None]
    by_budget: dict[int, list[float]] = {}
    for point in points:
        by_budget.setdefault(point.labelled, []).append(sum(_hours(cell.record) for cell in point.cells))
    return Cost(
        device=BOTH.join(sorted({"GPU" if record["machine"]["gpus"] else "CPU thread" for record in records})),
        finetuning=sum(map(sum, by_budget.values())),
        chosen=sum(_hours(point.chosen.record) for point in points),
        pretraining=None if None in behind else sum((one.hours for one in behind if one is not None), 0.0),
        a_network=tuple(sum(its) / len(its) for _, its in sorted(by_budget.items())),
    )


@dataclass(frozen=True)
class _Training:
    """A run that made a model. record: its run.json."""

    record: Mapping[str, Any]
    hours: float


def _behind(recipe: Mapping[str, Any]) -> list[_Training | None]:
    """Every training that a run of this recipe rests on, each once; None for one that is not known."""
    found: dict[Path, _Training | None] = {}
    left = _models_of(recipe)
    while left:
        path = left.pop()
        run = (model_folder(path).parent if path.exists() else path).resolve()
        if run not in found:
            found[run] = _training(run)
            if found[run] is not None:
                left += _models_of(json.loads((run / "config.json").read_text(encoding="utf-8")))
    return list(found.values())


def _models_of(recipe: Mapping[str, Any]) -> list[Path]:
    """What a recipe begins with, learns from and draws by; of a pretraining nothing."""
    named = [recipe.get("encoder"), recipe.get("start"), recipe.get("teacher"), recipe.get("data", {}).get("draw_encoder")]
    return [Path(name) for name in named if name is not None]


def _training(run: Path) -> _Training | None:
    if not (run / "run.json").is_file() or not (run / "config.json").is_file():
        return None
    record, recipe = (json.loads((run / name).read_text(encoding="utf-8")) for name in ("run.json", "config.json"))
    if "seconds" not in record:
        step = record.get("seconds_per_step")
        if step is None:
            return None
        record["seconds"] = step * record["step"]
    return _Training(record, _hours(record, recipe["processes"]))


def _hours(record: Mapping[str, Any], processes: int = 1) -> float:
    """Hours of one device: every process has a GPU, or its threads. On CPUs what was computed, not what was waited for."""
    machine = record["machine"]
    if not machine["gpus"] and "cpu_seconds" in record:
        return float(record["cpu_seconds"]) / 3600
    return float(record["seconds"]) / 3600 * processes * (1 if machine["gpus"] else machine["threads"])
