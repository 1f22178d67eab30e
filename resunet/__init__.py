"""From an archive of unlabelled scans and a handful of labelled ones to a segmentation model.

The promised API; everything else may change. Names are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resunet.bundle import Bundle
    from resunet.checkpoint import ModelConfig
    from resunet.decoder import ProgressiveDecoder
    from resunet.encoder import ResidualEncoder
    from resunet.errors import CheckFailed, EnvironmentFault, InputError, ResUNetError, Stopped
    from resunet.feature_extractor import FeatureExtractor
    from resunet.light_decoder import LightDecoder
    from resunet.light_model import MobileResUNet
    from resunet.mobile import MobileEncoder
    from resunet.model import ResUNet, UNet, build_model, load_model
    from resunet.transfer import Receipt, transfer_encoder

_HOME = {
    "Bundle": "bundle",
    "CheckFailed": "errors",
    "EnvironmentFault": "errors",
    "FeatureExtractor": "feature_extractor",
    "InputError": "errors",
    "LightDecoder": "light_decoder",
    "MobileEncoder": "mobile",
    "MobileResUNet": "light_model",
    "ModelConfig": "checkpoint",
    "ProgressiveDecoder": "decoder",
    "Receipt": "transfer",
    "ResUNet": "model",
    "ResUNetError": "errors",
    "ResidualEncoder": "encoder",
    "Stopped": "errors",
    "UNet": "model",
    "build_model": "model",
    "load_model": "model",
    "transfer_encoder": "transfer",
}

__all__ = [
    "Bundle",
    "CheckFailed",
    "EnvironmentFault",
    "FeatureExtractor",
    "InputError",
    "LightDecoder",
    "MobileEncoder",
    "MobileResUNet",
    "ModelConfig",
    "ProgressiveDecoder",
    "Receipt",
    "ResUNet",
    "ResUNetError",
    "ResidualEncoder",
    "Stopped",
    "UNet",
    "build_model",
    "load_model",
    "transfer_encoder",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"resunet.{_HOME[name]}"), name)
    raise AttributeError(f"module 'resunet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
