"""Whether a label curve's intervals cover 95 %, and how often it sees a difference at some budget where there is none.

    python -m benchmarks.curve_coverage [--repetitions 4000] [--looks 3 5]

Differences of Dice are drawn in two ways, for 4, 10, 23 and 106 test groups and 3 draws. "Dice": two arms' scores by a model of
scores, with patients that are hard for both, patients and draws that suit one arm, and misses that score 0; their difference is
skewed and has many zeros where both miss. "Effects": the difference as a sum of normal or skewed effects of patient, draw and rest,
of sizes that a model of scores would not give. Printed for each, of Student's interval over groups (of their means over draws),
Satterthwaite's and ours (`finetune.label_curve.statistics`): the share of 95 % intervals that hold the true mean, their mean width,
and the share of families of 5 nested budgets, none with a difference, in which Holm finds one. Below 5 groups no interval is
given; what it would be is printed. With `--looks`, instead: the share of those families in which our interval finds a difference at
some look, where a curve is read after so many draws, and again after more.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from finetune.evaluation.statistics import FEWEST_GROUPS
from finetune.label_curve.statistics import LEVEL, MeanSquares, half_width, mean_squares

GROUPS = (4, 10, 23, 106)
DRAWS = 3
BUDGETS = 5

Values = NDArray[np.float64]
Half = Callable[[MeanSquares, float], Values]


@dataclass(frozen=True)
class Dice:
    """Two arms' Dice as logit-normal scores with misses; all spreads on the logit.

    patient: of difficulty, the same for both arms; suits: of patients and `draw` of draws that suit one arm, `rest`: of one
    training; missed: shares of groups that an arm misses altogether in a draw; shift: of the first arm.
    """

    shift: float = 0.0
    patient: float = 1.0
    suits: float = 0.2
    draw: float = 0.1
    rest: float = 0.3
    missed: tuple[float, float] = (0.05, 0.05)

    def __call__(self, random: np.random.Generator, samples: int, groups: int, draws: int, budgets: int = 1) -> Values:
        """Differences (samples, budgets, groups, draws); budgets share patients, and half of what suits an arm."""
        level = 0.5 + self.patient * random.normal(size=(samples, 1, groups, 1))
        arms = []
        for arm in range(2):
            suits = self.suits * _shared(random, (samples, budgets, groups, 1))
            draw = self.draw * _shared(random, (samples, budgets, 1, draws))
            rest = self.rest * random.normal(size=(samples, budgets, groups, draws))
            dice = 1 / (1 + np.exp(-(level + suits + draw + rest + (self.shift if arm == 0 else 0))))
            arms.append(np.where(random.random(dice.shape) < self.missed[arm], 0.0, dice))
        return arms[0] - arms[1]


@dataclass(frozen=True)
class Effects:
    """A difference as the sum of independent effects of these spreads; `skewed`: most patients alike, a fifth much better."""

    patient: float
    draw: float
    rest: float
    skewed: bool = False

    def __call__(self, random: np.random.Generator, samples: int, groups: int, draws: int, budgets: int = 1) -> Values:
        size = (samples, budgets, groups, 1)
        if self.skewed:
            patients = np.where(random.random(size) < 0.2, random.exponential(1, size), 0) + random.normal(0, 0.15, size)
            patients = (patients - 0.2) / np.sqrt(0.2 * 2 - 0.2**2 + 0.15**2)
        else:
            patients = _shared(random, size)
        rest = random.normal(size=(samples, budgets, groups, draws))
        return self.patient * patients + self.draw * _shared(random, (samples, budgets, 1, draws)) + self.rest * rest


def _shared(random: np.random.Generator, size: tuple[int, ...]) -> Values:
    """Standard normal, half of the variance being the same at all budgets."""
    return np.sqrt(0.5) * (random.normal(size=(size[0], 1, *size[2:])) + random.normal(size=size))


NO_EFFECT: dict[str, Dice | Effects] = {
    "Dice, as measured": Dice(rest=0.6),
    "Dice, no draw effect": Dice(draw=0),
    "Dice, draws dominate": Dice(suits=0.05, draw=0.6, rest=0.1),
    "Dice, patients dominate": Dice(suits=0.6, draw=0.03, rest=0.1),
    "Dice, 20 % missed": Dice(missed=(0.2, 0.2)),
    "Dice, 40 % missed, small": Dice(patient=2, missed=(0.4, 0.4)),
    "effects 1 : 0 : 1": Effects(1, 0, 1),
    "effects 0 : 0 : 1": Effects(0, 0, 1),
    "effects 0.3 : 0.2 : 1": Effects(0.3, 0.2, 1),
    "effects 1 : 0.5 : 1": Effects(1, 0.5, 1),
    "effects 1 : 0.5 : 0.3": Effects(1, 0.5, 0.3),
    "effects 1 : 1 : 1": Effects(1, 1, 1),
    "effects 0.1 : 3 : 0.1": Effects(0.1, 3, 0.1),
}
EFFECT: dict[str, Dice | Effects] = {
    "Dice, better by 0.3 logits": Dice(shift=0.3, rest=0.6),
    "Dice, better by 1 logit": Dice(shift=1.0),
    "Dice, fewer misses, 5 of 15 %": Dice(shift=0.2, missed=(0.05, 0.15)),
    "Dice, fewer misses, 0 of 10 %": Dice(missed=(0.0, 0.1)),
}
BEYOND: dict[str, Dice | Effects] = {
    "a fifth of patients, 1 : 0 : 1": Effects(1, 0, 1, skewed=True),
    "a fifth of patients, 1 : 0 : 0.3": Effects(1, 0, 0.3, skewed=True),
}


def true_mean(scenario: Dice | Effects) -> float:
    """The mean difference, by Gauss-Hermite quadrature over the logit's whole spread."""
    if isinstance(scenario, Effects):
        return 0.0
    points, weights = np.polynomial.hermite_e.hermegauss(80)
    spread = np.sqrt(scenario.patient**2 + scenario.suits**2 + scenario.draw**2 + scenario.rest**2)
    arms = [
        (1 - missed) * float(weights @ (1 / (1 + np.exp(-(0.5 + shift + spread * points))))) / float(weights.sum())
        for shift, missed in zip((scenario.shift, 0.0), scenario.missed, strict=True)
    ]
    return arms[0] - arms[1]


def student(squares: MeanSquares, level: float) -> Values:
    p, d = squares.shape
    half: Values = -stdtrit(p - 1, level / 2) * np.sqrt(squares.groups / (p * d))
    return half


def satterthwaite(squares: MeanSquares, level: float) -> Values:
    p, d = squares.shape
    total = squares.groups + squares.draws - squares.rest
    parts = squares.groups**2 / (p - 1) + squares.draws**2 / (d - 1) + squares.rest**2 / ((p - 1) * (d - 1))
    half: Values = -stdtrit(np.maximum(total**2 / parts, 1), level / 2) * np.sqrt(np.maximum(total, 0) / (p * d))
    return half


INTERVALS: dict[str, Half] = {"Student": student, "Satterthwaite": satterthwaite, "ours": half_width}


def coverage(scenario: Dice | Effects, half: Half, groups: int, repetitions: int, seed: int) -> tuple[float, float]:
    """The share of 95 % intervals that hold the true mean, and their mean width."""
    squares = mean_squares(scenario(np.random.default_rng(seed), repetitions, groups, DRAWS)[:, 0])
    width = half(squares, LEVEL)
    return float((np.abs(squares.mean - true_mean(scenario)) <= width).mean()), float(2 * width.mean())


def false_family(scenario: Dice | Effects, half: Half, groups: int, repetitions: int, seed: int) -> float:
    """How often Holm finds a difference at some of 5 budgets: the least p is below a fifth of the level."""
    squares = mean_squares(scenario(np.random.default_rng(seed), repetitions, groups, DRAWS, BUDGETS))
    return float((np.abs(squares.mean) > half(squares, LEVEL / BUDGETS)).any(axis=1).mean())


def false_at_some_look(scenario: Dice | Effects, groups: int, looks: list[int], repetitions: int, seed: int) -> float:
    """`false_family` of our interval, of a curve that is read again with more draws of the same."""
    values = scenario(np.random.default_rng(seed), repetitions, groups, max(looks), BUDGETS)
    found = np.zeros(repetitions, bool)
    for draws in looks:
        squares = mean_squares(values[..., :draws])
        found |= (np.abs(squares.mean) > half_width(squares, LEVEL / BUDGETS)).any(axis=1)
    return float(found.mean())


def print_looks(looks: list[int], repetitions: int) -> None:
    groups = [one for one in GROUPS if one >= FEWEST_GROUPS]
    print(f"families with a false difference at one of the looks, after {', '.join(map(str, looks))} draws, %")
    print(f"{'':34}" + "".join(f"{f'{one} groups':>12}" for one in groups))
    for name, scenario in NO_EFFECT.items():
        rates = [100 * false_at_some_look(scenario, one, looks, repetitions, seed=2) for one in groups]
        print(f"{name:34}" + "".join(f"{rate:12.1f}" for rate in rates), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=4000)
    parser.add_argument("--looks", type=int, nargs="+", help="numbers of draws, ascending, from 2 on")
    options = parser.parse_args()
    repetitions = options.repetitions
    if options.looks:
        print_looks(options.looks, repetitions)
        return
    for groups in GROUPS:
        print(f"\n{groups} groups × {DRAWS} draws, coverage % (mean width); families with a false difference %")
        if groups < FEWEST_GROUPS:
            print("no interval is given; it would be:")
        print(f"{'':34}" + "".join(f"{name:>22}" for name in INTERVALS))
        for name, scenario in (NO_EFFECT | EFFECT | BEYOND).items():
            cells = []
            for half in INTERVALS.values():
                covered, width = coverage(scenario, half, groups, repetitions, seed=1)
                family = (
                    f"{100 * false_family(scenario, half, groups, repetitions, seed=2):5.1f}" if name in NO_EFFECT else "    –"
                )
                cells.append(f"{100 * covered:6.1f} ({width:5.2f}) {family:>6}")
            print(f"{name:34}" + "".join(f"{cell:>22}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
