"""Evaluation: whole scans, voxels and lesions, figures over groups → summary.json, cases.csv, overlays/."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import nn

from finetune.metrics import CaseMeasures, case_rows, measure_case, summarise
from finetune.overlay import error_picture, grey_picture, label_picture, side_by_side, telling_slice
from finetune.predict import predict_case
from resunet.checkpoint import ModelConfig, model_folder, read_config
from resunet.config import DataSettings, Precision
from resunet.data.cases import LoadedCase, load_cases, take_slice
from resunet.data.leakage import ARCHIVE, NO_GROUP_EVIDENCE, find_leaks, read_archive, refuse_leaks
from resunet.data.source import open_source
from resunet.errors import InputError
from resunet.files import folder_aside
from resunet.model import load_model
from resunet.progress import progress, say

SCHEMA_VERSION = 1
_OVERLAYS = 9  # the worst, the median and the best three


class EvaluateRequest(DataSettings):
    """What `resunet evaluate` takes beside the model; how channels are read comes from the model."""

    split: Literal["pool", "val", "test"] = "test"
    precision: Precision = "fp32"


@dataclass(frozen=True)
class Measured:
    """One evaluated case."""

    case: LoadedCase
    measures: CaseMeasures

    def row(self) -> tuple[str, str, CaseMeasures]:
        return self.case.case.id, self.case.case.group, self.measures


def evaluate(model: Path, request: EvaluateRequest, out: Path | None = None, allow_leak: bool = False) -> Path:
    """Evaluate a segmenter on a source; the folder with the results.

    Args:
        model: a fine-tuning run or a segmenter's model directory.
        request: the source and the part of it; a source without splits is evaluated whole, and the summary says so.
        out: a new folder; without it `evaluation-SPLIT` beside the model.

    Raises:
        InputError: the model, the source or `out`.
        CheckFailed: cases of the split were in the model's training data, and `allow_leak` is not set.
    """
    split = request.split
    folder = model_folder(model)
    out = out if out is not None else model / f"evaluation-{split}"
    if out.exists():
        raise InputError(f"--out {out}: exists already. Name another folder, or delete it.")
    network = load_model(folder)
    config = read_config(folder)
    if config.classes is None or config.architecture.spatial_dims != 2:
        raise InputError(
            f"{folder}: classes={config.classes}, spatial_dims={config.architecture.spatial_dims}; a 2D model that "
            "resunet finetune wrote, with its classes, can be evaluated."
        )
    source = open_source(request, masks=True)
    cases = source.part(split) if source.has_splits else list(source.cases)
    if not cases:
        raise InputError(f"--split {split}: is empty in {request.source / 'splits.json'}. Choose another part.")
    notes = source.notes()
    if not source.has_splits:
        notes.append(f"--split {split}: without splits.json all {len(cases)} cases were evaluated.")
    loaded = load_cases(
        cases,
        config.input_channels,
        config.normalisation,
        config.classes,
        config.ignore,
        progress=lambda items, total: progress(items, total, "read"),
    )
    notes += [f"Allowed when the model was trained: {one}." for one in config.allowed]
    if (folder / ARCHIVE).exists():
        archive = read_archive(folder)
        if archive.salt_fingerprint != source.salt.fingerprint:
            notes.append(NO_GROUP_EVIDENCE)
        leaks = find_leaks(archive, loaded, source.salt.fingerprint)
        # where nobody made a split nothing claims to be unseen: the figures are given, with what they are
        allowed = allow_leak or not source.has_splits
        notes += refuse_leaks(leaks, split, "the model's training data", allowed)
    for note in notes:
        say(note)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    measured = measure_cases(network, loaded, len(config.classes), device, request.precision)
    write_evaluation(out, network, measured, config, split, notes, device, request.precision)
    return out


def measure_cases(
    model: nn.Module,
    cases: Sequence[LoadedCase],
    num_classes: int,
    device: torch.device,
    precision: Precision,
    accelerator: Accelerator | None = None,
    quiet: bool = False,
) -> list[Measured]:
    """Predict and measure every case; with an accelerator each rank takes its share and all get the whole."""
    rank, ranks = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    share = range(rank, len(cases), ranks)
    found = []
    for i in progress(share, len(share), "evaluate", quiet=quiet):
        case = cases[i]
        assert case.labels is not None
        predicted = predict_case(model, case, device, precision)
        found.append((i, measure_case(case.labels, predicted, num_classes, case.spacing)))
    if ranks > 1:
        found = gather_object(found)
    return [Measured(cases[i], measures) for i, measures in sorted(found, key=lambda pair: pair[0])]


def write_evaluation(
    out: Path,
    model: nn.Module,
    measured: Sequence[Measured],
    config: ModelConfig,
    split: str,
    notes: Sequence[str],
    device: torch.device,
    precision: Precision,
) -> dict[str, Any]:
    """Write summary.json, cases.csv and overlays/ into a new folder, whole or not at all; the summary."""
    assert config.classes is not None
    names = list(config.classes.values())
    rows = [one.row() for one in measured]
    summary = {
        "schema_version": SCHEMA_VERSION,
        "split": split,
        "precision": precision,
        "cases": len(rows),
        "groups": len({group for _, group, _ in rows}),
        **summarise(rows, names),
        "notes": list(notes),
    }
    with folder_aside(out) as aside:
        (aside / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        table = case_rows(rows, names)
        with open(aside / "cases.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(table[0]))
            writer.writeheader()
            writer.writerows(table)
        (aside / "overlays").mkdir()
        for rank, one in telling_cases(measured):
            assert one.case.labels is not None
            predicted = predict_case(model, one.case, device, precision)
            index = telling_slice(one.case.labels, one.case.axis)
            grey, truth = grey_picture(one.case, index), one.case.label_slice(index)
            error = error_picture(grey, truth, take_slice(predicted, one.case.axis, index))
            picture = side_by_side([grey, label_picture(grey, truth), error])
            Image.fromarray(picture).save(aside / "overlays" / overlay_name(rank, one))
    return summary


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
