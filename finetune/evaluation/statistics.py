"""Figures over groups: a mean, an interval that covers what it says, and paired differences.

Figures of segmentation are far from normal: most groups near 0.9 and, now and then, one at 0 because all was missed. Of
ten such groups often none is at 0, they agree, and Student's interval or a bootstrap of what they say covers the mean in
two samples of three only (benchmarks/coverage.py). Where a value has bounds, the interval here counts with what was not
drawn: it is as wide as the bounds and the number of groups make it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtr, stdtrit

from resunet.errors import InputError

FEWEST_GROUPS = 5  # for an interval
_TAIL = 0.025
_EXACT = 1000  # points; of more, the weighted mean is as good as normal

Bounds = tuple[float, float]


def group_means(values_by_group: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean of each group; a group without values is left out."""
    return {group: math.fsum(values) / len(values) for group, values in values_by_group.items() if len(values)}


def figure(values_by_group: Mapping[str, Sequence[float]], bounds: Bounds | None = None) -> dict[str, Any]:
    """{"mean", "ci95": [low, high] or None, "n"}: the mean over groups of the group's mean over its values.

    n counts groups with values; mean is None if there are none. bounds: between which every value must lie, whatever was
    predicted. ci95 is `bounded_interval`'s, None below 5 groups and where there are no bounds: no interval for the mean of
    values without bounds covers 95 % whatever their distribution is (Bahadur & Savage 1956).
    """
    means = list(group_means(values_by_group).values())
    assert all(math.isfinite(value) for value in means), means
    mean = math.fsum(means) / len(means) if means else None
    interval = list(bounded_interval(means, bounds)) if bounds is not None and len(means) >= FEWEST_GROUPS else None
    return {"mean": mean, "ci95": interval, "n": len(means)}


def bounded_interval(values: Sequence[float], bounds: Bounds) -> tuple[float, float]:
    """A 95 % interval for the mean of the distribution that values came from, which lies within bounds.

    Gaffke's (2005; Learned-Miller & Thomas 2019, "A new confidence interval for the mean of a bounded random variable"):
    the upper end is the 97.5 % quantile of the values' mean, the upper bound being one more of them, under weights that are
    uniform on the simplex; the lower end likewise. Of zeros and ones it is Clopper-Pearson's; of many values it is the
    normal one. That it covers at least what it says is a conjecture without a known counter-example.
    """
    array = np.asarray(values, dtype=np.float64)
    low, high = bounds
    slack = 1e-9 * (high - low)  # the mean of values at a bound may be rounded beyond it
    assert ((array >= low - slack) & (array <= high + slack)).all(), (values, bounds)
    array = array.clip(low, high)
    return _quantile(np.append(array, low), _TAIL), _quantile(np.append(array, high), 1 - _TAIL)


def _quantile(points: NDArray[np.float64], level: float) -> float:
    """The quantile of the weighted mean of points under weights uniform on the simplex."""
    points = np.sort(points)
    first, last = float(points[0]), float(points[-1])
    if first == last:
        return first
    # a bracket that all but extreme cases keep to
    reach = 4 * float(points.std()) / math.sqrt(len(points))
    ends = max(first, float(points.mean()) - reach), min(last, float(points.mean()) + reach)
    if not _share_above(points, ends[0]) > 1 - level > _share_above(points, ends[1]):
        ends = first, last
    return float(brentq(lambda t: _share_above(points, t) - (1 - level), *ends, xtol=1e-6 * (last - first)))


def _share_above(points: NDArray[np.float64], t: float) -> float:
    """How likely the weighted mean of sorted points is to be above t.

    The divided difference [x_0 … x_n] max(x − t, 0)^n, by its recurrence, which is de Boor's: S_ij = ((x_j − t) S_i+1,j + (t −
    x_i) S_i,j−1) / (x_j − x_i), a mean with positive weights where t lies between x_i and x_j, and 0 or 1 where it does not.
    """
    n = len(points) - 1
    if n > _EXACT:
        return float(ndtr((points.mean() - t) / (points.std() / math.sqrt(n + 2))))
    below = int(np.searchsorted(points, t, side="right"))
    from_t = points - t
    share = (points > t).astype(np.float64)
    for span in range(1, n + 1):
        # of the stretches of this many points, from i on, only those from below t to above it are neither 0 nor 1
        start, stop = max(0, below - span), min(below, n + 1 - span)
        to_left, to_right = from_t[start:stop], from_t[start + span : stop + span]
        share[start:stop] = (to_right * share[start + 1 : stop + 1] - to_left * share[start:stop]) / (to_right - to_left)
    return float(share[0])


def paired_difference(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, Any]:
    """The figure of a − b over groups, a and b being group → mean, with "wins": the groups where a > b.

    ci95 is Student's, None below 5 groups: of two arms that are alike differences are symmetric, and it holds zero in at
    least 95 % of such samples. Where one arm fails altogether in a few groups and the other does not, and none of these
    was drawn, it is too narrow. Raises InputError if the two do not have the same groups. Whether a group has a Dice can
    depend on the prediction (empty truth: 0 with a false alarm, undefined without): the caller says what becomes of such
    groups before it comes here.
    """
    only_a, only_b = a.keys() - b.keys(), b.keys() - a.keys()
    if only_a or only_b:
        raise InputError(
            f"a paired difference needs the same groups on both sides: {len(only_a) + len(only_b)} differ "
            f"({len(only_a)} only in the first, {len(only_b)} only in the second, {len(a.keys() & b.keys())} in both). "
            "Evaluate both on the same data and split."
        )
    differences = [a[group] - b[group] for group in a]
    n = len(differences)
    mean = math.fsum(differences) / n if n else None
    interval = None
    if mean is not None and n >= FEWEST_GROUPS:
        half = float(stdtrit(n - 1, 1 - _TAIL)) * float(np.std(differences, ddof=1)) / math.sqrt(n)
        interval = [mean - half, mean + half]
    return {"mean": mean, "ci95": interval, "n": n, "wins": sum(difference > 0 for difference in differences)}
