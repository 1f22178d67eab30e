import numpy as np
import pytest

from resunet.data import neighbours
from resunet.data.neighbours import Cells


def clustered(count: int, spread: float, seed: int = 0) -> np.ndarray:
    """Vectors around 40 centres, as look-alikes come."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).gamma(1.0, 15.0, (40, 167))
    return (
        np.rint(centres[random.integers(40, size=count)] + random.normal(0, spread, (count, 167))).clip(0, 255).astype(np.uint8)
    )


def all_pairs(queries: np.ndarray, vectors: np.ndarray, radius: float, limit: int) -> list[tuple[int, int, float]]:
    """The definition, in whole numbers."""
    pairs = []
    for i, query in enumerate(queries.astype(np.int64)):
        squared = ((vectors.astype(np.int64) - query) ** 2).sum(axis=1)
        order = np.lexsort((np.arange(len(vectors)), squared))
        used = [j for j in order if squared[j] <= radius**2 and query.any() and vectors[j].any()]
        pairs += [(i, int(j), float(np.float32(squared[j]) ** np.float32(0.5))) for j in used[:limit]]
    return pairs


def listed(found: tuple[np.ndarray, np.ndarray, np.ndarray]) -> list[tuple[int, int, float]]:
    return [(int(i), int(j), float(d)) for i, j, d in zip(*found, strict=True)]


def test_search_within_half_the_radius_equals_all_pairs():
    queries, vectors = clustered(300, 3.0, 1), clustered(500, 3.0, 2)
    found = [pair for pair in listed(Cells(vectors).search(queries, 120.0, 1000)) if pair[2] <= 60]
    expected = all_pairs(queries, vectors, 60.0, 1000)
    assert len(expected) > 1000
    assert found == expected


def test_search_beyond_half_the_radius_misses_next_to_nothing():
    queries, vectors = clustered(300, 5.0, 1), clustered(500, 5.0, 2)
    expected = all_pairs(queries, vectors, 100.0, 1000)
    assert sum(distance > 50 for *_, distance in expected) > 1000
    assert len(Cells(vectors).search(queries, 100.0, 1000)[0]) >= 0.995 * len(expected)


@pytest.mark.parametrize("pending", [2**20, 10])
def test_search_keeps_the_nearest_when_there_are_too_many(monkeypatch, pending):
    monkeypatch.setattr(neighbours, "_PENDING", pending)
    monkeypatch.setattr(neighbours, "_PRODUCTS", 100)
    queries, vectors = clustered(60, 1.0, 1), np.tile(clustered(150, 1.0, 2), (3, 1))
    assert listed(Cells(vectors).search(queries, 200.0, 5)) == all_pairs(queries, vectors, 200.0, 5)


def test_search_of_identical_vectors_takes_the_first():
    same = np.full((100, 167), 7, np.uint8)
    one, other, distance = Cells(same).search(same[:3], 10.0, 4)
    assert one.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert other.tolist() == [0, 1, 2, 3] * 3
    assert not distance.any()


def test_rows_of_zeros_match_nothing():
    vectors = clustered(50, 1.0)
    vectors[::2] = 0
    one, other, _ = Cells(vectors).search(vectors, 1000.0, 100)
    assert len(one) == 25 * 25
    assert (one % 2 == 1).all() and (other % 2 == 1).all()


@pytest.mark.parametrize(("queries", "vectors"), [(0, 5), (5, 0), (0, 0)])
def test_search_of_nothing(queries, vectors):
    found = Cells(clustered(vectors, 1.0)).search(clustered(queries, 1.0), 50.0, 5)
    assert [len(column) for column in found] == [0, 0, 0]


def test_search_does_not_depend_on_batches(monkeypatch):
    queries, vectors = clustered(200, 4.0, 1), clustered(300, 4.0, 2)
    whole = listed(Cells(vectors).search(queries, 100.0, 8))
    monkeypatch.setattr(neighbours, "_BLOCK", 7)
    assert listed(Cells(vectors).search(queries, 100.0, 8)) == whole
    halves = [Cells(vectors).search(part, 100.0, 8) for part in (queries[:90], queries[90:])]
    assert listed(halves[0]) + [(i + 90, j, d) for i, j, d in listed(halves[1])] == whole


def test_search_leaves_its_input_alone():
    queries, vectors = clustered(20, 2.0, 1), clustered(30, 2.0, 2)
    before = queries.copy(), vectors.copy()
    queries.flags.writeable = vectors.flags.writeable = False
    Cells(vectors).search(queries, 100.0, 8)
    assert (queries == before[0]).all() and (vectors == before[1]).all()
