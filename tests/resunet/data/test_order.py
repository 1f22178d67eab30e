import numpy as np
import pytest

from resunet.data.order import batch_order, shuffled_places


def whole(size: int, seed: int, epoch: int) -> np.ndarray:
    return shuffled_places(np.arange(size), size, seed, epoch)


@pytest.mark.parametrize("size, batch", [(12, 4), (13, 4), (7, 7), (9, 1), (5, 3)])
def test_an_epoch_holds_every_item_at_most_once(size, batch):
    batches = size // batch
    for epoch in range(3):
        seen = np.concatenate([batch_order(size, batch, 3, epoch * batches + i) for i in range(batches)])
        assert len(seen) == batches * batch == len(set(seen.tolist()))
        assert set(seen.tolist()) <= set(range(size))
        np.testing.assert_array_equal(seen, whole(size, 3, epoch)[: batches * batch])


def test_every_item_has_its_turn():
    seen = {int(i) for index in range(40) for i in batch_order(10, 4, 0, index)}
    assert seen == set(range(10))


def test_the_order_is_a_pure_function():
    expected = [batch_order(20, 4, 1, index).tolist() for index in range(12)]
    np.random.seed(5)
    assert [batch_order(20, 4, 1, index).tolist() for index in reversed(range(12))] == expected[::-1]
    assert expected != [batch_order(20, 4, 2, index).tolist() for index in range(12)]
    assert whole(20, 1, 0).tolist() != whole(20, 1, 1).tolist()


def test_every_size_has_permutations():
    for size in (*range(1, 300), *range(300, 5001, 47), 1023, 1025, 4095, 4096, 4097):
        order = whole(size, seed=size % 7, epoch=size % 5)
        assert np.array_equal(np.sort(order), np.arange(size)), size


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 63])
def test_a_place_does_not_depend_on_the_others(size):
    order = whole(size, 3, 1)
    for place in range(size):
        assert shuffled_places(np.array([place]), size, 3, 1) == order[place]
    assert shuffled_places(np.array([], np.int64), size, 3, 1).size == 0


def test_large_numbers_of_items_need_no_list():
    size = 10**12 + 7
    places = np.concatenate([np.arange(1000), np.arange(size - 1000, size)])
    found = shuffled_places(places, size, 0, 0)
    assert len(set(found.tolist())) == 2000 and found.min() >= 0 and found.max() < size
    assert abs(found.mean() / size - 0.5) < 0.04  # 6 standard errors


@pytest.mark.parametrize("size", [2, 3, 5, 8, 12, 16, 31])
def test_every_item_is_as_likely_at_every_place(size):
    """Chi-square over the orders of many epochs; its mean is (size − 1)², its standard deviation √2 (size − 1)."""
    epochs = 1000
    counts = np.zeros((size, size))
    for epoch in range(epochs):
        counts[np.arange(size), whole(size, 11, epoch)] += 1
    expected = epochs / size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert abs(chi_square - freedom) < 6 * np.sqrt(2 * freedom)


def test_neighbours_do_not_stay_neighbours():
    """Slices of one volume are neighbours in the list: in an order they are as far apart as any two."""
    size = 1000
    places = np.argsort(whole(size, 0, 0))
    distance = np.abs(np.diff(places))
    assert abs(distance.mean() / size - 1 / 3) < 0.04  # of two random places; 5 standard errors
    assert abs(np.corrcoef(whole(size, 0, 0), whole(size, 0, 1))[0, 1]) < 0.15
    assert abs(np.corrcoef(whole(size, 0, 0), whole(size, 1, 0))[0, 1]) < 0.15
