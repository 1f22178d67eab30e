"""`resunet predict BUNDLE`: what `finetune.inference.predict` does with a model, without PyTorch."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from resunet.bundle.bundle import Bundle
from resunet.bundle.engines import name_of, version_of
from resunet.errors import InputError
from resunet.inference.inputs import Input, list_inputs
from resunet.inference.masks import Prediction
from resunet.inference.predict import Predicted, predict_input, predicted, refuse_taken, write_predictions
from resunet.inference.threshold import requested_threshold
from resunet.progress import progress, say


@dataclass(frozen=True)
class BundleRequest:
    """What `resunet predict` takes beside bundle, inputs and output folder; None: as the contract says.

    precision, runtime: of the graph; without a runtime the preferred one that is installed.
    """

    memory: float | None = None
    window: int | None = None
    overlap: float | None = None
    flips: bool = False
    probabilities: bool = False
    threshold: float | None = None
    operating_point: bool = False
    precision: str = "fp32"
    runtime: str | None = None

    def refuse_wrong(self) -> None:
        """Raises InputError with every value that is not allowed."""
        rules = {
            f"memory={self.memory}: must be above 0": self.memory is None or self.memory > 0,
            f"window={self.window}: must be at least 64": self.window is None or self.window >= 64,
            f"overlap={self.overlap}: must be 0 to 0.75": self.overlap is None or 0 <= self.overlap <= 0.75,
            f"threshold={self.threshold}: must be between 0 and 1": self.threshold is None or 0 < self.threshold < 1,
        }
        if faults := [fault for fault, fine in rules.items() if not fine]:
            raise InputError("resunet predict is not valid:\n" + "\n".join(f"  {fault}" for fault in faults))


def predict_bundle(path: Path, inputs: Sequence[Path], out: Path, request: BundleRequest) -> Predicted:
    """Predict every scan that `inputs` name, into `out`, a folder that does not exist or is empty.

    What can be predicted is, each file whole or not at all; what cannot is said as it comes up, and returned.

    Raises:
        InputError: the request, `out`, an input that does not exist, two of one name, or nothing that could be predicted.
        CheckFailed: the bundle was changed. EnvironmentFault: no runtime of it is installed.
    """
    refuse_taken(out)
    request.refuse_wrong()
    if (ranks := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise InputError(
            f"{path}: a bundle is predicted by one process, here are {ranks}. Start resunet predict without a launcher."
        )
    bundle = Bundle.open(path)
    contract, behaviour = bundle.contract, bundle.contract.behaviour()
    threshold = requested_threshold(contract, request.threshold, request.operating_point, request.probabilities)
    segmenter = bundle.segmenter(request.precision, request.runtime)
    found = list_inputs(inputs, contract.input.channels)
    given = {key: value for key in ("memory", "window", "overlap") if (value := getattr(request, key)) is not None}
    how = replace(bundle.seeing(), flips=request.flips, probabilities=request.probabilities, **given)
    runtime = segmenter.graph.runtime
    say(
        f"{name_of(runtime)} {version_of(runtime)}, {len(found.scans)} scans, {request.precision}, {how.memory:g} GiB"
        + (", mirrored" if how.flips else "")
        + (f"; {found.strangers} files that are no scans passed over" if found.strangers else "")
    )
    if (decision := behaviour.decision(threshold, how.probabilities)) is not None:
        say(decision)
    for fault in found.faults:
        say(fault)
    scorer = segmenter.scorer(how.flips)

    def make(one: Input) -> Prediction:
        return predict_input(one, scorer, behaviour, how, threshold)

    count = len(found.scans) + len(found.faults)
    faults = [*found.faults]
    faults += write_predictions(progress(found.scans, len(found.scans), "predict"), make, out, single=count == 1)
    return predicted(out, count, faults, single=count == 1)
