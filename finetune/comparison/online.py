"""Runs of a W&B group in the same comparison as runs that lie here: figures, paired differences, recipes and curves.

W&B knows test cases by numbers, counted in the order of their ids, and two sha256: where that of all test files is equal, so are
the cases, and where that of the ids is, so are the numbers.

Pictures, speed and receipts need the runs themselves: `finetune.comparison.compare`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from finetune.comparison.arms import Scored, differing_values, numbered, read_arm
from finetune.comparison.compare import paired_section, verdict
from finetune.evaluation.metrics import METRICS
from finetune.evaluation.statistics import figure, paired_difference
from finetune.mirrored import CASES, ORDER, case_columns_of, order_of
from resunet.errors import EnvironmentFault, InputError
from resunet.files import folder_aside, refuse_taken
from resunet.mirror import without_paths
from resunet.report import Section, curves, read_metrics, shown, write_page

Curve = tuple[list[float], list[float]]  # steps, values
_CURVES = {"loss": ("Training loss by step", "loss"), "val_dice": ("Dice of the val scans by step", "Dice")}
_ADVICE = "It has to be ENTITY/PROJECT/GROUP, and the account of this machine (wandb login) has to see it."


class ApiRun(Protocol):
    """What is read of a run of wandb.Api."""

    name: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]

    def scan_history(self) -> Iterable[Mapping[str, Any]]: ...


@dataclass(frozen=True)
class Mirrored(Scored):
    """A run as W&B knows it. test: sha256 over the test files; order: over their ids, '' of earlier versions; figures: metric →
    mean."""

    values: dict[str, Any]
    test: str
    order: str
    figures: dict[str, float]
    curves: dict[str, Curve]

    @property
    def judged_by(self) -> tuple[str, str]:
        """Classes and regions."""
        data = self.values.get("data", {})
        return json.dumps(data.get("classes")), json.dumps(data.get("regions"))


def compare_online(group: str, runs: Sequence[Path], out: Path) -> Path:
    """Compare the runs of a W&B group, after those that lie here; the first of all is measured against each of the others.

    Args:
        group: ENTITY/PROJECT/GROUP.
        out: a new folder, for compare.json and report.html.

    Raises:
        InputError: no such group, a run here that is not finished, other test cases or classes, or fewer than two runs.
        EnvironmentFault: W&B cannot be reached.
    """
    refuse_taken(out)
    here = [of_folder(run, run.resolve().name) for run in runs]
    return write_comparison([*here, *of_api(runs_of_group(group))], group, out)


def runs_of_group(group: str) -> list[ApiRun]:
    """The runs of ENTITY/PROJECT/GROUP, the earliest first."""
    parts = group.split("/")
    if len(parts) != 3 or not all(parts):
        raise InputError(f"--wandb {group}: {_ADVICE}")
    import wandb

    try:
        return list(wandb.Api().runs(f"{parts[0]}/{parts[1]}", filters={"group": parts[2]}))
    except ValueError as error:  # no such project
        raise InputError(f"--wandb {group}: {error}. {_ADVICE}") from error
    except (wandb.errors.Error, OSError) as error:
        raise EnvironmentFault(f"--wandb {group}: W&B cannot be asked: {error}. {_ADVICE}") from error


def of_api(runs: Iterable[ApiRun]) -> list[Mirrored]:
    """Those of W&B's runs that were judged on test cases, called by their names there."""
    found: list[Mirrored] = []
    for run in runs:
        summary = dict(run.summary)
        if CASES not in summary:
            continue
        values = {key: value for key, value in run.config.items() if key != "_wandb"}
        columns = {key: list(column) for key, column in dict(summary[CASES]).items()}
        lines = list(run.scan_history())
        found.append(
            _mirrored(
                name=run.name,
                columns=columns,
                values=values,
                test=str(values.pop("inputs", {}).get("test")),
                order=str(summary.get(ORDER, "")),
                figures={name: float(summary[f"test/{name}"]) for name in METRICS if f"test/{name}" in summary},
                its_curves={
                    key: ([line["_step"] for line in lines if key in line], [line[key] for line in lines if key in line])
                    for key in _CURVES
                },
            )
        )
    return found


def of_folder(folder: Path, name: str) -> Mirrored:
    """A run that lies here, as W&B would know it."""
    arm = read_arm(folder, name)
    metrics = read_metrics(folder)
    return _mirrored(
        name=name,
        columns=case_columns_of([(case, arm.groups[case], its, dice) for (case, its), dice in arm.scores.items()], arm.groups),
        values=without_paths(json.loads(arm.recipe.model_dump_json())),
        test=arm.test_digest,
        order=order_of(arm.groups),
        figures={name: arm.summary[name]["mean"] for name in METRICS if arm.summary[name]["mean"] is not None},
        its_curves={key: metrics[key] for key in _CURVES if key in metrics},
    )


def write_comparison(runs: Sequence[Mirrored], group: str, out: Path) -> Path:
    """compare.json and report.html of two runs or more, those of one name numbered; `out`."""
    if len(runs) < 2:
        raise InputError(
            f"--wandb {group}: {len(runs)} runs with test cases were found, two are needed: runs that ended and were evaluated."
        )
    runs = [replace(run, name=name) for run, name in zip(runs, numbered([run.name for run in runs]), strict=True)]
    first = runs[0]
    for other in runs[1:]:
        _refuse_other_cases(first, other)
    differences = {other.name: paired_difference(first.group_dice(), other.group_dice()) for other in runs[1:]}
    dice = {run.name: figure({group: [value] for group, value in run.group_dice().items()}, (0.0, 1.0)) for run in runs}
    metrics = [name for name in METRICS if name != "dice" and any(name in run.figures for run in runs)]
    table = [["", *dice], ["dice", *(shown(one) for one in dice.values())]]
    table += [[name, *(f"{run.figures[name]:.3f}" if name in run.figures else "" for run in runs)] for name in metrics]
    sections = [
        Section(
            lead=[verdict(first.name, name, its) for name, its in differences.items()],
            notes=[f"Read from the W&B group {group}; the test cases are known to be the same by the sha256 of files and ids."],
        ),
        Section("On the test cases", table=table),
        *paired_section(runs, differences),
        Section("What differs", table=differing_values({run.name: run.values for run in runs})),
        Section("Learning", pictures=[_drawn(runs, key) for key in _CURVES if any(run.curves.get(key) for run in runs)]),
    ]
    record = {
        "schema_version": 1,
        "runs": [run.name for run in runs],
        "dice": dice,
        "paired_dice_difference": {f"{first.name} - {name}": its for name, its in differences.items()},
        "wandb": group,
    }
    with folder_aside(out) as aside:
        (aside / "compare.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        write_page(aside / "report.html", "Comparison", sections)
    return out


def _mirrored(
    name: str,
    columns: Mapping[str, Sequence[Any]],
    values: dict[str, Any],
    test: str,
    order: str,
    figures: dict[str, float],
    its_curves: dict[str, Curve],
) -> Mirrored:
    rows = list(zip(columns["case"], columns["group"], columns["class"], columns["dice"], strict=True))
    return Mirrored(
        name=name,
        scores={(str(case), str(its)): float(dice) for case, _, its, dice in rows},
        groups={str(case): str(group) for case, group, _, _ in rows},
        values=values,
        test=test,
        order=order,
        figures=figures,
        curves=its_curves,
    )


def _refuse_other_cases(first: Mirrored, other: Mirrored) -> None:
    if first.judged_by != other.judged_by:
        raise InputError(
            f"{first.name} is judged by {' '.join(first.judged_by)}, {other.name} by {' '.join(other.judged_by)}. Compare runs of "
            "the same data.classes and data.regions."
        )
    if first.test != other.test or first.scores.keys() != other.scores.keys():
        raise InputError(
            f"{first.name} and {other.name} were evaluated on different test cases: {len(first.groups)} with sha256 "
            f"{first.test[:12]}, {len(other.groups)} with {other.test[:12]}. Evaluate both on the same split of the same source."
        )
    if not first.order or first.order != other.order:
        raise InputError(
            f"{first.name} and {other.name}: which test case of one is which of the other is not known: their ids were made with "
            "different salts, of other paths, or mirrored by an earlier version. Evaluate both with one RESUNET_SALT."
        )
    if first.groups != other.groups:
        raise InputError(
            f"{first.name} and {other.name} group the same test cases otherwise, and what is paired are groups. Give both sources "
            "the same groups.csv, and evaluate both again."
        )


def _drawn(runs: Sequence[Mirrored], key: str) -> Any:
    caption, label = _CURVES[key]
    return curves({run.name: run.curves[key] for run in runs if run.curves.get(key, ([], []))[0]}, caption, "step", label)
