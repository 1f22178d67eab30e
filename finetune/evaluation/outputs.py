"""What every evaluation has, whoever predicted: what it takes, the cases it is on, and the files it writes."""

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from finetune.evaluation.alarms import summarise_operating_point
from finetune.evaluation.calibration import Probabilities, summarise_calibration
from finetune.evaluation.metrics import CaseMeasures
from finetune.evaluation.objects import largest_wrong, wrong_objects
from finetune.evaluation.overlay import grey_picture, overlay, telling_slice
from finetune.evaluation.page import (
    calibration_section,
    classes_section,
    figures_table,
    operating_point_section,
    policy_section,
    size_section,
    telling_section,
    wrong_section,
)
from finetune.evaluation.summary import NO_POSTPROCESSING, case_rows, summarise
from finetune.evaluation.surface import TOLERANCE
from finetune.evaluation.targets import Targets
from resunet.config import Called, DataSettings, Precision
from resunet.data.cases import Case, LoadedCase, source_digest, take_slice
from resunet.data.source import Source
from resunet.decision import OperatingPoint
from resunet.errors import InputError
from resunet.files import folder_aside, refuse_taken
from resunet.plain import number_of
from resunet.report import Section, shown, write_page

Predict = Callable[[LoadedCase], NDArray[np.uint8]]

SCHEMA_VERSION = 1
_OVERLAYS = 9  # the worst, the median and the best three


FLAGS = Called("--data ", "--splits ", "--salt-file ")


class EvaluateRequest(DataSettings):
    """What `resunet evaluate` takes beside the model; how channels are read comes from the model."""

    split: Literal["pool", "val", "test"] = "test"
    precision: Precision | Literal["int8"] | None = Field(
        None, description="int8 is of bundles; null: fp32, of a bundle without it that of its first graph"
    )
    runtime: str | None = Field(None, description="of a bundle: openvino, onnxruntime or pytorch; null: the first installed")
    tolerance: float = Field(TOLERANCE, gt=0, description="mm, of surface Dice")
    memory: float | None = Field(None, gt=0, description="GiB that a process may take; null: 4, of a bundle its own")
    ignore: tuple[int, ...] = Field(
        (), description="mask values that nobody labelled; a model says so itself, a bundle does not"
    )
    false_alarms_per_1000: float | None = Field(
        None, gt=0, lt=1000, description="the budget of an operating point, chosen on val"
    )


@dataclass(frozen=True)
class Measured:
    """One evaluated case; without probabilities where another program predicted it."""

    case: LoadedCase
    measures: CaseMeasures
    probabilities: Probabilities | None = None

    def row(self) -> tuple[str, str, CaseMeasures]:
        return self.case.case.id, self.case.case.group, self.measures


def new_folder(out: Path) -> Path:
    """`out`, if it is free."""
    refuse_taken(out)
    return out


def cases_of_split(source: Source, request: EvaluateRequest) -> tuple[Sequence[Case], list[str]]:
    """The cases of the split, and what a reader has to know of them."""
    split = request.split
    cases = source.part(split) if source.has_splits else list(source.cases)
    if not cases:
        made = f"; resunet split {request.source} --out SPLIT.json writes the one that training makes, for --splits"
        raise InputError(
            f"--split {split}: is empty in {request.source}. Choose another part, or list its cases in splits.json"
            f"{made if split in source.open_parts else ''}."
        )
    notes = source.notes()
    if not source.has_splits:
        notes.append(f"--split {split}: without splits.json all {len(cases)} cases were evaluated.")
    return cases, notes


def write(
    out: Path,
    measured: Sequence[Measured],
    targets: Targets,
    split: str,
    notes: Sequence[str],
    precision: Precision | Literal["int8"] | None,
    predict: Predict,
    point: OperatingPoint | None = None,
    postprocessing: str = NO_POSTPROCESSING,
    title: str | None = None,
) -> dict[str, Any]:
    """Write summary.json, cases.csv and overlays/ into a new folder, whole or not at all; with a title report.html, too.

    Args:
        targets: what the cases were measured by.
        precision: None of another program's masks.
        predict: the labels of a case as they were measured, for its pictures.
        postprocessing: what became of them before, in words.

    Returns:
        The summary.
    """
    rows = [one.row() for one in measured]
    summary = {
        "schema_version": SCHEMA_VERSION,
        "split": split,
        "arithmetic": precision,
        "cases": len(rows),
        "groups": len({group for _, group, _ in rows}),
        "cases_sha256": source_digest([one.case for one in measured]),
        "in_mm": any(one.case.in_mm for one in measured),
        **summarise(rows, targets, rows[0][2].tolerance, postprocessing),
        "calibration": summarise_calibration(_by_group(measured)),
        "notes": list(notes),
    }
    if point is not None:
        known = [(one.case.case.group, one.measures.without_target, its) for one in measured if (its := one.probabilities)]
        summary["false_alarms"]["operating_point"] = summarise_operating_point(point, known)
    with folder_aside(out) as aside:
        (aside / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        table = case_rows(rows, targets)
        with open(aside / "cases.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(table[0]))
            writer.writeheader()
            writer.writerows(table)
        (aside / "overlays").mkdir()
        for rank, one in telling_cases(measured):
            assert one.case.labels is not None
            index = telling_slice(one.case.labels, one.case.axis)
            predicted = take_slice(predict(one.case), one.case.axis, index)
            picture = overlay(grey_picture(one.case, index), one.case.label_slice(index), predicted, targets)
            Image.fromarray(picture).save(aside / "overlays" / overlay_name(rank, one))
        if title is not None:
            count = f"{number_of(summary['cases'], 'case')} of {number_of(summary['groups'], 'group')}, split {split}."
            head = Section(lead=[f"Dice {shown(summary['dice'])} groups."], notes=notes, text=[count])
            sections = sections_of(summary, measured, targets, aside / "overlays", predict)
            write_page(aside / "report.html", title, [head, *sections, policy_section(summary)])
    return summary


def sections_of(
    summary: dict[str, Any], measured: Sequence[Measured], targets: Targets, overlays: Path, predict: Predict
) -> list[Section]:
    """What a page shows of an evaluation but for its policy. overlays: the folder that holds them."""
    cases = [one.measures for one in measured]
    telling = [
        (rank, one.measures.macro("dice") or 0.0, one.case.case.id, np.asarray(Image.open(overlays / overlay_name(rank, one))))
        for rank, one in telling_cases(measured)
    ]
    objects = [
        found
        for i, wanted in sorted(largest_wrong(cases).items())
        for found in wrong_objects(measured[i].case, predict(measured[i].case), math.prod(cases[i].spacing), wanted, targets)
    ]
    return [
        Section(
            f"On the {summary['split']} cases",
            table=figures_table({"": summary}),
            text=[] if targets.are_classes else [f"Of regions, which may overlap: {targets.described()}."],
        ),
        *classes_section(summary),
        *operating_point_section(summary),
        *telling_section(telling),
        *size_section(cases),
        *wrong_section("missed", objects, cases, targets),
        *wrong_section("false", objects, cases, targets),
        *calibration_section(summary),
    ]


def _by_group(measured: Sequence[Measured]) -> Mapping[str, list[Probabilities]]:
    by_group: dict[str, list[Probabilities]] = {}
    for one in measured:
        if one.probabilities is not None:
            by_group.setdefault(one.case.case.group, []).append(one.probabilities)
    return by_group


def overlay_name(rank: str, one: Measured) -> str:
    """The file of a case's overlay: how it did, then its id."""
    return f"{rank}-{one.case.case.id.replace('/', '_')}.png"


def telling_cases(measured: Sequence[Measured]) -> list[tuple[str, Measured]]:
    """The worst, the median and the best cases by Dice, three of each where there are enough, with their names."""
    scored = [(dice, one) for one in measured if (dice := one.measures.macro("dice")) is not None]
    scored.sort(key=lambda pair: pair[0])
    third = min(_OVERLAYS // 3, (len(scored) + 2) // 3)
    middle = max(third, min(len(scored) // 2 - third // 2, len(scored) - 2 * third))
    best = scored[max(third, len(scored) - third) :][::-1]
    median = scored[middle : max(middle, min(middle + third, len(scored) - third))]
    named = {"worst": scored[:third], "median": median, "best": best}
    return [(f"{name}-{i + 1}", one) for name, chosen in named.items() for i, (_, one) in enumerate(chosen)]
