import itertools

import numpy as np
import pytest

from resunet.data.splits import PARTS, check_disjoint, draw_groups, shuffled, split_groups
from resunet.errors import InputError

GROUPS = [f"patient_{i:02d}" for i in range(20)]


def test_an_order_depends_on_names_and_seed_alone():
    order = shuffled(GROUPS, 3)
    assert sorted(order) == GROUPS
    assert order == shuffled(GROUPS[::-1] * 2, 3)
    np.random.seed(0)
    assert order == shuffled(GROUPS, 3)
    assert order != shuffled(GROUPS, 4)


@pytest.mark.parametrize("count", [3, 4, 5, 10, 20, 57])
def test_shares_of_a_split(count):
    part_of = split_groups([f"g{i}" for i in range(count)] * 3, 0)
    assert len(part_of) == count
    sizes = {part: list(part_of.values()).count(part) for part in PARTS}
    assert sizes["val"] == max(1, round(0.1 * count))
    assert sizes["test"] == max(1, round(0.2 * count))
    assert sizes["pool"] == count - sizes["val"] - sizes["test"] >= 1


def test_a_split_depends_on_its_seed_alone():
    assert split_groups(GROUPS, 1) == split_groups(GROUPS[::-1], 1) != split_groups(GROUPS, 2)


def test_two_groups_cannot_be_split():
    with pytest.raises(InputError, match="2 groups cannot be split"):
        split_groups(["a", "b"] * 5, 0)


def test_a_group_in_two_parts_is_named():
    check_disjoint({"1": "pool", "2": "pool", "3": "val"}, {"1": "a", "2": "a", "3": "b"})
    with pytest.raises(InputError, match=r"1 groups are in more than one part.*'a' in pool and test"):
        check_disjoint({"1": "pool", "2": "test", "3": "val"}, {"1": "a", "2": "a", "3": "b"})


@pytest.mark.parametrize("draw", [0, 1, 7])
def test_draws_are_nested_and_deterministic(draw):
    draws = [draw_groups(GROUPS, n, draw) for n in range(1, 21)]
    for n, (smaller, larger) in enumerate(itertools.pairwise(draws), start=1):
        assert len(smaller) == n == len(set(smaller))
        assert larger[:n] == smaller
    assert draw_groups(GROUPS[::-1] * 2, 5, draw) == draws[4]
    assert draw_groups(GROUPS, None, draw) == draws[-1]


def test_draws_differ():
    assert len({tuple(draw_groups(GROUPS, 5, draw)) for draw in range(6)}) > 1


@pytest.mark.parametrize("share", [0.001, 0.05, 0.1, 0.2, 0.33, 0.5, 0.99])
@pytest.mark.parametrize("count", [1, 3, 7, 20])
def test_a_share_is_of_the_groups_and_at_least_one(share, count):
    assert len(draw_groups(GROUPS[:count], share, 0)) == max(1, round(share * count))


def test_one_is_a_number_of_groups():
    assert len(draw_groups(GROUPS, 1, 0)) == len(draw_groups(GROUPS, 1.0, 0)) == 1
    assert len(draw_groups(GROUPS, 20.0, 0)) == 20


def test_more_groups_than_there_are():
    with pytest.raises(InputError, match=r"data\.labelled=21: the pool has only 20 groups"):
        draw_groups(GROUPS, 21, 0)
