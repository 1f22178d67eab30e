"""The report of a fine-tuning run: how good, on how many, where it fails, and what came from the encoder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune.evaluate import Measured, overlay_name, telling_cases
from finetune.gradients import gradients_section
from finetune.labelled import LabelledData
from finetune.overlay import LEGEND
from finetune.recipe import FinetuneRecipe
from resunet.report import Picture, Section, curves, image, read_metrics, shown, write_page
from resunet.transfer import Receipt

_HEIGHT = 288  # pixels, about, of an overlay on the page


def write_report(
    recipe: FinetuneRecipe,
    data: LabelledData,
    receipt: Receipt | None,
    measured: Sequence[Measured],
    summary: dict[str, Any] | None,
) -> None:
    """report.html of a finished run; `summary` is evaluation/summary.json, None where there are no test cases."""
    counts = ", ".join(
        f"{len(cases)} {name} cases of {len({case.case.group for case in cases})} groups"
        for name, cases in (("training", data.train), ("val", data.val), ("test", data.test))
    )
    lead = (
        "Not evaluated: there are no test cases, or the recipe says evaluate_test=false."
        if summary is None
        else f"Test Dice {shown(summary['dice'])} groups."
    )
    origin = "Trained from scratch." if receipt is None else f"Encoder: {receipt.line()}."
    sections = [Section(lead=[lead], notes=data.notes(), text=[f"{counts}. {recipe.steps} steps.", origin])]
    if summary is not None:
        sections.append(Section("On the test cases", table=figures_table({"": summary})))
    metrics = read_metrics(recipe.out)
    sections.append(
        Section(
            "Learning",
            pictures=[
                curves({n: metrics[n] for n in ("loss", "focal", "dice")}, "Training loss by step", "step", "loss"),
                curves({"val": metrics["val_dice"]}, "Dice of the whole val scans by step", "step", "Dice"),
            ],
        )
    )
    gradients = gradients_section(recipe.out)
    sections += [gradients] if gradients is not None else []
    if summary is not None:
        overlays = recipe.out / "evaluation" / "overlays"
        pictures = [
            _overlay(overlays / overlay_name(rank, one), f"{rank.replace('-', ' ')}: Dice {one.measures.macro('dice'):.3f}")
            for rank, one in telling_cases(measured)
        ]
        text = [f"Scan, truth, prediction. {LEGEND}"]
        sections.append(Section("Worst, median and best", text=text, pictures=pictures))
        policy = [["Matter", "How it was treated"], *([key, value] for key, value in summary["policy"].items())]
        sections.append(Section("How the figures were counted", table=policy))
    write_page(recipe.out / "report.html", "Fine-tuning", sections)


def figures_table(summaries: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The figures of one or several summaries, a column each."""
    first = next(iter(summaries.values()))
    rows = [["", *(name or "mean [95 % interval], groups" for name in summaries)]]
    labels = {"dice": "Dice", "iou": "IoU", "precision": "Precision", "recall": "Recall", "hd95": "HD95, mm"}
    for key, label in (labels | {"surface_dice": f"Surface Dice within {first['surface_tolerance_mm']:g} mm"}).items():
        rows.append([label, *(shown(summary[key]) for summary in summaries.values())])
    unit = first["volume_error"]["unit"]
    for key, label in (("absolute", f"Volume error, {unit}"), ("relative", "Volume error, share of the truth's volume")):
        rows.append([label, *(_without_interval(summary["volume_error"][key]) for summary in summaries.values())])
    if len(first["classes"]) > 1:
        for name in first["classes"]:
            rows.append([f"Dice, {name}", *(shown(s["classes"][name]["dice"]) for s in summaries.values())])
    for key, label in (("recall", "Objects found"), ("precision", "Predicted objects that are true"), ("f1", "Object F1")):
        rows.append([label, *(shown(summary["lesions"][key]) for summary in summaries.values())])
    for index, size in enumerate(first["lesions"]["by_size"]):
        label = f"Found of {size['n']} objects of {size['range']} voxels"
        rows.append([label, *(shown(summary["lesions"]["by_size"][index]["recall"]) for summary in summaries.values())])
    for index, width in enumerate(first["lesions"]["by_width"] or ()):
        if width["n"]:
            label = f"Found of {width['n']} thin objects {width['range']} pixels wide"
            rows.append([label, *(shown(summary["lesions"]["by_width"][index]["recall"]) for summary in summaries.values())])
    alarms = [summary["false_alarms"] for summary in summaries.values()]
    label = f"False alarms in {alarms[0]['images_without_target']} cases without target"
    rows.append([label, *(f"{alarm['alarmed']}" for alarm in alarms)])
    calibrations = [summary["calibration"] for summary in summaries.values()]
    if all(calibrations):
        rows.append(["Calibration error (ECE)", *(shown(one["ece"]) for one in calibrations)])
        rows.append(["ECE from probability 0.05 on", *(shown(one["ece_foreground"]) for one in calibrations)])
    return rows


def _without_interval(figure: dict[str, Any]) -> str:
    return "undefined" if figure["mean"] is None else f"{figure['mean']:.3f}, n = {figure['n']}"


def _overlay(path: Path, caption: str) -> Picture:
    pixels = np.asarray(Image.open(path))
    return image(pixels, caption, scale=max(1, _HEIGHT // pixels.shape[0]))
