"""A trained encoder as timm's `features_only=True` models are used: `feature_info`, and a list of feature maps.

`feature_info` is timm's own class, so that whatever builds itself from a timm backbone (a decoder, a feature pyramid) builds itself
from this one. The scan's normalisation is not part of the network: `config.normalisation` says which it was trained with.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from timm.models import FeatureInfo
from torch import Tensor, nn

from resunet.checkpoint import ModelConfig, model_folder, read_config
from resunet.encoder import Encoder
from resunet.errors import InputError
from resunet.model import NETWORKS


class FeatureExtractor(nn.Module):
    """Some levels of an encoder, finest first.

    Args:
        encoder: any module that is an `Encoder`, of 2 or 3 dimensions.
        config: of the model directory that it is from.
        out_indices: which levels, ascending; negative ones count from the coarsest. None: all.

    Raises:
        InputError: a level that the encoder does not have.
    """

    def __init__(self, encoder: Encoder, config: ModelConfig, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        assert isinstance(encoder, nn.Module)
        self.encoder = encoder
        self.config = config
        levels = len(encoder.channels)
        self.out_indices = _levels(levels, range(levels) if out_indices is None else out_indices)
        described = [
            dict(num_chs=width, reduction=stride, module=f"levels.{level}")
            for level, (width, stride) in enumerate(zip(encoder.channels, encoder.strides, strict=True))
        ]
        self.feature_info = FeatureInfo(described, self.out_indices)

    @classmethod
    def from_pretrained(cls, path: str | Path, out_indices: Sequence[int] | None = None) -> Self:
        """Of a pretraining or fine-tuning run or a model directory, in evaluation mode.

        Raises:
            InputError: as `load_encoder`; or a level that the encoder does not have.
        """
        encoder, config = load_encoder(Path(path))
        return cls(encoder, config, out_indices).eval()

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, in_channels, *size) → for every chosen level (N, channels, *ceil(size / reduction))."""
        features = self.encoder(x)
        return [features[level] for level in self.out_indices]


def load_encoder(path: Path) -> tuple[Encoder, ModelConfig]:
    """The encoder of a run or a model directory, a segmenter's too, in evaluation mode; and the directory's config.

    Raises:
        InputError: no model there, weights that do not fit, or a network that has no encoder.
    """
    folder = model_folder(path)
    config = read_config(folder)
    network = NETWORKS[config.architecture.name].from_pretrained(folder)
    encoder: Any = getattr(network, "encoder", network)
    if not all(hasattr(encoder, what) for what in ("channels", "strides", "in_channels", "spatial_dims")):
        raise InputError(
            f"{folder}: architecture.name={config.architecture.name!r} has no encoder of its own. Give a pretraining run, or a "
            "fine-tuning run with model.name=resunet or mobile_resunet (of an ensemble, one of its members)."
        )
    found: Encoder = encoder
    return found, config


def _levels(count: int, wanted: Sequence[int]) -> tuple[int, ...]:
    levels = tuple(level + count if level < 0 else level for level in wanted)
    ascending = all(before < after for before, after in itertools.pairwise(levels))
    if not levels or not ascending or levels[0] < 0 or levels[-1] >= count:
        raise InputError(
            f"out_indices={list(wanted)}: the encoder has the levels 0 to {count - 1} (or -{count} to -1); name some of them, each "
            "once, the finest first."
        )
    return levels
