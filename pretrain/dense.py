"""Dense contrast: the same place of a scan in two views attracts, all other places of the set repel.

Features of a level of the decoder, which so is pretrained too, read at matching places that the geometry of the views gives
(`pretrain.places`). After the local loss of Chaitanya et al. 2020 (arXiv 2006.10511, section 3.2), VADeR (Pinheiro et al. 2020,
arXiv 2011.05499, section 3) and PixPro (Xie et al. 2021, arXiv 2011.10043, section 3.1), with the places of all scans as negatives.
"""

from collections.abc import Sequence

import torch
from lightly.loss import NTXentLoss
from lightly.utils import dist
from lightly.utils.debug import std_of_l2_normalized
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.losses import of_all_ranks
from pretrain.recipe import DenseSettings
from resunet.decoders import AnyDecoder, AnyEncoder
from resunet.light_decoder import LightDecoder


class DenseBranch(nn.Module):
    """A projection of single places: two linear layers (1×1 convolutions), thrown away later."""

    def __init__(self, encoder: AnyEncoder, decoder: AnyDecoder, settings: DenseSettings) -> None:
        super().__init__()
        self.level, self.stride = settings.level, encoder.strides[settings.level]
        width = (decoder.widths if isinstance(decoder, LightDecoder) else encoder.channels)[settings.level]
        self.projection = nn.Sequential(
            nn.Linear(width, settings.hidden), nn.ReLU(inplace=True), nn.Linear(settings.hidden, settings.output)
        )

    def forward(self, features: Tensor, sides: Sequence[int], places: Tensor) -> Tensor:
        """The decoder's level of views with these sides, and places (2N, count, dimensions) in them → (2N, count, output)."""
        projected: Tensor = self.projection(read_level(features, self.stride, sides, places))
        return projected


def read_level(level: Tensor, stride: int, sides: Sequence[int], places: Tensor) -> Tensor:
    """A level's features at places in [-1, 1] of the views, by linear interpolation, in float32.

    Feature i along an axis belongs to the view's voxel stride · i, where the strided convolutions are centred, not to the middle
    of the voxels from there to the next: in a flipped view the difference would change its sign.

    Args:
        level: (N, C, *size).
        sides: of the views, in array order.
        places: (N, count, dimensions), (x, y) or (x, y, z).

    Returns:
        (N, count, C).
    """
    dims = len(sides)
    view, size = (torch.tensor(list(one), device=places.device).flip(0) for one in (sides, level.shape[2:]))
    index = ((places + 1) * view / 2 - 0.5) / stride
    grid = (2 * index + 1) / size - 1
    read = F.grid_sample(
        level.float(), grid.view(*grid.shape[:2], *[1] * (dims - 1), dims), padding_mode="border", align_corners=False
    )
    return read.flatten(2).mT


def contrast_places(projection: Tensor, found: Tensor, settings: DenseSettings) -> dict[str, Tensor]:
    """NT-Xent of the matching places of one contrastive set over all ranks, in float32.

    Every scan's first place comes before any scan's second, and so on; of these as many are used as settings.pairs allows, and on
    every rank as many as on the one with fewest.

    Args:
        projection: (2N, count, D), of the first views and then of the second.
        found: (N, count), which of them are matches.

    Returns:
        dense_loss, 0 where no scan of a rank has any; dense_points, how many pairs were used over all ranks (chance is
        ln(2 · dense_points − 1)); dense_projection_std, see `pretrain.objective.contrast`.
    """
    pairs = [one.transpose(0, 1)[found.T] for one in projection.float().chunk(2)]
    ranks = dist.world_size()
    most = torch.tensor([float(min(len(pairs[0]), settings.pairs // ranks))], device=projection.device)
    count = int(of_all_ranks(most).min())
    if count == 0:
        nothing = projection.new_zeros((), dtype=torch.float32)
        return {"dense_loss": projection.float().sum() * 0, "dense_points": nothing, "dense_projection_std": nothing}
    first, second = (one[:count] for one in pairs)
    loss = NTXentLoss(temperature=settings.temperature, gather_distributed=True)
    return {
        "dense_loss": loss(first, second),
        "dense_points": torch.full((), float(count * ranks), device=projection.device),
        "dense_projection_std": std_of_l2_normalized(of_all_ranks(torch.cat([first, second]).detach())),
    }
