"""Intervals for means over patients and draws, which are both random; Holm's family; and the labels that reach a score.

A value is one group's in one draw: y = mean + group + draw + rest (two-way crossed random effects, one value a cell; Searle,
Casella & McCulloch 1992, §4.4). The mean of P groups and D draws has the variance (E MSp + E MSd − E MSe) / PD. With three
draws that sum, estimated and given Satterthwaite's degrees of freedom, comes out near zero now and then and the interval with
it: it covers 76 to 93 % (benchmarks/curve_coverage.py). Here each source of variance has its own Student quantile, and the
squares of the half-widths are added, as in the modified large-sample method (Graybill & Wang 1980; Zou & Donner 2008, "MOVER"):

    half² = max(t_P² MSp, t_D² MSd, t_P² MSp + t_D² (MSd − MSe)) / PD

with t_P of P − 1 and t_D of D − 1 degrees of freedom: never narrower than Student's interval over groups (of their means over
draws) nor than that over draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import stdtrit

from finetune.evaluation.statistics import FEWEST_GROUPS, Bounds, bounded_interval

FEWEST_DRAWS = 2  # of one nobody knows what another would have given
LEVEL = 0.05
_SMALLEST_P = 1e-12
_POINTS = 64  # between two budgets, where a curve is compared with a score

Values = NDArray[np.float64]


@dataclass(frozen=True)
class MeanSquares:
    """Of values (…, P, D): their mean and mean squares, each (…)."""

    mean: Values
    groups: Values
    draws: Values
    rest: Values
    shape: tuple[int, int]


def mean_squares(values: Values) -> MeanSquares:
    """The two-way analysis of variance of values (…, P groups, D draws), P and D at least 2."""
    p, d = values.shape[-2:]
    mean = values.mean(axis=(-2, -1))
    by_group, by_draw = values.mean(axis=-1), values.mean(axis=-2)
    rest = values - by_group[..., None] - by_draw[..., None, :] + mean[..., None, None]
    return MeanSquares(
        mean=mean,
        groups=d * ((by_group - mean[..., None]) ** 2).sum(axis=-1) / (p - 1),
        draws=p * ((by_draw - mean[..., None]) ** 2).sum(axis=-1) / (d - 1),
        rest=(rest**2).sum(axis=(-2, -1)) / ((p - 1) * (d - 1)),
        shape=(p, d),
    )


def half_width(squares: MeanSquares, level: float = LEVEL) -> Values:
    """Half the width of the 1 − level interval of the mean, (…)."""
    p, d = squares.shape
    of_groups = float(stdtrit(p - 1, level / 2)) * np.sqrt(squares.groups / (p * d))
    return _with_draws(-of_groups, squares, level)


def _with_draws(of_groups: Values, squares: MeanSquares, level: float) -> Values:
    """The half-width over groups, and what draws add to it."""
    p, d = squares.shape
    t = float(stdtrit(d - 1, level / 2)) ** 2
    over_draws = t * squares.draws / (p * d)
    added = t * (squares.draws - squares.rest) / (p * d)
    half: Values = np.sqrt(np.maximum(np.maximum(of_groups**2, over_draws), of_groups**2 + added))
    return half


def p_value(squares: MeanSquares) -> float:
    """The level at which the interval of a single mean begins to leave out zero."""
    mean = abs(float(squares.mean))

    def beyond(log_level: float) -> float:
        return float(half_width(squares, math.exp(log_level))) - mean

    if mean == 0:
        return 1.0
    lowest = math.log(_SMALLEST_P)
    return _SMALLEST_P if beyond(lowest) <= 0 else math.exp(brentq(beyond, lowest, 0.0, xtol=1e-9))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of a family (Holm 1979): those below a level are rejected, and it holds for all of them at once."""
    adjusted, floor = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = floor
    return adjusted


def difference(values: Values) -> dict[str, Any]:
    """The figure of paired differences (P, D): {"mean", "ci95", "p", "n" groups, "draws"}.

    ci95 and p are None below 5 groups or 2 draws.
    """
    groups, draws = values.shape
    figure: dict[str, Any] = {"mean": float(values.mean()), "ci95": None, "p": None, "n": groups, "draws": draws}
    if groups >= FEWEST_GROUPS and draws >= FEWEST_DRAWS:
        squares = mean_squares(values)
        half = float(half_width(squares))
        figure |= {"ci95": [figure["mean"] - half, figure["mean"] + half], "p": p_value(squares)}
    return figure


def score(values: Values, bounds: Bounds = (0.0, 1.0)) -> dict[str, Any]:
    """The figure of scores within bounds (P, D): as `difference`, without p.

    Over groups the interval is `bounded_interval`'s, for scores are skewed where differences are not: many groups near 0.9
    and a few at 0.
    """
    groups, draws = values.shape
    mean = float(values.mean())
    figure: dict[str, Any] = {"mean": mean, "ci95": None, "n": groups, "draws": draws}
    if groups >= FEWEST_GROUPS and draws >= FEWEST_DRAWS:
        squares = mean_squares(values)
        ends = bounded_interval(values.mean(axis=1).tolist(), bounds)
        below, above = (float(_with_draws(np.array(abs(mean - end)), squares, LEVEL)) for end in ends)
        figure["ci95"] = [max(bounds[0], mean - below), min(bounds[1], mean + above)]
    return figure


@dataclass(frozen=True)
class Labels:
    """A number of labels, or that it lies beyond those that were tried: at most the fewest, above the most."""

    number: float
    bound: str = "="  # or "<=" or ">"

    def __str__(self) -> str:
        number = f"{self.number:.0f}" if self.number >= 10 or self.number == round(self.number) else f"{self.number:.1f}"
        return {"=": "", "<=": "≤ ", ">": "> "}[self.bound] + number

    def record(self) -> dict[str, Any]:
        return {"labels": round(self.number, 2), "bound": self.bound}


@dataclass(frozen=True)
class LabelsNeeded:
    """How many labels a curve needs to reach a score; `interval` is None where there is none for a difference."""

    labels: Labels
    interval: tuple[Labels, Labels] | None


def labels_needed(target: Values, curve: Values, labels: Sequence[float]) -> LabelsNeeded:
    """How many labels the baseline needs to reach what another arm has.

    Between two budgets every group's score in every draw is taken as linear in the logarithm of the labels; nothing is said
    outside of the budgets. The number is where the mean first reaches the target's. The interval is that of all numbers of
    labels at which the paired difference from the target holds zero in its own 95 % interval (Fieller's argument), with what
    lies between them: groups and draws are in it, as they are in the difference.

    Args:
        target: (P, D), the other arm's scores with its labels.
        curve: (B, P, D), the baseline's with `labels`, which ascend.
    """
    assert curve.shape[1:] == target.shape and len(curve) == len(labels)
    at, scores = _interpolated(curve, np.asarray(labels, dtype=np.float64))
    reached = scores.mean(axis=(1, 2)) - target.mean()
    last = len(at) - 1
    if reached[0] > 0:
        number = Labels(at[0], "<=")
    elif not (reached >= -1e-12).any():
        number = Labels(at[last], ">")
    else:
        first = int(np.argmax(reached >= -1e-12))
        number = Labels(_crossing(at, reached, first))
    if target.shape[0] < FEWEST_GROUPS or target.shape[1] < FEWEST_DRAWS:
        return LabelsNeeded(number, None)
    squares = mean_squares(target[None] - scores)
    held = np.flatnonzero(np.abs(squares.mean) <= half_width(squares))
    if not len(held):
        return LabelsNeeded(number, (number, number))
    low = Labels(at[0], "<=") if held[0] == 0 else Labels(min(float(at[held[0]]), number.number))
    high = Labels(at[last], ">") if held[-1] == last else Labels(max(float(at[held[-1]]), number.number))
    if number.bound == "<=":
        low = number
    if number.bound == ">":
        high = number
    return LabelsNeeded(number, (low, high))


def _interpolated(curve: Values, labels: Values) -> tuple[Values, Values]:
    """Labels (N,) from the fewest to the most, the budgets among them, and the curve there (N, P, D)."""
    if len(labels) == 1:
        return labels, curve
    place = np.linspace(0, len(labels) - 1, (len(labels) - 1) * _POINTS + 1)
    left = np.minimum(place.astype(int), len(labels) - 2)
    share = place - left
    logs = np.log(labels)
    at = np.exp(logs[left] * (1 - share) + logs[left + 1] * share)
    at[::_POINTS] = labels  # without the rounding of exp
    weights = share[:, None, None]
    return at, curve[left] * (1 - weights) + curve[left + 1] * weights


def _crossing(at: Values, reached: Values, first: int) -> float:
    """Where a line between two points, straight in the logarithm of the labels, is zero."""
    if first == 0 or reached[first] <= 1e-12:
        return float(at[first])
    share = -reached[first - 1] / (reached[first] - reached[first - 1])
    logs = np.log(at[first - 1 : first + 1])
    return float(np.exp(logs[0] * (1 - share) + logs[1] * share))
