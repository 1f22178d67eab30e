"""The weights that a MobileNetV3 encoder begins with: timm's ImageNet weights from the Hub, or a file of a timm network.

Loaded exactly: every tensor of the encoder is in the file and of its shape, or nothing is loaded. The input convolution is
adapted to the scan's channels as timm does it; what the file holds beside is a classifier's.
"""

import pickle
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import logging as hub_logging
from torch import Tensor

from resunet.architecture import MOBILE_BACKBONE
from resunet.checkpoint import differences, load_exactly, read_weights
from resunet.errors import InputError
from resunet.files import sha256
from resunet.light_settings import LightSettings
from resunet.mobile import MobileEncoder
from resunet.progress import say

_KEY = "model.weights"
_CLASSIFIER = ("conv_head.", "norm_head.", "classifier.")
_FILE = "model.safetensors"
_INPUT = "conv_stem.weight"
_COLOURS = 3  # channels of ImageNet's pictures


def load_weights(encoder: MobileEncoder, weights: Literal["imagenet"] | Path) -> Path:
    """Load `weights` into an encoder; the file that they came from.

    Raises:
        InputError: no network, no such weights or file, or weights of another network.
    """
    path = _file(weights, _backbone(encoder))
    given = {name: tensor for name, tensor in _read(path).items() if not name.startswith(_CLASSIFIER)}
    wanted = {encoder.timm_name(name): tensor for name, tensor in encoder.state_dict().items()}
    if _INPUT in given and given[_INPUT].ndim == 4 and given[_INPUT].shape[1] == _COLOURS:
        from timm.models import adapt_input_conv

        given[_INPUT] = adapt_input_conv(encoder.in_channels, given[_INPUT])
    if problems := differences(wanted, given):
        raise InputError(
            f"{_KEY}={path}: are not those of timm's {_backbone(encoder)} (names as timm has them):\n{problems}\n"
            "Give the file of that network, or set model.backbone to the file's."
        )
    load_exactly(encoder, {name: given[encoder.timm_name(name)] for name in encoder.state_dict()}, str(path))
    return path


def weights_input(settings: LightSettings) -> dict[str, str]:
    """The sha256 of the file that an encoder begins with, as a run's record of its inputs has it; empty without one."""
    if settings.weights is None:
        return {}
    return {"weights": sha256(_file(settings.weights, settings.backbone or MOBILE_BACKBONE))}


def imagenet_file(backbone: str) -> Path:
    """timm's ImageNet weights of a backbone: as they were downloaded before, or from the Hub.

    Raises:
        InputError: timm has none, or the Hub cannot be reached.
    """
    import timm

    known = sorted({name.split(".")[0] for name in timm.list_pretrained("mobilenetv3_*")})
    if backbone not in known:
        raise InputError(
            f"{_KEY}=imagenet: timm has none of {backbone}; it has some of {', '.join(known)}. Set model.backbone, or leave it out."
        )
    described = timm.get_pretrained_cfg(backbone)
    assert described is not None and described.hf_hub_id is not None
    repository = described.hf_hub_id
    try:
        return Path(hf_hub_download(repository, _FILE, local_files_only=True))
    except LocalEntryNotFoundError:
        say(f"{_KEY}=imagenet: asking the Hugging Face Hub for {repository}")
    before = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # of each try
    try:
        return Path(hf_hub_download(repository, _FILE))
    except Exception as error:  # a proxy's refusal is an error of whatever HTTP client the hub's version has
        raise InputError(
            f"{_KEY}=imagenet: the Hugging Face Hub cannot be reached, and {repository} was not downloaded before. Where there is "
            f"a network, download https://huggingface.co/{repository}/resolve/main/{_FILE}; bring the file here and give its path: "
            f"{_KEY}=FILE. Or leave the key out: random weights, or a pretraining run."
        ) from error
    finally:
        hub_logging.set_verbosity(before)


def _file(weights: Literal["imagenet"] | Path, backbone: str) -> Path:
    return imagenet_file(backbone) if weights == "imagenet" else Path(weights)


def _backbone(encoder: MobileEncoder) -> str:
    return str(encoder.config.architecture.backbone)  # type: ignore[union-attr]


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a PyTorch file that holds nothing but tensors; by timm's names."""
    if not path.is_file():
        raise InputError(f"{_KEY}={path}: no such file. Give a .safetensors or .pth file of a timm network, or 'imagenet'.")
    if path.suffix == ".safetensors":
        return read_weights(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise InputError(
            f"{_KEY}={path}: cannot be read as a PyTorch file of tensors alone; nothing else in it is loaded. Save the network's "
            f"state_dict, or give {_FILE}."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(one, Tensor) for one in found.values()):
        raise InputError(f"{_KEY}={path}: holds no state_dict, names with tensors.")
    return {str(name).removeprefix("module."): tensor for name, tensor in found.items()}
