"""Prediction: scans → masks in their own format and geometry.

`finetune.inference.window` is how, `resunet.inference.masks` what is written.
"""

import datetime
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from finetune.inference.window import Inference, LiveNetwork, predict_values
from resunet.arithmetic import refuse_without_gpu
from resunet.checkpoint import WEIGHTS, ModelConfig, model_folder
from resunet.config import Precision
from resunet.data.cases import LoadedCase, rule_of
from resunet.errors import InputError
from resunet.files import sha256
from resunet.inference.inputs import Input, list_inputs
from resunet.inference.masks import Prediction
from resunet.inference.predict import (
    Behaviour,
    Predicted,
    predict_input,
    predicted,
    refuse_full,
    refuse_unwritable,
    write_predictions,
)
from resunet.inference.threshold import requested_threshold
from resunet.inference.window import Scorer
from resunet.layout import place
from resunet.model import Segmenter, load_finetuned
from resunet.plain import number_of
from resunet.progress import progress, say

_PATIENCE = datetime.timedelta(days=30)  # ranks that are done wait for those that have larger files


class PredictRequest(Inference):
    """What `resunet predict` takes beside model, inputs and output folder."""

    precision: Precision = "fp32"
    probabilities: bool = False
    threshold: float | None = Field(None, gt=0, lt=1, description="of the foreground's probability, not the usual 0.5")
    operating_point: bool = Field(False, description="the model's own threshold, for its budget of false alarms")


def predict_case(
    model: nn.Module | Scorer, case: LoadedCase, device: torch.device, precision: Precision, inference: Inference | None = None
) -> NDArray[np.uint8]:
    """The class index of every pixel, (y, x) or (z, y, x). The model is put into evaluation mode.

    Raises:
        InputError: the scan does not fit the memory, or the network gives what is not finite. It names the file.
    """
    inference = inference or Inference()
    with naming(case):
        return predict_values(model, case.values, case.axis, case.intensities, device, precision, inference)


@contextmanager
def naming(case: LoadedCase) -> Iterator[None]:
    """An InputError of what is done with a case says which it is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{case.case.where()}: {error}") from error


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
    refuse_full(out)
    network, config, behaviour, threshold = open_model(model, request)
    found = list_inputs(inputs, config.input_channels)
    refuse_unwritable(found.scans)
    # without a GPU Accelerate joins ranks only where it is told to use the CPU
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=_PATIENCE)
    main = state.is_main_process
    state.wait_for_everyone()  # every rank has seen that `out` is free before the first file is in it
    if main:
        say(_announcement(len(found.scans), found.strangers, state, request))
        if (decision := behaviour.decision(threshold, request.probabilities)) is not None:
            say(decision)
        for fault in found.faults:
            say(fault)
    channels = config.architecture.in_channels
    live = LiveNetwork(place(network, state.device).eval(), channels, state.device, request.precision, request.flips)

    def make(one: Input) -> Prediction:
        return predict_input(one, live, behaviour, request, threshold)

    share = found.scans[state.process_index :: state.num_processes]
    count = len(found.scans) + len(found.faults)
    faults = list(found.faults) if main else []
    faults += write_predictions(progress(share, len(share), "predict", quiet=not main), make, out, single=count == 1)
    if state.num_processes > 1:
        faults = gather_object(faults)
    return predicted(out, count, faults, single=count == 1)


def open_model(model: Path, request: PredictRequest) -> tuple[Segmenter, ModelConfig, Behaviour, float | None]:
    """The segmenter, its config, what is done before and after it, and at which probability it decides.

    Raises:
        InputError: no segmenter, or a threshold that it cannot have. EnvironmentFault: fp16 without a GPU.
    """
    refuse_without_gpu("--precision ", request.precision)
    folder = model_folder(model)
    network, config = load_finetuned(folder)
    behaviour = behaviour_of(config, sha256(folder / WEIGHTS))
    threshold = requested_threshold(config, request.threshold, request.operating_point, request.probabilities, request.flips)
    return network, config, behaviour, threshold


def behaviour_of(config: ModelConfig, weights: str) -> Behaviour:
    """What a segmenter's config.json says of scans and masks. weights: sha256 of its weights."""
    assert config.classes is not None
    post = config.postprocessing
    described = post.described() if post is not None else ""
    rule = rule_of(config.normalisation)
    return Behaviour(config.input_channels, rule, config.classes, config.object_rules(), described, weights)


def _announcement(scans: int, strangers: int, state: PartialState, request: PredictRequest) -> str:
    ranks = state.num_processes
    said = f"{number_of(ranks, 'rank')} on {state.device.type}, {number_of(scans, 'scan')}, {request.precision}"
    said += f", {request.memory:g} GiB a rank" + (", mirrored" if request.flips else "")
    return said + (f"; {strangers} files that are no scans passed over" if strangers else "")
