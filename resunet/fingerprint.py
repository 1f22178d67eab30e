"""The features by which a saved encoder, and what was trained of a decoder, are known again: of fixed inputs, in float64.

The order of summation moves them by about 1e-14 of their size.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from resunet.checkpoint import DecoderPart, FeatureCheck, cast_to
from resunet.decoders import AnyDecoder, AnyEncoder
from resunet.light_decoder import LightDecoder

_SEED = 20150505
_SIZE = {2: 64, 3: 32}


def fingerprint(encoder: AnyEncoder) -> FeatureCheck:
    """The live encoder's features of a fixed input, pooled per channel and level, in float64 on the CPU.

    Two inputs of uniform noise: one with equal channels, which an adaptation of the input channels must keep, and one
    with a plane of its own for every channel. Mean and root mean square over (N, *size).
    """
    size = _SIZE[encoder.spatial_dims]
    features = {kind: _pooled(_levels(encoder, _SEED, size, kind)) for kind in ("equal", "own")}
    return FeatureCheck(seed=_SEED, size=size, features=features)


def feature_error(encoder: AnyEncoder, check: FeatureCheck, adapted: bool = False) -> float:
    """The largest difference between an encoder's features and those recorded, relative to the largest recorded.

    `adapted`: the encoder has other input channels than the recorded one had, so that only equal channels compare.
    """
    return _worst(check, lambda kind: _pooled(_levels(encoder, check.seed, check.size, kind)), adapted)


def describe_decoder(encoder: AnyEncoder, decoder: AnyDecoder, squeeze_excite: bool) -> DecoderPart:
    """The facts of a trained decoder, its levels' features of the encoder's fixed input among them; see `fingerprint`."""
    size = _SIZE[encoder.spatial_dims]
    features = {kind: _pooled(_decoded(encoder, decoder, _SEED, size, kind)) for kind in ("equal", "own")}
    return DecoderPart(
        finest=decoder.finest,
        norm=encoder.config.architecture.norm,  # type: ignore[union-attr]
        squeeze_excite=squeeze_excite,
        channels=decoder.widths if isinstance(decoder, LightDecoder) else None,
        feature_check=FeatureCheck(seed=_SEED, size=size, features=features),
    )


def decoder_feature_error(encoder: AnyEncoder, decoder: AnyDecoder, part: DecoderPart, adapted: bool = False) -> float:
    """As `feature_error`, of a decoder's levels down to the finest that was recorded."""
    check = part.feature_check

    def found(kind: str) -> list[float]:
        return _pooled(_decoded(encoder, decoder, check.seed, check.size, kind)[part.finest - decoder.finest :])

    return _worst(check, found, adapted)


def _worst(check: FeatureCheck, pooled: Callable[[str], list[float]], adapted: bool) -> float:
    worst = 0.0
    for kind in ("equal",) if adapted else ("equal", "own"):
        expected = torch.tensor(check.features[kind], dtype=torch.float64)
        found = torch.tensor(pooled(kind), dtype=torch.float64)
        if found.shape != expected.shape:
            return float("inf")
        difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
        worst = max(worst, difference if math.isfinite(difference) else math.inf)
    return worst


@torch.no_grad()
def _levels(encoder: AnyEncoder, seed: int, size: int, kind: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 1 if kind == "equal" else encoder.in_channels, *[size] * encoder.spatial_dims)
    x = torch.rand(shape, generator=generator, dtype=torch.float64) * 4 - 2
    levels: list[Tensor] = cast_to(encoder, torch.float64)(x.expand(-1, encoder.in_channels, *shape[2:]))
    return levels


@torch.no_grad()
def _decoded(encoder: AnyEncoder, decoder: AnyDecoder, seed: int, size: int, kind: str) -> list[Tensor]:
    return cast_to(decoder, torch.float64).levels(_levels(encoder, seed, size, kind))


def _pooled(levels: Sequence[Tensor]) -> list[float]:
    pooled = []
    for level in levels:
        over = (0, *range(2, level.ndim))
        pooled += [level.mean(dim=over), level.square().mean(dim=over).sqrt()]
    found: list[float] = torch.cat(pooled).tolist()
    return found
