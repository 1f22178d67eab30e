"""Which layers hurt: val Dice after every group of channels alone has lost some, without any training."""

from collections.abc import Callable, Sequence

from torch import Tensor

from finetune.compression.prune import Prunable
from finetune.compression.recipe import PruneSettings
from resunet.config import Frozen
from resunet.data.cases import IGNORE, LoadedCase
from resunet.model import Segmenter
from resunet.progress import progress

_LEAST = 0.1


class LayerSensitivity(Frozen):
    """Of one group of channels, named by its first layer: share removed → val Dice."""

    layer: str
    channels: int
    layers: int
    dice: dict[str, float]

    def fall(self, share: float, whole: float) -> float:
        """What Dice loses where so large a share goes: of the next larger share that was tried, at most of the largest."""
        tried = sorted(self.dice, key=float)
        if not tried or share <= 0:
            return 0.0
        at = next((one for one in tried if float(one) >= share), tried[-1])
        return whole - self.dice[at]

    def square(self, whole: float) -> float:
        """w of the least squares fit of w · share² to the falls, those below 0 as 0."""
        shares = [float(share) ** 2 for share in self.dice]
        falls = [max(0.0, whole - dice) for dice in self.dice.values()]
        return sum(a * b for a, b in zip(shares, falls, strict=True)) / sum(share**2 for share in shares)


class Sensitivity(Frozen):
    """dice: of the whole network on the same cases."""

    dice: float
    cases: int
    layers: tuple[LayerSensitivity, ...]

    def weights(self) -> dict[str, float]:
        """By layer, w of the harm w · share² that its falls of Dice are fitted by, all at least a tenth of their mean.

        What falls by nothing, or rises, on so few cases is not harmless.
        """
        falls = {one.layer: one.square(self.dice) for one in self.layers}
        least = _LEAST * sum(falls.values()) / len(falls)
        return {layer: max(fall, least) for layer, fall in falls.items()} if least > 0 else dict.fromkeys(falls, 1.0)

    def worst(self, lost: dict[str, float], count: int = 3) -> list[str]:
        """Of layers that lost shares of their channels those that hurt most by themselves, in words."""
        falls = {one.layer: one.fall(lost.get(one.layer, 0.0), self.dice) for one in self.layers}
        worst = sorted((name for name in falls if falls[name] > 0), key=lambda name: -falls[name])[:count]
        return [f"{name} (lost {lost[name]:.0%}; by itself and untrained Dice −{falls[name]:.3f})" for name in worst]


def measure_sensitivity(
    subject: Prunable,
    scores: Sequence[Tensor],
    settings: PruneSettings,
    cases: Sequence[LoadedCase],
    dice: Callable[[Segmenter, Sequence[LoadedCase]], float],
) -> Sensitivity:
    """Remove the least important channels of one group at a time. dice: of a network on cases."""
    chosen = spread(cases, settings.sensitivity_cases)
    found: list[dict[str, float]] = [{} for _ in subject.groups]
    trials = [(i, share) for i in range(len(subject.groups)) for share in settings.sensitivity]
    for i, share in progress(trials, len(trials), "sensitivity"):
        group, score = subject.groups[i], scores[i]
        units = score.view(group.unit, -1).mean(dim=0)
        gone = min(max(1, round(share * len(units))), len(units) - 1)
        stride = len(units)
        least = units.argsort(stable=True)[:gone].tolist()
        removed: list[list[int]] = [[] for _ in subject.groups]
        removed[i] = sorted(unit + which * stride for unit in least for which in range(group.unit))
        found[i][f"{share:g}"] = dice(subject.without(removed), chosen)
    layers = tuple(
        LayerSensitivity(layer=group.name, channels=group.channels, layers=len({use.layer for use in group.uses}), dice=values)
        for group, values in zip(subject.groups, found, strict=True)
    )
    return Sensitivity(dice=dice(subject.network, chosen), cases=len(chosen), layers=layers)


def spread(cases: Sequence[LoadedCase], count: int) -> list[LoadedCase]:
    """At most so many cases with something to find, evenly over all of them, in their order, and so over groups."""
    holding = [case for case in cases if case.labels is not None and ((case.labels > 0) & (case.labels != IGNORE)).any()]
    if len(holding) <= count:
        return holding
    return [holding[i * len(holding) // count] for i in range(count)]
