import math

import numpy as np
import pytest
import scipy.ndimage
import torch

from finetune.settings import AugmentSettings
from finetune.training.augment import augment, elastic_displacement, volume_displacement
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


def test_images_are_augmented_as_ever():
    """Golden: what this gave before volumes came, to float32's rounding."""
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(30.0), indexing="ij")
    images = torch.stack([(y * (i + 1) / 7).sin() + (x / (3 + i)).cos() for i in range(3)])[:, None]
    labels = (images[:, 0] > 0.3).to(torch.uint8)
    given = AugmentSettings.model_validate({"elastic": {"sigma": 3, "alpha": 20, "probability": 0.6}})
    images, labels, rms = augment(images, labels, given, generator(11))
    assert images[:, 0, 12, 15].tolist() == pytest.approx([0.953068, -1.042737, -1.400599], abs=2e-6)
    assert images.mean(dim=(1, 2, 3)).tolist() == pytest.approx([0.562411, 0.147201, 0.132122], abs=2e-6)
    assert images.std(dim=(1, 2, 3)).tolist() == pytest.approx([0.89231, 0.861695, 0.883924], abs=2e-6)
    assert labels.sum(dim=(1, 2)).tolist() == [405, 313, 324] and rms == pytest.approx(1.627783, abs=2e-6)


def test_zoom_magnifies_about_the_centre():
    y, x = torch.meshgrid(torch.arange(41.0) - 20, torch.arange(61.0) - 30, indexing="ij")
    labels = (y**2 + x**2 < 100).to(torch.uint8).repeat(120, 1, 1)
    images = labels[:, None].float()
    moved, moved_labels, _ = augment(images, labels, settings(zoom_probability=0.5, zoom=(0.8, 1.5)), generator())
    ratios = (moved_labels.sum(dim=(1, 2)) / labels.sum(dim=(1, 2))).sqrt()
    still = ((moved - images).abs() < 1e-4).flatten(1).all(dim=1)
    assert (
        40 < still.sum() < 80 and ratios.min() == pytest.approx(0.8, abs=0.04) and ratios.max() == pytest.approx(1.5, abs=0.06)
    )
    for one, ratio in zip(moved_labels.float(), ratios.tolist(), strict=True):
        assert abs((one * y).sum() / one.sum()) < 0.3 and abs((one * x).sum() / one.sum()) < 0.3
        assert float((one * x.abs()).amax()) == pytest.approx(9.5 * ratio, abs=1.2), "in pixels, not in sides"
        assert float((one * y.abs()).amax()) == pytest.approx(9.5 * ratio, abs=1.2)


def test_a_shift_is_a_share_of_the_side():
    labels = discs(1, 48).repeat(60, 1, 1)
    moved, moved_labels, _ = augment(labels[:, None].float(), labels, settings(shift=0.1), generator())
    at = torch.arange(48.0)
    for axis in (1, 2):
        before, after = (
            (one.float().sum(dim=3 - axis) * at).sum(dim=1) / one.float().sum(dim=(1, 2)) for one in (labels, moved_labels)
        )
        apart = after - before
        assert apart.abs().max() < 0.1 * 48 + 0.6 and apart.min() < -3 and apart.max() > 3 and abs(apart.mean()) < 1
    assert ((moved[:, 0] > 0.5) == (moved_labels == 1)).float().mean() > 0.995


def test_intensities_are_those_of_the_views():
    images, labels = smooth_images(6, 24, 24), discs(6, 24)
    given = settings(intensity={"noise": 1, "noise_sigma": (0.2, 0.2)})
    moved, moved_labels, _ = augment(images, labels, given, generator())
    assert (moved - images).std().item() == pytest.approx(0.2, rel=0.05) and torch.equal(moved_labels, labels)
    alone = augment(images, labels, settings(), generator())[0]
    torch.testing.assert_close(alone, images, atol=2e-5, rtol=0)


CUBES, FLAT = (1.0, 1.0, 1.0), (5.0, 1.0, 1.0)


def volume(*size: int) -> torch.Tensor:
    smooth = scipy.ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(size), 2)
    return torch.from_numpy(smooth / smooth.std()).float()[None, None]


def moved_volume(images: torch.Tensor, spacing: tuple[float, ...], seed: int = 0, **changes: object) -> tuple:
    labels = torch.zeros(images[:, 0].shape, dtype=torch.uint8)
    return augment(images, labels, settings(**changes), generator(seed), torch.tensor([spacing] * len(images)))


def test_still_settings_change_no_volume():
    images = torch.randn(2, 3, 7, 13, 10, generator=generator())
    labels = torch.randint(4, (2, 7, 13, 10), generator=generator()).to(torch.uint8)
    moved, moved_labels, rms = augment(images, labels, settings(), generator(), torch.tensor([CUBES, FLAT]))
    torch.testing.assert_close(moved, images, atol=3e-5, rtol=0)
    assert torch.equal(moved_labels, labels) and moved_labels.dtype == torch.uint8 and rms == 0


@pytest.mark.parametrize("spacing", [CUBES, (2.5, 1.0, 1.0), (1.0, 2.0, 3.0)])
def test_a_volume_turns_in_mm(spacing):
    """Distances in mm from the centre are kept: of two balls, and between them; in voxels they are not."""
    size = (31, 41, 37)
    at = np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(size, spacing, strict=True)], indexing="ij")
    places = ((0.0, 9.0, 3.0), (4.0, -6.0, 8.0))
    balls = [np.exp(-sum((a - c) ** 2 for a, c in zip(at, place, strict=True)) / 18) for place in places]
    images = torch.from_numpy(np.stack(balls)).float()[None]

    def centres(volume: torch.Tensor) -> np.ndarray:
        return np.array([[(one * a).sum() / one.sum() for a in at] for one in volume.double().numpy()])

    assert centres(images[0]) == pytest.approx(np.array(places), abs=0.05)
    angles = []
    for seed in range(4):
        found = centres(moved_volume(images, spacing, seed, rotation=40)[0][0])
        assert np.linalg.norm(found, axis=1) == pytest.approx(np.linalg.norm(places, axis=1), abs=0.25)
        assert np.linalg.norm(found[0] - found[1]) == pytest.approx(np.linalg.norm(np.subtract(*places)), abs=0.25)
        angles.append(np.abs(found - places).max(axis=0))
    assert (np.max(angles, axis=0) > 1).all()  # about every axis


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_thick_slices_are_moved_within_themselves_alike(axis):
    spacing = tuple(5.0 if i == axis else 1.0 for i in range(3))
    size = [24, 24, 24]
    size[axis] = 6
    one = volume(*[n for i, n in enumerate(size) if i != axis][:2], 1)[0, 0, :, :, 0]
    images = one.unsqueeze(axis).expand(*size)[None, None].clone()  # every slice alike
    images = images + torch.arange(6.0).view([1, 1, *[6 if i == axis else 1 for i in range(3)]])  # but for a step
    moved, _, rms = moved_volume(images, spacing, 1, rotation=30, elastic={"probability": 1, "sigma": 4, "alpha": 30}, flip=0)
    slices = moved[0, 0].movedim(axis, 0)
    assert rms > 0.5 and (slices[0] - images[0, 0].movedim(axis, 0)[0]).abs().max() > 0.5
    torch.testing.assert_close(slices[1:] - slices[:-1], torch.ones_like(slices[1:]), atol=1e-3, rtol=0)
    cubes, _, _ = moved_volume(images, CUBES, 1, rotation=30, elastic={"probability": 1, "sigma": 4, "alpha": 30}, flip=0)
    between = cubes[0, 0].movedim(axis, 0)
    assert (between[1:] - between[:-1] - 1).abs().max() > 0.2


def test_thick_slices_are_zoomed_and_shifted_within_themselves():
    at = torch.stack(torch.meshgrid(*[torch.arange(25.0) - 12] * 3, indexing="ij"))
    ball = (at.square().sum(dim=0) < 40).float()[None, None]
    for spacing, axes in ((CUBES, (True, True, True)), (FLAT, (False, True, True))):
        moved = moved_volume(ball, spacing, 0, zoom_probability=1, zoom=(1.4, 1.4))[0][0, 0] > 0.5
        longest = [float((at[axis].abs() * moved).max()) for axis in range(3)]
        assert longest == pytest.approx([8.4 if zoomed else 6 for zoomed in axes], abs=1.1)
        moved = moved_volume(ball, spacing, 1, shift=0.2)[0][0, 0] > 0.5
        middles = [float((at[axis] * moved).sum() / moved.sum()) for axis in range(3)]
        assert [abs(middle) > 0.4 for middle in middles] == list(axes)


@pytest.mark.parametrize("sigma", [1.0, 3.0, 10.0])
def test_the_field_of_a_volume_is_that_of_scipy(sigma):
    size = (12, 30, 21)
    field = volume_displacement(size, sigma, 30.0, None, generator(3))
    uniform = (torch.rand(3, *size, generator=generator(3)) * 2 - 1).double().numpy()
    oracle = scipy.ndimage.gaussian_filter(uniform, (0, sigma, sigma, sigma), mode="constant", truncate=4)
    np.testing.assert_allclose(field.numpy(), 30 * math.sqrt(2 * sigma * math.sqrt(math.pi)) * oracle, atol=1e-4)
    flat = volume_displacement(size, sigma, 30.0, 0, generator(3))
    uniform = (torch.rand(2, 1, *size[1:], generator=generator(3)) * 2 - 1).double().numpy()
    oracle = scipy.ndimage.gaussian_filter(uniform, (0, 0, sigma, sigma), mode="constant", truncate=4)
    np.testing.assert_allclose(flat[1:].numpy(), np.broadcast_to(30 * oracle, (2, *size)), atol=1e-4)
    assert (flat[0] == 0).all()


def test_alpha_means_the_same_in_2d_and_in_3d():
    inner = (..., slice(12, -12), slice(12, -12), slice(12, -12))
    field = volume_displacement((48, 48, 48), 3.0, 30.0, None, generator())[inner]
    assert field.square().mean().sqrt().item() == pytest.approx(30 * math.sqrt(1 / 3) / (6 * math.sqrt(math.pi)), rel=0.1)


def test_a_volume_is_read_where_the_field_says():
    images = volume(20, 24, 22)
    given = {"elastic": {"probability": 1, "sigma": 3, "alpha": 20}}
    moved, _, rms = moved_volume(images, CUBES, 2, **given)
    source = generator(2)
    torch.rand(3, generator=source), torch.rand(1, generator=source), torch.rand(1, generator=source)  # angles, flip, chosen
    field = volume_displacement((20, 24, 22), 3, 20, None, source).double()
    oracle = scipy.ndimage.map_coordinates(
        images[0, 0].double().numpy(), np.mgrid[:20, :24, :22] + field.numpy(), order=1, mode="nearest"
    )
    np.testing.assert_allclose(moved[0, 0].numpy(), oracle, atol=2e-4)
    assert np.abs(oracle - images[0, 0].numpy()).max() > 0.5
    assert rms == pytest.approx(field.square().sum(dim=0).mean().sqrt().item(), rel=1e-5)


def test_flips_of_volumes_are_left_right():
    images = torch.randn(30, 1, 3, 5, 6, generator=generator())
    labels = torch.randint(3, (30, 3, 5, 6), generator=generator()).to(torch.uint8)
    spacing = torch.ones(30, 3)
    moved, moved_labels, _ = augment(images, labels, settings(flip=1), generator(), spacing)
    torch.testing.assert_close(moved, images.flip(4), atol=3e-5, rtol=0)
    assert torch.equal(moved_labels, labels.flip(3))
    half = augment(images, labels, settings(flip=0.5), generator(), spacing)[1]
    assert 5 < sum(torch.equal(one, label.flip(2)) for one, label in zip(half, labels, strict=True)) < 25


def test_volume_and_mask_move_together_and_get_no_new_value():
    at = np.mgrid[:20, :24, :24]
    ball = torch.from_numpy(((at - np.array([9, 14, 10])[:, None, None, None]) ** 2).sum(axis=0) < 49)
    labels = torch.where(ball, IGNORE, 3).to(torch.uint8)[None].repeat(4, 1, 1, 1)
    given = AugmentSettings.model_validate({"rotation": 60, "elastic": {"probability": 1, "sigma": 4, "alpha": 20}})
    spacing = torch.tensor([CUBES, FLAT, (1, 1, 4), (1, 2, 1)])
    images, moved, _ = augment((labels == IGNORE)[:, None].float(), labels, given, generator(), spacing)
    assert set(moved.unique().tolist()) == {3, IGNORE} and (moved != labels).float().mean() > 0.01
    for image, label in zip(images[:, 0], moved.numpy(), strict=True):
        wrong = (image > (image.max() + image.min()) / 2).numpy() != (label == IGNORE)
        inside = label == IGNORE
        border = scipy.ndimage.binary_dilation(inside) & ~scipy.ndimage.binary_erosion(inside)
        assert not (wrong & ~border).any()


def test_augmentation_of_volumes_is_a_function_of_the_generator():
    images, labels = volume(10, 12, 14), torch.zeros(1, 10, 12, 14, dtype=torch.uint8)
    before, spacing = images.clone(), torch.tensor([CUBES])
    first, again, other = (augment(images, labels, AugmentSettings(), generator(seed), spacing)[0] for seed in (4, 4, 5))
    assert torch.equal(first, again) and not torch.equal(first, other) and torch.equal(images, before)
