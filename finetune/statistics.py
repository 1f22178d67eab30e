"""Figures over groups: a mean, an interval that covers what it says, and paired differences."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import betaincinv, stdtrit

from resunet.errors import InputError

FEWEST_GROUPS = 5  # for an interval


def group_means(values_by_group: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean of each group; a group without values is left out."""
    return {group: math.fsum(values) / len(values) for group, values in values_by_group.items() if len(values)}


def figure(values_by_group: Mapping[str, Sequence[float]], bounded: bool = False) -> dict[str, Any]:
    """{"mean", "ci95": [low, high] or None, "n"}: the mean over groups of the group's mean over its values.

    n counts groups with values; mean is None if there are none. ci95 is the Student-t interval over the groups' means, None
    below 5 groups. bounded says that the values lie in [0, 1]: the interval is cut to it, and where every group's mean is
    exactly 0 or 1 it is Clopper-Pearson's, because Student's would be of no width when all groups agree.
    """
    return _mean_and_interval(list(group_means(values_by_group).values()), bounded)


def _mean_and_interval(means: Sequence[float], bounded: bool) -> dict[str, Any]:
    values = np.asarray(means, dtype=np.float64)
    n = len(values)
    assert np.isfinite(values).all(), means
    assert not bounded or ((values >= 0) & (values <= 1)).all(), means
    if n == 0:
        return {"mean": None, "ci95": None, "n": 0}
    mean = math.fsum(means) / n
    if n < FEWEST_GROUPS:
        return {"mean": mean, "ci95": None, "n": n}
    if bounded and np.isin(values, (0.0, 1.0)).all():
        ones = int(values.sum())
        low = betaincinv(ones, n - ones + 1, 0.025) if ones else 0.0
        high = betaincinv(ones + 1, n - ones, 0.975) if ones < n else 1.0
    else:
        half = stdtrit(n - 1, 0.975) * values.std(ddof=1) / math.sqrt(n)
        low, high = mean - half, mean + half
        if bounded:
            low, high = max(low, 0.0), min(high, 1.0)
    return {"mean": mean, "ci95": [float(low), float(high)], "n": n}


def paired_difference(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, Any]:
    """The figure of a − b over groups, a and b being group → mean, with "wins": the groups where a > b.

    Raises InputError if the two do not have the same groups. Whether a group has a Dice can depend on the prediction (empty
    truth: 0 with a false alarm, undefined without): the caller says what becomes of such groups before it comes here.
    """
    only_a, only_b = a.keys() - b.keys(), b.keys() - a.keys()
    if only_a or only_b:
        raise InputError(
            f"a paired difference needs the same groups on both sides: {len(only_a) + len(only_b)} differ "
            f"({len(only_a)} only in the first, {len(only_b)} only in the second, {len(a.keys() & b.keys())} in both). "
            "Evaluate both on the same data and split."
        )
    differences = [a[group] - b[group] for group in a]
    return {**_mean_and_interval(differences, bounded=False), "wins": sum(difference > 0 for difference in differences)}
