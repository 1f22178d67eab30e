"""Which layers INT8 hurts: Dice of a network of which one layer alone is rounded."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, fx, nn

from finetune.quantisation.training import show
from resunet.config import Frozen
from resunet.progress import progress


class RoundedLayer(Frozen):
    """dice: where this layer alone is in INT8, its inputs and its weights."""

    layer: str
    dice: float


class RoundingSensitivity(Frozen):
    """dice: of the float network on the same cases."""

    dice: float
    cases: int
    layers: tuple[RoundedLayer, ...]

    def worst(self, count: int) -> list[str]:
        """Of the layers that cost any Dice by themselves those that cost most."""
        hurting = [one for one in self.layers if one.dice < self.dice]
        return [one.layer for one in sorted(hurting, key=lambda one: one.dice)[:count]]

    def told(self, count: int = 3) -> list[str]:
        """These, in words."""
        dice = {one.layer: one.dice for one in self.layers}
        return [f"{layer} (alone in INT8 Dice −{self.dice - dice[layer]:.4f})" for layer in self.worst(count)]


def measure_rounding(
    network: nn.Module,
    channels: int,
    grid: Literal["affine", "symmetric"],
    batches: Sequence[Tensor],
    dice: Callable[[fx.GraphModule], float],
    cases: int,
) -> RoundingSensitivity:
    """Round one layer at a time, with ranges from batches, and nothing trained.

    Args:
        channels: of the network's input.
        batches: (N, channels, *size), that set the ranges.
        dice: of a captured network, on so many `cases`.
    """
    from finetune.quantisation import pt2e  # torchao

    prepared = pt2e.prepare(network, channels, trained=True, with_batch_norm=False, grid=grid)
    pt2e.set_ranges(prepared, moving=True, rounding=False)
    show(prepared, list(batches), torch.device("cpu"))
    pt2e.set_ranges(prepared, moving=False, rounding=False)
    whole = dice(prepared)
    found = []
    layers = pt2e.rounding_by_layer(prepared)
    for layer, rounders in progress(list(layers.items()), len(layers), "which layers hurt"):
        for one in rounders:
            one.enable_fake_quant(True)
        found.append(RoundedLayer(layer=layer, dice=dice(prepared)))
        for one in rounders:
            one.enable_fake_quant(False)
    return RoundingSensitivity(dice=whole, cases=cases, layers=tuple(found))
