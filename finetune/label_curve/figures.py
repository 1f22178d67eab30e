"""The figures of a label curve: Dice against labels, the paired difference, and Dice against hours."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from finetune.label_curve.cost import BOTH
from resunet.report import COLOURS

_ASIDE = 1.05  # between arms at the same labels, on the logarithmic axis

_LONG = 20  # letters of a name, of which three stand beside each other above a figure
_LINE = 0.22  # inches

Record = Mapping[str, Any]


def curve_figure(record: Record) -> Figure:
    """Dice against labels: every draw a point, the mean a line, with its interval."""
    figure, axes = _axes(record, "Dice of test groups")
    for (arm, points), colour, aside in _series(record["dice"], record["arms"]):
        _draw(axes, points, colour, aside, arm)
    _legend(figure, axes)
    return figure


def difference_figure(record: Record) -> Figure:
    """The paired difference from the baseline at every number of labels: filled where the family of tests shows it."""
    figure, axes = _axes(record, f"Dice less that of {record['baseline']}")
    axes.axhline(0, color="#57606a", linewidth=1)
    others = {arm: record["differences"][arm] for arm in record["arms"] if arm in record["differences"]}
    for (arm, points), colour, aside in _series(others, record["arms"]):
        _draw(axes, points, colour, aside, arm)
        for point in points:
            shown = point["verdict"] in ("better", "worse")
            x = point["labels"] * aside
            axes.plot(x, point["mean"], "o", color=colour, markerfacecolor=colour if shown else "white", markersize=7, zorder=4)
    if len(others) > 1:
        _legend(figure, axes)
    return figure


def cost_figure(record: Record) -> Figure | None:
    """Dice against hours from nothing to a network, pretraining included; None where an arm's cost is not known."""
    costs = record["cost"]
    devices = {cost["device"] for cost in costs.values()}
    if any(cost["pretraining_hours"] is None for cost in costs.values()) or len(devices) > 1 or BOTH in min(devices):
        return None
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.subplots()
    for (arm, points), colour, _ in _series(record["dice"], record["arms"]):
        hours = [costs[arm]["pretraining_hours"] + one for one in costs[arm]["hours_a_network"]]
        axes.plot(hours, [point["mean"] for point in points], "o-", color=colour, label=arm, linewidth=1.6)
        for hour, point in zip(hours, points, strict=True):
            axes.annotate(str(point["labels"]), (hour, point["mean"]), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel=f"hours of one {costs[record['baseline']]['device']}, pretraining included", ylabel="Dice of test groups")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    _legend(figure, axes)
    return figure


def _legend(figure: Figure, axes: Axes) -> None:
    """Above the axes, which keep their height: there it hides no point."""
    names = axes.get_legend_handles_labels()[1]
    columns = 1 if max(map(len, names)) > _LONG else min(len(names), 3)
    figure.legend(frameon=False, loc="outside upper left", ncols=columns)
    figure.set_figheight(figure.get_figheight() + _LINE * -(-len(names) // columns))


def _axes(record: Record, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    labels = record["labels"]
    axes.set_xticks([one["labels"] for one in labels], [f"{one['labels']}\n{one['train']} + {one['val']}" for one in labels])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", length=0)
    most = max(point["labels"] for points in record["dice"].values() for point in points)  # a probe's labels are beside
    axes.set_xlim(labels[0]["labels"] / 1.3, most * 1.3)
    axes.set(xlabel="labelled groups: to train on + to choose by", ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _series(
    by_arm: Mapping[str, Sequence[Record]], arms: Sequence[str]
) -> list[tuple[tuple[str, Sequence[Record]], str, float]]:
    """(arm, its points), its colour, the same in every figure of these arms, and the factor that sets it beside the others."""
    middle = (len(by_arm) - 1) / 2
    return [
        (item, COLOURS[arms.index(item[0]) % len(COLOURS)], _ASIDE ** (index - middle))
        for index, item in enumerate(by_arm.items())
    ]


def _draw(axes: Axes, points: Sequence[Record], colour: str, aside: float, arm: str) -> None:
    x = [point["labels"] * aside for point in points]
    for at, point in zip(x, points, strict=True):
        axes.plot([at] * len(point["by_draw"]), point["by_draw"], "o", color=colour, alpha=0.35, markersize=4, linestyle="none")
        if point["ci95"] is not None:
            axes.plot([at, at], point["ci95"], color=colour, linewidth=1.6, alpha=0.8)
    axes.plot(x, [point["mean"] for point in points], "o-", color=colour, label=arm, linewidth=1.6, markersize=5)
