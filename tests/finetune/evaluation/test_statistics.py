import json
import math

import numpy as np
import pytest
import scipy.stats

from benchmarks.coverage import coverage, gaffke, missed, paired_coverage, student
from finetune.evaluation.statistics import bounded_interval, figure, group_means, paired_difference
from resunet.errors import InputError


@pytest.mark.parametrize("n", [5, 20, 50])
@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5])
def test_the_interval_of_yes_and_no_is_clopper_pearsons_and_has_its_coverage(n, rate):
    """Exact, from the binomial: Student's interval of 50 groups at rate 0.1 covers 88 %."""
    coverage = 0.0
    for ones in range(n + 1):
        low, high = figure({str(i): [float(i < ones)] for i in range(n)}, (0, 1))["ci95"]
        expected = scipy.stats.binomtest(ones, n).proportion_ci(0.95, method="exact")
        assert [low, high] == pytest.approx(list(expected), abs=1e-5)
        coverage += scipy.stats.binom.pmf(ones, n, rate) * (low <= rate <= high)
    assert coverage >= 0.95


@pytest.mark.parametrize("n, bounds", [(5, (0, 1)), (12, (0, 1)), (12, (-1, 3)), (60, (0, 1))])
def test_the_interval_is_gaffkes(n, bounds):
    """Its definition, drawn: quantiles of the mean under Dirichlet(1, …, 1) weights, a bound being one more value."""
    random = np.random.default_rng(n)
    values = np.round(random.beta(9, 2, n), 1)  # with ties
    weights = random.dirichlet(np.ones(n + 1), 100_000)
    drawn = [np.quantile(weights @ np.append(values, bound), q) for bound, q in zip(bounds, (0.025, 0.975), strict=True)]
    assert list(bounded_interval(values.tolist(), bounds)) == pytest.approx(drawn, abs=0.006 * (bounds[1] - bounds[0]))


def test_many_groups_have_the_normal_interval_with_and_without_the_approximation():
    values = np.random.default_rng(0).beta(18, 2, 1300)
    for some in (values[:900], values):  # from 1,000 on the weighted mean is taken for normal
        low, high = bounded_interval(some.tolist(), (0, 1))
        half = 1.96 * some.std() / np.sqrt(len(some))
        assert [low, high] == pytest.approx([some.mean() - half, some.mean() + half], abs=0.5 * half)
        assert low < some.mean() - half and high > some.mean() + half * 0.9
    at_1000 = [bounded_interval(values[:n].tolist(), (0, 1)) for n in (999, 1001)]
    assert at_1000[0] == pytest.approx(at_1000[1], abs=5e-4)


SKEWED = {"near 0.9": missed(0), "10 % missed": missed(0.1), "U-shaped": missed(0, 1.5, 0.3)}


@pytest.mark.parametrize("groups, repetitions", [(5, 300), (10, 300), (40, 100), (100, 60)])
@pytest.mark.parametrize("distribution", SKEWED)
def test_the_interval_has_its_coverage_for_skewed_groups(distribution, groups, repetitions):
    """Small and seeded; benchmarks/coverage.py is large."""
    sample, mean = SKEWED[distribution]
    covered, width = coverage(gaffke, sample, mean, groups, repetitions, seed=1)
    assert covered >= 0.945 and width < 1.75 / np.sqrt(groups)


def test_students_interval_would_not_have_it():
    sample, mean = SKEWED["10 % missed"]
    assert all(coverage(student, sample, mean, groups, 300, seed=1)[0] < 0.75 for groups in (5, 10))


@pytest.mark.parametrize("groups", [5, 10, 40, 100])
def test_paired_arms_that_are_alike_differ_in_five_of_a_hundred_at_most(groups):
    assert paired_coverage(groups, 4000, fails=0, seed=0) > 0.94


def test_figures_of_few_groups_and_of_values_without_bounds():
    assert figure({}) == figure({}, (0, 1)) == {"mean": None, "ci95": None, "n": 0}
    assert figure({"a": []}) == {"mean": None, "ci95": None, "n": 0}
    assert figure({"a": [0.25, 0.75], "b": [1.0], "c": []}, (0, 1)) == {"mean": 0.75, "ci95": None, "n": 2}
    assert figure({str(i): [0.5] for i in range(4)}, (0, 1))["ci95"] is None
    assert figure({str(i): [0.5] for i in range(5)}, (0, 1))["ci95"] is not None
    assert figure({str(i): [0.5 * i] for i in range(5)}) == {"mean": 1, "ci95": None, "n": 5}


def test_the_interval_scales_with_its_values():
    values = {str(i): [value] for i, value in enumerate([0.1, 0.5, 0.4, 0.9, 0.8, 0.8])}
    small = figure(values, (0, 1))
    large = figure({name: [200 * value for value in its] for name, its in values.items()}, (0, 200))
    assert large["ci95"] == pytest.approx([200 * end for end in small["ci95"]], rel=1e-4)
    assert small["ci95"][0] < small["mean"] < small["ci95"][1]


def test_values_at_a_bound_may_be_rounded():
    diagonal = math.hypot(0.1, 0.7)
    assert figure({str(i): [diagonal] * 3 for i in range(6)}, (0, diagonal))["ci95"][1] == pytest.approx(diagonal)
    with pytest.raises(AssertionError):
        figure({str(i): [1.01] for i in range(6)}, (0, 1))


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
