"""Encoder → full network, exactly, with a receipt.

Weights that silently did not load are the field's commonest fault, so nothing here is lenient: every tensor of the
encoder is loaded or adapted and named, everything else is fresh and named, and the encoder inside the full network
must give the features that the live one gave when it was saved.
"""

import math
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from resunet.checkpoint import (
    CONFIG,
    WEIGHTS,
    FeatureCheck,
    ModelConfig,
    cast_to,
    differences,
    load_exactly,
    model_folder,
    read_config,
    read_weights,
)
from resunet.config import Frozen
from resunet.encoder import ResidualEncoder
from resunet.errors import CheckFailed, InputError
from resunet.files import sha256
from resunet.model import ResUNet

# Features are compared in float64, where the order of summation moves them by about 1e-14 of their size. Adapted input
# convolutions are rounded to float32 once more: measured up to 2e-9.
TOLERANCE = 1e-9
TOLERANCE_ADAPTED = 1e-6
_SEED = 20150505
_SIZE = {2: 64, 3: 32}


class TensorReceipt(Frozen):
    """One tensor of the network after the transfer."""

    name: str
    state: Literal["loaded", "adapted", "fresh"]
    shape: tuple[int, ...]
    norm: float
    source: str | None = None


class Receipt(Frozen):
    """What came from the encoder, tensor by tensor: receipt.json."""

    schema_version: int = 1
    encoder_sha256: dict[str, str]
    allowed: list[str]
    encoder_parameters: int
    encoder_parameters_loaded: int
    encoder_share_loaded: float
    feature_error: float
    feature_tolerance: float
    tensors: list[TensorReceipt]

    def line(self) -> str:
        """The receipt in a sentence."""
        states = [tensor.state for tensor in self.tensors]
        return (
            f"{states.count('loaded')} tensors loaded, {states.count('adapted')} adapted, {states.count('fresh')} fresh; "
            f"{self.encoder_share_loaded:.1%} of the encoder's {self.encoder_parameters:,} parameters came from "
            f"pretraining; features equal to {self.feature_error:.0e}"
        )


def transfer_encoder(encoder: Path, model: ResUNet, allow_input_channels: bool = False) -> Receipt:
    """Load a pretrained encoder into `model.encoder`.

    Args:
        encoder: a pretraining run or an encoder's model directory.
        model: changed in place, once everything has been checked.
        allow_input_channels: allow another number of input channels. The input convolutions are then summed over the
            encoder's channels and divided by the network's, which gives the same features for an image whose
            channels are equal (as timm does for grey images).

    Raises:
        InputError: names or shapes that differ and are not named as allowed, each listed.
        CheckFailed: the features are not those of the network that was saved.
    """
    folder = model_folder(encoder)
    config = read_config(folder)
    _check_architecture(folder, config, model, allow_input_channels)
    check = config.feature_check
    if check is None:
        raise InputError(f"{folder / CONFIG}: has no feature_check; it was not written by resunet pretrain.")
    given = read_weights(folder / WEIGHTS)
    wanted = model.encoder.state_dict()
    tensors = dict(given)
    adapted = []
    for name in model.encoder.input_convolutions():
        if allow_input_channels and name in given and name in wanted and given[name].shape != wanted[name].shape:
            tensors[name] = adapt_input(given[name], wanted[name].shape[1])
            adapted.append(name)
    problems = differences(wanted, tensors)
    if problems:
        raise InputError(f"{folder / WEIGHTS}: does not fit the network's encoder:\n{problems}")
    trial = load_exactly(ResidualEncoder(**model.encoder.config.architecture.model_dump(exclude={"name"})), tensors, "")
    error = feature_error(trial, check, adapted=bool(adapted))
    tolerance = TOLERANCE_ADAPTED if adapted else TOLERANCE
    if not error <= tolerance:
        raise CheckFailed(
            f"{folder}: the encoder does not give the features it gave when it was saved: relative difference "
            f"{error:.2g}, allowed {tolerance:.0g}. {WEIGHTS} was changed after pretraining; restore it or pretrain again."
        )
    load_exactly(model.encoder, tensors, str(folder / WEIGHTS))
    error = feature_error(model.encoder, check, adapted=bool(adapted))  # of the encoder where it now is
    assert error <= tolerance
    return _receipt(folder, model, set(adapted), error)


def adapt_input(weight: Tensor, in_channels: int) -> Tensor:
    """(C_out, C_in, …) → (C_out, in_channels, …): the sum over the input channels, shared out equally."""
    return weight.sum(dim=1, keepdim=True).expand(-1, in_channels, *weight.shape[2:]).contiguous() / in_channels


def fingerprint(encoder: ResidualEncoder) -> FeatureCheck:
    """The live encoder's features of a fixed input, pooled per channel and level, in float64 on the CPU.

    Two inputs of uniform noise: one with equal channels, which an adaptation of the input channels must keep, and one
    with a plane of its own for every channel. Mean and root mean square over (N, *size).
    """
    size = _SIZE[encoder.spatial_dims]
    return FeatureCheck(
        seed=_SEED, size=size, features={kind: _pooled(encoder, _SEED, size, kind) for kind in ("equal", "own")}
    )


def feature_error(encoder: ResidualEncoder, check: FeatureCheck, adapted: bool = False) -> float:
    """The largest difference between an encoder's features and those recorded, relative to the largest recorded.

    `adapted`: the encoder has other input channels than the recorded one had, so that only equal channels compare.
    """
    worst = 0.0
    for kind in ("equal",) if adapted else ("equal", "own"):
        expected = torch.tensor(check.features[kind], dtype=torch.float64)
        found = torch.tensor(_pooled(encoder, check.seed, check.size, kind), dtype=torch.float64)
        if found.shape != expected.shape:
            return float("inf")
        difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
        worst = max(worst, difference if math.isfinite(difference) else math.inf)
    return worst


@torch.no_grad()
def _pooled(encoder: ResidualEncoder, seed: int, size: int, kind: str) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 1 if kind == "equal" else encoder.in_channels, *[size] * encoder.spatial_dims)
    x = torch.rand(shape, generator=generator, dtype=torch.float64) * 4 - 2
    x = x.expand(-1, encoder.in_channels, *shape[2:])
    pooled = []
    for level in cast_to(encoder, torch.float64)(x):
        over = (0, *range(2, level.ndim))
        pooled += [level.mean(dim=over), level.square().mean(dim=over).sqrt()]
    return torch.cat(pooled).tolist()


def _check_architecture(folder: Path, config: ModelConfig, model: ResUNet, allow_input_channels: bool) -> None:
    """What an encoder and a network must share, compared key by key before any tensor is."""
    if config.architecture.name != ResidualEncoder.kind:
        raise InputError(f"{folder}: holds a {config.architecture.name!r}, not an encoder. Give a pretraining run.")
    theirs = config.architecture.model_dump()
    ours = model.encoder.config.architecture.model_dump()
    free = {"in_channels"} if allow_input_channels else set()
    differing = [key for key in ours if ours[key] != theirs[key] and key not in free]
    if differing:
        lines = "\n".join(f"  {key}: encoder {_shown(theirs[key])}, network {_shown(ours[key])}" for key in differing)
        hint = "Set the recipe's model keys to the encoder's, or pretrain an encoder of this shape."
        if "in_channels" in differing:
            hint += " Another number of input channels can be allowed by name: allow=[input_channels]."
        raise InputError(f"{folder}: the encoder is not of the network's architecture:\n{lines}\n{hint}")


def _shown(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _receipt(folder: Path, model: ResUNet, adapted: set[str], error: float) -> Receipt:
    prefix = "encoder."
    tensors = []
    for name, tensor in model.state_dict().items():
        source = name.removeprefix(prefix) if name.startswith(prefix) else None
        state: Literal["loaded", "adapted", "fresh"] = "loaded"
        if source is None:
            state = "fresh"
        elif source in adapted:
            state = "adapted"
        tensors.append(
            TensorReceipt(name=name, state=state, shape=tuple(tensor.shape), norm=float(tensor.double().norm()), source=source)
        )
    sizes = {name: parameter.numel() for name, parameter in model.encoder.named_parameters()}
    loaded = sum(size for name, size in sizes.items() if name not in adapted)
    return Receipt(
        encoder_sha256={name: sha256(folder / name) for name in (CONFIG, WEIGHTS)},
        allowed=[f"input channels adapted: {name}" for name in sorted(adapted)],
        encoder_parameters=sum(sizes.values()),
        encoder_parameters_loaded=loaded,
        encoder_share_loaded=loaded / sum(sizes.values()),
        feature_error=error,
        feature_tolerance=TOLERANCE_ADAPTED if adapted else TOLERANCE,
        tensors=tensors,
    )
