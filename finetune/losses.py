"""Focal + Dice, in float32, with ignored pixels left out.

Binary tasks have one logit and a sigmoid, others a softmax. The conventions are fixed and stated here, because each of
them changes the figure.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from resunet.data.cases import IGNORE

# Added to numerator and denominator of the Dice. Small, so that it does not hide an empty target: with nothing in the
# target and nothing predicted the Dice is 1, and any prediction brings it near 0.
SMOOTHING = 1e-5


def focal_dice_loss(
    logits: Tensor, target: Tensor, gamma: float = 2.0, focal_weight: float = 1.0, dice_weight: float = 1.0
) -> dict[str, Tensor]:
    """The weighted sum and its two terms.

    Args:
        logits: (N, 1 or K, *size), any float dtype.
        target: (N, *size) class indices; `IGNORE` is left out of both terms.

    Returns:
        loss, focal, dice: float32 scalars.
    """
    logits = logits.float()  # sums over a 512² image overflow in half precision
    focal = focal_loss(logits, target, gamma)
    dice = dice_loss(logits, target)
    return {"loss": focal_weight * focal + dice_weight * dice, "focal": focal, "dice": dice}


def focal_loss(logits: Tensor, target: Tensor, gamma: float = 2.0) -> Tensor:
    """mean over pixels of −(1 − p)^γ log p, p the probability of the true class; no α (Lin et al. 2017, arXiv 1708.02002)."""
    valid = target != IGNORE
    if logits.shape[1] == 1:
        sign = torch.where(target == 1, 1.0, -1.0)
        log_p = F.logsigmoid(sign * logits[:, 0])
    else:
        true = torch.where(valid, target, 0).long()
        log_p = logits.log_softmax(dim=1).gather(1, true[:, None])[:, 0]
    values = -((1 - log_p.exp()).clamp_min(0) ** gamma) * log_p
    return (values * valid).sum() / valid.sum().clamp_min(1)


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 − mean over foreground classes of (2 Σpg + s) / (Σp + Σg + s), summed over the whole batch (batch Dice).

    Milletari et al. 2016 (arXiv 1606.04797) with the plain denominator, as nnU-Net and MONAI (batch=True) have it.
    """
    valid = (target != IGNORE)[:, None].float()
    if logits.shape[1] == 1:
        probability = logits.sigmoid()
        truth = (target == 1)[:, None].float()
    else:
        probability = logits.softmax(dim=1)[:, 1:]
        classes = torch.arange(1, logits.shape[1], device=target.device)
        truth = (target[:, None] == classes.view(1, -1, *[1] * (target.ndim - 1))).float()
    probability = probability * valid
    over = (0, *range(2, logits.ndim))
    overlap = (probability * truth).sum(dim=over)
    total = probability.sum(dim=over) + truth.sum(dim=over)
    return 1 - ((2 * overlap + SMOOTHING) / (total + SMOOTHING)).mean()
