"""What an evaluation shows on a page: figures, objects by size, wrong objects, calibration, telling cases, and the policy."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from finetune.evaluation.metrics import CaseMeasures
from finetune.evaluation.objects import SHOWN, Kind, WrongObject, caption_of, sizes_of
from finetune.evaluation.targets import Targets
from resunet.pictures import COLOURS, SWATCHES
from resunet.report import COLOURS as LINES
from resunet.report import Picture, Section, drawing, image, shown, svg

_HEIGHT = 288  # pixels, about, of an overlay on the page
_INK = "#1b1f24"


def figures_table(summaries: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The figures of one or several summaries, a column each. Of each class Dice; `class_rows` has its objects."""
    first = next(iter(summaries.values()))
    rows = [["", *(name or "mean [95 % interval], groups" for name in summaries)]]
    in_mm = first.get("in_mm", True)  # runs of earlier versions do not say
    length, within = "mm" if in_mm else "pixels", first["surface_tolerance_mm"]
    labels = {"dice": "Dice", "iou": "IoU", "precision": "Precision", "recall": "Recall", "hd95": f"HD95, {length}"}
    for key, label in (
        labels | {"surface_dice": f"Surface Dice within {within:g} {length if within != 1 or in_mm else 'pixel'}"}
    ).items():
        rows.append([label, *(_cell(summary[key]) for summary in summaries.values())])
    unit = first["volume_error"]["unit"] if in_mm else "pixels"
    for key, label in (("absolute", f"Volume error, {unit}"), ("relative", "Volume error, share of the truth's volume")):
        rows.append([label, *(_without_interval(summary["volume_error"][key]) for summary in summaries.values())])
    if len(first["classes"]) > 1:
        for name in first["classes"]:
            rows.append([f"Dice, {name}", *(_cell(s["classes"][name]["dice"]) for s in summaries.values())])
    for key, label in (("recall", "Objects found"), ("precision", "Predicted objects that are true"), ("f1", "Object F1")):
        rows.append([label, *(_cell(summary["lesions"][key]) for summary in summaries.values())])
    for index, size in enumerate(first["lesions"]["by_size"]):
        label = f"Found of {size['n']} objects of {size['range']} voxels"
        rows.append([label, *(_cell(summary["lesions"]["by_size"][index]["recall"]) for summary in summaries.values())])
    for index, width in enumerate(first["lesions"]["by_width"] or ()):
        if width["n"]:
            label = f"Found of {width['n']} thin objects {width['range']} pixels wide"
            rows.append([label, *(_cell(summary["lesions"]["by_width"][index]["recall"]) for summary in summaries.values())])
    rows += _alarm_rows([summary["false_alarms"] for summary in summaries.values()], "False alarms", "target")
    calibrations = [summary["calibration"] for summary in summaries.values()]
    if all(calibrations):
        rows.append(["Calibration error (ECE)", *(_cell(one["ece"]) for one in calibrations)])
        rows.append(["ECE from probability 0.05 on", *(_cell(one["ece_foreground"]) for one in calibrations)])
    return rows


def _alarm_rows(alarms: Sequence[Mapping[str, Any]], label: str, without: str) -> list[list[str]]:
    return [
        [f"{label} in {alarms[0]['images_without_target']} cases without {without}", *(f"{one['alarmed']}" for one in alarms)]
    ]


def class_rows(summaries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Objects and false alarms of each class, a column for every summary; nothing of a single class."""
    names = list(summaries[0]["classes"])
    if len(names) < 2:
        return []
    rows = []
    for name in names:
        its = [summary["classes"][name] for summary in summaries]
        if all("lesions" in one for one in its):  # runs of earlier versions do not say
            rows.append([f"Objects found, {name}", *(_cell(one["lesions"]["recall"]) for one in its)])
            rows += _alarm_rows([one["false_alarms"] for one in its], f"False alarms, {name}", "it")
    return rows


def classes_section(summary: Mapping[str, Any]) -> list[Section]:
    """Objects and false alarms of each class of one summary, and its thin objects by width; nothing of a single class."""
    classes = summary["classes"]
    if len(classes) < 2:
        return []
    rows = [["", "Dice", "objects found", "predicted ones true", "false alarms"]]
    thin = [["", "width, pixels", "thin objects", "found"]]
    for name, its in classes.items():
        lesions, alarms = its["lesions"], its["false_alarms"]
        figures = (its["dice"], lesions["recall"], lesions["precision"])
        rows.append([name, *map(_narrow, figures), f"{alarms['alarmed']} of {alarms['images_without_target']}"])
        thin += [
            [name, width["range"], str(width["n"]), _cell(width["recall"])] for width in lesions["by_width"] or () if width["n"]
        ]
    sections = [Section("Each class", table=rows, text=["False alarms: cases without the class in which it was predicted."])]
    return [*sections, Section("Thin objects of each class", table=thin)] if len(thin) > 1 else sections


def _narrow(figure: Mapping[str, Any]) -> str:
    """Mean and interval, without the number of groups."""
    return _cell(figure).partition(", n =")[0]


def _cell(figure: Mapping[str, Any]) -> str:
    return shown(figure, why=False)


def operating_point_section(summary: dict[str, Any]) -> list[Section]:
    """The threshold that keeps to a budget of false alarms; nothing where none was asked for."""
    point = summary["false_alarms"].get("operating_point")
    if point is None:
        return []
    chosen = point["chosen_on"]
    clean = summary["false_alarms"]["images_without_target"]
    table = [
        ["At the operating point", "mean [95 % interval], groups"],
        ["Threshold of the probability", f"{point['threshold']:.6g}"],
        ["Budget of false alarms per 1,000 cases without target", f"{point['budget_per_1000']:g}"],
        ["Chosen on val", f"{chosen['alarmed']} alarms in {chosen['images_without_target']} cases without target"],
        ["False alarms here", f"{point['alarmed']} in {clean} cases without target"],
        ["False alarms per 1,000", shown(point["false_alarms_per_1000"], 1)],
        ["Cases with a target that are detected", shown(point["found"])],
        ["Objects found", shown(point["lesions_found"])],
    ]
    return [Section("Operating point", table=table, text=[point["policy"]])]


def size_section(cases: Sequence[CaseMeasures]) -> list[Section]:
    """True objects, found and missed, by size; nothing without objects."""
    missed = [size for case in cases for size, _ in sizes_of(case, "missed")]
    every = [size for case in cases for its in case.classes for size in its.lesion_sizes]
    found = list((Counter(every) - Counter(missed)).elements())
    if not found and not missed:
        return []
    unit = "voxels" if any(case.is_volume for case in cases) else "pixels"
    text = [f"{len(found) + len(missed):,} true objects, {len(found):,} found, {len(missed):,} missed."]
    return [Section("Objects by size", text=text, pictures=[size_histogram(found, missed, unit)])]


def doubling(*kinds: Sequence[int]) -> tuple[list[int], list[NDArray[np.int64]]]:
    """1, 2, 4 … beyond the largest size, and how many of each kind lie from one to below the next."""
    largest = max(size for sizes in kinds for size in sizes)
    edges = [2**power for power in range(largest.bit_length() + 1)]
    return edges, [np.bincount([size.bit_length() - 1 for size in sizes], minlength=len(edges) - 1) for sizes in kinds]


def size_histogram(found: Sequence[int], missed: Sequence[int], unit: str) -> Picture:
    """Stacked bars over sizes that double from bar to bar."""
    edges, counts = doubling(found, missed)
    with drawing():
        figure = Figure(figsize=(4.4, 2.9), layout="constrained")
        axes = figure.subplots()
        widths = np.diff(edges)
        # the colours of the overlays, and a hatch for those who cannot tell them apart in print
        for label, heights, below, name, hatch in (
            ("found", counts[0], np.zeros_like(counts[0]), "found", ""),
            ("missed", counts[1], counts[0], "missed", "////"),
        ):
            colour = tuple(value / 255 for value in COLOURS[name])
            axes.bar(
                edges[:-1],
                heights,
                widths,
                below,
                align="edge",
                color=colour,
                edgecolor=_INK,
                linewidth=0.8,
                hatch=hatch,
                label=label,
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel(f"size of the true object, {unit}")
        axes.set_ylabel("objects")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        return svg(
            figure, f"True objects by size, found and missed; from bar to bar the size doubles (1 to {edges[-1]:,} {unit})"
        )


def wrong_section(kind: Kind, objects: Sequence[WrongObject], cases: Sequence[CaseMeasures], targets: Targets) -> list[Section]:
    """The missed objects, or the false ones, the largest first, and how many more there are; nothing if there are none."""
    total = sum(1 for case in cases for _ in sizes_of(case, kind))
    if not total:
        return []
    heading, side = ("Missed objects", "truth") if kind == "missed" else ("False alarms", "prediction")
    rest = f" The {SHOWN} largest; {total - SHOWN:,} more are not shown." if total > SHOWN else ""
    text = [
        f"{total:,} in all.{rest} Around each: the scan, the truth, the prediction. The object's outline is in colour in the "
        f"{side}, other outlines are white."
    ]
    legend = [
        (COLOURS[kind], "missed object" if kind == "missed" else "predicted where nothing is"),
        ((255, 255, 255), "others"),
    ]
    its = sorted((one for one in objects if one.kind == kind), key=lambda one: -one.size)
    pictures = []
    for one in its:
        caption = caption_of(one, targets)
        alt = f"Scan, truth and prediction around a {'missed object' if kind == 'missed' else 'false alarm'}: {caption}"
        pictures.append(image(one.picture, caption, alt=alt))
    return [Section(heading, text=text, legend=legend, pictures=pictures)]


def calibration_section(summary: dict[str, Any]) -> list[Section]:
    """The reliability curve; nothing without probabilities."""
    calibration = summary["calibration"]
    if calibration is None:
        return []
    text = [
        f"ECE {shown(calibration['ece'])}; from probability 0.05 on {shown(calibration['ece_foreground'])}. On the diagonal a "
        "probability means what it says; below it the network is too sure. A larger dot holds more voxels."
    ]
    return [Section("Calibration", text=text, pictures=[reliability(calibration["bins"])])]


def reliability(bins: Sequence[dict[str, Any]]) -> Picture:
    """The share of foreground by probability, of bins that hold voxels."""
    held = [one for one in bins if one["voxels"]]
    with drawing():
        figure = Figure(figsize=(4.2, 4.0), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color="#9aa3ad", linewidth=1, linestyle="--")
        x, y = ([one[key] for one in held] for key in ("probability", "observed"))
        axes.plot(x, y, color=LINES[0], linewidth=1.4)
        axes.scatter(x, y, s=[6 + 8 * math.log10(one["voxels"]) for one in held], color=LINES[0])
        axes.set(xlabel="predicted probability", ylabel="share that is foreground", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.set_aspect("equal")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        return svg(figure, "Reliability: the share of voxels that are foreground, by their predicted probability")


def telling_section(overlays: Sequence[tuple[str, float, str, NDArray[np.uint8]]]) -> list[Section]:
    """Worst, median and best cases: rank, Dice, case, picture; nothing without any."""
    if not overlays:
        return []
    pictures = []
    for rank, dice, case, pixels in overlays:
        caption = f"{rank.replace('-', ' ')}: Dice {dice:.3f} ({case})"
        alt = f"Scan, truth and prediction side by side; {caption}"
        pictures.append(image(pixels, caption, max(1, _HEIGHT // pixels.shape[0]), alt=alt))
    text = ["Scan, truth, prediction. What is small is framed in white, and enlarged beside."]
    return [Section("Worst, median and best", text=text, legend=SWATCHES, pictures=pictures)]


def policy_section(summary: dict[str, Any]) -> Section:
    table = [["Matter", "How it was treated"], *([key, value] for key, value in summary["policy"].items())]
    return Section("How the figures were counted", table=table)


def _without_interval(figure: dict[str, Any]) -> str:
    return "undefined" if figure["mean"] is None else f"{figure['mean']:.3f}, n = {figure['n']}"
