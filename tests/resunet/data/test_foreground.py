import json

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from resunet.data.foreground import ForegroundMap, foreground_corner, foreground_map

SIZE = (48, 128, 128)
BLOCK = 8


def ellipsoid(size: tuple[int, ...] = SIZE, radius: float = 0.7) -> np.ndarray:
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in size], indexing="ij")
    return sum((axis / radius) ** 2 for axis in axes) < 1


def share_in_blocks(content: np.ndarray, block: int = BLOCK) -> np.ndarray:
    """By a loop over the blocks, how much of each is content."""
    grid = tuple(-(-n // block) for n in content.shape)
    shares = np.empty(grid)
    for where in np.ndindex(*grid):
        shares[where] = content[tuple(slice(i * block, (i + 1) * block) for i in where)].mean()
    return shares


def assert_finds(values: np.ndarray, content: np.ndarray, block: int = BLOCK) -> None:
    """Every block with half content or more is foreground, of those without any at most one in a hundred."""
    mask, shares = foreground_map(values, block).mask, share_in_blocks(content, block)
    assert mask.shape == shares.shape
    assert mask[shares >= 0.5].all()
    assert mask[shares == 0].mean() <= 0.01


def ct(noise: float = 15, lungs: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(1, z, y, x) in Hounsfield units, −2000 outside the field of view, and where the body is."""
    rng = np.random.default_rng(0)
    body = ellipsoid()
    values = np.where(body, 40 + 60 * gaussian_filter(rng.normal(size=SIZE), 3) / 0.03, -1000.0)
    if lungs:
        lung = ellipsoid(radius=0.35)
        values[lung] = rng.normal(-750, 100, int(lung.sum()))
    values += rng.normal(0, noise, SIZE)
    y, x = np.ogrid[-1:1:128j, -1:1:128j]
    values = np.where(y**2 + x**2 < 1.05, values, -2000)
    return values.round().astype(np.int16)[None], body


def mri(sigma: float = 15, offset: float = 300) -> tuple[np.ndarray, np.ndarray]:
    """Rician noise around a head."""
    rng = np.random.default_rng(1)
    head = ellipsoid()
    signal = np.where(head, offset + 80 * gaussian_filter(rng.normal(size=SIZE), 2) / 0.05, 0).clip(0)
    return np.hypot(signal + rng.normal(0, sigma, SIZE), rng.normal(0, sigma, SIZE)).astype(np.uint16)[None], head


@pytest.mark.parametrize("noise", [0, 5, 30])
@pytest.mark.parametrize("lungs", [False, True])
def test_ct_with_air_and_padding(noise, lungs):
    assert_finds(*ct(noise, lungs))


def test_ct_without_padding():
    values, body = ct()
    assert_finds(values.clip(-1024), body)


def test_mri_with_noise():
    assert_finds(*mri())
    values, head = mri()
    assert_finds(values.astype(np.float32) * 1e-4, head)


def test_skull_stripped_mri_of_several_channels():
    values, head = mri()
    stripped = np.where(head, values, 0)
    assert_finds(np.concatenate([stripped, stripped * 7, np.zeros_like(values)]), head)


@pytest.mark.parametrize("noise", [0, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_bright_background(noise, channels):
    rng = np.random.default_rng(2)
    content = ellipsoid((200, 200), 0.5)
    values = np.where(content, rng.normal(120, 30, content.shape), 240 + rng.normal(0, noise, content.shape))
    assert_finds(np.repeat(values.clip(0, 255).astype(np.uint8)[None], channels, axis=0), content)


@pytest.mark.parametrize(("background", "value"), [(10, 200), (245, 40)])
def test_a_small_object_is_found(background, value):
    noise = np.random.default_rng(2).integers(-2, 3, (1, 512, 512))
    values = (background + noise).astype(np.uint8)
    values[0, 200:260, 300:360] = value
    assert_finds(values, values[0] == value, 16)


def texture(**extra: float) -> np.ndarray:
    rng = np.random.default_rng(3)
    return rng.normal(120, 20, (256, 256)) + np.linspace(-extra.get("gradient", 0), extra.get("gradient", 0), 256)


@pytest.mark.parametrize(
    "values",
    [
        texture(),
        texture(gradient=60),
        np.where(ellipsoid((256, 256), 0.2), 250, texture() * 0.1 + 90),  # a bright defect on a plate that is no background
        np.where(ellipsoid((256, 256), 0.2), 20, texture() * 0.1 + 140),  # a dark one
        np.where(ellipsoid((256, 256), 0.2), 20, texture()),
        np.where(ellipsoid((256, 256), 0.6), 5, texture()),  # a dark hole that does not reach the border
        gaussian_filter(texture() * 10, 8),
        np.full((256, 256), 7.0),
        np.where(np.arange(256 * 256).reshape(256, 256) == 0, 200, 10),  # one bright pixel
        np.tile(np.linspace(0, 255, 256), (256, 1)),
    ],
)
def test_everything_is_foreground_where_there_is_no_background(values):
    assert foreground_map(values.clip(0, 255).astype(np.uint8)[None], 16).mask.all()


def test_tissue_between_fat_and_bone_is_no_background():
    rng = np.random.default_rng(4)
    y, x = np.mgrid[:256, :256]
    values = np.where((y // 64 + x // 64) % 4 == 0, -100, np.where((y // 64 + x // 64) % 4 == 2, 60, 700 + 150 * np.sin(x / 9)))
    assert foreground_map((np.where(y < 170, 60, values) + rng.normal(0, 8, values.shape))[None], 16).mask.all()


def test_a_scan_cropped_to_the_organ_is_all_foreground():
    values, _ = mri(offset=600)
    assert foreground_map(values[:, 16:32, 44:84, 44:84], BLOCK).mask.all()


def test_values_are_not_changed_and_the_map_is_the_same_each_time():
    values, _ = mri()
    before = values.copy()
    first, second = foreground_map(values, BLOCK), foreground_map(values, BLOCK)
    assert (values == before).all() and (first.mask == second.mask).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (7, 5), (33, 1, 70), (1, 1, 1)])
@pytest.mark.parametrize("block", [1, 16])
def test_small_and_thin_scans(size, block):
    found = foreground_map(np.random.default_rng(0).normal(size=(2, *size)), block)
    assert found.mask.shape == tuple(-(-n // min(block, n)) for n in size)
    assert found.mask.any()


def test_a_block_may_differ_along_the_axes():
    values, head = mri()
    found = foreground_map(values, (1, 16, 16))
    assert found.mask.shape == (48, 8, 8)
    empty = ~head.any(axis=(1, 2))
    assert empty.any() and not found.mask[empty].any()


def test_facts_come_back():
    values, _ = mri()
    found = foreground_map(values, (4, 16, 32))
    again = ForegroundMap.from_facts(json.loads(json.dumps(found.facts())))
    assert (again.block, again.size) == (found.block, found.size)
    assert (again.mask == found.mask).all()


def test_usable_slices():
    mask = np.zeros((4, 3, 3), bool)
    mask[1] = True
    mask[2, 0, 0] = True
    found = ForegroundMap(mask, (5, 2, 2), (18, 6, 6))
    assert found.usable_slices(0).tolist() == list(range(5, 15))
    assert found.usable_slices(0, share=0.2).tolist() == list(range(5, 10))
    assert found.usable_slices(1).tolist() == list(range(6))
    mask = np.zeros((4, 1, 1), bool)
    mask[3] = True
    assert ForegroundMap(mask, (5, 2, 2), (18, 2, 2)).usable_slices(0).tolist() == [15, 16, 17]


def test_the_map_of_a_slice():
    values, _ = mri()
    found = foreground_map(values, (4, 8, 16))
    for axis, index in ((0, 23), (1, 64), (2, 127)):
        part = found.slice(axis, index)
        assert (part.mask == np.take(found.mask, index // found.block[axis], axis)).all()
        assert part.size == tuple(np.delete(found.size, axis)) and part.block == tuple(np.delete(found.block, axis))


def test_corners_are_around_foreground_and_inside():
    mask = np.zeros((6, 8), bool)
    mask[2, 3] = mask[5, 7] = mask[0, 0] = True
    found = ForegroundMap(mask, (10, 10), (55, 80))
    rng = np.random.default_rng(0)
    seen, last = np.zeros(mask.shape, int), 0
    for _ in range(3000):
        y, x = foreground_corner(rng, found, (1, 1))
        assert mask[y // 10, x // 10] and y < 55
        seen[y // 10, x // 10] += 1
        last += y == 54
    assert last < 300  # a fifth of the third in the block that is cut to five rows
    assert (abs(seen[mask] - 1000) < 5 * np.sqrt(1000 * 2 / 3)).all()  # uniform: within five standard deviations
    for _ in range(300):
        y, x = foreground_corner(rng, found, (20, 30))
        assert 0 <= y <= 35 and 0 <= x <= 50
        centre = (y + 10) // 10, (x + 15) // 10
        assert mask[centre] or y in (0, 35) or x in (0, 50)


def test_corners_depend_on_the_generator_alone():
    found = foreground_map(mri()[0], BLOCK)
    draws = [[foreground_corner(np.random.default_rng(seed), found, (16, 64, 64)) for seed in range(50)] for _ in range(2)]
    assert draws[0] == draws[1] and len(set(draws[0])) > 40


def test_a_crop_larger_than_the_scan_and_a_map_without_foreground():
    found = ForegroundMap(np.zeros((2, 2), bool), (10, 10), (20, 15))
    corners = {foreground_corner(np.random.default_rng(seed), found, (30, 5)) for seed in range(200)}
    assert {y for y, _ in corners} == {0}
    assert {x for _, x in corners} == set(range(11))
