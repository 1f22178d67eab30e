"""How much the channels of each group matter: by their weights, by what the loss would lose, or by their norms' scale.

torch-pruning's importances are of modules that it traced itself; these are the same sums (a test compares), by layers' names. All
are divided by the group's mean, as torch-pruning does, so that layers of different size are ranked together.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from finetune.compression.groups import Group, Use
from finetune.recipe import FinetuneRecipe
from finetune.step import forward_backward
from finetune.training.patches import Batches
from resunet.errors import InputError
from resunet.model import Segmenter
from resunet.widths import CONVOLUTIONS, NORMS, TRANSPOSED, is_depthwise

Kind = Literal["magnitude", "taylor", "batch_norm"]
Scores = list[Tensor]  # of every group, one a channel


def weight_importance(network: nn.Module, groups: Sequence[Group], kind: Kind) -> Scores:
    """magnitude: of what belongs to a channel the sum of squares, the mean over a group's layers (Fang et al. 2023, p = 2).

    batch_norm: the mean of the norms' scales (Liu et al. 2017, arXiv 1708.06519).

    Raises:
        InputError: a group without norms that have a scale.
    """
    assert kind != "taylor"
    if kind == "magnitude":
        return [_relative(torch.stack(_each(network, group, torch.square)).mean(dim=0)) for group in groups]
    found = []
    for group in groups:
        norms = [use for use in group.uses if isinstance(network.get_submodule(use.layer), NORMS)]
        scales = [_scale(network, use) for use in norms]
        if not scales:
            raise InputError(
                f"prune.importance=batch_norm: the channels of {group.name} have no norm with a scale. Take magnitude or taylor."
            )
        found.append(_relative(torch.stack(scales).mean(dim=0)))
    return found


def taylor_importance(
    recipe: FinetuneRecipe,
    network: Segmenter,
    groups: Sequence[Group],
    sampler: Batches,
    batches: int,
    accelerator: Accelerator,
) -> Scores:
    """|Σ gradient · weight| of what belongs to a channel, the mean over a group's layers and over batches.

    How much the loss would change without it, to first order (Molchanov et al. 2019, arXiv 1906.10771, section 3.1). The network is
    not touched.
    """
    trial = copy.deepcopy(network).eval()  # without dropout of any kind, and with the statistics that it is used with
    totals = [torch.zeros(group.channels) for group in groups]
    for batch in range(batches):
        trial.zero_grad(set_to_none=True)
        forward_backward(recipe, trial, sampler, batch, accelerator)
        products = {
            name: (parameter * parameter.grad).detach().float().cpu()
            for name, parameter in trial.named_parameters()
            if parameter.grad is not None
        }
        for total, group in zip(totals, groups, strict=True):
            total += torch.stack(_each(trial, group, torch.clone, products)).abs().mean(dim=0)
    return [_relative(total / batches) for total in totals]


def _each(
    network: nn.Module, group: Group, of: Callable[[Tensor], Tensor], values: Mapping[str, Tensor] | None = None
) -> list[Tensor]:
    """Of every layer of a group the sum of `of` its weights (or of `values` by their names) for each channel."""
    found = []
    for use in group.uses:
        layer = network.get_submodule(use.layer)
        weight = getattr(layer, "weight", None)
        if weight is None:  # a norm without scale
            continue
        tensor = weight.detach().float().cpu() if values is None else values[f"{use.layer}.weight"]
        dim = 0
        if isinstance(layer, CONVOLUTIONS + TRANSPOSED) and not is_depthwise(layer):
            dim = int((use.side == "out") == isinstance(layer, TRANSPOSED))
        sums = of(tensor).movedim(dim, 0).flatten(1).sum(dim=1) if tensor.ndim > 1 else of(tensor)
        found.append(sums[list(use.places)])
    return found


def _scale(network: nn.Module, use: Use) -> Tensor:
    weight = network.get_submodule(use.layer).weight
    if not isinstance(weight, Tensor):
        raise InputError(f"prune.importance=batch_norm: {use.layer} has no scale. Take magnitude or taylor.")
    return weight.detach().abs().float().cpu()[list(use.places)]


def _relative(scores: Tensor) -> Tensor:
    mean = scores.mean()
    return scores / mean if mean > 0 else torch.ones_like(scores)
