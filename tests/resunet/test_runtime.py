import subprocess
import sys

import numpy as np
import pytest
from scipy import ndimage

from resunet.runtime import (
    Intensity,
    ObjectRule,
    normalise,
    percentile_intensity,
    percentiles,
    remove_objects,
    slice_axis,
)


def oracle(channel: np.ndarray, low: float, high: float) -> np.ndarray:
    values = channel.astype(np.float64)
    ordered = np.sort(values.ravel())

    def percentile(q):  # linear between the two nearest ranks
        rank = q / 100 * (len(ordered) - 1)
        below = int(np.floor(rank))
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (rank - below) * (ordered[above] - ordered[below])

    clipped = np.minimum(np.maximum(values, percentile(low)), percentile(high))
    mean = clipped.sum() / clipped.size
    return (clipped - mean) / np.sqrt(((clipped - mean) ** 2).sum() / clipped.size)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 40, 30), (3, 12, 11, 10)])
def test_normalisation_is_the_clipped_z_score_of_each_channel(dtype, shape):
    random = np.random.default_rng(0)
    scale = np.array([40, 60, 30][: shape[0]]).reshape(-1, *[1] * (len(shape) - 1))
    scan = (random.normal(0, 0.5, shape).clip(-2, 2) * scale + 125).astype(dtype)
    found = normalise(scan, percentile_intensity(scan, 0.5, 99.5))
    assert found.dtype == np.float32 and found.shape == shape
    for channel, values in zip(found, scan, strict=True):
        np.testing.assert_allclose(channel, oracle(values, 0.5, 99.5), atol=2e-5)


def test_sixteen_bits_stay_apart():
    scan = np.arange(2**16, dtype=np.uint16).reshape(1, 256, 256)
    assert len(np.unique(normalise(scan, percentile_intensity(scan, 0, 100)))) == 2**16


def test_a_part_is_normalised_like_the_whole():
    scan = np.random.default_rng(1).integers(-1000, 3000, (1, 8, 9, 10), dtype=np.int16)
    intensities = percentile_intensity(scan, 0.5, 99.5)
    whole = normalise(scan, intensities)
    np.testing.assert_array_equal(normalise(scan[:, 3], intensities), whole[:, 3])


def test_fixed_constants():
    found = normalise(np.array([[[-2000, -500, 0, 500, 2000]]], np.int16), [Intensity(-1000, 1000, 100, 200)])
    np.testing.assert_allclose(found, [[[-5.5, -3.0, -0.5, 2.0, 4.5]]])


@pytest.mark.parametrize("value", [0, 255, 0.1, -1e6, 1e-12])
def test_a_constant_channel_becomes_zeros(value):
    scan = np.full((1, 5, 6), value, np.float32)
    np.testing.assert_array_equal(normalise(scan, percentile_intensity(scan, 0.5, 99.5)), 0)


def test_channels_and_intensities_are_as_many():
    with pytest.raises(ValueError, match="zip"):
        normalise(np.zeros((2, 3, 3)), [Intensity(0, 1, 0, 1)])


def test_the_input_is_not_mutated():
    scan = np.random.default_rng(2).normal(size=(1, 9, 9)).astype(np.float32)
    before = scan.copy()
    normalise(scan, percentile_intensity(scan, 10, 90))
    np.testing.assert_array_equal(scan, before)


@pytest.mark.parametrize(
    "spacing, axis",
    [
        ((3.0, 1.0, 1.0), 0),
        ((1.0, 3.0, 1.0), 1),
        ((0.9, 0.9, 1.2), 2),
        ((1.0, 1.0, 1.0), 0),  # ties: superior–inferior
        ((1.0, 2.0, 2.0), 1),
        ((1.0, 1.00001, 0.99999), 0),  # a tie but for rounding in a header
    ],
)
def test_a_volume_is_sliced_along_its_coarsest_axis(spacing, axis):
    assert slice_axis(spacing) == axis


def test_a_product_needs_neither_torch_nor_monai_nor_pydantic():
    code = (
        "import sys, resunet.runtime; "
        "print([m for m in ('torch', 'monai', 'pydantic', 'SimpleITK', 'scipy', 'omegaconf') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.strip() == "[]"


def test_the_unit_of_a_scan_does_not_matter():
    scan = np.random.default_rng(0).normal(1.0, 0.2, (1, 20, 20))
    small = scan * 1e-9
    np.testing.assert_allclose(
        normalise(small, percentile_intensity(small, 0.5, 99.5)),
        normalise(scan, percentile_intensity(scan, 0.5, 99.5)),
        atol=1e-4,
    )


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "int32", "float32", "float64"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7, 5), (1, 257, 257), (1, 256, 258)])
def test_percentiles_are_those_of_numpy(dtype, shape):
    values = np.random.default_rng(2).normal(60, 40, shape).clip(0 if dtype[0] == "u" else -120, 120).astype(dtype)
    wanted = [0, 0.5, 3.3, 25, 50, 99.5, 100]
    before = values.copy()
    np.testing.assert_allclose(percentiles(values, wanted), np.percentile(values, wanted), rtol=1e-6)
    np.testing.assert_array_equal(values, before)
    flipped = values[..., ::-1]  # not in one piece
    np.testing.assert_allclose(percentiles(flipped, wanted), np.percentile(values, wanted), rtol=1e-6)


@pytest.mark.parametrize("shape", [(24, 20), (9, 8, 7)])
@pytest.mark.parametrize("largest_only, smallest", [(False, 1), (False, 3), (True, 1), (True, 4), (True, 10_000)])
def test_objects_are_removed_as_scipy_counts_them(shape, largest_only, smallest):
    """Corners touch in both; the other class and the input stay as they are."""
    for seed in range(4):
        random = np.random.default_rng(seed)
        labels = (random.integers(1, 3, shape) * (random.random(shape) < 0.15)).astype(np.uint8)
        before = labels.copy()
        cleaned = remove_objects(labels, [ObjectRule(2, largest_only, smallest)])
        components, count = ndimage.label(labels == 2, np.ones((3,) * len(shape)))
        sizes = [int((components == number).sum()) for number in range(1, count + 1)]
        wanted = before.copy()
        for number, size in enumerate(sizes, start=1):
            if size < smallest or (largest_only and number != sizes.index(max(sizes)) + 1):
                wanted[components == number] = 0
        assert np.array_equal(labels, before) and count > 3 and cleaned.dtype == np.uint8
        # of objects that are equally large numbering decides, which is not scipy's
        if not largest_only or sizes.count(max(sizes)) == 1:
            assert np.array_equal(cleaned, wanted)
        assert (cleaned > 0).sum() == (wanted > 0).sum()


def test_rules_come_one_after_the_other_and_none_changes_nothing():
    labels = np.array([[1, 1, 0, 2, 0, 1], [0, 0, 0, 2, 2, 0]], np.uint8).T  # not in the order of memory
    assert remove_objects(labels, []) is labels
    both = remove_objects(labels, [ObjectRule(1, True, 1), ObjectRule(2, False, 4)])
    assert both.T.tolist() == [[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
    assert not remove_objects(np.zeros((3, 3), np.uint8), [ObjectRule(1, True, 5)]).any()
