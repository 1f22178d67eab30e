"""Which channels go, so that targets of parameters and multiply-adds are met at the least harm that is to be expected.

The harm of a group that loses a share R of its importance is taken for w · R²: w from the measured sensitivity, the square since a
little of everything hurts less than all of something. A channel's harm over its price, at the margin, ranks all together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.compression.groups import Group, LayerCost, Size, size_at, widths_after
from resunet.errors import InputError

_MIXTURES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the price of a channel in multiply-adds, the rest in parameters
_CLOSE = 1e-3  # of the threshold


@dataclass(frozen=True)
class Bounds:
    """What a network may have at most; None: as much as it has."""

    parameters: float | None
    macs: float | None

    def hold(self, size: Size) -> bool:
        return (self.parameters is None or size.parameters <= self.parameters) and (self.macs is None or size.macs <= self.macs)


@dataclass(frozen=True)
class Harm:
    """What is known of a group. weight: w. lost: the share of its channels that went before, in this compression."""

    weight: float = 1.0
    lost: float = 0.0

    def of(self, share: Tensor) -> Tensor:
        """Of losing a share of the importance that is left."""
        return self.weight * (self.lost + (1 - self.lost) * share) ** 2


def choose_channels(
    groups: Sequence[Group],
    scores: Sequence[Tensor],
    harms: Sequence[Harm],
    costs: Mapping[str, LayerCost],
    bounds: Bounds,
    round_to: int,
    least: Sequence[int],
) -> list[list[int]]:
    """Of every group the channels to remove.

    A channel goes if its harm over its price is below a threshold, which is searched: the smallest that meets the bounds. The price
    is its share of the network's parameters and of its multiply-adds, mixed: deep levels have dear parameters, shallow ones dear
    multiply-adds. Of the mixtures the one is taken that does the least harm.

    Args:
        scores: importances, one a channel.
        round_to: what is left of a group is a multiple of it, where the group has as many.
        least: channels that each group keeps.

    Raises:
        InputError: the bounds cannot be met.
    """
    marginal = [_marginal(group, score, harm) for group, score, harm in zip(groups, scores, harms, strict=True)]
    best: tuple[float, list[list[int]]] | None = None
    for mixture in _MIXTURES:
        prices = [group.unit * _price(i, groups, costs, mixture) for i, group in enumerate(groups)]
        ranked = [one / price for one, price in zip(marginal, prices, strict=True)]
        removed = _search(groups, ranked, costs, bounds, round_to, least)
        if removed is None:
            continue
        harm = sum(
            float(its.of(score[gone].sum() / score.sum())) for its, score, gone in zip(harms, scores, removed, strict=True)
        )
        if best is None or harm < best[0]:
            best = harm, removed
    if best is None:
        smallest = size_at(costs, widths_after(groups, [g.channels - k for g, k in zip(groups, least, strict=True)], costs))
        raise InputError(
            f"prune: even with {smallest.parameters:,} parameters and {smallest.macs:,} multiply-adds, the fewest that prune.least "
            "and prune.round_to leave, the target is not met. Raise prune.parameters or prune.macs, or lower prune.least."
        )
    return best[1]


def fewest(groups: Sequence[Group], share: float, round_to: int, full: Mapping[str, int]) -> list[int]:
    """Channels that every group keeps at least: a share of those of the full network, by the group's name, rounded up."""
    found = []
    for group in groups:
        step = _step(group, round_to)
        kept = max(1, -(-round(share * full[group.name]) // step)) * step
        found.append(min(kept, group.channels))
    return found


def _search(
    groups: Sequence[Group],
    ranked: Sequence[Tensor],
    costs: Mapping[str, LayerCost],
    bounds: Bounds,
    round_to: int,
    least: Sequence[int],
) -> list[list[int]] | None:
    """The fewest channels below one threshold for all groups that meet the bounds; None if none do."""

    def at(threshold: float) -> list[list[int]]:
        return [_below(*one, threshold, round_to) for one in zip(groups, ranked, least, strict=True)]

    def met(removed: Sequence[Sequence[int]]) -> bool:
        return bounds.hold(size_at(costs, widths_after(groups, [len(gone) for gone in removed], costs)))

    low, high = 0.0, max(float(one.max()) for one in ranked) * 1.01
    if not met(at(high)):
        return None
    while high - low > _CLOSE * high:
        middle = (low + high) / 2
        low, high = (low, middle) if met(at(middle)) else (middle, high)
    return at(high)


def _below(group: Group, ranked: Tensor, least: int, threshold: float, round_to: int) -> list[int]:
    """The channels of a group below a threshold, the least important first; as many as leave a width that may be."""
    step = _step(group, round_to)
    left = group.channels - int((ranked < threshold).sum()) * group.unit
    left = min(group.channels, max(least, round(left / step) * step))
    units = ranked.argsort(stable=True)[: (group.channels - left) // group.unit].tolist()
    stride = group.channels // group.unit
    return sorted(unit + which * stride for unit in units for which in range(group.unit))


def _step(group: Group, round_to: int) -> int:
    """Widths of a group are multiples of it: of round_to where the group is one itself, and of the groups of its norms."""
    wanted = -(-round_to // group.unit) * group.unit
    return wanted if group.channels % wanted == 0 else group.unit


def _marginal(group: Group, score: Tensor, harm: Harm) -> Tensor:
    """What it adds to a group's harm to remove each set of channels that go together, after all that matter less.

    The importance of a set is the mean of its channels', as torch-pruning has those of a group norm.
    """
    units = score.view(group.unit, -1).mean(dim=0).double()
    order = units.argsort(stable=True)
    share = torch.cat([torch.zeros(1, dtype=torch.float64), units[order].cumsum(0) / units.sum()])
    marginal = torch.empty_like(units)
    marginal[order] = harm.of(share).diff()
    return marginal


def _price(index: int, groups: Sequence[Group], costs: Mapping[str, LayerCost], mixture: float) -> float:
    """A channel's share of the network, relative to the mean of all channels."""
    whole = size_at(costs, {})
    channels = sum(group.channels for group in groups)
    gone = [0] * len(groups)
    gone[index] = 1
    without = size_at(costs, widths_after(groups, gone, costs))
    parameters = (whole.parameters - without.parameters) / whole.parameters
    macs = (whole.macs - without.macs) / whole.macs
    return channels * ((1 - mixture) * parameters + mixture * macs)
