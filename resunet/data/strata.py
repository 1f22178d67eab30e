"""What a group's masks are like, coarsely: the strata that splits and labelled subsets are balanced over."""

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from resunet.data.cases import Case
from resunet.data.images import read_mask


def read_strata(cases: Sequence[Case]) -> dict[str, str]:
    """Group (as the source names it) → stratum: the values in its masks, and how much of them is not 0.

    How much in steps of a factor of 4, so that a small lesion differs from a large one. It depends on the group's own masks and on
    nothing else: no recipe's classes, no other group. Pretraining, which knows no classes, so makes the split that
    fine-tuning makes.

    Args:
        cases: all with masks; every mask is read.

    Raises:
        InputError: a mask that cannot be read.
    """
    with ThreadPoolExecutor() as pool:
        found = pool.map(_look, [case.mask for case in cases])
        by_group: dict[str, tuple[set[int], int, int]] = {}
        for case, (values, labelled, size) in zip(cases, found, strict=True):
            its_values, its_labelled, its_size = by_group.get(case.group_name, (set(), 0, 0))
            by_group[case.group_name] = (its_values | values, its_labelled + labelled, its_size + size)
    return {group: _stratum(*facts) for group, facts in by_group.items()}


def _look(mask: Path | None) -> tuple[set[int], int, int]:
    """The values of a mask, how many of its pixels are not 0, and how many there are."""
    assert mask is not None, "strata are of labelled sources, opened with masks=True"
    values = read_mask(mask).values
    return {int(value) for value in np.unique(values)}, int(np.count_nonzero(values)), values.size


def _stratum(values: set[int], labelled: int, size: int) -> str:
    names = " ".join(str(value) for value in sorted(values))
    if labelled == 0:
        return names
    step = next(power for power in itertools.count() if labelled * 4**power >= size)
    return f"{names}, at least 1/{4**step} not 0"
