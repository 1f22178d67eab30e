import numpy as np
import pytest
import torch
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers import sliding_window_inference

from resunet.bundle.scorer import EngineScorer, gaussian, places_of
from resunet.inference.window import Footprint, Plan, step_of


def engine(x: np.ndarray) -> np.ndarray:
    """Depends on the window's size and on where a pixel is in it."""
    ramp = np.linspace(0, 1, x.shape[-1], dtype=np.float32)
    return np.concatenate([x * 2 + ramp, x * x.mean() - 1], axis=1)


@pytest.mark.parametrize("window", [(32, 32), (17, 50), (1, 9), (16, 8, 5)])
def test_weights_are_those_of_monai(window):
    np.testing.assert_allclose(gaussian(window), compute_importance_map(window, "gaussian").numpy(), rtol=1e-5)


@pytest.mark.parametrize("size, window", [((70, 33), (32, 32)), ((32, 100), (32, 32)), ((20, 17, 40), (16, 16, 16))])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.7])
def test_windows_are_those_of_monai(size, window, overlap):
    steps = [step_of(side, length, overlap) for side, length in zip(window, size, strict=True)]
    assert list(places_of(size, window, overlap)) == [tuple(one) for one in dense_patch_slices(size, window, steps)]
    image = np.random.default_rng(0).normal(size=(1, 1, *size)).astype(np.float32)
    scorer = EngineScorer(engine, Footprint(1, 2, 2), len(size))
    # x.mean() is of all windows that are given at once, so that one at a time is compared
    found = scorer.slide(image, Plan(0, window[0], 1, 4), overlap)

    def by_torch(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(engine(x.numpy()))

    expected = sliding_window_inference(torch.from_numpy(image), window, 1, by_torch, overlap, "gaussian")
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_windows_that_are_given_at_once_are_told_apart():
    image = np.random.default_rng(0).normal(size=(1, 1, 70, 50)).astype(np.float32)

    def alone(x: np.ndarray) -> np.ndarray:
        return np.concatenate([engine(one[None]) for one in x])

    scorer = EngineScorer(alone, Footprint(1, 2, 2), 2)
    np.testing.assert_array_equal(scorer.slide(image, Plan(0, 32, 4, 4), 0.25), scorer.slide(image, Plan(0, 32, 1, 4), 0.25))


def test_mirror_images_are_averaged():
    image = np.random.default_rng(0).normal(size=(2, 1, 6, 5)).astype(np.float32)
    found = EngineScorer(engine, Footprint(1, 2, 2), 2, flips=True)(image)
    total = engine(image) + engine(image[..., ::-1])[..., ::-1] + engine(image[:, :, ::-1])[:, :, ::-1]
    total = total + engine(image[:, :, ::-1, ::-1])[:, :, ::-1, ::-1]
    np.testing.assert_allclose(found, total / 4, atol=1e-6)
