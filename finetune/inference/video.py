"""A video through a model; `resunet.inference.video` is what is read and written, a bundle's as well."""

import os
from pathlib import Path

import torch
from numpy.typing import NDArray

from finetune.inference.predict import PredictRequest, open_model
from finetune.inference.window import LiveNetwork
from resunet.inference.predict import refuse_full, segment
from resunet.inference.video import predict_video, refuse_for_video
from resunet.layout import place
from resunet.progress import say


def predict_model_video(model: Path, video: Path, out: Path, request: PredictRequest, masks: bool) -> Path:
    """Overlay, timing and, with `masks`, masks of a video, into a new or empty folder; `out`.

    Raises:
        InputError, EnvironmentFault: as `finetune.inference.predict.predict` and `resunet.inference.video.predict_video`.
    """
    refuse_full(out)
    refuse_for_video(video, request.probabilities, int(os.environ.get("WORLD_SIZE", "1")))
    network, config, behaviour, threshold = open_model(model, request)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    live = LiveNetwork(place(network, device).eval(), config.architecture.in_channels, device, request.precision, request.flips)

    def labels_of(values: NDArray) -> NDArray:
        return segment(values, (1.0, 1.0), live, behaviour, request, threshold)

    if (decision := behaviour.decision(threshold, request.probabilities)) is not None:
        say(decision)
    about = {"runtime": f"PyTorch {torch.__version__}", "device": device.type, "threads": torch.get_num_threads()}
    about |= {"precision": request.precision, "flips": request.flips}
    return predict_video(video, out, labels_of, behaviour, masks, about)
