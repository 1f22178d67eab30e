"""Prediction: scans → masks in their own format and geometry.

`finetune.inference.window` is how, `finetune.inference.masks` what is written.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from finetune.evaluation.alarms import requested_threshold
from finetune.inference.inputs import Input, list_inputs
from finetune.inference.masks import Prediction, write_prediction
from finetune.inference.window import Inference, predict_values
from resunet.checkpoint import WEIGHTS, ModelConfig, model_folder
from resunet.config import Precision
from resunet.data.cases import LoadedCase, intensities_of, read_case
from resunet.errors import EnvironmentFault, InputError
from resunet.files import sha256
from resunet.layout import place
from resunet.model import load_finetuned
from resunet.progress import progress, say
from resunet.runtime import remove_objects, slice_axis

_PATIENCE = datetime.timedelta(days=30)  # ranks that are done wait for those that have larger files


class PredictRequest(Inference):
    """What `resunet predict` takes beside model, inputs and output folder."""

    precision: Precision = "fp32"
    probabilities: bool = False
    threshold: float | None = Field(None, gt=0, lt=1, description="of the foreground's probability, not the usual 0.5")
    operating_point: bool = Field(False, description="the model's own threshold, for its budget of false alarms")


@dataclass(frozen=True)
class Predicted:
    """What a prediction came to, over all ranks. faults: a message for each input that could not be predicted."""

    out: Path
    written: int
    faults: tuple[str, ...]


def predict_case(
    model: nn.Module, case: LoadedCase, device: torch.device, precision: Precision, inference: Inference | None = None
) -> NDArray[np.uint8]:
    """The class index of every pixel, (y, x) or (z, y, x). The model is put into evaluation mode."""
    inference = inference or Inference()
    return predict_values(model, case.values, case.axis, case.intensities, device, precision, inference)


def predict(model: Path, inputs: Sequence[Path], out: Path, request: PredictRequest) -> Predicted:
    """Predict every scan that `inputs` name; under a launcher each rank takes its share of them.

    What can be predicted is, each file whole or not at all; what cannot is said as it comes up, and returned.

    Args:
        model: a fine-tuning run or a segmenter's model directory.
        inputs: files, folders, DICOM series, nnU-Net data sets, manifests.
        out: a folder that does not exist, or is empty.

    Raises:
        InputError: the model, `out`, an input that does not exist, two of one name, or nothing that could be predicted.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: exists already, and is not empty. Name another folder, or empty it.")
    if request.precision == "fp16" and not torch.cuda.is_available():
        raise EnvironmentFault("--precision fp16: needs a GPU, and none is visible. On a CPU use bf16 or fp32.")
    folder = model_folder(model)
    network, config = load_finetuned(folder)
    threshold = requested_threshold(config, request.threshold, request.operating_point, request.probabilities)
    found = list_inputs(inputs, config.input_channels)
    # without a GPU Accelerate joins ranks only where it is told to use the CPU
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=_PATIENCE)
    main = state.is_main_process
    state.wait_for_everyone()  # every rank has seen that `out` is free before the first file is in it
    if main:
        say(_announcement(len(found.scans), found.strangers, state, request))
        if (decision := _decision(config, threshold, request)) is not None:
            say(decision)
    network = place(network, state.device)
    weights = sha256(folder / WEIGHTS)
    share = found.scans[state.process_index :: state.num_processes]
    faults = list(found.faults) if main else []
    single = len(found.scans) + len(found.faults) == 1
    for fault in faults:
        say(fault)
    for one in progress(share, len(share), "predict", quiet=not main):
        try:
            prediction = _predict_one(network, one, config, weights, state.device, request, threshold)
            write_prediction(prediction, out, one.name)
        except InputError as error:
            faults.append(str(error))
            if not single:
                say(str(error))
    if state.num_processes > 1:
        faults = gather_object(faults)
    written = len(found.scans) + len(found.faults) - len(faults)
    if not written:
        raise InputError(faults[0] if single else f"none of {len(faults)} inputs could be predicted; nothing was written.")
    return Predicted(out, written, tuple(faults))


def _predict_one(
    network: nn.Module,
    one: Input,
    config: ModelConfig,
    weights: str,
    device: torch.device,
    request: PredictRequest,
    threshold: float | None,
) -> Prediction:
    assert config.classes is not None
    scan = read_case(one.case, config.input_channels)
    values = np.ascontiguousarray(scan.values)
    axis = slice_axis(scan.spacing) if values.ndim == 4 else None
    intensities = intensities_of(values, config.normalisation)
    where = str(one.case.files[0])
    try:
        scores = request.probabilities or threshold is not None
        made = predict_values(network, values, axis, intensities, device, request.precision, request, scores)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    if threshold is not None:
        made = (made[0] > threshold).astype(np.uint8)
    elif not request.probabilities:
        made = remove_objects(made, config.object_rules())
    return Prediction(made, config.classes, one.case.files, scan.format, scan.orientation, weights)


def _decision(config: ModelConfig, threshold: float | None, request: PredictRequest) -> str | None:
    """How masks are decided, where that is not the usual way."""
    if threshold is not None:
        return f"masks: where the probability is above {threshold:.6g}, not post-processed"
    if config.postprocessing is None or not config.postprocessing.rules or request.probabilities:
        return None
    return f"post-processing: {config.postprocessing.described()}"


def _announcement(scans: int, strangers: int, state: PartialState, request: PredictRequest) -> str:
    ranks = state.num_processes
    said = f"{ranks} {'rank' if ranks == 1 else 'ranks'} on {state.device.type}, {scans} scans, {request.precision}"
    said += f", {request.memory:g} GiB a rank" + (", mirrored" if request.flips else "")
    return said + (f"; {strangers} files that are no scans passed over" if strangers else "")
