import numpy as np
import pytest
import torch

from finetune.patches import PatchSampler
from resunet.data.cases import IGNORE, Case, LoadedCase
from resunet.data.perceptual import look
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
    images, labels = PatchSampler([whole], (16, 12), 0.5).batch(64, (0, 1))
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
    images, _ = PatchSampler([numbered(12, 11)], (8, 8), 0).batch(400, (0,))
    starts = {divmod(int(image[0, 0, 0]), 11) for image in images}
    assert starts == {(y, x) for y in range(5) for x in range(4)}


@pytest.mark.parametrize("share", [0.0, 0.33, 1.0])
def test_the_share_of_patches_on_foreground(share):
    # 1 pixel in 200²: a random 8² patch holds it in about 0.1 % of the cases
    values = np.random.default_rng(0).random((1, 200, 200), np.float32)
    labels = np.zeros((200, 200), np.uint8)
    labels[100, 90] = 2
    _, patches = PatchSampler([case("a", values, labels)], (8, 8), share).batch(600, (3,))
    hit = (patches == 2).any(dim=2).any(dim=1).float().mean().item()
    assert hit == pytest.approx(share, abs=0.07)  # 3.5 standard deviations


def test_a_centred_pixel_lies_in_the_middle_half_where_the_image_allows():
    values = np.random.default_rng(0).random((1, 100, 100), np.float32)
    labels = np.zeros((100, 100), np.uint8)
    labels[50, 60] = 1
    _, patches = PatchSampler([case("a", values, labels)], (16, 16), 1).batch(300, (0,))
    places = np.argwhere(patches.numpy() == 1)[:, 1:]
    assert len(places) == 300
    assert set(places[:, 0]) == set(places[:, 1]) == set(range(4, 12))
    labels[50, 60], labels[0, 99] = 0, 1
    _, corner = PatchSampler([case("a", values, labels)], (16, 16), 1).batch(20, (0,))
    assert (corner[:, 0, 15] == 1).all()


def test_small_images_go_on_with_their_edge_and_are_ignored_there():
    whole = numbered(6, 20)
    images, labels = PatchSampler([whole], (9, 8), 0.5).batch(20, (0,))
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
    assert [one.index for one in sampler.slices] == [0, 1, 3, 4]
    assert [one.index for one in sampler.with_foreground] == [4]


def test_ignored_pixels_are_no_foreground():
    values = np.random.default_rng(0).random((1, 12, 12), np.float32)
    labels = np.full((12, 12), IGNORE, np.uint8)
    labels[0, 0] = 0
    assert PatchSampler([case("a", values, labels)], (8, 8), 1).with_foreground == []


def test_no_foreground_at_all_works():
    values = np.random.default_rng(0).random((2, 12, 12), np.float32)
    images, labels = PatchSampler([case("a", values, np.zeros((12, 12), np.uint8))], (8, 8), 1).batch(4, (0,))
    assert images.shape == (4, 2, 8, 8) and (labels == 0).all()


def test_cases_are_not_changed():
    whole = numbered(6, 6)
    whole.values.flags.writeable = whole.labels.flags.writeable = False
    images, labels = PatchSampler([whole], (8, 8), 0.5).batch(4, (0,))
    images += 1
    labels += 1
    assert (whole.values == np.arange(36).reshape(1, 6, 6)).all()
