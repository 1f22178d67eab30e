from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.training.patches import PatchSampler
from resunet.data.cases import IGNORE, Case, LoadedCase
from resunet.data.perceptual import look
from resunet.errors import InputError
from resunet.runtime import Intensity


def case(name: str, values: np.ndarray, labels: np.ndarray, spacing: tuple[float, ...] | None = None) -> LoadedCase:
    """A case in memory whose normalised values are its raw ones."""
    return LoadedCase(
        case=Case(name, name, name, name, "pool", files=(), mask=None),
        values=values,
        spacing=spacing or (1.0,) * labels.ndim,
        intensities=[Intensity(-1e9, 1e9, 0, 1)] * values.shape[0],
        labels=labels,
        file_sha256="",
        pixel_sha256="",
        look=look(values),
    )


def numbered(height: int, width: int, name: str = "a") -> LoadedCase:
    """An image whose every pixel is its own position, one pixel of foreground at (3, 5)."""
    values = np.arange(height * width, dtype=np.float32).reshape(1, height, width)
    labels = np.zeros((height, width), np.uint8)
    labels[3, 5] = 1
    return case(name, values, labels)


def test_patches_are_windows_of_the_image_with_the_labels_of_the_same_place():
    whole = numbered(40, 30)
    images, labels, spacing = PatchSampler([whole], (16, 12), 0.5).batch(64, (0, 1))
    assert spacing.tolist() == [[1, 1]] * 64
    assert images.shape == (64, 1, 16, 12) and images.dtype == torch.float32
    assert labels.shape == (64, 16, 12) and labels.dtype == torch.uint8
    starts = set()
    for image, label in zip(images[:, 0].numpy(), labels.numpy(), strict=True):
        y, x = divmod(int(image[0, 0]), 30)
        assert y <= 40 - 16 and x <= 30 - 12
        assert (image == whole.values[0, y : y + 16, x : x + 12]).all()
        assert (label == whole.labels[y : y + 16, x : x + 12]).all()
        starts.add((y, x))
    assert len(starts) > 30


def test_every_place_is_reached():
    images, *_ = PatchSampler([numbered(12, 11)], (8, 8), 0).batch(400, (0,))
    starts = {divmod(int(image[0, 0, 0]), 11) for image in images}
    assert starts == {(y, x) for y in range(5) for x in range(4)}


@pytest.mark.parametrize("share", [0.0, 0.33, 1.0])
def test_the_share_of_patches_on_foreground(share):
    # 1 pixel in 200²: a random 8² patch holds it in about 0.1 % of the cases
    values = np.random.default_rng(0).random((1, 200, 200), np.float32)
    labels = np.zeros((200, 200), np.uint8)
    labels[100, 90] = 2
    _, patches, _ = PatchSampler([case("a", values, labels)], (8, 8), share).batch(600, (3,))
    hit = (patches == 2).any(dim=2).any(dim=1).float().mean().item()
    assert hit == pytest.approx(share, abs=0.07)  # 3.5 standard deviations


def test_a_centred_pixel_lies_in_the_middle_half_where_the_image_allows():
    values = np.random.default_rng(0).random((1, 100, 100), np.float32)
    labels = np.zeros((100, 100), np.uint8)
    labels[50, 60] = 1
    _, patches, _ = PatchSampler([case("a", values, labels)], (16, 16), 1).batch(300, (0,))
    places = np.argwhere(patches.numpy() == 1)[:, 1:]
    assert len(places) == 300
    assert set(places[:, 0]) == set(places[:, 1]) == set(range(4, 12))
    labels[50, 60], labels[0, 99] = 0, 1
    _, corner, _ = PatchSampler([case("a", values, labels)], (16, 16), 1).batch(20, (0,))
    assert (corner[:, 0, 15] == 1).all()


def test_small_images_go_on_with_their_edge_and_are_ignored_there():
    whole = numbered(6, 20)
    images, labels, _ = PatchSampler([whole], (9, 8), 0.5).batch(20, (0,))
    for image, label in zip(images[:, 0].numpy(), labels.numpy(), strict=True):
        x = int(image[1, 0])
        inside = slice(1, 7)  # 3 rows are missing: 1 above, 2 below
        assert (image[inside] == whole.values[0, :, x : x + 8]).all()
        assert (image[0] == image[1]).all() and (image[7:] == image[6]).all()
        assert (label[inside] == whole.labels[:, x : x + 8]).all()
        assert (label[0] == IGNORE).all() and (label[7:] == IGNORE).all()


def test_patches_are_a_function_of_the_entropy():
    sampler = PatchSampler([numbered(40, 30), numbered(50, 50, "b")], (8, 8), 0.33)
    first, again, other = (sampler.batch(6, entropy)[0] for entropy in ((1, 2, 3, 0), (1, 2, 3, 0), (1, 2, 3, 1)))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_slices_without_contrast_are_left_out():
    values = np.random.default_rng(0).random((1, 5, 12, 12), np.float32)
    values[0, 2] = 0.5
    labels = np.zeros((5, 12, 12), np.uint8)
    labels[2] = 1
    labels[4, 0, 0] = 1
    sampler = PatchSampler([case("a", values, labels, (3, 1, 1))], (8, 8), 0.5)
    assert [one.index for one in sampler.units] == [0, 1, 3, 4]
    assert [[one.index for one, _ in holding] for holding in sampler.holding] == [[4]]


@pytest.mark.parametrize("patch", [(8, 8), (8, 8, 8)])
@pytest.mark.parametrize("value", [0, IGNORE])
def test_nothing_but_background_is_refused(patch, value):
    values = np.random.default_rng(0).random((2, 12, 12, 12), np.float32)
    labels = np.full((12, 12, 12), value, np.uint8)
    labels[0, 0] = 0
    with pytest.raises(InputError, match="None of the 2 training cases has a pixel of any class"):
        PatchSampler([case("a", values, labels)] * 2, patch, 1)


@pytest.mark.parametrize("patch", [(4, 4), (1, 4, 4)])
def test_every_class_is_centred_on_as_often_and_then_every_case(patch):
    """A class of one pixel in one case, and one of hundreds in two: half of the patches each."""
    rng = np.random.default_rng(0)
    cases = [case(name, rng.random((1, 3, 30, 30), np.float32), np.zeros((3, 30, 30), np.uint8), (9, 1, 1)) for name in "abc"]
    cases[0].labels[1, 10, 10] = 2
    for one in cases[1:]:
        one.labels[:, 20:, 20:] = 1
    sampler = PatchSampler(cases, patch, 1)
    labels = sampler.batch(800, (0,)).labels.flatten(1)
    assert all(set(one.unique().tolist()) <= {0, 1} or 2 in one for one in labels)
    rare = (labels == 2).any(dim=1).float().mean().item()
    assert rare == pytest.approx(0.5, abs=0.06)  # 3.4 standard deviations; by pixels it would be 1 in 601
    frequent = [one for one, _ in sampler.holding[0]]
    assert Counter(one.case.case.id for one in frequent) == {name: 3 if len(patch) == 2 else 1 for name in "bc"}


@pytest.mark.parametrize("by_object", [False, True])
def test_by_object_a_small_lesion_is_centred_on_as_often_as_a_large_one(by_object):
    labels = np.zeros((64, 64), np.uint8)
    labels[4:24, 4:24] = labels[60, 60] = labels[61, 61] = 1  # 400 pixels, and two that touch at a corner
    labels[40, 40] = 2
    values = np.random.default_rng(0).random((1, 64, 64)).astype(np.float32)
    sampler = PatchSampler([case("a", values, labels)], (8, 8), 1, by_object)
    _, patches, _ = sampler.batch(400, (0,))
    of_first = [patch for patch in patches if (patch == 1).any()]
    small = sum(1 for patch in of_first if (patch == 1).sum() <= 2)
    assert len(of_first) == pytest.approx(200, abs=45), "classes are drawn first, as ever"
    assert (0.35 < small / len(of_first) < 0.65) if by_object else small / len(of_first) < 0.12
    assert torch.equal(patches, sampler.batch(400, (0,)).labels)


def test_objects_of_a_volume_are_found_in_all_directions():
    labels = np.zeros((6, 20, 20), np.uint8)
    labels[0, 0, 0] = labels[1, 1, 1] = 1  # one object, by its corners
    labels[4, 10:16, 10:16] = 1
    values = np.random.default_rng(0).random((1, 6, 20, 20)).astype(np.float32)
    sampler = PatchSampler([case("a", values, labels, (1, 1, 1))], (4, 8, 8), 1, by_object=True)
    assert sorted(len(positions) for _, positions in sampler.holding[0]) == [2, 36]
    assert all((labels[tuple(positions.T)] == 1).all() for _, positions in sampler.holding[0])


def test_positions_are_limited_and_reach_the_whole_class():
    labels = np.zeros((40, 60, 60), np.uint8)
    labels[5:] = 1
    whole = case("a", np.random.default_rng(0).random((1, 40, 60, 60), np.float32), labels, (1, 1, 1))
    ((_, positions),) = PatchSampler([whole], (8, 8, 8), 1).holding[0]
    ((_, again),) = PatchSampler([whole], (8, 8, 8), 1).holding[0]
    assert positions.shape == (10_000, 3) and (positions == again).all() and (labels[tuple(positions.T)] == 1).all()
    assert len(np.unique(positions, axis=0)) == 10_000
    assert positions.mean(axis=0) == pytest.approx([22, 29.5, 29.5], abs=1)  # of 10,000: 0.2 is a standard deviation
    slices = PatchSampler([whole], (8, 8), 1).holding[0]
    assert [len(found) for _, found in slices] == [250] * 35
    small = np.argwhere(labels[:6, :10, :10])
    few = case("b", whole.values[:, :6, :10, :10], labels[:6, :10, :10], (1, 1, 1))
    assert (PatchSampler([few], (8, 8, 8), 1).holding[0][0][1] == small).all()  # few are all kept


def numbered_volume(*size: int, spacing: tuple[float, ...] = (2.0, 1.0, 0.5)) -> LoadedCase:
    values = np.arange(np.prod(size), dtype=np.float32).reshape(1, *size)
    labels = np.zeros(size, np.uint8)
    labels[3, 5, 4] = 1
    return case("v", values, labels, spacing)


def test_patches_of_volumes_are_windows_of_the_volume():
    whole = numbered_volume(12, 20, 15)
    images, labels, spacing = PatchSampler([whole], (8, 16, 10), 0.5).batch(60, (0, 1))
    assert images.shape == (60, 1, 8, 16, 10) and labels.shape == (60, 8, 16, 10) and labels.dtype == torch.uint8
    assert spacing.tolist() == [[2, 1, 0.5]] * 60
    starts = set()
    for image, label in zip(images[:, 0].numpy(), labels.numpy(), strict=True):
        start = np.unravel_index(int(image[0, 0, 0]), whole.size)
        window = tuple(slice(first, first + side) for first, side in zip(start, (8, 16, 10), strict=True))
        assert (image == whole.values[0][window]).all() and (label == whole.labels[window]).all()
        starts.add(start)
    assert len(starts) > 25  # many are at the corner that is centred on


def test_a_short_volume_goes_on_with_its_edge_and_is_ignored_there():
    whole = numbered_volume(5, 20, 15)
    images, labels, _ = PatchSampler([whole], (8, 16, 18), 0.5).batch(10, (0,))
    for image, label in zip(images[:, 0].numpy(), labels.numpy(), strict=True):
        _, y, x = np.unravel_index(int(image[1, 0, 1]), whole.size)
        assert x == 0 and (image[1:6, :, 1:16] == whole.values[0][:, y : y + 16]).all()
        assert (image[0] == image[1]).all() and (image[7] == image[5]).all() and (image[:, :, 17] == image[:, :, 15]).all()
        assert (label[1:6, :, 1:16] == whole.labels[:, y : y + 16]).all()
        assert (label[[0, 6, 7]] == IGNORE).all() and (label[..., [0, 16, 17]] == IGNORE).all()


def test_a_slice_has_the_spacing_of_its_plane():
    whole = numbered_volume(12, 20, 15, spacing=(0.5, 7.0, 1.0))
    images, _, spacing = PatchSampler([whole], (8, 8), 0.5).batch(3, (0,))
    assert spacing.tolist() == [[0.5, 1]] * 3 and images.shape == (3, 1, 8, 8)
    for image in images[:, 0].numpy():
        z, y, x = np.unravel_index(int(image[0, 0]), whole.size)
        assert (image == whole.values[0, z : z + 8, y, x : x + 8]).all()


def test_an_image_is_no_volume():
    with pytest.raises(InputError, match=r"is an image of two dimensions, as are 1 of 2 scans.*model.spatial_dims=2"):
        PatchSampler([numbered_volume(9, 9, 9), with_file(numbered(20, 20))], (8, 8, 8), 0.5)


def with_file(one: LoadedCase) -> LoadedCase:
    return replace(one, case=replace(one.case, files=(Path("a.png"),)))


def test_cases_are_not_changed():
    whole = numbered(6, 6)
    whole.values.flags.writeable = whole.labels.flags.writeable = False
    images, labels, _ = PatchSampler([whole], (8, 8), 0.5).batch(4, (0,))
    images += 1
    labels += 1
    assert (whole.values == np.arange(36).reshape(1, 6, 6)).all()
