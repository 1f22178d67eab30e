import io
import itertools

import numpy as np
import pytest
from PIL import Image
from scipy.fft import dctn
from scipy.ndimage import gaussian_filter, zoom

from resunet.data.perceptual import (
    ALONE,
    CORRELATION,
    HASH_BYTES,
    RADIUS,
    SIDE,
    Look,
    correlation,
    correlations,
    find_candidates,
    is_copy,
    look,
    looks,
)


def texture(seed: int, shape: tuple[int, ...] = (96, 120), grain: float = 2.0) -> np.ndarray:
    """Smooth noise in 0–255, (1, *shape): every seed another image of the same kind."""
    values = gaussian_filter(np.random.default_rng(seed).normal(size=shape), grain, mode="wrap")
    return np.rint((values - values.min()) / np.ptp(values) * 255).astype(np.uint8)[None]


def neighbour(seed: int, agreement: float) -> np.ndarray:
    """An image that shares most of another's content, as the next slice does."""
    other = np.sqrt(1 - agreement**2) * (texture(seed + 1000).astype(float) - 128)
    return np.rint(agreement * (texture(seed).astype(float) - 128) + other + 128).clip(0, 255).astype(np.uint8)


def symmetries(image: np.ndarray) -> list[np.ndarray]:
    turned = [np.rot90(image, turns, (1, 2)) for turns in range(4)]
    return turned + [one[:, :, ::-1] for one in turned]


def hashed(*looks: Look) -> np.ndarray:
    return np.stack([np.frombuffer(one.hash, np.uint8) for one in looks])


def distance(one: Look, other: Look) -> float:
    return float(np.linalg.norm(np.subtract(*hashed(one, other).astype(float))))


def agree(one: Look, other: Look) -> bool:
    return bool(is_copy(distance(one, other), correlation(one.thumbnail, other.thumbnail)))


def as_jpeg(image: np.ndarray, quality: int = 75) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image[0]).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))[None]


def resized(image: np.ndarray, share: float = 0.8) -> np.ndarray:
    size = (round(image.shape[2] * share), round(image.shape[1] * share))
    return np.asarray(Image.fromarray(image[0]).resize(size, Image.Resampling.BICUBIC))[None]


def test_looks_together_are_those_of_each_alone():
    """To the byte: a manifest does not depend on which files came together."""
    shapes = [(96, 128), (64, 64), (40, 30), (512, 33), (20, 64, 96), (1, 64, 70)]
    scans = [texture(seed, shape) for seed, shape in enumerate(shapes)]
    scans += [scans[i].astype(np.uint16) * 200 for i in (0, 2)] + [scans[i] / np.float32(7) for i in (1, 2, 4)]
    scans += [np.concatenate([scans[0], scans[0][:, ::-1], 255 - scans[0]]), np.full((1, 64, 64), 7, np.int16)]
    together = looks(scans)
    for scan, one in zip(scans, together, strict=True):
        alone = look(scan)
        assert one.hash == alone.hash and np.array_equal(one.thumbnail, alone.thumbnail)
    assert [one.hash for one in looks(scans[::-1])][::-1] == [one.hash for one in together]


@pytest.mark.parametrize("rows", [32, 64, 512, 544])
def test_parts_of_rows_are_added_exactly(rows):
    image = np.full((1, rows, 32), 255, np.uint8)
    image[0, :, 0] = 0  # not flat; the largest sums that there are beside it
    assert look(image).thumbnail.tolist() == look(image.astype(np.float64)).thumbnail.tolist()


def test_look_has_a_fixed_form():
    image, volume = look(texture(0)), look(texture(0, (20, 30, 40)))
    assert {len(image.hash), len(volume.hash)} == {HASH_BYTES}
    assert image.thumbnail.shape == (1, SIDE, SIDE) and volume.thumbnail.shape == (3, SIDE, SIDE)
    assert image.thumbnail.dtype == np.uint8 and (image.thumbnail.min(), image.thumbnail.max()) == (0, 255)


def test_thumbnail_is_the_area_average():
    image = texture(0, (4 * SIDE, 3 * SIDE))
    means = image.reshape(SIDE, 4, SIDE, 3).mean(axis=(1, 3))
    expected = np.rint((means - means.min()) / np.ptp(means) * 255)
    assert np.abs(look(image).thumbnail[0] - expected).max() <= 1


@pytest.mark.parametrize("size", [(5, 9), (33, 31), (31, 200)])
def test_thumbnail_is_the_area_average_of_sizes_that_do_not_divide(size):
    image = texture(1, size, 1.0)
    fine = image[0].repeat(SIDE, axis=0).repeat(SIDE, axis=1)  # every pixel as a square that divides
    means = fine.reshape(SIDE, size[0], SIDE, size[1]).mean(axis=(1, 3))
    expected = np.rint((means - means.min()) / np.ptp(means) * 255)
    assert np.abs(look(image).thumbnail[0] - expected).max() <= 1


def test_large_image_is_averaged_in_blocks():
    image = texture(0, (64, 2**15))  # more than one block of rows
    assert np.abs(look(image).thumbnail.astype(int) - look(image[:, :, ::-1]).thumbnail[:, :, ::-1]).max() <= 1
    means = image.reshape(SIDE, 2, SIDE, -1).mean(axis=(1, 3))
    expected = np.rint((means - means.min()) / np.ptp(means) * 255)
    assert np.abs(look(image).thumbnail[0] - expected).max() <= 1


@pytest.mark.parametrize("size", [(96, 120), (97, 64), (20, 20)])
def test_flips_and_rotations_change_nothing(size):
    image = texture(2, size)
    first, *others = map(look, symmetries(image))
    assert max(distance(first, other) for other in others) <= 3  # rounding of sums in another order
    assert min(correlation(first.thumbnail, other.thumbnail) for other in others) > 0.9999


@pytest.mark.parametrize(
    "changed",
    [
        lambda v: v.astype(np.uint16) * 257,
        lambda v: v.astype(np.int16) * 3 - 1000,
        lambda v: v.astype(np.float32) * 1e-6,
        lambda v: v.astype(np.float32) * np.float32(1e36),
        lambda v: v.astype(np.float64) + 1e7,
        lambda v: v.astype(np.int32) + 10**9,
        lambda v: 255 - v,
        lambda v: np.repeat(v, 3, axis=0),
        lambda v: np.repeat(v, 2, axis=0),
        lambda v: np.asfortranarray(v),
    ],
)
def test_brightness_contrast_and_type_change_nothing(changed):
    image = texture(3)
    assert distance(look(image), look(changed(image))) <= 3
    assert correlation(look(image).thumbnail, look(changed(image)).thumbnail) > 0.9999


def test_colour_and_its_grey_version_look_alike():
    colour = np.concatenate([texture(seed) for seed in (1, 2, 3)])
    grey = np.asarray(Image.fromarray(np.moveaxis(colour, 0, -1)).convert("L"))[None]
    assert distance(look(colour), look(grey)) <= 10  # grey is rounded, and equal weights are 270 away


def test_look_leaves_its_input_alone_and_repeats():
    image = texture(4)
    before = image.copy()
    image.flags.writeable = False
    first, second = look(image), look(image)
    assert (image == before).all()
    assert first.hash == second.hash and (first.thumbnail == second.thumbnail).all()


ATTACKS = {
    "jpeg": as_jpeg,
    "resized": resized,
    "rotated": lambda image: np.rot90(image, 1, (1, 2)),
    "flipped": lambda image: image[:, ::-1],
}


@pytest.mark.parametrize("names", [*itertools.combinations(ATTACKS, 1), *itertools.permutations(ATTACKS, 2)])
def test_copies_are_found_and_look_alikes_are_not(names):
    originals = [look(texture(seed)) for seed in range(12)]
    copies = []
    for seed in range(12):
        image = texture(seed)
        for name in names:
            image = np.ascontiguousarray(ATTACKS[name](image))
        copies.append(look(image))
    alike = [look(neighbour(seed, 0.98)) for seed in range(12)]
    archive = alike + copies
    one, other, length = find_candidates(hashed(*archive), hashed(*originals))
    verified = correlations([archive[i].thumbnail for i in one], [originals[j].thumbnail for j in other])
    expected = {(12 + seed, seed) for seed in range(12)}
    near = set(zip(one.tolist(), other.tolist(), strict=True))
    assert near > expected  # some look-alikes are near enough to be looked at
    for found in (is_copy(length, verified), is_copy(length, None)):
        assert set(zip(one[found].tolist(), other[found].tolist(), strict=True)) == expected


@pytest.mark.parametrize(
    "flat",
    [
        np.zeros((1, 40, 40), np.uint8),
        np.full((1, 40, 40), 1000, np.uint16),
        np.full((1, 40, 40), 0.1, np.float32),
        np.full((1, 37, 41), 1 / 3, np.float64),
        np.full((3, 40, 50), 77, np.uint8),
        np.full((1, 9, 11, 13), 5, np.int16),
        np.random.default_rng(0).integers(0, 2, (1, 256, 256)).astype(np.uint8),  # noise of the last bit
    ],
    ids=["black", "grey", "float32", "float64", "colour", "volume", "noise"],
)
def test_flat_images_are_never_accused(flat):
    seen = look(flat)
    assert seen.hash == bytes(HASH_BYTES) and not seen.thumbnail.any()
    assert len(find_candidates(hashed(seen, look(texture(0))), hashed(seen, seen))[0]) == 0
    assert correlation(seen.thumbnail, seen.thumbnail) == 0


def test_dark_images_with_content_are_not_flat():
    dark = (texture(5, grain=4.0) // 16).astype(np.uint8)
    assert agree(look(dark), look(dark[:, ::-1]))


@pytest.mark.parametrize("size", [(20, 30, 40), (21, 33, 17), (2, 24, 24)])
def test_flips_and_axes_of_a_volume_change_nothing(size):
    volume = texture(6, size)
    first = look(volume)
    for axes in itertools.permutations((1, 2, 3)):
        turned = volume.transpose(0, *axes)
        for flipped in (turned, turned[:, ::-1], turned[:, ::-1, ::-1], turned[:, :, :, ::-1]):
            other = look(flipped)
            assert distance(first, other) <= 3
            assert correlation(first.thumbnail, other.thumbnail) > 0.999


@pytest.mark.parametrize("size", [9, 10, 11])
def test_planes_of_a_volume_average_its_middle_third(size):
    volume = texture(8, (size, SIDE, 2 * SIDE), 1.5)
    third = np.repeat(volume, 3, axis=1)[:, size : 2 * size].mean(axis=1, keepdims=True)  # every slice as three
    assert (look(volume).thumbnail[0] == look(third[:, 0]).thumbnail[0]).all()


def test_volume_copies_are_found_and_others_are_not():
    volumes = [texture(seed, (24, 32, 40), 3.0) for seed in range(5)]
    small = [zoom(volume[0].astype(np.float32), 0.8, order=1, mode="nearest", grid_mode=True)[None] for volume in volumes]
    for (i, volume), (j, copy) in itertools.product(enumerate(volumes), enumerate(small)):
        assert agree(look(volume), look(copy)) == (i == j)


def test_volume_of_one_slice_is_an_image():
    image = texture(7)
    for axis in (1, 2, 3):
        one = look(np.expand_dims(image, axis))
        assert one.hash == look(image).hash and one.thumbnail.shape == (1, SIDE, SIDE)


def naive_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's, of spectra times √frequency up to 19 half-waves, over eight turned thumbnails."""
    rows, columns = np.mgrid[:20, :20]

    def spectrum(square: np.ndarray) -> np.ndarray:
        kept = dctn(square.astype(float), norm="ortho")[:20, :20] * np.hypot(rows, columns) ** 0.5
        return kept.ravel() / np.linalg.norm(kept)

    return max(abs(float(spectrum(one[0]) @ spectrum(turned[0]))) for turned in symmetries(other))


def test_correlation_equals_the_definition():
    for seed in range(5):
        one, other = look(texture(seed)).thumbnail, look(neighbour(seed, 0.7)[:, ::-1]).thumbnail
        assert 0.2 < correlation(one, other) < 0.95
        assert correlation(one, other) == pytest.approx(naive_correlation(one, other), abs=1e-9)


def test_correlations_of_many_equal_those_of_one():
    images = [look(texture(seed)).thumbnail for seed in range(4)]
    volumes = [look(texture(seed, (12, 14, 16))).thumbnail for seed in range(3)]
    ones = [*images, *volumes, images[0]]
    others = [*reversed(images), *volumes, volumes[0]]
    together = correlations(ones, others)
    assert together.tolist() == pytest.approx([correlation(*pair) for pair in zip(ones, others, strict=True)], abs=1e-12)
    assert together[4:7] == pytest.approx(1) and together[7] == 0  # an image and a volume
    assert (correlations([one.tobytes() for one in ones], [other.tobytes() for other in others]) == together).all()
    assert correlations([], []).shape == (0,)


def test_is_copy_needs_both_or_a_shorter_distance():
    assert is_copy(RADIUS, CORRELATION) and not is_copy(RADIUS + 1, 1.0) and not is_copy(0.0, CORRELATION - 0.001)
    assert is_copy(ALONE, None) and not is_copy(ALONE + 1, None)
    assert is_copy(np.array([1.0, 99.0, 101.0]), np.array([0.5, 0.999, 1.0])).tolist() == [False, True, False]
    assert is_copy(np.array([1.0, 99.0]), None).tolist() == [True, False]
