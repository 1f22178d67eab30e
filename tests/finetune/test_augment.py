import math

import numpy as np
import pytest
import scipy.ndimage
import torch

from finetune.augment import augment, elastic_displacement
from finetune.recipe import AugmentSettings
from resunet.data.cases import IGNORE

STILL = {"rotation": 0, "elastic": {"probability": 0}, "contrast": (1, 1), "flip": 0}


def settings(**changes: object) -> AugmentSettings:
    return AugmentSettings.model_validate(STILL | changes)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth_images(count: int, height: int, width: int) -> torch.Tensor:
    noise = np.random.default_rng(0).standard_normal((count, 1, height, width))
    smooth = scipy.ndimage.gaussian_filter(noise, (0, 0, 2, 2))
    return torch.from_numpy(smooth / smooth.std()).float()


def discs(count: int, size: int = 48) -> torch.Tensor:
    """A disc off the centre of each label map."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return torch.stack([((y - 18 - i) ** 2 + (x - 28) ** 2 < 100).to(torch.uint8) for i in range(count)])


def test_still_settings_change_nothing():
    images = torch.randn(2, 3, 13, 10, generator=generator())
    labels = torch.randint(4, (2, 13, 10), generator=generator()).to(torch.uint8)
    moved, moved_labels, rms = augment(images, labels, settings(), generator())
    torch.testing.assert_close(moved, images, atol=2e-5, rtol=0)
    assert torch.equal(moved_labels, labels) and moved_labels.dtype == torch.uint8 and rms == 0


@pytest.mark.parametrize("sigma", [1.0, 3.0, 10.0])
def test_the_elastic_field_is_that_of_scipy(sigma):
    field = elastic_displacement(2, 30, 41, sigma, 30.0, generator(3))
    uniform = (torch.rand(2, 2, 30, 41, generator=generator(3)) * 2 - 1).double().numpy()
    oracle = 30 * scipy.ndimage.gaussian_filter(uniform, (0, 0, sigma, sigma), mode="constant", truncate=4)
    np.testing.assert_allclose(field.numpy(), oracle, atol=1e-4)


def test_the_seeds_figure_moves_pixels_by_about_half_a_pixel():
    field = elastic_displacement(8, 256, 256, 10.0, 30.0, generator())[..., 40:-40, 40:-40]
    # the variance of a uniform number, 1/3, times that which a Gaussian leaves of white noise, 1/(4πσ²)
    closed_form = 30 * math.sqrt(1 / 3) / (2 * 10 * math.sqrt(math.pi))
    assert closed_form == pytest.approx(0.489, abs=1e-3)
    assert field.square().mean().sqrt().item() == pytest.approx(closed_form, rel=0.15)
    assert abs(field.mean().item()) < 0.1


def test_the_logged_rms_is_that_of_the_patches_that_were_deformed():
    images, labels = smooth_images(16, 64, 64), torch.zeros(16, 64, 64, dtype=torch.uint8)
    always, half = (
        augment(images, labels, settings(elastic={"probability": p, "sigma": 2, "alpha": 8}), generator())[2] for p in (1, 0.5)
    )
    per_axis = 8 * math.sqrt(1 / 3) / (2 * 2 * math.sqrt(math.pi))
    assert always == pytest.approx(per_axis * math.sqrt(2), rel=0.1)  # of the vector
    assert half == pytest.approx(always, rel=0.1) and half != always


def test_the_image_is_read_where_the_field_says():
    images = smooth_images(1, 40, 40)
    given = settings(elastic={"probability": 1, "sigma": 4, "alpha": 40})
    moved, _, _ = augment(images, torch.zeros(1, 40, 40, dtype=torch.uint8), given, generator(2))
    dx, dy = elastic_displacement(1, 40, 40, 4, 40, generator(2))[0].double().numpy()
    y, x = np.mgrid[:40, :40]
    oracle = scipy.ndimage.map_coordinates(images[0, 0].double().numpy(), [y + dy, x + dx], order=1, mode="nearest")
    np.testing.assert_allclose(moved[0, 0].numpy(), oracle, atol=1e-4)
    assert np.abs(oracle - images[0, 0].numpy()).max() > 0.5


def test_rotation_is_that_of_scipy():
    images = smooth_images(1, 41, 41).expand(6, -1, -1, -1).contiguous()
    labels = torch.zeros(6, 41, 41, dtype=torch.uint8)
    moved, _, _ = augment(images, labels, settings(rotation=60), generator())
    found = []
    inner = slice(12, 29)
    for one in moved:
        # the angle is random: it is the one at which scipy's rotation is the same
        errors = {}
        for angle in np.arange(-60, 60.5, 0.5):
            turned = scipy.ndimage.rotate(images[0, 0].numpy(), angle, reshape=False, order=1, mode="nearest")
            errors[float(angle)] = np.abs(turned[inner, inner] - one[0, inner, inner].numpy()).max()
        best = min(errors, key=errors.get)
        assert errors[best] < 0.1  # a quarter of a degree off, 8 pixels from the centre
        assert np.median(list(errors.values())) > 0.5
        found.append(best)
    assert min(found) < -15 and max(found) > 15


def test_rotation_is_in_pixels_where_the_patch_is_not_square():
    """The distance of a point from the centre is kept."""
    images = torch.zeros(20, 1, 41, 81)
    images[:, 0, 20, 50:53] = images[:, 0, 19, 51] = images[:, 0, 21, 51] = 1  # a dot 11 right of the centre
    labels = torch.zeros(20, 41, 81, dtype=torch.uint8)
    moved, _, _ = augment(images, labels, settings(rotation=180), generator())
    y, x = torch.meshgrid(torch.arange(41.0) - 20, torch.arange(81.0) - 40, indexing="ij")
    for one in moved[:, 0]:
        at = torch.stack([(one * y).sum(), (one * x).sum()]) / one.sum()
        assert at.norm().item() == pytest.approx(11, abs=0.3)


def test_flips_are_left_right():
    images = torch.randn(40, 2, 9, 12, generator=generator())
    labels = torch.randint(3, (40, 9, 12), generator=generator()).to(torch.uint8)
    moved, moved_labels, _ = augment(images, labels, settings(flip=1), generator())
    torch.testing.assert_close(moved, images.flip(3), atol=2e-5, rtol=0)
    assert torch.equal(moved_labels, labels.flip(2))
    moved, moved_labels, _ = augment(images, labels, settings(flip=0.5), generator())
    flipped = [torch.equal(one, label.flip(1)) for one, label in zip(moved_labels, labels, strict=True)]
    kept = [torch.equal(one, label) for one, label in zip(moved_labels, labels, strict=True)]
    assert 8 < sum(flipped) < 32 and sum(flipped) + sum(kept) == 40


def test_image_and_mask_move_together():
    labels = discs(8)
    given = AugmentSettings.model_validate(
        {"rotation": 90, "elastic": {"probability": 1, "sigma": 4, "alpha": 40}, "flip": 0.5}
    )
    images, moved, _ = augment(labels[:, None].float(), labels, given, generator())
    assert (moved != labels).float().mean() > 0.05  # it did move
    for image, label in zip(images[:, 0], moved.numpy(), strict=True):
        middle = (image.max() + image.min()) / 2
        wrong = (image > middle).numpy() != (label == 1)
        border = scipy.ndimage.binary_dilation(label == 1) & ~scipy.ndimage.binary_erosion(label == 1)
        assert not (wrong & ~border).any()
        assert wrong.sum() < 0.3 * border.sum()


def test_labels_get_no_new_value():
    labels = torch.tensor([0, 3, 7, IGNORE], dtype=torch.uint8)[torch.randint(4, (4, 32, 32), generator=generator())]
    strong = AugmentSettings.model_validate({"rotation": 180, "elastic": {"probability": 1, "sigma": 3, "alpha": 60}})
    _, moved, _ = augment(torch.zeros(4, 1, 32, 32), labels, strong, generator())
    assert moved.dtype == torch.uint8 and set(moved.unique().tolist()) == {0, 3, 7, IGNORE}


def test_what_is_ignored_stays_ignored():
    labels = torch.zeros(6, 48, 48, dtype=torch.uint8)
    labels[discs(6) == 1] = IGNORE
    given = AugmentSettings.model_validate({"rotation": 45})
    images, moved, _ = augment((labels == IGNORE)[:, None].float(), labels, given, generator())
    ignored = (moved == IGNORE).sum(dim=(1, 2)).float()
    assert (ignored - (labels == IGNORE).sum(dim=(1, 2))).abs().max() < 15
    assert images[:, 0][moved == IGNORE].mean() > images[:, 0][moved != IGNORE].mean() + 0.5


def test_contrast_keeps_the_mean_and_scales_the_deviation():
    images = torch.randn(50, 2, 16, 16, generator=generator()) * 3 + torch.tensor([5.0, -2.0])[:, None, None]
    labels = torch.zeros(50, 16, 16, dtype=torch.uint8)
    changed, _, _ = augment(images, labels, settings(contrast=(0.5, 2)), generator())
    torch.testing.assert_close(changed.mean(dim=(2, 3)), images.mean(dim=(2, 3)), atol=1e-4, rtol=0)
    factor = changed.std(dim=(2, 3)) / images.std(dim=(2, 3))
    torch.testing.assert_close(factor[:, 0], factor[:, 1], atol=1e-4, rtol=0)  # one for all channels
    assert 0.499 < factor.min() < 0.65 and 1.85 < factor.max() < 2.001


def test_augmentation_is_a_function_of_the_generator_and_changes_no_input():
    images, labels = smooth_images(3, 32, 32), discs(3, 32)
    before = images.clone(), labels.clone()
    first, again, other = (augment(images, labels, AugmentSettings(), generator(seed)) for seed in (4, 4, 5))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]) and first[2] == again[2]
    assert not torch.equal(first[0], other[0])
    assert torch.equal(images, before[0]) and torch.equal(labels, before[1])
    same = augment(images[:1].expand(3, -1, -1, -1), labels[:1].expand(3, -1, -1), AugmentSettings(), generator(4))[0]
    assert not torch.equal(same[0], same[1])
