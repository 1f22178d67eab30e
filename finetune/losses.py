"""Focal + Dice, and a Dice of single components, in float32, with ignored pixels left out.

Binary tasks have one logit and a sigmoid, others a softmax. The conventions are fixed and stated here, because each of
them changes the figure.
"""

from collections.abc import Sequence
from typing import Literal

import cc3d
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from resunet.data.cases import IGNORE

# Added to numerator and denominator of the Dice. Small, so that it does not hide an empty target: with nothing in the
# target and nothing predicted the Dice is 1, and any prediction brings it near 0.
SMOOTHING = 1e-5


def segmentation_loss(
    logits: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    focal_weight: float = 1.0,
    dice_weight: float = 1.0,
    component_weight: float = 0.0,
    class_weights: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """The weighted sum of its terms; a term of weight 0 is not computed.

    Args:
        logits: (N, 1 or K, *size), any float dtype.
        target: (N, *size) class indices; `IGNORE` is left out of all terms.
        class_weights: one a class, the background first, of focal and Dice; None: all alike.

    Returns:
        loss and its terms (focal, dice, component): float32 scalars.
    """
    logits = logits.float()  # sums over a 512² image overflow in half precision
    terms = {}
    if focal_weight:
        terms["focal"] = focal_weight * focal_loss(logits, target, gamma, class_weights)
    if dice_weight:
        terms["dice"] = dice_weight * dice_loss(logits, target, class_weights)
    if component_weight:
        terms["component"] = component_weight * component_dice_loss(logits, target)
    weights = {"focal": focal_weight, "dice": dice_weight, "component": component_weight}
    return {"loss": torch.stack(list(terms.values())).sum()} | {name: term / weights[name] for name, term in terms.items()}


def focal_loss(logits: Tensor, target: Tensor, gamma: float = 2.0, class_weights: Sequence[float] | None = None) -> Tensor:
    """Mean over pixels of −(1 − p)^γ log p, p the probability of the true class; no α (Lin et al. 2017, arXiv 1708.02002).

    With weights the mean is weighted by those of the true classes, as torch's cross-entropy has it.
    """
    valid = target != IGNORE
    true = torch.where(valid, target, 0).long()
    if logits.shape[1] == 1:
        log_p = F.logsigmoid(torch.where(true == 1, 1.0, -1.0) * logits[:, 0])
    else:
        log_p = logits.log_softmax(dim=1).gather(1, true[:, None])[:, 0]
    weight = valid.float() if class_weights is None else valid * logits.new_tensor(class_weights)[true]
    values = -((1 - log_p.exp()).clamp_min(0) ** gamma) * log_p
    return (values * weight).sum() / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny)


def dice_loss(logits: Tensor, target: Tensor, class_weights: Sequence[float] | None = None) -> Tensor:
    """1 − mean over foreground classes of (2 Σpg + s) / (Σp + Σg + s), summed over the whole batch (batch Dice).

    Milletari et al. 2016 (arXiv 1606.04797) with the plain denominator, as nnU-Net and MONAI (batch=True) have it.
    """
    probability, truth = _foreground(logits, target)
    over = (0, *range(2, logits.ndim))
    overlap = (probability * truth).sum(dim=over)
    total = probability.sum(dim=over) + truth.sum(dim=over)
    dice = (2 * overlap + SMOOTHING) / (total + SMOOTHING)
    if class_weights is None:
        return 1 - dice.mean()
    weight = logits.new_tensor(class_weights[1:])
    return 1 - (dice * weight).sum() / weight.sum()


def component_dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 − mean Dice of the target's connected components, each on all pixels but those of the others.

    A lesion of 5 pixels counts as much as one of 500 (blob loss: Kofler et al. 2022, arXiv 2205.08209, equation 3).

    Components are of one scan and one class, and touch at corners too. Without any the loss is 0: false alarms are the other
    terms' affair.
    """
    probability, truth = _foreground(logits, target)
    ids, owner = _components(truth)
    count = len(owner)
    if not count:
        return 0.0 * probability.sum()
    flat = ids.flatten()
    inside = logits.new_zeros(count + 1).index_add(0, flat, probability.flatten())[1:]
    sizes = torch.bincount(flat, minlength=count + 1)[1:]
    maps = probability.flatten(0, 1).flatten(1).sum(dim=1)
    of_all = torch.zeros_like(maps).index_add(0, owner, inside)
    alone = maps[owner] - of_all[owner] + inside
    return 1 - ((2 * inside + SMOOTHING) / (alone + sizes + SMOOTHING)).mean()


def _foreground(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Probability and truth of the foreground classes, (N, 1 or K − 1, *size), 0 where the target is ignored."""
    valid = (target != IGNORE)[:, None].float()
    if logits.shape[1] == 1:
        return logits.sigmoid() * valid, (target == 1)[:, None].float()
    classes = torch.arange(1, logits.shape[1], device=target.device)
    truth = (target[:, None] == classes.view(1, -1, *[1] * (target.ndim - 1))).float()
    return logits.softmax(dim=1)[:, 1:] * valid, truth


def _components(truth: Tensor) -> tuple[Tensor, Tensor]:
    """Ids (N, K, *size), 0 outside and counted from 1 over the batch; and for each component the index of its map in N · K."""
    maps = truth.flatten(0, 1).to(torch.uint8).cpu().numpy()
    connectivity: Literal[8, 26] = 8 if maps.ndim == 3 else 26
    ids = np.zeros(maps.shape, np.int64)
    owner: list[int] = []
    for number, one in enumerate(maps):
        labels, count = cc3d.connected_components(one, connectivity=connectivity, return_N=True)
        ids[number] = np.where(labels > 0, labels.astype(np.int64) + len(owner), 0)
        owner += [number] * int(count)
    return torch.from_numpy(ids).to(truth.device).view(truth.shape), torch.tensor(owner, dtype=torch.int64, device=truth.device)
