"""Splits and labelled subsets: by group, deterministic, nested.

A group (a patient, a physical item) is on one side only.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from resunet.errors import InputError

PARTS = ("pool", "val", "test")
SHARES = {"pool": 0.7, "val": 0.1, "test": 0.2}


def split_groups(groups: Sequence[str], seed: int) -> dict[str, str]:
    """group → part for a source without splits: 70 % pool, 10 % val, 20 % test of the groups, each at least one.

    Raises:
        InputError: fewer than three groups.
    """
    order = shuffled(groups, seed)
    if len(order) < len(PARTS):
        raise InputError(
            f"{len(order)} groups cannot be split into {', '.join(PARTS)}: at least 3 are needed. "
            "Add images, or give groups.csv and splits.json."
        )
    val = max(1, round(SHARES["val"] * len(order)))
    test = max(1, round(SHARES["test"] * len(order)))
    parts = ["val"] * val + ["test"] * test
    return {group: parts[i] if i < len(parts) else "pool" for i, group in enumerate(order)}


def check_disjoint(part_of: Mapping[str, str], group_of: Mapping[str, str]) -> None:
    """No group in two parts.

    Args:
        part_of: case → part.
        group_of: case → group.

    Raises:
        InputError: with the number of groups at fault and one of them.
    """
    parts: dict[str, set[str]] = {}
    for case, part in part_of.items():
        parts.setdefault(group_of[case], set()).add(part)
    torn = sorted(group for group, its in parts.items() if len(its) > 1)
    if torn:
        raise InputError(
            f"{len(torn)} groups are in more than one part of the split, for example {torn[0]!r} in "
            f"{' and '.join(sorted(parts[torn[0]]))}. A patient or item belongs to one part: correct splits.json or groups.csv."
        )


def draw_groups(groups: Sequence[str], labelled: float | int | None, draw: int) -> list[str]:
    """The labelled groups of one draw: the first n of a permutation that depends on `draw` alone, so draws are nested.

    Args:
        labelled: a share of the groups (below 1), or a number of them; None is all. n = max(1, round(share × groups)).

    Raises:
        InputError: more groups than there are.
    """
    order = shuffled(groups, draw)
    if labelled is None:
        return order
    count = max(1, round(labelled * len(order))) if labelled < 1 else int(labelled)
    if count > len(order):
        raise InputError(
            f"data.labelled={labelled}: the pool has only {len(order)} groups. Give at most that, or a share below 1."
        )
    return order[:count]


def shuffled(groups: Sequence[str], seed: int) -> list[str]:
    """The distinct groups in an order that depends on their names and the seed alone."""
    names = sorted(set(groups))
    return [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
