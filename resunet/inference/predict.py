"""One scan after another through whatever computes scores: read, predicted, post-processed, written in its own format."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from resunet.data.cases import read_case
from resunet.data.formats import sniff
from resunet.errors import InputError
from resunet.files import is_empty, refuse_taken
from resunet.inference.inputs import Input
from resunet.inference.masks import Prediction, can_write_dicom, refuse_dicom, write_prediction
from resunet.inference.window import Scorer, Settings, predict_values
from resunet.progress import say
from resunet.runtime import Intensity, ObjectRule, Percentiles, intensities_by, remove_objects, slice_axis


class Request(Settings, Protocol):
    """What is asked of a prediction beside how."""

    @property
    def probabilities(self) -> bool: ...


@dataclass(frozen=True)
class Behaviour:
    """What a segmenter takes and how it decides: what a model directory's config.json and a bundle's contract both say.

    input_channels: 'grey', 'rgb' or a number. rule: of normalisation. classes: raw mask value → name, background first.
    object_rules: the post-processing of masks. described: what that does, in words. weights: sha256.
    """

    input_channels: str | int
    rule: Intensity | Percentiles
    classes: Mapping[int, str]
    object_rules: tuple[ObjectRule, ...]
    described: str
    weights: str

    def decision(self, threshold: float | None, probabilities: bool) -> str | None:
        """How masks are decided, where that is not the usual way."""
        if threshold is not None:
            return f"masks: where the probability is above {threshold:.6g}, not post-processed"
        return f"post-processing: {self.described}" if self.object_rules and not probabilities else None


@dataclass(frozen=True)
class Predicted:
    """What a prediction came to, over all ranks. faults: a message for each input that could not be predicted."""

    out: Path
    written: int
    faults: tuple[str, ...]


def refuse_full(out: Path) -> None:
    """Raises InputError unless `out` is a folder that does not exist, or is empty."""
    if not out.is_dir():
        refuse_taken(out)
    elif not is_empty(out):
        raise InputError(f"--out {out}: exists already, and is not empty. Name another folder, or empty it.")


def refuse_unwritable(inputs: Iterable[Input]) -> None:
    """Raises EnvironmentFault if a prediction needs a library that is not here, before the first is computed."""
    if can_write_dicom():
        return
    for one in inputs:
        with suppress(InputError):  # a file that is gone is told when its turn comes
            if sniff(one.case.files[0]) == "dicom":
                refuse_dicom(one.case.files[0])


def predict_input(one: Input, scorer: Scorer, behaviour: Behaviour, request: Request, threshold: float | None) -> Prediction:
    """Read a scan and predict it.

    Raises:
        InputError: the scan cannot be read, does not fit the model or the memory. It names the file.
    """
    scan = read_case(one.case, behaviour.input_channels)
    try:
        made = segment(scan.values, scan.spacing, scorer, behaviour, request, threshold)
    except InputError as error:
        raise InputError(f"{one.case.files[0]}: {error}") from error
    return Prediction(made, behaviour.classes, one.case.files, scan.format, scan.orientation, behaviour.weights)


def segment(
    values: NDArray, spacing: tuple[float, ...], scorer: Scorer, behaviour: Behaviour, request: Request, threshold: float | None
) -> NDArray:
    """(C, *size) of a scan → post-processed class indices, uint8 (*size), or probabilities, float32 (M, *size)."""
    values = np.ascontiguousarray(values)
    axis = slice_axis(spacing) if values.ndim == 4 else None
    scores = request.probabilities or threshold is not None
    made = predict_values(scorer, values, axis, intensities_by(values, behaviour.rule), request, scores)
    if threshold is not None:
        return np.asarray(made[0] > threshold, np.uint8)
    return made if request.probabilities else remove_objects(made, behaviour.object_rules)


def write_predictions(inputs: Iterable[Input], predict: Callable[[Input], Prediction], out: Path, single: bool) -> list[str]:
    """Write what `predict` makes of each input; what went wrong with the others, a message each, said as it comes up.

    single: there is one input only, whose fault the caller raises.
    """
    faults: list[str] = []
    for one in inputs:
        try:
            write_prediction(predict(one), out, one.name)
        except InputError as error:
            faults.append(str(error))
            if not single:
                say(str(error))
    return faults


def predicted(out: Path, inputs: int, faults: list[str], single: bool) -> Predicted:
    """What `inputs` and their faults come to.

    Raises:
        InputError: nothing could be predicted.
    """
    if len(faults) == inputs:
        raise InputError(faults[0] if single else f"none of {inputs} inputs could be predicted; nothing was written.")
    return Predicted(out, inputs - len(faults), tuple(faults))
