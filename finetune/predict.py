"""Prediction: scans → masks in their own format and geometry.

`finetune.window` is how, `finetune.masks` what is written.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from nibabel.openers import ImageOpener
from numpy.typing import NDArray
from torch import nn

from finetune.inputs import Input, list_inputs
from finetune.masks import Prediction, write_prediction
from finetune.window import Inference, predict_values
from resunet.checkpoint import WEIGHTS, ModelConfig, model_folder
from resunet.config import Precision
from resunet.data.cases import Case, LoadedCase, intensities_of, read_case
from resunet.data.formats import named
from resunet.data.images import Scan, channel_count, read_scan
from resunet.errors import EnvironmentFault, InputError
from resunet.files import sha256
from resunet.model import load_finetuned
from resunet.progress import progress, say
from resunet.runtime import slice_axis

_PATIENCE = datetime.timedelta(days=30)  # ranks that are done wait for those that have larger files


class PredictRequest(Inference):
    """What `resunet predict` takes beside model, inputs and output folder."""

    precision: Precision = "fp32"
    probabilities: bool = False


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
    found = list_inputs(inputs, config.input_channels)
    # without a GPU Accelerate joins ranks only where it is told to use the CPU
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=_PATIENCE)
    main = state.is_main_process
    state.wait_for_everyone()  # every rank has seen that `out` is free before the first file is in it
    if main:
        say(_announcement(len(found.scans), found.strangers, state, request))
    network = network.to(state.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    weights = sha256(folder / WEIGHTS)
    share = found.scans[state.process_index :: state.num_processes]
    faults = list(found.faults) if main else []
    single = len(found.scans) + len(found.faults) == 1
    for fault in faults:
        say(fault)
    for one in progress(share, len(share), "predict", quiet=not main):
        try:
            prediction = _predict_one(network, one, config, weights, state.device, request)
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
    network: nn.Module, one: Input, config: ModelConfig, weights: str, device: torch.device, request: PredictRequest
) -> Prediction:
    assert config.classes is not None
    scan = _read(one.case, config.input_channels)
    if scan.format == "nifti":
        _refuse_zero_spacing(one.case.files)
    values = np.ascontiguousarray(scan.values)
    axis = slice_axis(scan.spacing) if values.ndim == 4 else None
    intensities = intensities_of(values, config.normalisation)
    where = str(one.case.files[0])
    try:
        made = predict_values(network, values, axis, intensities, device, request.precision, request, request.probabilities)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return Prediction(made, config.classes, one.case.files, scan.format, scan.orientation, weights)


def _read(case: Case, channels: str | int) -> Scan:
    """A scan with the model's channels.

    Raises:
        InputError: unreadable, or other channels, in words of a prediction.
    """
    try:
        return read_case(case, channels)
    except InputError:
        there = len(case.files) if case.file_per_channel else len(read_scan(_files(case), None).values)
        if there in ((1, 3) if isinstance(channels, str) else (channels,)):
            raise
        wanted = channel_count(channels)
        raise InputError(
            f"{case.where()}: has {there} {'channel' if there == 1 else 'channels'}, the model takes {wanted} ({channels}). "
            "Give it scans like those it was trained on; channels in files of their own come as an nnU-Net data set."
        ) from None


def _refuse_zero_spacing(files: Sequence[Path]) -> None:
    """ITK and nibabel read a NIfTI spacing of 0 as 1, without a word: which slices are thick would be made up."""
    for path in files:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with named(path, ".nii.gz" if packed else ".nii") as name:
            kind = type(nibabel.load(name))
            assert issubclass(kind, nibabel.Nifti1Image)  # which a Nifti2Image is, too
            with ImageOpener(name) as file:
                header = kind.header_class.from_fileobj(file, check=False)  # the check would put 1 there
        spacing = [float(value) for value in header["pixdim"][1 : 1 + min(int(header["dim"][0]), 3)]]
        if 0 in spacing:
            raise InputError(
                f"{path}: the spacing in its header is {' × '.join(f'{value:g}' for value in spacing)} mm; every one must be "
                "above 0. Convert it again from its original, or correct pixdim."
            )


def _files(case: Case) -> Path | tuple[Path, ...]:
    return case.files if len(case.files) > 1 else case.files[0]


def _announcement(scans: int, strangers: int, state: PartialState, request: PredictRequest) -> str:
    ranks = state.num_processes
    said = f"{ranks} {'rank' if ranks == 1 else 'ranks'} on {state.device.type}, {scans} scans, {request.precision}"
    said += f", {request.memory:g} GiB a rank" + (", mirrored" if request.flips else "")
    return said + (f"; {strangers} files that are no scans passed over" if strangers else "")
