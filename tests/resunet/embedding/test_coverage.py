import itertools

import numpy as np
import pytest

from resunet.embedding.coverage import choose, cover, distances_to, k_centre, nested_order, random_covers, typical
from resunet.embedding.groups import unit


@pytest.fixture
def points():
    return unit(np.random.default_rng(0).normal(size=(40, 5)))


def blobs(*sizes: int) -> np.ndarray:
    """Tight clusters of so many points around axes that are orthogonal."""
    rng = np.random.default_rng(1)
    return unit(np.concatenate([np.eye(len(sizes))[i] + rng.normal(0, 0.02, (n, len(sizes))) for i, n in enumerate(sizes)]))


def test_distances_are_those_of_a_loop(points):
    naive = [min(np.linalg.norm(point - points[i]) for i in (3, 7, 20)) for point in points]
    np.testing.assert_allclose(distances_to(points, [3, 7, 20]), naive, atol=1e-7)
    assert np.isinf(distances_to(points, [])).all()
    found = cover(points, [3, 7, 20])
    assert found.mean == pytest.approx(np.mean(naive), abs=1e-7) and found.farthest == pytest.approx(max(naive))


def test_k_centre_is_the_greedy_of_a_loop(points):
    covered = np.zeros(40, bool)
    covered[[4, 9]] = True
    labelled, wanted, scores = [4, 9], [], []
    for _ in range(6):
        distance = [min(np.linalg.norm(point - points[i]) for i in labelled) for point in points]
        wanted.append(int(np.argmax(distance)))
        scores.append(max(distance))
        labelled.append(wanted[-1])
    found = k_centre(points, covered, 6)
    assert found.order == wanted
    np.testing.assert_allclose(found.scores, scores, atol=1e-7)
    assert covered.sum() == 2


def test_k_centre_is_within_twice_the_best(points):
    """Gonzalez 1985: the farthest distance is at most twice that of the best centres."""
    few = points[:12]
    best = min(cover(few, list(chosen)).farthest for chosen in itertools.combinations(range(12), 3))
    assert cover(few, k_centre(few, np.zeros(12, bool), 3).order).farthest <= 2 * best


def test_k_centre_starts_in_the_middle(points):
    found = k_centre(points, np.zeros(40, bool), 2)
    assert found.order[0] == np.argmin(np.linalg.norm(points - points.mean(axis=0), axis=1)) and np.isnan(found.scores[0])


def test_typicality_takes_one_of_each_cluster_the_largest_first():
    points = blobs(12, 20, 8)
    found = typical(points, np.zeros(40, bool), 3, seed=0)
    cluster = np.repeat([0, 1, 2], [12, 20, 8])
    assert cluster[found.order].tolist() == [1, 0, 2]
    for number, score in zip(found.order, found.scores, strict=True):
        members = np.flatnonzero(cluster == cluster[number])
        distances = np.sort(np.linalg.norm(points[members][:, None] - points[members], axis=2), axis=1)
        typicality = 1 / (distances[:, 1 : 1 + len(members) // 2].mean(axis=1) + 1e-5)
        assert members[typicality.argmax()] == number and score == pytest.approx(typicality.max())


def test_typicality_leaves_what_is_covered():
    points, covered = blobs(12, 20, 8), np.zeros(40, bool)
    covered[[0, 13]] = True
    assert typical(points, covered, 1, seed=0).order[0] >= 32


def test_typicality_leaves_outliers_to_the_end():
    points = blobs(12, 12, 1)
    assert 24 not in typical(points, np.zeros(25, bool), 3, seed=0).order
    assert k_centre(points, np.zeros(25, bool), 3).order.count(24) == 1


@pytest.mark.parametrize("method", ["kcenter", "typicality"])
def test_choices_are_distinct_free_and_repeatable(points, method):
    covered = np.arange(40) % 3 == 0
    found = choose(method, points, covered, 26)
    assert len(set(found.order)) == 26 and not covered[found.order].any()
    assert choose(method, points, covered, 26).order == found.order


@pytest.mark.parametrize("method", ["kcenter", "typicality"])
def test_an_order_of_all(points, method):
    orders = [nested_order(method, points, seed) for seed in (0, 0, 1)]
    assert sorted(orders[0]) == list(range(40)) and orders[0] == orders[1] != orders[2]


def test_both_cover_better_than_chance():
    points = blobs(30, 10, 10, 6)
    covered = np.zeros(56, bool)
    chance = np.mean([one.mean for one in random_covers(points, covered, 4, 50)])
    for method in ("kcenter", "typicality"):
        assert cover(points, choose(method, points, covered, 4).order).mean < chance / 2


def test_random_choices_keep_what_is_labelled(points):
    covered = np.zeros(40, bool)
    covered[:39] = True
    (only,) = random_covers(points, covered, 1, 1)
    assert only.farthest == pytest.approx(0, abs=1e-7)


def test_equal_points_are_one_cluster():
    points = np.tile(np.eye(3)[:1], (6, 1))
    assert len(set(typical(points, np.zeros(6, bool), 4, seed=0).order)) == 4
