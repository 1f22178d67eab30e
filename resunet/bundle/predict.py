"""`resunet predict BUNDLE`: what `finetune.inference.predict` does with a model, without PyTorch."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from numpy.typing import NDArray

from resunet.bundle.bundle import Bundle, BundleSegmenter, Seeing
from resunet.bundle.engines import name_of, version_of
from resunet.errors import InputError
from resunet.inference.inputs import Input, list_inputs
from resunet.inference.masks import Prediction
from resunet.inference.predict import (
    Behaviour,
    Predicted,
    predict_input,
    predicted,
    refuse_full,
    refuse_unwritable,
    segment,
    write_predictions,
)
from resunet.inference.threshold import requested_threshold
from resunet.inference.video import predict_video, refuse_for_video
from resunet.inference.window import Scorer
from resunet.plain import number_of
from resunet.progress import progress, say


@dataclass(frozen=True)
class BundleRequest:
    """What `resunet predict` takes beside bundle, inputs and output folder; None: as the contract says.

    precision, runtime: of the graph; without them fp32, if an installed runtime has it, and the preferred runtime.
    """

    memory: float | None = None
    window: int | None = None
    overlap: float | None = None
    flips: bool = False
    probabilities: bool = False
    threshold: float | None = None
    operating_point: bool = False
    precision: str | None = None
    runtime: str | None = None

    def refuse_wrong(self) -> None:
        """Raises InputError with every value that is not allowed."""
        rules = {
            f"memory={self.memory}: must be above 0, and finite": self.memory is None or 0 < self.memory < math.inf,
            f"window={self.window}: must be at least 64": self.window is None or self.window >= 64,
            f"overlap={self.overlap}: must be 0 to 0.75": self.overlap is None or 0 <= self.overlap <= 0.75,
            f"threshold={self.threshold}: must be between 0 and 1": self.threshold is None or 0 < self.threshold < 1,
        }
        if faults := [fault for fault, fine in rules.items() if not fine]:
            raise InputError("resunet predict is not valid:\n" + "\n".join(f"  {fault}" for fault in faults))


@dataclass(frozen=True)
class _Opened:
    """A bundle ready to predict. how: the request's settings, with the contract's where it leaves them open."""

    behaviour: Behaviour
    how: Seeing
    threshold: float | None
    segmenter: BundleSegmenter
    scorer: Scorer


def predict_bundle(path: Path, inputs: Sequence[Path], out: Path, request: BundleRequest) -> Predicted:
    """Predict every scan that `inputs` name, into `out`, a folder that does not exist or is empty.

    What can be predicted is, each file whole or not at all; what cannot is said as it comes up, and returned.

    Raises:
        InputError: the request, `out`, an input that does not exist, two of one name, or nothing that could be predicted.
        CheckFailed: the bundle was changed. EnvironmentFault: no runtime of it is installed.
    """
    refuse_full(out)
    opened = _open(path, request)
    behaviour, how, threshold, scorer = opened.behaviour, opened.how, opened.threshold, opened.scorer
    found = list_inputs(inputs, behaviour.input_channels)
    refuse_unwritable(found.scans)
    graph = opened.segmenter.graph
    say(
        f"{name_of(graph.runtime)} {version_of(graph.runtime)}, {number_of(len(found.scans), 'scan')}, {graph.precision}, "
        f"{how.memory:g} GiB"
        + (", mirrored" if how.flips else "")
        + (f"; {found.strangers} files that are no scans passed over" if found.strangers else "")
    )
    if (decision := behaviour.decision(threshold, how.probabilities)) is not None:
        say(decision)
    for fault in found.faults:
        say(fault)

    def make(one: Input) -> Prediction:
        return predict_input(one, scorer, behaviour, how, threshold)

    count = len(found.scans) + len(found.faults)
    faults = [*found.faults]
    faults += write_predictions(progress(found.scans, len(found.scans), "predict"), make, out, single=count == 1)
    return predicted(out, count, faults, single=count == 1)


def predict_bundle_video(path: Path, video: Path, out: Path, request: BundleRequest, masks: bool) -> Path:
    """Overlay, timing and, with `masks`, masks of a video, into `out`, a folder that does not exist or is empty; `out`.

    Raises:
        InputError, CheckFailed, EnvironmentFault: as `predict_bundle` and `resunet.inference.video.predict_video`.
    """
    refuse_full(out)
    refuse_for_video(video, request.probabilities, int(os.environ.get("WORLD_SIZE", "1")))
    opened = _open(path, request)
    if (decision := opened.behaviour.decision(opened.threshold, False)) is not None:
        say(decision)

    def labels_of(values: NDArray) -> NDArray:
        return segment(values, (1.0, 1.0), opened.scorer, opened.behaviour, opened.how, opened.threshold)

    graph = opened.segmenter.graph
    runtime = f"{name_of(graph.runtime)} {version_of(graph.runtime)}"
    about = {"runtime": runtime, "precision": graph.precision, "flips": request.flips}
    return predict_video(video, out, labels_of, opened.behaviour, masks, about)


def _open(path: Path, request: BundleRequest) -> _Opened:
    """Raises as `predict_bundle`, but for its inputs."""
    request.refuse_wrong()
    if (ranks := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise InputError(
            f"{path}: a bundle is predicted by one process, here are {ranks}. Start resunet predict without a launcher."
        )
    bundle = Bundle.open(path)
    contract = bundle.contract
    threshold = requested_threshold(contract, request.threshold, request.operating_point, request.probabilities, request.flips)
    given = {key: value for key in ("memory", "window", "overlap") if (value := getattr(request, key)) is not None}
    how = replace(bundle.seeing(), flips=request.flips, probabilities=request.probabilities, **given)
    segmenter = bundle.segmenter(request.precision, request.runtime)
    if request.operating_point and segmenter.graph.precision == "int8":
        raise InputError(
            "--operating-point: its threshold was chosen on the network before it was rounded; the INT8 graph has other "
            "probabilities. Find one with resunet evaluate BUNDLE --precision int8 --false-alarms-per-1000 B, and give it as "
            "--threshold."
        )
    return _Opened(contract.behaviour(), how, threshold, segmenter, segmenter.scorer(how.flips))
