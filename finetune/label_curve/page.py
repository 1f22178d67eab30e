"""report.html of a label curve: the verdict, the curves, the differences, the labels saved, the cost, and how it was done."""

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from finetune.evaluation.statistics import FEWEST_GROUPS
from finetune.label_curve.cost import BOTH
from finetune.label_curve.figures import cost_figure, curve_figure, difference_figure
from finetune.label_curve.result import Curve
from finetune.label_curve.verdict import grid_caution, needed, saved, signed, verdicts
from resunet.checkpoint import WEIGHTS
from resunet.files import file_aside
from resunet.mirror import without_paths
from resunet.report import Section, svg, write_page

Record = Mapping[str, Any]
_COLUMNS = 5  # of a table with a column for every arm; more of them are beyond the edge of the page


def write_report(curve: Curve, record: Record, out: Path) -> None:
    """report.html, and its curve as curve.png and curve.svg."""
    drawn = curve_figure(record)
    for ending in ("png", "svg"):
        _save(drawn, out / f"curve.{ending}")
    baseline = record["baseline"]
    pictures = [
        svg(drawn, f"Dice against labelled groups, logarithmic: {', '.join(record['arms'])}. Pale points are draws."),
        svg(
            difference_figure(record),
            f"Paired difference of Dice from {baseline}, with 95 % intervals. Pale points are draws; a filled point is a "
            "difference that holds for all budgets at once.",
        ),
    ]
    sections = [
        Section(
            lead=verdicts(record),
            text=[_what(record), *_probes(record)],
            notes=[*grid_caution(record), *_looks(record)],
            pictures=pictures,
        ),
        Section("Dice", text=[_DICE], table=_dice(record)),
        Section("Paired differences", text=[_DIFFERENCES], table=_difference_rows(record)),
        Section("Labels saved", text=[_SAVED.format(baseline=baseline)], table=_saved_rows(record)),
        Section("What val chose", text=[_CHOSEN], table=_chosen(record)),
        _cost(record),
        Section("What makes the arms", table=_arms(curve)),
        Section("How it was counted", text=[_draws(record), *_METHOD]),
    ]
    if record["test_groups"] < FEWEST_GROUPS:
        sections.insert(3, Section("Every value", table=_every_value(curve)))
    write_page(out / "report.html", "Label curve", sections)


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=200, metadata={"Date": None} if path.suffix == ".svg" else None)
    with file_aside(path) as aside:
        aside.write_bytes(buffer.getvalue())


_DICE = (
    "The mean over test groups and draws, with a 95 % interval that takes both as random. Arms are compared in pairs, below."
)
_DIFFERENCES = (
    "Of each test group in each draw, the arm's Dice less the baseline's. Intervals are 95 % each; the verdict is Holm's over all "
    "arms and budgets, so that the chance of any false 'better' or 'worse' on this page is at most about 5 %."
)
_SAVED = (
    "How many labelled groups {baseline} needs to reach what the other arm has: read off its curve, straight lines between "
    "budgets on the logarithmic axis, and never beyond them ('>' and '≤'). The interval holds every number of labels at which "
    "the paired difference is not shown to differ from zero. Below zero: {baseline} needs fewer."
)
_CHOSEN = (
    "Every arm had the same grid of steps. For each draw on its own, the number of steps was chosen by the Dice of the val groups "
    "of that draw, as somebody with these labels would; of equals the most. Only the chosen network saw the test cases, once. "
    "In the table, of each draw: steps, and Dice on val in brackets."
)
_METHOD = [
    "Draw d trains with seed + d in every arm, so that draws differ in labels, initialisation and order; patches and augmentation "
    "are the same in all arms.",
    "Dice of a group is the mean over its cases that have something to find; false alarms on others are in each run's evaluation.",
    "Intervals take groups and draws as random, with Student's quantile for each: half² = max(t_P² MSp, t_D² MSd, "
    "t_P² MSp + t_D² (MSd − MSe)) / PD, of the two-way mean squares of P groups and D draws. For Dice itself, the part of the "
    "groups is the interval for bounded values. With few draws intervals are wide because draws are few. Simulated: "
    "benchmarks/curve_coverage.py. They say nothing of another pretraining: an encoder is one run.",
    "Where what helps is confined to a few groups, and these are the same in every draw, 95 % intervals of few groups cover less.",
]


_WAYS = {"random": "at random", "kcenter": "by k-centre", "typicality": "by typicality"}


def _draws(record: Record) -> str:
    """How groups were drawn, of arms that differ in it for each."""
    labels = "Labels: groups (patients or items) to train on and to choose by; val has at most as many groups as training. "
    ways = {_WAYS[by] for by in record["draw_by"].values()}
    if ways == {_WAYS["random"]}:
        return (
            f"{labels}Draws are random orders of the pool's groups: a smaller budget is part of a larger one, and all arms have "
            "the same draws."
        )
    told = ", ".join(f"{arm} {_WAYS[by]}" for arm, by in record["draw_by"].items())
    return (
        f"{labels}Groups to train on are the beginnings of orders of the pool's groups, one a draw: a smaller budget is part of a "
        f"larger one. They were drawn so: {told}. By k-centre and typicality means so that they cover the pool in an encoder's "
        "embedding: k-centre from a random group on; typicality from clusters of that seed, so that its draws share many groups. "
        "Arms that draw in the same way have the same draws, and groups to choose by are drawn at "
        "random, the same for all."
    )


def _looks(record: Record) -> list[str]:
    """That a curve which grew was read before."""
    before = record["looks"][:-1]
    if not before:
        return []
    then = "; ".join(f"{one['draws']} draws, {one['arms']} arms, {', '.join(map(str, one['labels']))} groups" for one in before)
    return [
        f"This curve was read before it was as large as now: with {then}. Each reading is another chance of a false 'better' or "
        "'worse': the 5 % below are of one reading whose size was fixed beforehand. Simulated, two readings (3, then 5 draws) "
        "found one in up to 10 % of curves, six (3 to 8) in up to 17 % (benchmarks/curve_coverage.py --looks)."
    ]


def _what(record: Record) -> str:
    labels = ", ".join(str(one["labels"]) for one in record["labels"])
    steps = ", ".join(map(str, record["steps"]))
    return (
        f"{len(record['arms'])} arms, {labels} labelled groups, {record['draws']} draws, steps {steps}; "
        f"{record['test_groups']} test groups that no step saw."
    )


def _probes(record: Record) -> list[str]:
    """The labels that an encoder's probe used, of every arm that has them beside its own."""
    said = []
    for arm in record["arms"]:
        counts = [one["probe"][arm] for one in record["labels"]]
        if any(counts):
            at = ", ".join(f"{count} at {one['labels']}" for count, one in zip(counts, record["labels"], strict=True))
            said.append(
                f"Labels of {arm} count the groups that its encoder's probe or its teacher used and that are not among those to "
                f"train on or to choose by (in the draw where these are most): {at}. Its points are so much farther right."
            )
    return said


def _dice(record: Record) -> list[list[str]]:
    rows = [["labelled groups (training + val)", "images", *record["arms"]]]
    for index, one in enumerate(record["labels"]):
        cells = [_shown_score(record["dice"][arm][index]) for arm in record["arms"]]
        images = sorted(one["images"])
        spread = str(images[0]) if images[0] == images[-1] else f"{images[0]}–{images[-1]}"
        rows.append([f"{one['labels']} ({one['train']} + {one['val']})", spread, *cells])
    return _narrow(rows)


def _narrow(rows: list[list[str]]) -> list[list[str]]:
    """A table with a column for every arm, or, of many arms, with a row for each."""
    return rows if len(rows[0]) <= _COLUMNS else [list(column) for column in zip(*rows, strict=True)]


def _firm(text: str) -> str:
    """On one line, however narrow its column is."""
    return text.replace(" ", "\u00a0")


def _difference_rows(record: Record) -> list[list[str]]:
    rows = [["labelled groups", "arm", "verdict", f"less {record['baseline']}", "p, Holm", "each draw"]]
    for arm, figures in record["differences"].items():
        for figure in figures:
            p = "–" if figure["p_holm"] is None else _p(figure["p_holm"])
            each = _firm(", ".join(signed(value) for value in figure["by_draw"]))
            rows.append([str(figure["labels"]), arm, figure["verdict"], _shown_difference(figure), p, each])
    return rows


def _shown_score(figure: Record) -> str:
    ends = figure["ci95"]
    return f"{figure['mean']:.3f} " + (
        "(too few for an interval)" if ends is None else _firm(f"[{ends[0]:.3f}, {ends[1]:.3f}]")
    )


def _shown_difference(figure: Record) -> str:
    ends = figure["ci95"]
    interval = "(too few for an interval)" if ends is None else _firm(f"[{signed(ends[0])}, {signed(ends[1])}]")
    return f"{signed(figure['mean'])} {interval}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _saved_rows(record: Record) -> list[list[str]]:
    baseline = record["baseline"]
    rows = [["arm", "with labelled groups", f"{baseline} needs", "labels saved"]]
    for arm, its in record["labels_saved"].items():
        rows += [[arm, str(row["labels"]), _firm(needed(row)), _firm(saved(row))] for row in its]
    return rows


def _chosen(record: Record) -> list[list[str]]:
    rows = [["labelled groups", *(f"{arm}: steps (val)" for arm in record["arms"])]]
    for index, one in enumerate(record["labels"]):
        cells = []
        for arm in record["arms"]:
            figure = record["dice"][arm][index]
            cells.append(", ".join(_firm(f"{s} ({v:.2f})") for s, v in zip(figure["steps"], figure["val_dice"], strict=True)))
        rows.append([str(one["labels"]), *cells])
    return _narrow(rows)


def _cost(record: Record) -> Section:
    device = BOTH.join(sorted({one for cost in record["cost"].values() for one in cost["device"].split(BOTH)}))
    rows = [["arm", "pretraining", "fine-tuning, all cells", "the chosen ones"]]
    for arm, cost in record["cost"].items():
        pretraining = cost["pretraining_hours"]
        first = "not known" if pretraining is None else "none" if pretraining == 0 else f"{pretraining:.3g} h"
        rows.append([arm, first, f"{cost['finetuning_hours']:.3g} h", f"{cost['chosen_hours']:.3g} h"])
    drawn = cost_figure(record)
    caption = (
        "Dice against the hours that one network takes, all steps of the grid and pretraining included; labels beside points"
    )
    text = [f"Hours of one {device}, of training without evaluation on test. An encoder is pretrained once for all its cells."]
    if BOTH in device:
        text.append("An hour of one is not an hour of the other: these sums do not compare.")
    return Section("Cost", text=text, table=rows, pictures=[svg(drawn, caption)] if drawn is not None else [])


def _arms(curve: Curve) -> list[list[str]]:
    rows = [["arm", "begins", "its own keys of the fine-tuning recipe"]]
    for arm, values in curve.recipe.arms.items():
        own = without_paths(values)
        begins = curve.recipe.cell(arm, 1, 0, 1, Path("cell")).begins
        rests = "".join(f", {name} {digest[:12]}" for name, digest in curve.models[arm].items() if name.endswith(WEIGHTS))
        rows.append([arm, begins + rests, json.dumps(own) if own else "none"])
    return rows


def _every_value(curve: Curve) -> list[list[str]]:
    """Of few groups, Dice itself and the differences: a row for every arm, budget and group, a column for every draw."""
    rows = [["arm", "labelled groups", "group", *(f"draw {d}" for d in range(curve.recipe.draws))]]
    baseline = curve.scores[curve.recipe.baseline]
    tables: dict[str, tuple[NDArray[np.float64], Callable[[float], str]]] = {
        arm: (curve.scores[arm], "{:.3f}".format) for arm in curve.recipe.arms
    }
    less = f" less {curve.recipe.baseline}"
    tables |= {arm + less: (curve.scores[arm] - baseline, signed) for arm in curve.recipe.others()}
    for name, (scores, written) in tables.items():
        for index, budget in enumerate(curve.budgets):
            for number, values in enumerate(scores[index]):
                rows.append([name, str(budget.labels), str(number + 1), *map(written, values)])
    return rows
