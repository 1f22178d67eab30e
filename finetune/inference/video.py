"""A video through a model; `resunet.inference.video` is what is read and written, a bundle's as well."""

import os
from pathlib import Path

import torch
from numpy.typing import NDArray

from finetune.inference.predict import PredictRequest, behaviour_of
from finetune.inference.window import LiveNetwork
from resunet.checkpoint import WEIGHTS, model_folder
from resunet.errors import EnvironmentFault
from resunet.files import sha256
from resunet.inference.predict import refuse_taken, segment
from resunet.inference.threshold import requested_threshold
from resunet.inference.video import predict_video, refuse_for_video
from resunet.layout import place
from resunet.model import load_finetuned
from resunet.progress import say


def predict_model_video(model: Path, video: Path, out: Path, request: PredictRequest, masks: bool) -> Path:
    """Overlay, timing and, with `masks`, masks of a video, into a new or empty folder; `out`.

    Raises:
        InputError, EnvironmentFault: as `finetune.inference.predict.predict` and `resunet.inference.video.predict_video`.
    """
    refuse_taken(out)
    refuse_for_video(video, request.probabilities, int(os.environ.get("WORLD_SIZE", "1")))
    if request.precision == "fp16" and not torch.cuda.is_available():
        raise EnvironmentFault("--precision fp16: needs a GPU, and none is visible. On a CPU use bf16 or fp32.")
    folder = model_folder(model)
    network, config = load_finetuned(folder)
    behaviour = behaviour_of(config, sha256(folder / WEIGHTS))
    threshold = requested_threshold(config, request.threshold, request.operating_point, request.probabilities)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    live = LiveNetwork(place(network, device).eval(), config.architecture.in_channels, device, request.precision, request.flips)

    def labels_of(values: NDArray) -> NDArray:
        return segment(values, (1.0, 1.0), live, behaviour, request, threshold)

    if (decision := behaviour.decision(threshold, request.probabilities)) is not None:
        say(decision)
    about = {"runtime": f"PyTorch {torch.__version__}", "device": device.type, "threads": torch.get_num_threads()}
    about |= {"precision": request.precision, "flips": request.flips}
    return predict_video(video, out, labels_of, behaviour, masks, about)
