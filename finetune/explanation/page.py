"""explain.html: what `resunet explain` found, on one page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune.explanation.heatmap import LEGEND
from resunet.report import Picture, Section, image, write_page

_PICTURES = 24  # cases on the page; all are in the folder
_READING = (
    "Grad-CAM (Selvaraju et al. 2017; of a sum of logits: Vinogradova et al. 2020) shows where a layer holds what speaks for the "
    "class in the target. It shows no cause, and nothing that speaks against the class; coarse layers show it coarsely. "
    "Brightness compares within a picture, not between pictures."
)
_SANITY = (
    "Weights are drawn anew from the head down, and the maps compared with the trained network's (Adebayo et al. 2018). A map "
    "that keeps its order of pixels, with a correlation near 1, does not depend on what was learned: do not read it."
)


def write_explain_page(folder: Path, record: Mapping[str, Any]) -> None:
    """explain.html beside the pictures that the record of explain.json names."""
    cases, lesions = record["cases"], record["lesions"]
    count = len({one["id"] for one in cases})
    sections = [
        Section(
            lead=[f"{len(cases)} maps of {count} scans by layer {record['layer']}."],
            notes=record["notes"],
            text=[_READING, LEGEND],
        )
    ]
    for kind, heading, why in (
        ("missed", "Missed lesions", "Target: the lesion as it truly is. What little spoke for it?"),
        ("false", "False alarms", "Target: the predicted region. What was taken for the class?"),
    ):
        shown = [one for one in lesions if one["kind"] == kind]
        if record["lesions_found"] is not None:
            total = record["lesions_found"][kind]
            text = [f"{total} in all{', the largest first' if total > 1 else ''}. {why if shown else ''}"]
            sections.append(Section(heading, text=text, pictures=[_picture(folder, one) for one in shown]))
    text = [] if len(cases) <= _PICTURES else [f"The first {_PICTURES}; all {len(cases)} are in the folder overlays."]
    sections.append(Section("Predictions", text=text, pictures=[_picture(folder, one) for one in cases[:_PICTURES]]))
    if record["sanity"] is not None:
        sections.append(
            Section("Do the maps depend on what was learned?", text=[_SANITY], table=sanity_table(record["sanity"]))
        )
    write_page(folder / "explain.html", "Explanation", sections)


def sanity_table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The sanity check, a row a stage, under a header."""
    table = [["Randomised from the head to", "Rank correlation", "Maps", "Of them empty"]]
    for row in rows:
        mean = row["rank_correlation"]
        found = "none" if mean is None else f"{mean:.2f}"
        table.append([row["randomised_from_head_to"], found, str(row["maps"]), str(row["empty"])])
    return table


def _picture(folder: Path, one: Mapping[str, Any]) -> Picture:
    place = "" if one["slice"] is None else f", slice {one['slice']}"
    rank = f"{one['rank']}. {one['voxels']:,} voxels. " if "rank" in one else ""
    share = one["share_inside"]
    if one["largest"] == 0:
        found = "The layer holds nothing for the class."
    elif share is None:
        found = "Not predicted here: the target is the whole image."
    else:
        found = f"{share:.0%} of the map lies in the target, which is {one['share_of_image']:.1%} of the image."
    caption = f"{rank}{one['class']}: {one['target']}{place}; mean logit {one['mean_logit']:.2f}. {found} ({one['id']})"
    return image(np.asarray(Image.open(folder / one["picture"])), caption)
