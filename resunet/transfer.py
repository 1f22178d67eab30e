"""Encoder → full network, exactly, with a receipt; and with it what of a decoder was trained.

Weights that silently did not load are the field's commonest fault, so nothing here is lenient: every tensor of the
encoder is loaded or adapted and named, so is every one of the trained part of a decoder, everything else is fresh and named, and
both inside the full network must give the features that the live ones gave when they were saved.
"""

from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from resunet.architecture import MobileResUNetArchitecture, ResUNetArchitecture
from resunet.checkpoint import (
    CONFIG,
    WEIGHTS,
    DecoderPart,
    ModelConfig,
    differences,
    load_exactly,
    model_folder,
    read_config,
    read_weights,
)
from resunet.config import Frozen
from resunet.data.leakage import ARCHIVE
from resunet.decoders import AnyEncoder, decoder_of
from resunet.encoder import ResidualEncoder
from resunet.errors import CheckFailed, InputError
from resunet.files import sha256
from resunet.fingerprint import decoder_feature_error, feature_error
from resunet.mobile import MobileEncoder
from resunet.model import WithEncoder

# Features are compared in float64, where the order of summation moves them by about 1e-14 of their size. Adapted input
# convolutions are rounded to float32 once more: measured up to 2e-9.
TOLERANCE = 1e-9
TOLERANCE_ADAPTED = 1e-6
DECODER = "decoder.safetensors"
Parts = Literal["encoder", "both"]


class TensorReceipt(Frozen):
    """One tensor of the network after the transfer."""

    name: str
    state: Literal["loaded", "adapted", "fresh"]
    shape: tuple[int, ...]
    norm: float
    source: str | None = None


class Receipt(Frozen):
    """What came from pretraining, tensor by tensor: receipt.json.

    source of a tensor: its name in the encoder's file, or in the decoder's. decoder_…: where a decoder came too. start_sha256: of a
    run that goes on from a finished segmenter, whose every tensor was loaded; there was no encoder then.
    """

    schema_version: int = 1
    encoder_sha256: dict[str, str]
    allowed: list[str]
    encoder_parameters: int
    encoder_parameters_loaded: int
    encoder_share_loaded: float
    feature_error: float
    feature_tolerance: float
    decoder_parameters: int = 0
    decoder_parameters_loaded: int = 0
    decoder_feature_error: float | None = None
    start_sha256: dict[str, str] = {}
    tensors: list[TensorReceipt]

    def line(self) -> str:
        """The receipt in a sentence."""
        states = [tensor.state for tensor in self.tensors]
        if self.start_sha256:
            return (
                f"all {len(states)} tensors of a finished segmenter, its head's too, were loaded; training went on from there"
            )
        decoder = ""
        if self.decoder_feature_error is not None:
            decoder = (
                f"; so did {self.decoder_parameters_loaded / self.decoder_parameters:.1%} of the decoder's "
                f"{self.decoder_parameters:,}, features equal to {self.decoder_feature_error:.0e}"
            )
        return (
            f"{states.count('loaded')} tensors loaded, {states.count('adapted')} adapted, {states.count('fresh')} fresh; "
            f"{self.encoder_share_loaded:.1%} of the encoder's {self.encoder_parameters:,} parameters came from "
            f"pretraining, features equal to {self.feature_error:.0e}{decoder}"
        )


def transfer_encoder(
    encoder: Path, model: WithEncoder, allow_input_channels: bool = False, parts: Parts | None = None
) -> Receipt:
    """Load a pretrained encoder into `model.encoder`, and what was trained of a decoder into `model.decoder`.

    Args:
        encoder: a pretraining run or an encoder's model directory.
        model: changed in place, once everything has been checked.
        allow_input_channels: allow another number of input channels. The input convolutions are then summed over the
            encoder's channels and divided by the network's, which gives the same features for an image whose
            channels are equal (as timm does for grey images).
        parts: encoder: nothing else; both: the decoder too, or an error; None: whatever there is.

    Raises:
        InputError: names or shapes that differ and are not named as allowed, each listed.
        CheckFailed: the features are not those of the network that was saved.
    """
    folder = model_folder(encoder)
    config = read_config(folder)
    part = _decoder_part(folder, config, parts)
    _check_architecture(folder, config, part, model, allow_input_channels)
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
    trial: AnyEncoder = load_exactly(type(model.encoder).build(model.encoder.config.architecture), tensors, "")
    error = feature_error(trial, check, adapted=bool(adapted))
    tolerance = TOLERANCE_ADAPTED if adapted else TOLERANCE
    if not error <= tolerance:
        raise CheckFailed(
            f"{folder}: the encoder does not give the features it gave when it was saved: relative difference "
            f"{error:.2g}, allowed {tolerance:.0g}. {WEIGHTS} was changed after pretraining; restore it or pretrain again."
        )
    from_decoder = read_decoder(folder, trial, part, tolerance, adapted=bool(adapted)) if part is not None else {}
    load_exactly(model.encoder, tensors, str(folder / WEIGHTS))
    error = feature_error(model.encoder, check, adapted=bool(adapted))  # of the encoder where it now is
    assert error <= tolerance
    decoder_error = None
    if part is not None:
        load_exactly(model.decoder, model.decoder.state_dict() | from_decoder, str(folder / DECODER))
        decoder_error = decoder_feature_error(model.encoder, model.decoder, part, adapted=bool(adapted))
        assert decoder_error <= tolerance
    return _receipt(folder, model, set(adapted), error, set(from_decoder), decoder_error)


def receipt_of_start(model: nn.Module, digests: dict[str, str]) -> Receipt:
    """Of a finished segmenter that was loaded exactly. digests: sha256 of its files."""
    tensors = [
        TensorReceipt(name=name, state="loaded", shape=tuple(tensor.shape), norm=float(tensor.double().norm()), source=name)
        for name, tensor in model.state_dict().items()
    ]
    return Receipt(
        encoder_sha256={},
        allowed=[],
        encoder_parameters=0,
        encoder_parameters_loaded=0,
        encoder_share_loaded=0.0,
        feature_error=0.0,
        feature_tolerance=0.0,
        start_sha256=digests,
        tensors=tensors,
    )


def adapt_input(weight: Tensor, in_channels: int) -> Tensor:
    """(C_out, C_in, …) → (C_out, in_channels, …): the sum over the input channels, shared out equally."""
    return weight.sum(dim=1, keepdim=True).expand(-1, in_channels, *weight.shape[2:]).contiguous() / in_channels


def read_decoder(
    folder: Path, encoder: AnyEncoder, part: DecoderPart, tolerance: float, adapted: bool = False
) -> dict[str, Tensor]:
    """The tensors of the trained decoder in a model directory, checked: names, shapes, and features from this encoder's.

    Raises:
        InputError: no such file, or names or shapes that differ, each listed.
        CheckFailed: the features are not those of the decoder that was saved.
    """
    if not (folder / DECODER).is_file():
        raise InputError(
            f"{folder / DECODER}: no such file, and {CONFIG} names a trained decoder. Restore it, or leave it: transfer=encoder."
        )
    tensors = read_weights(folder / DECODER)
    decoder = decoder_of(encoder, part.squeeze_excite, part.finest, part.channels)
    problems = differences(decoder.state_dict(), tensors)
    if problems:
        raise InputError(f"{folder / DECODER}: does not fit the network's decoder:\n{problems}")
    load_exactly(decoder, tensors, str(folder / DECODER))
    error = decoder_feature_error(encoder, decoder, part, adapted)
    if not error <= tolerance:
        raise CheckFailed(
            f"{folder}: the decoder does not give the features it gave when it was saved: relative difference {error:.2g}, allowed "
            f"{tolerance:.0g}. {DECODER} was changed after pretraining; restore it or pretrain again."
        )
    return tensors


def _decoder_part(folder: Path, config: ModelConfig, parts: Parts | None) -> DecoderPart | None:
    """The trained decoder that is to be transferred."""
    if parts == "both" and config.decoder is None:
        raise InputError(
            f"transfer=both: {folder} holds an encoder alone. A decoder is trained by resunet pretrain with dense "
            "(dense.weight=1, for example); leave the key out to take what there is."
        )
    return None if parts == "encoder" else config.decoder


def _check_architecture(
    folder: Path, config: ModelConfig, part: DecoderPart | None, model: WithEncoder, allow_input_channels: bool
) -> None:
    """What an encoder and a network must share, compared key by key before any tensor is."""
    if config.architecture.name not in (ResidualEncoder.kind, MobileEncoder.kind):
        raise InputError(f"{folder}: holds a {config.architecture.name!r}, not an encoder. Give a pretraining run.")
    if config.architecture.name != (own_kind := model.encoder.kind):
        raise InputError(
            f"{folder}: holds a {config.architecture.name!r}, and a {model.kind!r} has a {own_kind!r}. Give an encoder of that "
            "kind, or another model.name."
        )
    theirs = config.architecture.model_dump()
    ours = model.encoder.config.architecture.model_dump()
    free = {"in_channels"} if allow_input_channels else set()
    differing = [key for key in ours if ours[key] != theirs[key] and key not in free]
    lines = [f"  {key}: encoder {_shown(theirs[key])}, network {_shown(ours[key])}" for key in differing]
    hint = "Set the recipe's model keys to the encoder's, or pretrain an encoder of this shape."
    assert isinstance(model.config.architecture, ResUNetArchitecture | MobileResUNetArchitecture)
    if (
        part is not None
        and part.channels is not None
        and part.channels[part.finest :] != (widths := model.config.architecture.channels[part.finest :])
    ):
        lines.append(f"  channels: decoder {_shown(part.channels[part.finest :])}, network {_shown(widths)}")
        hint += " transfer=encoder leaves the decoder out."
    elif part is not None and part.squeeze_excite != (own := model.config.architecture.squeeze_excite):
        lines.append(f"  squeeze_excite: decoder {part.squeeze_excite}, network {own}")
        hint += " transfer=encoder leaves the decoder out."
    if lines:
        if "in_channels" in differing:
            hint += " Another number of input channels can be allowed by name: allow=[input_channels]."
        listed = "\n".join(lines)
        raise InputError(f"{folder}: the encoder is not of the network's architecture:\n{listed}\n{hint}")


def _shown(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _receipt(
    folder: Path, model: WithEncoder, adapted: set[str], error: float, from_decoder: set[str], decoder_error: float | None
) -> Receipt:
    sources = {f"encoder.{name}": name for name in model.encoder.state_dict()}
    sources |= {f"decoder.{name}": name for name in from_decoder}
    tensors = []
    for name, tensor in model.state_dict().items():
        source = sources.get(name)
        state: Literal["loaded", "adapted", "fresh"] = "loaded"
        if source is None:
            state = "fresh"
        elif source in adapted:  # convolutions of the encoder; none of a decoder has such a name
            state = "adapted"
        tensors.append(
            TensorReceipt(name=name, state=state, shape=tuple(tensor.shape), norm=float(tensor.double().norm()), source=source)
        )
    sizes = {name: parameter.numel() for name, parameter in model.encoder.named_parameters()}
    loaded = sum(size for name, size in sizes.items() if name not in adapted)
    decoder_sizes = {name: parameter.numel() for name, parameter in model.decoder.named_parameters()}
    files = [CONFIG, WEIGHTS, *([] if decoder_error is None else [DECODER])]
    files += [ARCHIVE] if (folder / ARCHIVE).is_file() else []  # what was looked for leaks in
    return Receipt(
        encoder_sha256={name: sha256(folder / name) for name in files},
        allowed=[f"input channels adapted: {name}" for name in sorted(adapted)],
        encoder_parameters=sum(sizes.values()),
        encoder_parameters_loaded=loaded,
        encoder_share_loaded=loaded / sum(sizes.values()),
        feature_error=error,
        feature_tolerance=TOLERANCE_ADAPTED if adapted else TOLERANCE,
        decoder_parameters=sum(decoder_sizes.values()) if decoder_error is not None else 0,
        decoder_parameters_loaded=sum(size for name, size in decoder_sizes.items() if name in from_decoder),
        decoder_feature_error=decoder_error,
        tensors=tensors,
    )
