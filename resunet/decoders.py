"""The decoder that goes with an encoder."""

from collections.abc import Sequence

from resunet.decoder import ProgressiveDecoder
from resunet.encoder import ResidualEncoder
from resunet.light_decoder import LightDecoder
from resunet.light_model import decoder_widths
from resunet.mobile import MobileEncoder

AnyEncoder = ResidualEncoder | MobileEncoder
AnyDecoder = ProgressiveDecoder | LightDecoder


def decoder_of(
    encoder: AnyEncoder, squeeze_excite: bool = False, finest: int = 0, channels: Sequence[int] | None = None
) -> AnyDecoder:
    """A fresh decoder as the encoder's segmenter has it, down to a level.

    Args:
        channels: of a light decoder; None: as wide as `decoder_widths` says.
    """
    if isinstance(encoder, MobileEncoder):
        return LightDecoder(encoder, decoder_widths(encoder.channels) if channels is None else channels, squeeze_excite, finest)
    assert channels is None, "the decoder of a residual encoder is as wide as that"
    return ProgressiveDecoder(encoder, encoder.config.architecture.norm, squeeze_excite, finest)  # type: ignore[union-attr]
