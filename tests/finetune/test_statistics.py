import json
import math

import numpy as np
import pytest
import scipy.stats

from finetune.statistics import figure, group_means, paired_difference
from resunet.errors import InputError


def test_the_interval_is_students():
    for n in (5, 8, 40):
        values = np.random.default_rng(n).normal(0.5, 3, n)
        ours = figure({str(i): [value] for i, value in enumerate(values)})
        assert ours["ci95"] == pytest.approx(scipy.stats.t.interval(0.95, n - 1, values.mean(), scipy.stats.sem(values)))
        assert (ours["mean"], ours["n"]) == (pytest.approx(values.mean()), n)
        assert math.isclose(sum(ours["ci95"]) / 2, ours["mean"])  # not cut unless asked


@pytest.mark.parametrize("n", [5, 10, 40])
def test_the_interval_has_its_coverage_for_normal_groups(n):
    draws = np.random.default_rng(0).normal(0.7, 0.1, (3000, n))
    intervals = (figure({str(i): [value] for i, value in enumerate(row)})["ci95"] for row in draws)
    assert 0.93 < np.mean([low <= 0.7 <= high for low, high in intervals]) < 0.97


@pytest.mark.parametrize("n", [5, 20, 50])
@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5])
def test_the_interval_of_yes_and_no_has_at_least_its_coverage(n, rate):
    """Exact, from the binomial: Student's interval of 50 groups at rate 0.1 covers 88 %."""
    coverage = 0.0
    for ones in range(n + 1):
        low, high = figure({str(i): [float(i < ones)] for i in range(n)}, bounded=True)["ci95"]
        assert [low, high] == pytest.approx(list(scipy.stats.binomtest(ones, n).proportion_ci(0.95, method="exact")))
        coverage += scipy.stats.binom.pmf(ones, n, rate) * (low <= rate <= high)
    assert coverage >= 0.95


def test_figures_of_few_groups_and_of_bounded_values():
    assert figure({}) == {"mean": None, "ci95": None, "n": 0}
    assert figure({"a": []}) == {"mean": None, "ci95": None, "n": 0}
    assert figure({"a": [0.25, 0.75], "b": [1.0], "c": []}) == {"mean": 0.75, "ci95": None, "n": 2}
    assert figure({str(i): [0.5] for i in range(4)})["ci95"] is None
    high = {str(i): [value] for i, value in enumerate([0.2, 0.9, 1.0, 1.0, 1.0])}
    assert figure(high)["ci95"][1] > 1 and figure(high, bounded=True)["ci95"][1] == 1


def test_paired_difference():
    random = np.random.default_rng(3)
    a, b = ({f"g{i}": float(value) for i, value in enumerate(random.random(12))} for _ in range(2))
    ours = paired_difference(a, dict(reversed(b.items())))
    test = scipy.stats.ttest_rel(list(a.values()), list(b.values()))
    assert ours["ci95"] == pytest.approx(list(test.confidence_interval(0.95)))
    assert ours["mean"] == pytest.approx(np.mean(list(a.values())) - np.mean(list(b.values())))
    assert (ours["n"], ours["wins"]) == (12, sum(a[group] > b[group] for group in a))
    json.dumps(ours)
    assert paired_difference(a, a)["wins"] == 0


def test_paired_difference_refuses_other_groups():
    with pytest.raises(InputError, match=r"3 differ.*2 only in the first, 1 only in the second, 1 in both"):
        paired_difference({"a": 1, "b": 1, "c": 1}, {"c": 1, "d": 1})


def test_group_means_leave_out_groups_without_values():
    assert group_means({"a": [0.25, 0.75], "b": [], "c": [1.0]}) == {"a": 0.5, "c": 1.0}
