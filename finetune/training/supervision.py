"""Deep supervision: the decoder's coarser levels learn the labels too, through heads that only training has.

The saved network is the plain one: `Supervised` wraps it, and its heads stay in the checkpoints.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from resunet.architecture import EncoderArchitecture, MobileEncoderArchitecture
from resunet.blocks import convolution, crop_to
from resunet.encoder import initialise_head
from resunet.errors import InputError
from resunet.light_model import MobileResUNet, shuffling_head
from resunet.model import ResUNet, UNet, logit_channels
from resunet.widths import level_channels


class Supervised(nn.Module):
    """A network with a 1×1 head on every level of its decoder but the coarsest (as nnU-Net; Lee et al. 2015, arXiv 1409.5185).

    The light network's levels begin at half the size, and so every head doubles it, as its own does.

    Raises:
        InputError: a network of fewer than four levels, which has no such level beside the finest.
    """

    def __init__(self, network: ResUNet | UNet | MobileResUNet) -> None:
        super().__init__()
        architecture = network.config.architecture
        light = isinstance(network, MobileResUNet)
        levels = level_channels(network)
        widths = levels[1:-1]
        if not widths:
            raise InputError(
                f"loss.deep_supervision=true: a network of {len(levels) + (not light)} levels has nothing to supervise beside its "
                "finest. Set model.channels of at least 4 levels, or loss.deep_supervision=false."
            )
        assert not isinstance(architecture, EncoderArchitecture | MobileEncoderArchitecture)
        logits = logit_channels(architecture.num_classes)
        self.network = network
        self.heads = nn.ModuleList(
            shuffling_head(width, logits) if light else convolution(architecture.spatial_dims, width, logits, 1, bias=True)
            for width in widths
        )
        for head in self.heads:
            initialise_head(head)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, in_channels, *size) → logits, finest first: level i is (N, 1 or num_classes, *ceil(size / 2^i)), or a light network's
        one longer."""
        return self.heads_of(self.network.levels(x))

    def heads_of(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """The logits of `network.levels`, as `forward` gives them."""
        heads = [self.network.head, *self.heads]
        return [head(level) for head, level in zip(heads, levels[:-1], strict=True)]


def supervised_loss(
    logits: Sequence[Tensor], labels: Tensor, loss: Callable[[Tensor, Tensor], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The weighted sum of `loss` over the levels, and the finest level's terms.

    Args:
        logits: finest first, as `Supervised` gives them.
        labels: (N, *size) of the finest.
        loss: logits and labels of a level → {"loss", and its terms}.
    """
    coarse = [coarser(labels, level) for level in range(len(logits))]
    levels = [loss(crop_to(one, its.shape[1:]), its) for one, its in zip(logits, coarse, strict=True)]
    weighted = [weight * one["loss"] for weight, one in zip(level_weights(len(levels)), levels, strict=True)]
    return levels[0] | {"loss": torch.stack(weighted).sum()}


def level_weights(count: int) -> list[float]:
    """1, 1/2, 1/4 … of their sum, finest first (nnU-Net: Isensee et al. 2021, doi 10.1038/s41592-020-01008-z)."""
    weights = [0.5**level for level in range(count)]
    return [weight / sum(weights) for weight in weights]


def coarser(labels: Tensor, level: int) -> Tensor:
    """(N, *size) → (N, *ceil(size / 2^level)): the label, `IGNORE` too, of the pixel on which a coarse one is centred.

    Strided convolutions put the output i on the input 2^level · i; those of the plain U-Net, which pools, lie half a coarse pixel
    further.
    """
    return labels[(slice(None), *[slice(None, None, 2**level)] * (labels.ndim - 1))]
