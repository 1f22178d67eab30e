"""Whether 95 % intervals cover 95 %: of figures over groups, and of paired differences, for 5 to 100 groups.

    python -m benchmarks.coverage [--repetitions 4000]

Group means are drawn from distributions such as segmentation has them. Printed for each interval: the share of samples whose
interval holds the true mean, and the mean width. `finetune.evaluation.statistics` uses the last one.
"""

import argparse
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, stdtrit

from finetune.evaluation.statistics import bounded_interval

GROUPS = (5, 10, 40, 100)
_RESAMPLED = 2000

Sample = Callable[[np.random.Generator, tuple[int, ...]], NDArray[np.float64]]
Interval = Callable[[NDArray[np.float64], np.random.Generator], tuple[float, float]]


def missed(share: float, a: float = 18, b: float = 2) -> tuple[Sample, float]:
    """Beta(a, b), and 0 for a share of the groups; with its mean."""
    return lambda random, size: np.where(random.random(size) < share, 0.0, random.beta(a, b, size)), (1 - share) * a / (a + b)


def zeros_and_ones(share: float) -> tuple[Sample, float]:
    return lambda random, size: (random.random(size) < share).astype(float), share


DISTRIBUTIONS: dict[str, tuple[Sample, float]] = {
    "Dice near 0.9": missed(0),
    "5 % missed": missed(0.05),
    "10 % missed": missed(0.1),
    "20 % missed": missed(0.2),
    "40 % missed, 0.82": missed(0.4, 9, 2),
    "U-shaped": missed(0, 1.5, 0.3),
    "small lesions, uniform": missed(0, 1, 1),
    "rate 0.05": zeros_and_ones(0.05),
}


def student(values: NDArray[np.float64], random: np.random.Generator) -> tuple[float, float]:
    half = stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / np.sqrt(len(values))
    return max(0.0, values.mean() - half), min(1.0, values.mean() + half)


def percentile(values: NDArray[np.float64], random: np.random.Generator) -> tuple[float, float]:
    low, high = np.quantile(_resampled(values, random), [0.025, 0.975])
    return float(low), float(high)


def bca(values: NDArray[np.float64], random: np.random.Generator) -> tuple[float, float]:
    means = _resampled(values, random)
    below = (means < values.mean()).mean() + (means == values.mean()).mean() / 2
    z0 = ndtri(np.clip(below, 1e-4, 1 - 1e-4))
    left_out = values.mean() - values
    squares = (left_out**2).sum()
    acceleration = (left_out**3).sum() / (6 * squares**1.5) if squares else 0.0
    z = z0 + ndtri([0.025, 0.975])
    low, high = np.quantile(means, ndtr(z0 + z / (1 - acceleration * z)))
    return float(low), float(high)


def bootstrap_t(values: NDArray[np.float64], random: np.random.Generator) -> tuple[float, float]:
    drawn = values[random.integers(0, len(values), (_RESAMPLED, len(values)))]
    spread = drawn.std(axis=1)
    drawn, spread = drawn[spread > 1e-9], spread[spread > 1e-9]
    if len(drawn) < 10:
        return float(values.mean()), float(values.mean())
    low, high = np.quantile((drawn.mean(axis=1) - values.mean()) / spread, [0.025, 0.975])
    return max(0.0, values.mean() - high * values.std()), min(1.0, values.mean() - low * values.std())


def gaffke(values: NDArray[np.float64], random: np.random.Generator) -> tuple[float, float]:
    return bounded_interval(values.tolist(), (0.0, 1.0))


INTERVALS: dict[str, Interval] = {
    "Student": student,
    "percentile": percentile,
    "BCa": bca,
    "bootstrap-t": bootstrap_t,
    "Gaffke": gaffke,
}


def coverage(interval: Interval, sample: Sample, mean: float, groups: int, repetitions: int, seed: int) -> tuple[float, float]:
    """The share of samples whose interval holds `mean`, and the intervals' mean width."""
    random = np.random.default_rng(seed)
    ends = np.array([interval(values, random) for values in sample(random, (repetitions, groups))])
    return float(((ends[:, 0] <= mean) & (mean <= ends[:, 1])).mean()), float((ends[:, 1] - ends[:, 0]).mean())


def paired_coverage(groups: int, repetitions: int, fails: float, seed: int) -> float:
    """How often Student's interval of paired differences holds the truth: two alike arms but that in a share `fails` of the
    groups the second one misses all."""
    random = np.random.default_rng(seed)
    size = (repetitions, groups)
    level = missed(0.1)[0](random, size)
    a, b = (np.clip(level + random.normal(0, 0.03, size) * (level > 0), 0, 1) for _ in range(2))
    b = np.where(random.random(size) < fails, 0, b)
    differences = a - b
    half = stdtrit(groups - 1, 0.975) * differences.std(axis=1, ddof=1) / np.sqrt(groups)
    truth = fails * 0.9 * 0.9
    return float((np.abs(differences.mean(axis=1) - truth) <= half + 1e-12).mean())


def _resampled(values: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.float64]:
    means: NDArray[np.float64] = random.multinomial(len(values), np.full(len(values), 1 / len(values)), _RESAMPLED) @ values
    return means / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=4000)
    repetitions = parser.parse_args().repetitions
    for groups in GROUPS:
        print(f"\n{groups} groups, coverage % (mean width)")
        print(f"{'':24}" + "".join(f"{name:>16}" for name in INTERVALS))
        for name, (sample, mean) in DISTRIBUTIONS.items():
            cells = [coverage(interval, sample, mean, groups, repetitions, seed=0) for interval in INTERVALS.values()]
            print(f"{name:24}" + "".join(f"{100 * share:9.1f} ({width:.2f})" for share, width in cells), flush=True)
    print("\npaired differences, Student, coverage %")
    for fails in (0.0, 0.05, 0.2):
        cells_of = [f"{groups}: {100 * paired_coverage(groups, 10 * repetitions, fails, seed=0):.1f}" for groups in GROUPS]
        print(f"second arm fails in {100 * fails:g} % of groups   " + "   ".join(cells_of))


if __name__ == "__main__":
    main()
