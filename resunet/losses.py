"""Focal + Dice, and a Dice of single components, in float32, with ignored pixels left out.

Binary tasks have one logit and a sigmoid, others a softmax. The conventions are fixed and stated here, because each of
them changes the figure.

With regions, unions of classes that may overlap, all terms are of the regions instead of the classes. The probability of a
region is the sum of those of its classes, so that a softmax over exclusive classes still stands behind it: nested regions have
nested probabilities, and every pixel one class. nnU-Net's region-based training (Isensee et al. 2018, arXiv 1809.10483; its
documentation/region_based_training.md) has an independent sigmoid for each region, with Dice and cross-entropy, and makes a
label map of them by an order of precedence (regions_class_order). This is not that: a combination that is no class cannot be
predicted here, and there is no order to choose.

Every term is a function of sums over the batch. `total` makes of a rank's sums those of all ranks, so that the loss, and its
gradient, are those of the whole batch whatever the number of ranks (`resunet.training.sum_over_ranks`).
"""

from collections.abc import Callable, Sequence
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

Total = Callable[[Tensor], Tensor]
Members = Sequence[Sequence[int]]  # of every region its class indices; none of them the background's


def one_rank(values: Tensor) -> Tensor:
    """The total over the ranks where there is one."""
    return values


def segmentation_loss(
    logits: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    focal_weight: float = 1.0,
    dice_weight: float = 1.0,
    component_weight: float = 0.0,
    class_weights: Sequence[float] | None = None,
    total: Total = one_rank,
    regions: Members | None = None,
) -> dict[str, Tensor]:
    """The weighted sum of its terms; a term of weight 0 is not computed.

    Args:
        logits: (N, 1 or K, *size), any float dtype.
        target: (N, *size) class indices; `IGNORE` is left out of all terms.
        class_weights: one a class, the background first, or one a region, of focal and Dice; None: all alike.
        total: the sum over the ranks of a tensor of any shape.
        regions: what the terms are of; None: the classes.

    Returns:
        loss and its terms (focal, dice, component): float32 scalars.
    """
    logits = logits.float()  # sums over a 512² image overflow in half precision
    terms = {}
    if focal_weight:
        terms["focal"] = focal_weight * focal_loss(logits, target, gamma, class_weights, total, regions)
    if dice_weight:
        terms["dice"] = dice_weight * dice_loss(logits, target, class_weights, total, regions)
    if component_weight:
        terms["component"] = component_weight * component_dice_loss(logits, target, total, regions)
    weights = {"focal": focal_weight, "dice": dice_weight, "component": component_weight}
    return {"loss": torch.stack(list(terms.values())).sum()} | {name: term / weights[name] for name, term in terms.items()}


def focal_loss(
    logits: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    class_weights: Sequence[float] | None = None,
    total: Total = one_rank,
    regions: Members | None = None,
) -> Tensor:
    """Mean over pixels of −(1 − p)^γ log p, p the probability of the true class; no α (Lin et al. 2017, arXiv 1708.02002).

    With weights the mean is weighted by those of the true classes, as torch's cross-entropy has it. With regions it is over pixels
    and regions, weighted by the regions' weights, p being the probability of what is true: that a pixel is of the region or is not.
    """
    valid = target != IGNORE
    true = torch.where(valid, target, 0).long()
    if regions is not None:
        sign = 2 * region_truth(target, regions) - 1
        log_p = F.logsigmoid(sign * region_logits(logits, regions))
        its = torch.ones(len(regions)) if class_weights is None else torch.tensor(class_weights)
        weight = valid[:, None] * its.to(logits).view(1, -1, *[1] * (target.ndim - 1))
        return _focal_mean(log_p, weight, gamma, total)
    if logits.shape[1] == 1:
        log_p = F.logsigmoid(torch.where(true == 1, 1.0, -1.0) * logits[:, 0])
    else:
        log_p = logits.log_softmax(dim=1).gather(1, true[:, None])[:, 0]
    weight = valid.float() if class_weights is None else valid * logits.new_tensor(class_weights)[true]
    return _focal_mean(log_p, weight, gamma, total)


def _focal_mean(log_p: Tensor, weight: Tensor, gamma: float, total: Total) -> Tensor:
    values = -((1 - log_p.exp()).clamp_min(0) ** gamma) * log_p
    summed, weights = total(torch.stack([(values * weight).sum(), weight.sum()])).unbind()
    return summed / weights.clamp_min(torch.finfo(weight.dtype).tiny)


def dice_loss(
    logits: Tensor,
    target: Tensor,
    class_weights: Sequence[float] | None = None,
    total: Total = one_rank,
    regions: Members | None = None,
) -> Tensor:
    """1 − mean over foreground classes, or over regions, of (2 Σpg + s) / (Σp + Σg + s), summed over the whole batch (batch Dice).

    Milletari et al. 2016 (arXiv 1606.04797) with the plain denominator, as nnU-Net and MONAI (batch=True) have it.
    """
    probability, truth = _foreground(logits, target, regions)
    over = (0, *range(2, logits.ndim))
    sizes = probability.sum(dim=over) + truth.sum(dim=over)
    overlap, sizes = total(torch.stack([(probability * truth).sum(dim=over), sizes])).unbind()
    dice = (2 * overlap + SMOOTHING) / (sizes + SMOOTHING)
    if class_weights is None:
        return 1 - dice.mean()
    weight = logits.new_tensor(class_weights[1:] if regions is None else class_weights)
    return 1 - (dice * weight).sum() / weight.sum()


def component_dice_loss(logits: Tensor, target: Tensor, total: Total = one_rank, regions: Members | None = None) -> Tensor:
    """1 − mean Dice of the target's connected components, each on all pixels but those of the others.

    A lesion of 5 pixels counts as much as one of 500 (blob loss: Kofler et al. 2022, arXiv 2205.08209, equation 3).

    Components are of one scan and one class, or one region, and touch at corners too. Without any the loss is 0: false alarms
    are the other terms' affair.
    """
    probability, truth = _foreground(logits, target, regions)
    ids, owner = _components(truth)
    count = len(owner)
    flat = ids.flatten()
    inside = logits.new_zeros(count + 1).index_add(0, flat, probability.flatten())[1:]
    sizes = torch.bincount(flat, minlength=count + 1)[1:]
    maps = probability.flatten(0, 1).flatten(1).sum(dim=1)
    of_all = torch.zeros_like(maps).index_add(0, owner, inside)
    alone = maps[owner] - of_all[owner] + inside
    dice = (2 * inside + SMOOTHING) / (alone + sizes + SMOOTHING)
    summed, number = total(torch.stack([dice.sum(), dice.new_tensor(count)])).unbind()
    return 1 - summed / number if number else 0.0 * probability.sum()


def region_logits(logits: Tensor, regions: Members) -> Tensor:
    """(N, K, *size) → (N, R, *size), whose sigmoid is the sum of the softmax over each region's classes.

    log Σ exp of the region's logits less that of the others': nothing is added up as a probability, so that neither a region
    that is certain nor one that is impossible is rounded.
    """
    found = []
    for its in regions:
        others = [index for index in range(logits.shape[1]) if index not in its]
        found.append(logits[:, list(its)].logsumexp(dim=1) - logits[:, others].logsumexp(dim=1))
    return torch.stack(found, dim=1)


def region_truth(target: Tensor, regions: Members) -> Tensor:
    """(N, *size) class indices → (N, R, *size), 1 within each region and 0 elsewhere, also where the target is ignored."""
    inside = [torch.isin(target, torch.tensor(list(its), dtype=target.dtype, device=target.device)) for its in regions]
    return torch.stack(inside, dim=1).float()


def _foreground(logits: Tensor, target: Tensor, regions: Members | None) -> tuple[Tensor, Tensor]:
    """Probability and truth of the foreground classes or the regions, (N, 1, K − 1 or R, *size), 0 where the target is ignored."""
    valid = (target != IGNORE)[:, None].float()
    if regions is not None:
        return region_logits(logits, regions).sigmoid() * valid, region_truth(target, regions)
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
