import math

import numpy as np
import pytest
from scipy import ndimage

from finetune.evaluation.surface import SurfaceMeasures, compare_surfaces, diagonal

SHAPES = [((17, 14), (1.0, 1.0)), ((17, 14), (0.4, 1.7)), ((7, 12, 11), (5.0, 1.0, 1.0)), ((9, 8, 7), (1.0, 0.7, 2.5))]
MISSED = 99.0


def blobs(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5)
    return noise > np.quantile(noise, 0.8)


def compare(truth, prediction, spacing, tolerance: float = 1.0, evaluated=None) -> SurfaceMeasures:
    return compare_surfaces(truth, prediction, evaluated, spacing, tolerance, MISSED)


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # MONAI of itself
@pytest.mark.parametrize("shape, spacing", SHAPES)
def test_hd95_and_surface_dice_are_those_of_monai(shape, spacing):
    import torch  # here, because MONAI takes seconds to import
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    for seed in range(6):
        truth = blobs(seed, shape)
        prediction = blobs(seed + 100, shape) if seed % 2 else truth ^ (np.random.default_rng(seed).random(shape) < 0.02)
        pair = [torch.from_numpy(mask[None, None]) for mask in (prediction, truth)]
        options = dict(include_background=True, spacing=list(spacing))
        for tolerance in (0.5, 1.0, 2.0):
            ours = compare(truth, prediction, spacing, tolerance)
            assert ours.surface_dice == pytest.approx(float(compute_surface_dice(*pair, [tolerance], **options)), abs=1e-6)
        assert ours.hd95 == pytest.approx(float(compute_hausdorff_distance(*pair, percentile=95, **options)), rel=1e-5)


@pytest.mark.parametrize("shape, spacing", SHAPES)
def test_distances_are_those_of_a_distance_map(shape, spacing):
    """scipy's erosion and distance transform: the definition, slowly."""
    cross = ndimage.generate_binary_structure(len(shape), 1)
    for seed in range(6):
        masks = blobs(seed, shape), blobs(seed + 50, shape)
        surfaces = [mask & ~ndimage.binary_erosion(mask, cross) for mask in masks]
        maps = [ndimage.distance_transform_edt(~surface, sampling=spacing) for surface in surfaces]
        distances = maps[1][surfaces[0]], maps[0][surfaces[1]]
        ours = compare(*masks, spacing, 1.5)
        assert ours.hd95 == pytest.approx(max(np.percentile(one, 95) for one in distances))
        assert ours.surface_dice == pytest.approx(np.mean(np.concatenate(distances) <= 1.5 + 1e-9))


def test_what_monai_leaves_undefined_has_a_value():
    """MONAI: HD95 NaN for both, which then leaves the mean; surface Dice 0 for both, NaN where both are empty, as here."""
    empty, dot = np.zeros((5, 6), bool), np.zeros((5, 6), bool)
    dot[2, 3] = True
    assert compare(empty, empty, (1, 1)) == SurfaceMeasures(None, None)
    assert compare(dot, empty, (1, 1)) == compare(empty, dot, (1, 1)) == SurfaceMeasures(MISSED, 0.0)
    assert compare(dot, dot, (1, 1)) == SurfaceMeasures(0.0, 1.0)


def test_anisotropic_spacing():
    truth, prediction = np.zeros((2, 9, 9, 9), bool)
    truth[4, 4, 4] = prediction[5, 4, 4] = True
    assert compare(truth, prediction, (5, 1, 1)) == SurfaceMeasures(5.0, 0.0)
    assert compare(truth, prediction, (1, 1, 5)) == SurfaceMeasures(1.0, 1.0)
    prediction[:] = False
    prediction[5, 6, 7] = True
    assert compare(truth, prediction, (5, 1, 0.5)).hd95 == pytest.approx(math.sqrt(25 + 4 + 2.25))


def test_the_tolerance_is_included_whatever_rounding_does():
    truth, prediction = np.zeros((2, 1, 12), bool)
    truth[0, 4] = prediction[0, 7] = True
    assert 7 * 0.1 - 4 * 0.1 != 0.3
    assert compare(truth, prediction, (1, 0.1), 0.3).surface_dice == 1
    assert compare(truth, prediction, (1, 0.1), 0.29).surface_dice == 0


def test_the_border_of_the_image_is_a_surface():
    full = np.ones((4, 5), bool)
    inner = full.copy()
    inner[[0, -1]] = inner[:, [0, -1]] = False
    ours = compare(full, inner, (1, 1), 0.5)
    assert ours.hd95 == pytest.approx(math.sqrt(2)) and ours.surface_dice == 0  # corners
    assert compare(full, full, (1, 1)) == SurfaceMeasures(0.0, 1.0)


def test_no_surface_beside_ignored_voxels():
    """Where nobody labelled, nobody said that the object ends: a shared cut is no agreement."""
    truth, prediction, evaluated = np.zeros((6, 12), bool), np.zeros((6, 12), bool), np.ones((6, 12), bool)
    evaluated[:, 6:] = False
    truth[2:4, 2:6] = prediction[2:4, 4:6] = True
    cut = compare(truth, prediction, (1, 1), 0.5, evaluated)
    whole = compare(truth, prediction, (1, 1), 0.5)
    # surfaces are all voxels: 8 and 4. The whole lot: 4 + 4 of 12 agree. Nothing changes but for voxels inside otherwise
    assert cut == whole == SurfaceMeasures(2.0, 8 / 12)
    truth[1:5, 2:6] = prediction[1:5, 3:6] = True  # (2..3, 3..5) are now inside but for the cut at column 6
    cut, whole = (compare(truth, prediction, (1, 1), 0.5, known) for known in (evaluated, None))
    assert cut.surface_dice == pytest.approx((6 + 6) / (10 + 8)) and whole.surface_dice == pytest.approx((8 + 8) / (12 + 10))


def test_a_truth_whose_ends_nobody_knows_is_left_out():
    truth, evaluated = np.zeros((6, 6), bool), np.zeros((6, 6), bool)
    truth[2:4, 2:4] = evaluated[2:4, 2:4] = True
    assert compare(truth, truth, (1, 1), evaluated=evaluated) == SurfaceMeasures(None, None)
    assert compare(truth, np.zeros_like(truth), (1, 1), evaluated=evaluated) == SurfaceMeasures(None, None)
    assert compare(np.zeros_like(truth), truth, (1, 1), evaluated=evaluated) == SurfaceMeasures(MISSED, 0.0)


def test_the_diagonal_is_longer_than_any_distance():
    assert diagonal((3, 4), (1, 1)) == 5 and diagonal((2, 3, 6), (1, 2, 0.5)) == math.sqrt(4 + 36 + 9)
    truth, prediction = np.zeros((2, 3, 4, 5), bool)
    truth[0, 0, 0] = prediction[-1, -1, -1] = True
    assert compare(truth, prediction, (5, 1, 1)).hd95 < diagonal(truth.shape, (5, 1, 1))
