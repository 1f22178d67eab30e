"""Features of single pixels, from all levels of an encoder."""

import torch
from torch import Tensor
from torch.nn import functional as F

from resunet.decoders import AnyEncoder
from resunet.layout import channels_last


def features_at(encoder: AnyEncoder, image: Tensor, places: Tensor) -> Tensor:
    """What every level has at some pixels: read bilinearly, l2-normalised level by level, side by side; of length 1 in all.

    A strided level's position j is centred on pixel j · stride (3×3 convolutions padded by 1, and every stride-th pixel of the
    shortcut), which is where it is read. This is not F.interpolate's corner, half a stride away, which is 7.5 pixels at stride 16.

    Args:
        image: (C, *size).
        places: (P, D), pixels in array order.

    Returns:
        (P, channels of all levels) float32.
    """
    found = []
    for level, stride in zip(encoder(channels_last(image[None])), encoder.strides, strict=True):
        last = torch.tensor([max(n - 1, 1) for n in level.shape[2:]], device=image.device)
        grid = (2 * places / stride / last - 1).flip(1)  # (x, y) or (x, y, z), as grid_sample has it
        grid = grid.reshape(1, -1, *[1] * (grid.shape[1] - 1), grid.shape[1])
        read = F.grid_sample(level.float(), grid, padding_mode="border", align_corners=True)  # (1, C, P, 1[, 1])
        found.append(F.normalize(read.flatten(1).reshape(level.shape[1], -1).T, dim=1))
    return F.normalize(torch.cat(found, dim=1), dim=1)
