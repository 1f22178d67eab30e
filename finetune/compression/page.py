"""report.html of a compression: every step with its size, its figures and what the gate said; which layers hurt; test."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from finetune.comparison.cost import Cost, cost_section
from finetune.compression.int8 import NAME
from finetune.compression.result import END, START
from resunet.plain import duration
from resunet.report import COLOURS, Picture, Section, drawing, shown, svg, write_page

Record = Mapping[str, Any]

_SHARES = {"parameters_share": "parameters", "macs_share": "multiply-adds"}
_NAMES = {START: "before", END: "after", NAME: "after, INT8"}


def write_report(record: Record, out: Path) -> None:
    """The page of compress.json."""
    sections = [Section(lead=_lead(record), notes=_notes(record)), _steps(record), *_pictures(record)]
    if record["test"] is not None:
        sections.append(_test(record["test"]))
    if record["cost"] is not None:
        costs = {name: Cost(**{k: v for k, v in its.items() if k != "threads"}) for name, its in record["cost"].items()}
        sections.append(cost_section(costs))
    if record["sensitivity"] is not None:
        sections.append(_sensitivity(record["sensitivity"]))
    if record["rounding"] is not None:
        sections.append(_rounding(record["rounding"]))
    sections += [_layers(record)] if record["accepted"] is not None else []
    write_page(out / "report.html", "Compression", sections)


def _lead(record: Record) -> list[str]:
    accepted, int8 = _accepted(record), record["quantised"]
    if record["cost"] is None:
        return ["Nothing was accepted: every step cost more on val than the gate lets pass."]
    said = []
    if accepted is not None:
        gone = [f"{1 - accepted[share]:.0%} of the {what}" for share, what in _SHARES.items()]
        said.append(
            f"{' and '.join(gone)} are gone. Val Dice {record['start']['dice']['mean']:.4f} → {accepted['dice']['mean']:.4f} "
            f"({_percent(-accepted['fall'])})."
        )
    if int8 is not None and int8["accepted"]:
        fall, size = _percent(-int8["fall"]), int8["bytes"] / 1e6
        beside = f", {len(int8['keep_float'])} layers in float32" if int8["keep_float"] else ""
        said.append(f"INT8 ({int8['method']}{beside}): val Dice {int8['dice']['mean']:.4f} ({fall}), {size:.1f} MB.")
    if record["test"] is not None:
        networks = record["test"]["networks"]
        ends = [
            f"{_NAMES[name]} {its['dice']['mean']:.4f} ({_percent(-its['fall'])})"
            for name, its in networks.items()
            if name != START and (name != END or accepted is not None)
        ]
        said.append(f"Test, read once: Dice before {networks[START]['dice']['mean']:.4f}, {', '.join(ends)}.")
    return said


def _notes(record: Record) -> list[str]:
    notes = []
    if record["steps"] and not record["steps"][-1]["accepted"]:
        notes.append(
            f"The target was not reached: step {record['steps'][-1]['name']} was refused, and the last accepted stands."
        )
    if record["quantised"] is not None and not record["quantised"]["accepted"]:
        notes.append("INT8 was refused, in every way that was tried; the network stays float32.")
    return notes


def _steps(record: Record) -> Section:
    start, gate = record["start"], record["gate"]
    rows = [
        ["Step", "Gate", "Parameters", "Multiply-adds", "Val Dice", "Paired", "Recall of the smallest", "Paired", "Trained"],
        [
            "the run",
            "",
            f"{start['parameters'] / 1e6:.3f} M",
            f"{start['macs'] / 1e9:.2f} G",
            shown(start["dice"], 4),
            "",
            _recall(start),
            "",
            "",
        ],
    ]
    tried = [(step, _size_cells(step)) for step in record["steps"]]
    tried += [(int8, [_int8_cell(int8), ""]) for int8 in record["quantised_steps"]]
    for step, size in tried:
        rows.append(
            [
                step["name"],
                "accepted" if step["accepted"] else "refused",
                *size,
                "failed" if step["dice"]["mean"] is None else f"{shown(step['dice'], 4)} ({_percent(-step['fall'])})",
                "" if step["dice"]["mean"] is None else shown(step["dice_difference"], 4),
                _recall(step),
                "" if step["recall_difference"] is None else shown(step["recall_difference"], 3),
                duration(step["seconds"]),
            ]
        )
    told = [
        f"The gate, on val: Dice falls by less than {gate['dice']:.1%} of the run's, and the recall of the smallest objects by at "
        f"most {gate['recall']:g}. Paired: step − run, over groups; of Dice, of the cases that have something to find."
    ]
    if start["size"] is not None:
        told.append(f"The smallest objects: of {start['size']} voxels, the first range that enough groups have.")
    told.append(
        "Val chose which steps stay and, unless the run has checkpoint=last, the checkpoint of the run and of every step: it "
        "flatters what was accepted, the more the fewer its groups and the more steps were tried. Test says what that is worth."
    )
    for step, _ in tried:
        if not step["accepted"]:
            hurt = f" Layers that hurt most by themselves: {'; '.join(step['hurt'])}." if step.get("hurt") else ""
            told.append(f"Step {step['name']} was refused: {'; '.join(step['reasons'])}.{hurt}")
    return Section("Steps", text=told, table=rows)


def _pictures(record: Record) -> list[Section]:
    return [Section("What it costs", pictures=[_dice_picture(record), _size_picture(record)])] if record["steps"] else []


def _test(test: Record) -> Section:
    networks = test["networks"]
    size = networks[START]["size"]
    rows = [
        ["On test", "Dice", "Difference, paired", *([] if size is None else [f"Recall, {size} voxels", "Difference, paired"])]
    ]
    for name, its in networks.items():
        row = [_NAMES[name], shown(its["dice"], 4), "" if name == START else shown(its["dice_difference"], 4)]
        if size is not None:
            row += [shown(its["recall"]), "" if name == START else shown(its["recall_difference"])]
        rows.append(row)
    return Section("Test, read once", text=["evaluation/ has all figures of the network that came out."], table=rows)


def _sensitivity(record: Record) -> Section:
    shares = sorted({share for layer in record["layers"] for share in layer["dice"]}, key=float)
    whole = record["dice"]
    rows = [["Channels of", "Channels", "Layers", *(f"Dice without {float(share):.0%}" for share in shares)]]
    for layer in record["layers"]:
        rows.append(
            [
                layer["layer"],
                str(layer["channels"]),
                str(layer["layers"]),
                *(f"{layer['dice'][share]:.3f} ({layer['dice'][share] - whole:+.3f})" for share in shares),
            ]
        )
    text = [
        f"Dice of {record['cases']} val cases after the least important channels of one group of layers have gone, and nothing was "
        f"trained; of the whole network {whole:.3f}. Channels that are added to each other go together: a group is named by its "
        "first layer."
    ]
    return Section("Which layers hurt", text=text, table=rows, pictures=[_sensitivity_picture(record, shares)])


def _rounding(record: Record) -> Section:
    whole = record["dice"]
    layers = sorted(record["layers"], key=lambda one: one["dice"])
    rows = [
        ["Layer", "Dice with it alone in INT8"],
        *([one["layer"], f"{one['dice']:.4f} ({one['dice'] - whole:+.4f})"] for one in layers),
    ]
    text = [
        f"Dice of {record['cases']} val cases where the inputs and weights of one layer alone are rounded, nothing trained; of the "
        f"float network {whole:.4f}. The worst first. An addition is called by the unit that adds."
    ]
    return Section("Which layers INT8 hurts", text=text, table=rows)


def _layers(record: Record) -> Section:
    names = list(record["steps"][0]["lost"])
    steps = [step for step in record["steps"] if step["accepted"]]
    rows = [["Channels of", *(f"gone in step {step['name']}" for step in steps)]]
    rows += [[name, *(f"{step['lost'][name]:.0%}" for step in steps)] for name in names]
    return Section("What went", text=["Of the channels that the step before had left."], table=rows)


def _dice_picture(record: Record) -> Picture:
    with drawing():
        figure = Figure(figsize=(4.4, 3.2), layout="constrained")
        axes = figure.subplots()
        start = record["start"]["dice"]["mean"]
        axes.axhline(start * (1 - record["gate"]["dice"]), color="#9aa3ad", linestyle="--", linewidth=1)
        axes.plot(100, start, "s", color="#1b1f24")
        axes.annotate("run", (100, start), xytext=(-4, 6), textcoords="offset points", fontsize=9, ha="right")
        for step in (one for one in record["steps"] if one["dice"]["mean"] is not None):
            at = 100 * step["parameters_share"], step["dice"]["mean"]
            _point(axes, at, step)
        axes.set(xlabel="parameters left, %", ylabel="Dice of val groups", xlim=(0, 105))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        return svg(figure, "Val Dice against parameters: filled accepted, empty refused; dashed the gate")


def _size_picture(record: Record) -> Picture:
    with drawing():
        figure = Figure(figsize=(4.4, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.plot(100, 100, "s", color="#1b1f24")
        for step in record["steps"]:
            _point(axes, (100 * step["macs_share"], 100 * step["parameters_share"]), step)
        axes.set(xlabel="multiply-adds left, %", ylabel="parameters left, %", xlim=(0, 105), ylim=(0, 105))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        return svg(figure, "Parameters against multiply-adds of every step")


def _point(axes: Any, at: tuple[float, float], step: Record) -> None:
    face = COLOURS[0] if step["accepted"] else "white"
    axes.plot(*at, "o", color=COLOURS[0], markerfacecolor=face)
    axes.annotate(step["name"], at, xytext=(5, 5), textcoords="offset points", fontsize=9)


def _sensitivity_picture(record: Record, shares: Sequence[str]) -> Picture:
    layers = record["layers"]
    with drawing():
        figure = Figure(figsize=(4.8, 0.26 * len(layers) + 1), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color="#9aa3ad", linewidth=1)
        rows = range(len(layers))
        for share, colour in zip(shares, COLOURS, strict=False):
            falls = [layer["dice"][share] - record["dice"] for layer in layers]
            axes.plot(falls, rows, "o", color=colour, label=f"{float(share):.0%} gone", markersize=5)
        axes.set_yticks(list(rows), [layer["layer"] for layer in layers], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("change of Dice")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        return svg(figure, "Change of val Dice by group of layers, each pruned alone, untrained")


def _size_cells(step: Record) -> list[str]:
    return [
        f"{step['parameters'] / 1e6:.3f} M ({step['parameters_share']:.0%})",
        f"{step['macs'] / 1e9:.2f} G ({step['macs_share']:.0%})",
    ]


def _int8_cell(int8: Record) -> str:
    """What a try in INT8 was: its method, what it left in float, its size."""
    beside = f", {', '.join(int8['keep_float'])} in float32" if int8["keep_float"] else ""
    return f"INT8, {int8['method']}{beside}, {int8['bytes'] / 1e6:.2f} MB"


def _recall(its: Record) -> str:
    return "" if its["recall"] is None else shown(its["recall"])


def _accepted(record: Record) -> Record | None:
    return next((step for step in record["steps"] if step["name"] == record["accepted"]), None)


def _percent(share: float) -> str:
    return f"{100 * share:+.2f} %"
