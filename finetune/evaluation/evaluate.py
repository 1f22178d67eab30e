"""Evaluation of a segmenter: whole scans, voxels, surfaces and lesions, figures over groups."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import nn

from finetune.evaluation.alarms import is_without_target, notes_of, point_on_val
from finetune.evaluation.calibration import Probabilities
from finetune.evaluation.metrics import case_dice, measure_targets
from finetune.evaluation.outputs import (
    FLAGS,
    EvaluateRequest,
    Measured,
    Predict,
    cases_of_split,
    new_folder,
    overlay_name,
    sections_of,
    telling_cases,
    write,
)
from finetune.evaluation.predictions import evaluate_masks
from finetune.evaluation.statistics import figure
from finetune.evaluation.summary import NO_POSTPROCESSING
from finetune.evaluation.surface import TOLERANCE
from finetune.evaluation.targets import Targets, targets_of
from finetune.evaluation.unseen import refuse_seen
from finetune.inference.predict import naming, predict_case
from finetune.inference.window import Inference, predict_scores
from resunet.bundle import is_bundle
from resunet.checkpoint import CONFIG, ModelConfig, model_folder
from resunet.config import Precision
from resunet.data.cases import Case, LoadedCase, load_cases, refuse_images
from resunet.data.source import Source, open_source
from resunet.decision import OperatingPoint
from resunet.errors import InputError
from resunet.inference.window import Scorer
from resunet.layout import place
from resunet.model import Segmenter, load_finetuned
from resunet.progress import progress, say
from resunet.report import Section
from resunet.runtime import ObjectRule, remove_objects

__all__ = [
    "EvaluateRequest",
    "Measured",
    "case_scores",
    "evaluate",
    "evaluation_sections",
    "mean_dice",
    "measure_cases",
    "overlay_name",
    "telling_cases",
    "write_evaluation",
]


def evaluate(model: Path, request: EvaluateRequest, out: Path | None = None, allow_leak: bool = False) -> Path:
    """Evaluate a segmenter, or masks that another program made, on a source; the folder with the results.

    Args:
        model: a fine-tuning run, a segmenter's model directory, a bundle, or a folder of masks with the images' stems.
        request: the source and the part of it; a source without splits is evaluated whole, and the summary says so.
        out: a new folder; without it `evaluation-SPLIT` in the model's, or beside a folder of masks or a bundle.

    Raises:
        InputError: the model, the masks, the source or `out`.
        CheckFailed: cases of the split were in the model's training data, and `allow_leak` is not set.
    """
    if is_bundle(model):
        if allow_leak:
            raise InputError("--allow-leak: a bundle does not say what it was trained on; leave it out.")
        from finetune.evaluation.bundles import evaluate_bundle  # which measures with what is here

        return evaluate_bundle(model, request, out)
    precision = _precision_of_model(model, request)
    folder = model_folder(model)
    if folder.is_dir() and not (folder / CONFIG).is_file():
        for flag, given in (
            ("--allow-leak", allow_leak),
            (f"--precision {request.precision}", request.precision is not None),
            (f"--memory {request.memory}", request.memory is not None),
        ):
            if given:
                raise InputError(
                    f"{flag}: {model} holds masks that another program made, of which nobody knows more; leave it out."
                )
        return evaluate_masks(folder, request, out)
    out = new_folder(out if out is not None else model / f"evaluation-{request.split}")
    network, config = load_finetuned(folder)
    assert config.classes is not None
    if request.ignore:
        raise InputError(
            f"--ignore {list(request.ignore)}: is for masks of another program; this model ignores {config.ignore}."
        )
    settings = request.model_copy(update={"channels": config.input_channels})
    source = open_source(settings, masks=True, classes=config.classes, ignore=config.ignore, called=FLAGS)
    cases, notes = cases_of_split(source, request)
    notes += [f"Allowed when the model was trained: {one}." for one in config.allowed]
    # where nobody made a split nothing claims to be unseen: the figures are given, with what they are
    load = partial(_load_unseen, folder, config, source, allowed=allow_leak or not source.has_splits)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = place(network, device)
    inference = Inference() if request.memory is None else Inference(memory=request.memory)
    point = config.operating_point

    def read_val() -> Sequence[LoadedCase]:
        val, remarks = load(source.part("val"), "val")
        notes.extend(remarks)
        return val

    if (budget := request.false_alarms_per_1000) is not None:
        peaks = partial(clean_peaks, network, device=device, precision=precision, inference=inference)
        point = point_on_val(budget, request.split, source.has_splits, read_val, peaks)
    notes += notes_of(point) if point is not None else []
    loaded, remarks = load(cases, request.split)
    notes = list(dict.fromkeys(notes + remarks))  # val and test may have one in common
    for note in notes:
        say(note)
    targets, rules = targets_of(config.classes, config.regions), config.object_rules()
    measured = measure_cases(
        network, loaded, targets, device, precision, tolerance=request.tolerance, rules=rules, inference=inference
    )
    title = f"Evaluation on {request.split}" if source.has_splits else "Evaluation on all cases"
    write_evaluation(out, network, measured, config, request.split, notes, device, precision, inference, point, title)
    return out


def _precision_of_model(model: Path, request: EvaluateRequest) -> Precision:
    if request.precision == "int8" or request.runtime is not None:
        given = "--precision int8" if request.precision == "int8" else f"--runtime {request.runtime}"
        raise InputError(f"{given}: is of bundles; {model} is none. Leave it out, or export it first.")
    return request.precision or "fp32"


def _load_unseen(
    folder: Path, config: ModelConfig, source: Source, cases: Sequence[Case], split: str, allowed: bool
) -> tuple[list[LoadedCase], list[str]]:
    """Cases as the model reads them, none of which it was trained on; and notes."""
    loaded = load_cases(
        cases,
        config.input_channels,
        config.normalisation,
        config.classes,
        config.ignore,
        progress=lambda items, total: progress(items, total, "read"),
    )
    refuse_images(loaded, config.architecture.spatial_dims)
    notes = refuse_seen(folder, config, loaded, source.salt_fingerprint, split, allowed, by="--allow-leak")
    return loaded, notes


def clean_peaks(
    network: nn.Module | Scorer,
    cases: Sequence[LoadedCase],
    device: torch.device,
    precision: Precision,
    inference: Inference,
) -> list[float]:
    """The greatest foreground probability of every case without target."""
    labelled = [(case, case.labels) for case in cases if case.labels is not None]
    clean = [(case, Probabilities(), labels) for case, labels in labelled if is_without_target(labels)]
    for case, kept, labels in progress(clean, len(clean), "threshold"):
        kept.add(labels, case_scores(network, case, device, precision, inference)[1])
    return [kept.peak for _, kept, _ in clean]


def case_scores(
    network: nn.Module | Scorer, case: LoadedCase, device: torch.device, precision: Precision, inference: Inference
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """(*size) each: class indices, and the probability of not being background."""
    with naming(case):
        return predict_scores(network, case.values, case.axis, case.intensities, device, precision, inference)


def mean_dice(
    model: nn.Module | Scorer,
    cases: Sequence[LoadedCase],
    targets: Targets,
    device: torch.device,
    precision: Precision,
    accelerator: Accelerator | None = None,
    rules: Sequence[ObjectRule] = (),
    inference: Inference = Inference(),  # noqa: B008
) -> float:
    """Dice over groups as `measure_cases` has it, and nothing else: what is asked of val many times. 0: no case defines one."""
    rank, ranks = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    found: list[tuple[int, float | None]] = []
    for i in range(rank, len(cases), ranks):
        case = cases[i]
        assert case.labels is not None
        predicted = remove_objects(predict_case(model, case, device, precision, inference), rules)
        found.append((i, case_dice(case.labels, predicted, targets)))
    if ranks > 1:
        found = gather_object(found)
    by_group: dict[str, list[float]] = {}
    for i, dice in sorted(found, key=lambda one: one[0]):
        of_group = by_group.setdefault(cases[i].case.group, [])
        if dice is not None:
            of_group.append(dice)
    return float(figure(by_group)["mean"] or 0.0)


def measure_cases(
    model: nn.Module | Scorer,
    cases: Sequence[LoadedCase],
    targets: Targets,
    device: torch.device,
    precision: Precision,
    accelerator: Accelerator | None = None,
    quiet: bool = False,
    tolerance: float = TOLERANCE,
    rules: Sequence[ObjectRule] = (),
    inference: Inference = Inference(),  # noqa: B008
) -> list[Measured]:
    """Predict and measure every case; with an accelerator each rank takes its share and all get the whole.

    model: or a bundle's scorer, whose device and precision are its own.
    rules: post-processing. The probabilities that are kept are as the network gives them.
    """
    rank, ranks = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    share = range(rank, len(cases), ranks)
    found = []
    for i in progress(share, len(share), "evaluate", quiet=quiet):
        case = cases[i]
        assert case.labels is not None
        labels, foreground = case_scores(model, case, device, precision, inference)
        kept = Probabilities()
        kept.add(case.labels, foreground)
        for target in range(len(targets.names)):
            kept.add_objects(targets.mask(case.labels, target), foreground)
        measures = measure_targets(case.labels, remove_objects(labels, rules), targets, case.spacing, tolerance)
        found.append((i, measures, kept))
    if ranks > 1:
        found = gather_object(found)
    return [Measured(cases[i], measures, kept) for i, measures, kept in sorted(found, key=lambda one: one[0])]


def write_evaluation(
    out: Path,
    model: nn.Module,
    measured: Sequence[Measured],
    config: ModelConfig,
    split: str,
    notes: Sequence[str],
    device: torch.device,
    precision: Precision,
    inference: Inference,
    point: OperatingPoint | None = None,
    title: str | None = None,
) -> dict[str, Any]:
    """`finetune.evaluation.outputs.write` for a segmenter, with the post-processing of its config; the summary."""
    assert config.classes is not None
    done = config.postprocessing.described() if config.postprocessing is not None else NO_POSTPROCESSING
    predict = predicting(model, config, device, precision, inference)
    targets = targets_of(config.classes, config.regions)
    remarks = [
        f"The classes {its} are of the same regions: nothing taught the network to tell them apart, and in its "
        "masks either may stand for both."
        for its in targets.alike()
    ]
    return write(out, measured, targets, split, [*notes, *remarks], precision, predict, point, done, title)


def evaluation_sections(
    folder: Path,
    model: Segmenter,
    measured: Sequence[Measured],
    summary: dict[str, Any],
    precision: Precision,
    inference: Inference,
) -> list[Section]:
    """What a page shows of an evaluation that was written into a folder."""
    config = model.config
    assert config.classes is not None
    predict = predicting(model, config, next(model.parameters()).device, precision, inference)
    return sections_of(summary, measured, targets_of(config.classes, config.regions), folder / "overlays", predict)


def predicting(
    model: nn.Module, config: ModelConfig, device: torch.device, precision: Precision, inference: Inference
) -> Predict:
    """The labels of a case as a segmenter is measured by: after its post-processing."""
    rules = config.object_rules()
    return lambda case: remove_objects(predict_case(model, case, device, precision, inference), rules)
