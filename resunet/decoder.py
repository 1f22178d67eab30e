"""The progressive decoder: from the encoder's coarsest level to its finest, one `UpBlock` a level."""

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from resunet.blocks import NormKind, UpBlock
from resunet.encoder import Encoder


class ProgressiveDecoder(nn.Module):
    """Transposed convolution ×2, skip through a 1×1 convolution (optional squeeze-and-excitation), added, residual unit.

    It asks the encoder for channels and strides. The finest feature map it returns has the size and the width of the
    encoder's level `finest`: 0, the finest it has, but for a decoder that is trained before it is whole. The blocks of that one
    have the names that they have in the whole decoder.

    Args:
        encoder: whose `channels`, `strides` and `spatial_dims` shape the decoder; it is not kept.
        norm: 'batch', 'instance' or 'group'.
        squeeze_excite: squeeze-and-excitation on every skip.
        finest: the level that it climbs to.
    """

    def __init__(self, encoder: Encoder, norm: NormKind = "batch", squeeze_excite: bool = False, finest: int = 0) -> None:
        super().__init__()
        assert finest == 0 or 0 < finest < len(encoder.channels) - 1, f"finest={finest}: of {len(encoder.channels)} levels"
        self.finest = finest
        steps = [coarse // fine for fine, coarse in itertools.pairwise(encoder.strides)]
        assert all(step == 2 for step in steps), f"every level halves the one before: strides {encoder.strides}"
        widths = encoder.channels[finest:][::-1]  # coarsest first
        self.blocks = nn.ModuleList(
            UpBlock(encoder.spatial_dims, below, skip, skip, norm, squeeze_excite) for below, skip in itertools.pairwise(widths)
        )

    def forward(self, features: Sequence[Tensor], finest: int | None = None) -> Tensor:
        """Features finest first, as an encoder returns them → (N, channels[finest], *size of level `finest`).

        Args:
            finest: a coarser level to stop at; None: its own finest.
        """
        finest = self.finest if finest is None else finest
        x = features[-1]
        for block, skip in zip(self.blocks, reversed(features[finest:-1]), strict=finest == self.finest):
            x = block(x, skip)
        return x

    def levels(self, features: Sequence[Tensor]) -> list[Tensor]:
        """What every block gives, finest first: (N, channels[i], *size of level i); the first is `forward`'s.

        Apart from `forward`, which lets the coarser ones go while it climbs.
        """
        x, found = features[-1], []
        for block, skip in zip(self.blocks, reversed(features[self.finest : -1]), strict=True):
            x = block(x, skip)
            found.append(x)
        return found[::-1]
