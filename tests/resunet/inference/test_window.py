import numpy as np
import pytest
import torch

from resunet.inference.window import decide, foreground_of, mirrors, probabilities_of


def test_decisions():
    logits = np.array([-3.0, 0.0, 1e-6, 3.0], np.float32).reshape(1, 1, 2, 2)
    assert decide(logits).tolist() == [[[0, 0], [1, 1]]]
    many = np.array([[1.0, 5.0], [2.0, -1.0], [1.5, 4.0]], np.float32).reshape(1, 3, 1, 2)
    assert decide(many).tolist() == [[[1, 0]]] and decide(many).dtype == decide(logits).dtype == np.uint8
    high = np.zeros((1, 254, 1, 1), np.float32)
    high[0, 253] = 1
    assert decide(high).item() == 253


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_probabilities_are_those_of_torch(channels):
    logits = np.random.default_rng(0).normal(0, 40, (3, channels, 7, 5)).astype(np.float32)
    logits[0, 0, 0] = [-200, 200, 0, 1e-7, -90]
    given = torch.from_numpy(logits)
    expected = given.sigmoid() if channels == 1 else given.softmax(dim=1)
    found = probabilities_of(logits)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-30)


def test_the_foreground_is_all_that_is_not_background():
    one = np.random.default_rng(0).normal(0, 3, (2, 1, 4, 5)).astype(np.float32)
    np.testing.assert_array_equal(foreground_of(one), probabilities_of(one)[:, 0])
    three = np.log(np.array([[0.6, 0.4], [0.3, 0.35], [0.1, 0.25]], np.float32)).reshape(1, 3, 1, 2)
    np.testing.assert_allclose(foreground_of(three), [[[0.4, 0.6]]], rtol=1e-5)
    small = np.log(np.array([1.0, 1e-9, 2e-9], np.float32)).reshape(1, 3, 1, 1)
    assert foreground_of(small).item() == pytest.approx(3e-9), "1 less the background's would be 0"


def test_mirror_images():
    assert mirrors(2, False) == [()]
    assert mirrors(2, True) == [(), (2,), (3,), (2, 3)]
    assert len(mirrors(3, True)) == len(set(mirrors(3, True))) == 8
