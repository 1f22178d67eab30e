"""A bundle on labelled scans, through its own runtime: the same figures, files and page as of a model."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from finetune.evaluation.alarms import notes_of, point_on_val
from finetune.evaluation.evaluate import clean_peaks, measure_cases
from finetune.evaluation.outputs import FLAGS, EvaluateRequest, cases_of_split, new_folder, write
from finetune.evaluation.summary import NO_POSTPROCESSING
from finetune.evaluation.targets import targets_of
from finetune.inference.predict import predict_case
from finetune.inference.window import Inference
from resunet.bundle import Bundle
from resunet.bundle.contract import Contract
from resunet.bundle.engines import name_of, version_of
from resunet.config import FixedNormalisation, Normalisation, PercentileZScore
from resunet.data.cases import Case, LoadedCase, load_cases, refuse_images
from resunet.data.source import open_source
from resunet.decision import OperatingPoint
from resunet.progress import progress, say
from resunet.runtime import remove_objects

_UNSEEN = "The bundle does not say which scans it was trained on: whether cases of this part are among them is not known."
_CPU = torch.device("cpu")


def evaluate_bundle(path: Path, request: EvaluateRequest, out: Path | None) -> Path:
    """Evaluate a bundle; see `finetune.evaluation.evaluate.evaluate`. How scans are read, and the classes, its contract says.

    Raises:
        InputError: the request, the source or `out`, or a precision that the bundle does not have.
        CheckFailed: the bundle was changed. EnvironmentFault: no runtime of it is installed.
    """
    out = new_folder(out if out is not None else path.resolve().with_name(f"{path.resolve().name}-evaluation-{request.split}"))
    bundle = Bundle.open(path)
    contract, behaviour = bundle.contract, bundle.contract.behaviour()
    segmenter = bundle.segmenter(request.precision, request.runtime)
    scorer, graph = segmenter.scorer(flips=False), segmenter.graph
    window = contract.window
    inference = Inference(memory=request.memory or window.memory, window=window.size, overlap=window.overlap)
    settings = request.model_copy(update={"channels": contract.input.channels})
    source = open_source(settings, masks=True, classes=contract.classes, ignore=request.ignore, called=FLAGS)
    cases, notes = cases_of_split(source, request)
    notes += [f"Predicted by {name_of(graph.runtime)} {version_of(graph.runtime)} in {graph.precision}.", _UNSEEN]
    point = None if contract.operating_point is None else OperatingPoint(**vars(contract.operating_point))
    if point is not None and graph.precision == "int8":
        point = None
        notes.append(
            "The operating point was chosen on the network before it was rounded to INT8, which has other probabilities: there are "
            "no figures at it. --false-alarms-per-1000 finds one for this graph."
        )
    if (budget := request.false_alarms_per_1000) is not None:
        read_val = partial(_load, contract, source.part("val"), request)
        peaks = partial(clean_peaks, scorer, device=_CPU, precision="fp32", inference=inference)
        point = point_on_val(budget, request.split, source.has_splits, read_val, peaks)
    notes += notes_of(point) if point is not None else []
    for note in notes:
        say(note)
    targets, rules = targets_of(contract.classes, contract.regions), behaviour.object_rules
    loaded = _load(contract, cases, request)
    measured = measure_cases(
        scorer, loaded, targets, _CPU, "fp32", tolerance=request.tolerance, rules=rules, inference=inference
    )

    def predict(case: LoadedCase) -> NDArray[np.uint8]:
        return remove_objects(predict_case(scorer, case, _CPU, "fp32", inference), rules)

    done = behaviour.described or NO_POSTPROCESSING
    title = f"Evaluation of a bundle on {request.split}"
    write(out, measured, targets, request.split, notes, graph.precision, predict, point, done, title)
    return out


def _load(contract: Contract, cases: Sequence[Case], request: EvaluateRequest) -> list[LoadedCase]:
    loaded = load_cases(
        cases,
        contract.input.channels,
        _normalisation(contract),
        contract.classes,
        request.ignore,
        progress=lambda items, total: progress(items, total, "read"),
    )
    refuse_images(loaded, contract.spatial_dims)
    return loaded


def _normalisation(contract: Contract) -> Normalisation:
    rule = contract.normalisation
    if rule.mean is None or rule.std is None:
        return PercentileZScore(low=rule.low, high=rule.high)
    return FixedNormalisation(kind="fixed", low=rule.low, high=rule.high, mean=rule.mean, std=rule.std)
