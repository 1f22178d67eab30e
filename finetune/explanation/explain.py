"""`resunet explain`: Grad-CAM maps of a segmenter, of its predictions and of the lesions that it got wrong."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finetune.evaluation.wrong import Kind, WrongLesion, wrong_lesions
from finetune.explanation.explainer import PREDICTED, WHOLE, Explainer, open_explainer
from finetune.explanation.gradcam import cascade
from finetune.explanation.page import sanity_table, write_explain_page
from finetune.explanation.request import ExplainRequest, cases_of, classes_of, remarks_of
from resunet.data.cases import Case, LoadedCase, take_slice
from resunet.errors import InputError
from resunet.files import folder_aside, refuse_taken
from resunet.plain import number_of
from resunet.progress import progress, say

SCHEMA_VERSION = 1
_SANITY_MAPS = 8
LESION = {"missed": "missed lesion", "false": "false lesion"}

Wrong = dict[Kind, list[tuple[int, WrongLesion]]]  # with the number of their case


def explain(model: Path, request: ExplainRequest, out: Path) -> Path:
    """Explain a segmenter on scans: overlays/, lesions/, explain.json and explain.html in a new folder; `out`.

    A slice in which a class is not predicted is explained by the class's logits in the whole image, and says so, where the
    class or the slice was asked for or nothing at all is predicted in the scan; else it is left out.

    Raises:
        InputError: the model, an input, its mask, the layer, the class or `out`.
    """
    refuse_taken(out)
    explainer = open_explainer(model, request)
    classes = classes_of(explainer.classes, explainer.config.regions or (), request.class_name)
    cases, notes = cases_of(request, explainer.config)
    notes += remarks_of(explainer.config)
    for note in notes:
        say(note)
    with folder_aside(out) as aside:
        entries, wrong, checks, lost = _explain_cases(explainer, cases, classes, request, aside)
        if lost:
            notes.append(f"{number_of(lost, 'input')} could not be read or predicted: left out.")
        record: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "layer": explainer.layer.name,
            "layer_stride": explainer.layer.stride,
            "notes": notes,
            "cases": entries,
            "lesions_found": {kind: len(found) for kind, found in wrong.items()} if any(case.mask for case in cases) else None,
            "lesions": _explain_lesions(explainer, cases, wrong, request.lesions, aside),
            "sanity": _summary(checks) if request.sanity else None,
        }
        (aside / "explain.json").write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
        write_explain_page(aside, record)
    if request.sanity:
        for row in sanity_table(record["sanity"]):
            say("  ".join(f"{cell:<20}" for cell in row).rstrip())
    return out


def chosen_slices(there: NDArray[np.bool_], axis: int | None, most: int | None) -> list[int]:
    """The slices with most of a class, in order, the middle one where there is none of it; all for None; 0 of an image."""
    if axis is None:
        return [0]
    counts = there.sum(axis=tuple(i for i in range(there.ndim) if i != axis))
    if most is None:
        return list(range(len(counts)))
    order = [int(i) for i in np.argsort(-counts, kind="stable")[:most] if counts[i]]
    return sorted(order) or [len(counts) // 2]


def _explain_cases(
    explainer: Explainer, cases: Sequence[Case], classes: Sequence[int], request: ExplainRequest, aside: Path
) -> tuple[list[dict[str, Any]], Wrong, list[dict[str, float | None]], int]:
    """What explain.json says of the cases, the lesions that are wrong, checks of the first maps, and how many cases were lost.

    Raises:
        InputError: none could be read and predicted; the fault of the last.
    """
    (aside / "overlays").mkdir()
    entries: list[dict[str, Any]] = []
    wrong: Wrong = {"missed": [], "false": []}
    checks: list[dict[str, float | None]] = []
    lost = 0
    for number in progress(range(len(cases)), len(cases), "explain"):
        try:
            case = explainer.load(cases[number])
            predicted = explainer.predict(case)
            tiling = explainer.tiling(case)
        except InputError as error:  # as in a prediction, one bad scan or mask does not cost the others
            lost += 1
            if lost == len(cases):
                raise
            say(str(error))
            continue
        asked = request.class_name is not None or not np.isin(predicted, classes).any()
        for class_index in classes:
            there = predicted == class_index
            if not there.any() and not asked:
                continue
            for index in chosen_slices(there, case.axis, request.slices):
                region = np.take(there, index, axis=case.axis) if case.axis is not None else there
                wanted, target = (region, PREDICTED) if region.any() else (np.ones_like(region), WHOLE)
                entry, picture = explainer.entry(case, predicted, index, class_index, wanted, target, tiling)
                name = f"overlays/{len(entries) + 1:04}-{_file_name(case, index)}.png"
                Image.fromarray(picture).save(aside / name)
                entries.append(entry | {"picture": name})
                if request.sanity and target == PREDICTED and entry["largest"] > 0 and len(checks) < _SANITY_MAPS:
                    image, wanted = explainer.seen(case, index, region)
                    checks.append(
                        cascade(explainer.model, explainer.layer, image, class_index, wanted, tiling, seed=len(checks))
                    )
        if case.labels is not None:
            for one in wrong_lesions(case.labels, predicted, case.axis):
                if one.class_index in classes:
                    wrong[one.kind].append((number, one))
    return entries, wrong, checks, lost


def _explain_lesions(explainer: Explainer, cases: Sequence[Case], wrong: Wrong, most: int, aside: Path) -> list[dict[str, Any]]:
    """The largest missed and false lesions; missed ones first, by rank. Each scan is read and predicted once more."""
    ranked = {kind: list(enumerate(sorted(found, key=lambda pair: -pair[1].voxels)[:most], 1)) for kind, found in wrong.items()}
    by_case: dict[int, list[tuple[int, WrongLesion]]] = {}
    for found in ranked.values():
        for rank, (number, lesion) in found:
            by_case.setdefault(number, []).append((rank, lesion))
    if by_case:
        (aside / "lesions").mkdir()
    entries = []
    for number in progress(sorted(by_case), len(by_case), "explain lesions"):
        case = explainer.load(cases[number])
        predicted = explainer.predict(case)
        tiling = explainer.tiling(case)
        for rank, lesion in by_case[number]:
            region = lesion.region(take_slice(predicted, case.axis, lesion.index).shape)
            target = LESION[lesion.kind]
            entry, picture = explainer.entry(case, predicted, lesion.index, lesion.class_index, region, target, tiling, True)
            name = f"lesions/{lesion.kind}-{rank:02}-{lesion.voxels}-voxels-{_file_name(case, lesion.index)}.png"
            Image.fromarray(picture).save(aside / name)
            entries.append({"kind": lesion.kind, "rank": rank, "voxels": lesion.voxels, **entry, "picture": name})
    return sorted(entries, key=lambda one: (one["kind"] != "missed", one["rank"]))


def _summary(checks: Sequence[dict[str, float | None]]) -> list[dict[str, Any]]:
    """A row a stage, head first: the mean rank correlation with the trained maps, over those that are not empty."""
    rows = []
    for stage in checks[0] if checks else ():
        found = [one[stage] for one in checks]
        values = [value for value in found if value is not None]
        mean = math.fsum(values) / len(values) if values else None
        rows.append(
            {"randomised_from_head_to": stage, "rank_correlation": mean, "maps": len(found), "empty": len(found) - len(values)}
        )
    return rows


def _file_name(case: LoadedCase, index: int) -> str:
    name = case.case.id.replace("/", "_")
    return name if case.axis is None else f"{name}-slice{index}"
