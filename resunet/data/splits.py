"""Splits and labelled subsets: by group, deterministic, nested, and balanced over strata where they are known.

A group (a patient, a physical item) is on one side only. splits.json holds a split as a person can read and edit it:
{"pool": [stem, …], "val": […], "test": […]}; a stem in none of them is left out.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from resunet.data.listing import complain
from resunet.errors import InputError
from resunet.files import refuse_taken, write_text

PARTS = ("pool", "val", "test")
SHARES = {"val": 0.1, "test": 0.2}  # the pool is the rest


def split_groups(
    groups: Iterable[str], seed: int, strata: Mapping[str, str] | None = None, parts: Sequence[str] = PARTS
) -> dict[str, str]:
    """group → part: 10 % of the groups val, 20 % test, each at least one, and the rest pool.

    Args:
        strata: group → stratum; every part then has about the same share of each.
        parts: those to be made, the pool among them; what another part would have had stays in the pool.

    Raises:
        InputError: fewer groups than parts.
    """
    order = ordered(groups, seed, strata)
    if len(order) < len(parts):
        raise InputError(
            f"{len(order)} groups cannot be split into {', '.join(parts)}: at least {len(parts)} are needed. "
            "Add images, or give groups.csv and splits.json."
        )
    taken = [part for part in SHARES if part in parts for _ in range(max(1, round(SHARES[part] * len(order))))]
    return {group: taken[i] if i < len(taken) else "pool" for i, group in enumerate(order)}


def fold_groups(groups: Iterable[str], folds: int, seed: int, strata: Mapping[str, str] | None = None) -> dict[str, int]:
    """group → fold, from 0: every group is in one; sizes differ by one group at most.

    Args:
        strata: group → stratum; every fold then has about the same share of each.

    Raises:
        InputError: fewer groups than folds.
    """
    order = ordered(groups, seed, strata)
    if len(order) < folds:
        raise InputError(
            f"data.folds={folds}: pool and val have only {len(order)} groups to divide. Set at most that many folds, or add groups."
        )
    # stretches of the order, which are what it balances; every folds-th group would not be
    return {group: i * folds // len(order) for i, group in enumerate(order)}


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


def draw_groups(
    groups: Iterable[str], labelled: float | int | None, draw: int, strata: Mapping[str, str] | None = None
) -> list[str]:
    """The labelled groups of one draw: the first n of an order that depends on `draw` alone, so draws are nested.

    Args:
        labelled: a share of the groups (below 1), or a number of them; None is all. n = max(1, round(share × groups)).
        strata: group → stratum; every draw then has about the same share of each.

    Raises:
        InputError: more groups than there are.
    """
    return first_groups(ordered(groups, draw, strata), labelled)


def first_groups(order: Sequence[str], labelled: float | int | None) -> list[str]:
    """The labelled groups of an order, as `draw_groups` counts them.

    Raises:
        InputError: more groups than there are.
    """
    if labelled is None:
        return list(order)
    count = max(1, round(labelled * len(order))) if labelled < 1 else int(labelled)
    if count > len(order):
        raise InputError(
            f"data.labelled={labelled}: the pool has only {len(order)} groups. Give at most that, or a share below 1."
        )
    return list(order[:count])


def ordered(groups: Iterable[str], seed: int, strata: Mapping[str, str] | None = None) -> list[str]:
    """The distinct groups in a random order in which every stretch has about the same share of each stratum.

    Systematic sampling with random starts: the j-th of the n groups of a stratum, themselves shuffled, stands at
    (j + u) / n, with u in [0, 1) of the stratum. A stretch of length t so holds n·t of them, give or take less than one, and
    every group, that of a rare stratum too, is as likely as any other to be anywhere. The u of different strata are spread
    evenly, which keeps rare ones from coming all at once. One stratum is the same as none.
    """
    order = shuffled(groups, seed)
    if strata is None:
        return order
    members: dict[str, list[str]] = {}
    for group in order:
        members.setdefault(strata[group], []).append(group)
    rng = np.random.default_rng([seed, len(members)])
    starts = (rng.permutation(len(members)) + rng.random()) / len(members)
    position = {
        group: (j + start) / len(members[stratum])
        for stratum, start in zip(sorted(members), starts, strict=True)
        for j, group in enumerate(members[stratum])
    }
    return sorted(order, key=position.__getitem__)


def shuffled(groups: Iterable[str], seed: int) -> list[str]:
    """The distinct groups in an order that depends on their names and the seed alone."""
    names = sorted(set(groups))
    return [names[i] for i in np.random.default_rng(seed).permutation(len(names))]


def read_splits(path: Path, stems: Iterable[str] | None = None) -> dict[str, str] | None:
    """splits.json: stem → part; None where there is no such file.

    Raises:
        InputError: another form, a stem twice, or a stem that is not among `stems` (where they are known).
    """
    if not path.is_file():
        return None
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(splits, dict) or set(splits) != set(PARTS) or not all(isinstance(s, list) for s in splits.values()):
        raise InputError(f'{path}: must be {{"pool": [stems], "val": [stems], "test": [stems]}}.')
    listed = [str(stem) for part in PARTS for stem in splits[part]]
    if stems is not None:
        complain(path, "stems without an image", sorted(set(listed) - set(stems)), "Correct the file, or add the images.")
    twice = sorted(stem for stem, count in Counter(listed).items() if count > 1)
    complain(path, "stems that are listed twice", twice, "List each once.")
    return {str(stem): part for part in PARTS for stem in splits[part]}


def write_splits(path: Path, stems_of: Mapping[str, Iterable[str]]) -> None:
    """Write a split, or a labelled subset of one, as a splits.json that `read_splits` reads; whole or not at all.

    Args:
        stems_of: part → its stems; see `Source.stems`.

    Raises:
        InputError: the file exists: somebody may have edited it.
    """
    assert set(stems_of) <= set(PARTS)
    refuse_taken(path, what="file")
    lists = {part: sorted(stems_of.get(part, ())) for part in PARTS}
    write_text(path, json.dumps(lists, indent=1, ensure_ascii=False) + "\n")
