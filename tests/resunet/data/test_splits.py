import itertools
import json

import numpy as np
import pytest

from resunet.data.splits import (
    PARTS,
    check_disjoint,
    draw_groups,
    fold_groups,
    ordered,
    read_splits,
    shuffled,
    split_groups,
    write_splits,
)
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


STRATA = {group: ("rare" if i < 3 else "common" if i < 8 else "most") for i, group in enumerate(GROUPS)}


@pytest.mark.parametrize("seed", range(4))
def test_one_stratum_is_the_same_as_none(seed):
    same = dict.fromkeys(GROUPS, "all")
    assert ordered(GROUPS, seed, same) == ordered(GROUPS, seed) == shuffled(GROUPS, seed)
    assert split_groups(GROUPS, seed, same) == split_groups(GROUPS, seed)
    assert draw_groups(GROUPS, 7, seed, same) == draw_groups(GROUPS, 7, seed)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5])
@pytest.mark.parametrize("seed", range(8))
def test_of_two_strata_no_stretch_has_one_too_many(seed, share):
    groups = [f"g{i:03}" for i in range(101)]
    rare = set(groups[: round(share * len(groups))])
    order = ordered(groups, seed, {group: str(group in rare) for group in groups})
    assert sorted(order) == groups
    before = np.concatenate([[0], np.cumsum([group in rare for group in order])])
    ideal = np.arange(len(order) + 1) * len(rare) / len(order)
    assert np.abs(before - ideal).max() < 1  # of every prefix
    shuffled_before = np.concatenate([[0], np.cumsum([group in rare for group in shuffled(groups, seed)])])
    assert np.abs(before - ideal).max() < np.abs(shuffled_before - ideal).max()


@pytest.mark.parametrize("seed", range(8))
def test_of_many_strata_every_prefix_is_about_even(seed):
    sizes = [40, 20, 11, 5, 5, 3, 2, 1, 1, 1]
    strata = {f"{s}-{i}": str(s) for s, size in enumerate(sizes) for i in range(size)}
    order = ordered(list(strata), seed, strata)
    counts = np.stack([np.cumsum([strata[group] == str(s) for group in order]) for s in range(len(sizes))])
    ideal = np.arange(1, len(order) + 1) * np.array(sizes)[:, None] / len(order)
    # the bound of the docstring, on a scale where a stretch is measured by what stands in it: 1 + share × (strata − 2)
    bound = 1 + np.array(sizes)[:, None] / len(order) * (len(sizes) - 2)
    assert (np.abs(counts - ideal) < bound).all()


def test_a_group_of_a_rare_stratum_may_be_anywhere():
    """Its place is uniform: as often among the first tenth as a group of a large stratum is."""
    groups = [f"g{i:02}" for i in range(20)]
    strata = {group: group if group in ("g03", "g11") else "rest" for group in groups}
    places = np.array([[ordered(groups, seed, strata).index(group) for group in ("g03", "g11", "g07")] for seed in range(800)])
    for column in places.T:
        counts = np.bincount(column // 4, minlength=5)  # fifths; 160 expected, standard deviation 11
        assert np.abs(counts - 160).max() < 50


@pytest.mark.parametrize("draw", [0, 1, 7])
def test_stratified_draws_are_nested_and_depend_on_names_alone(draw):
    draws = [draw_groups(GROUPS, n, draw, STRATA) for n in range(1, 21)]
    for n, (smaller, larger) in enumerate(itertools.pairwise(draws), start=1):
        assert len(set(smaller)) == n and larger[:n] == smaller
    renamed = {group: f"stratum {stratum}" for group, stratum in STRATA.items()}
    assert draw_groups(GROUPS[::-1] * 2, 20, draw, dict(reversed(renamed.items()))) == draws[-1]
    assert draw_groups(GROUPS, 20, draw + 1, STRATA) != draws[-1]


def test_every_part_of_a_stratified_split_has_its_share():
    groups = [f"g{i:03}" for i in range(100)]
    strata = {group: "with" if i < 30 else "without" for i, group in enumerate(groups)}
    for seed in range(6):
        part_of = split_groups(groups, seed, strata)
        sizes = {part: [group for group in groups if part_of[group] == part] for part in PARTS}
        assert {part: len(its) for part, its in sizes.items()} == {"pool": 70, "val": 10, "test": 20}
        for part, expected in (("pool", 21), ("val", 3), ("test", 6)):
            assert abs(sum(strata[group] == "with" for group in sizes[part]) - expected) < 2


@pytest.mark.parametrize("strata", [None, STRATA])
@pytest.mark.parametrize("folds", [2, 3, 5, 7, 20])
def test_folds_divide_the_groups_evenly(folds, strata):
    fold_of = fold_groups(GROUPS * 2, folds, 0, strata)
    sizes = np.bincount(list(fold_of.values()))
    assert set(fold_of) == set(GROUPS) and len(sizes) == folds and max(sizes) - min(sizes) <= 1
    assert fold_groups(GROUPS[::-1], folds, 0, strata) == fold_of != fold_groups(GROUPS, folds, 1, strata)


@pytest.mark.parametrize("folds", [2, 3, 5])
@pytest.mark.parametrize("rare", [10, 30, 50])
def test_every_stratified_fold_has_its_share(folds, rare):
    groups = [f"g{i:03}" for i in range(100)]
    strata = {group: str(i < rare) for i, group in enumerate(groups)}

    def furthest(strata_or_none):
        """How far a fold's number of rare groups is from its share, at most."""
        gaps = []
        for seed in range(20):
            fold_of = fold_groups(groups, folds, seed, strata_or_none)
            counts = np.bincount([fold_of[group] for group in groups[:rare]], minlength=folds)
            gaps.append(np.abs(counts - rare / folds).max())
        return max(gaps)

    assert furthest(strata) < 2 < furthest(None)


def test_fewer_groups_than_folds():
    assert sorted(fold_groups(["a", "b"] * 3, 2, 0).values()) == [0, 1]
    with pytest.raises(InputError, match=r"data\.folds=3: pool and val have only 2 groups"):
        fold_groups(["a", "b"] * 3, 3, 0)


def test_only_the_parts_that_are_asked_for():
    part_of = split_groups(GROUPS, 0, parts=("pool", "val"))
    assert sorted(part_of.values()) == ["pool"] * 18 + ["val"] * 2
    assert set(split_groups(["a", "b"], 0, parts=("pool", "val")).values()) == {"pool", "val"}
    with pytest.raises(InputError, match="1 groups cannot be split into pool, val: at least 2 are needed"):
        split_groups(["a"], 0, parts=("pool", "val"))


def test_a_split_is_written_as_it_is_read(tmp_path):
    path = tmp_path / "splits.json"
    assert read_splits(path) is None
    write_splits(path, {"val": ["x/ö", "b"], "pool": ["c"]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"pool": ["c"], "val": ["b", "x/ö"], "test": []}
    assert "x/ö" in path.read_text(encoding="utf-8")  # a person reads it
    assert read_splits(path, ["b", "c", "x/ö", "other"]) == {"c": "pool", "b": "val", "x/ö": "val"} == read_splits(path)
    assert [file.name for file in tmp_path.iterdir()] == ["splits.json"]


def test_a_split_that_stands_is_not_written_over(tmp_path):
    path = tmp_path / "splits.json"
    path.write_text("edited by hand")
    with pytest.raises(InputError, match=r"splits\.json: exists already"):
        write_splits(path, {"pool": ["a"]})
    assert path.read_text(encoding="utf-8") == "edited by hand"
