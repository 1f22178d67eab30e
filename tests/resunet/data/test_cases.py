import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from PIL import Image

from resunet.config import FixedNormalisation, PercentileZScore
from resunet.data.cases import (
    IGNORE,
    Case,
    LoadedCase,
    encode_labels,
    load_cases,
    read_case,
    source_digest,
    take_slice,
)
from resunet.errors import InputError
from resunet.files import files_sha256

CLASSES = {0: "background", 255: "tumour"}


def case(image: Path, mask: Path | None = None) -> Case:
    return Case(id="id", group="group", group_hmac="hmac", group_name="group", part=None, files=(image,), mask=mask)


def several(*files: Path, **changes) -> Case:
    return dataclasses.replace(case(files[0]), files=files, **changes)


def load(image: Path, mask: Path | None = None, **arguments) -> LoadedCase:
    defaults = dict(channels="grey", normalisation=PercentileZScore(), classes=CLASSES if mask else None)
    (loaded,) = load_cases([case(image, mask)], **(defaults | arguments))
    return loaded


@pytest.fixture
def volume(tmp_path):
    """A volume (z, y, x) with a given spacing (z, y, x), and its mask."""

    def make(spacing, shape=(5, 6, 7)) -> tuple[Path, Path, np.ndarray, np.ndarray]:
        random = np.random.default_rng(0)
        values = random.integers(-1000, 3000, shape).astype(np.int16)
        labels = random.choice([0, 255], shape).astype(np.uint8)
        for name, array in (("image.nii", values), ("mask.nii", labels)):
            image = sitk.GetImageFromArray(array)
            image.SetSpacing([float(s) for s in spacing[::-1]])
            sitk.WriteImage(image, str(tmp_path / name))
        return tmp_path / "image.nii", tmp_path / "mask.nii", values, labels

    return make


def png(path: Path, values: np.ndarray) -> Path:
    Image.fromarray(values.astype(np.uint8)).save(path)
    return path


def z_score(values: np.ndarray, low: float, high: float) -> np.ndarray:
    clipped = np.clip(values.astype(np.float64), np.percentile(values, low), np.percentile(values, high))
    return (clipped - clipped.mean()) / clipped.std()


@pytest.mark.parametrize(
    "spacing, axis",
    [((3, 1, 1), 0), ((1, 3, 1), 1), ((1, 1, 3), 2), ((1, 1, 1), 0), ((1, 2, 2), 1)],
)
def test_a_volume_is_sliced_along_its_coarsest_axis_and_put_together_again(volume, spacing, axis):
    image, mask, values, labels = volume(spacing)
    loaded = load(image, mask)
    assert loaded.axis == axis and loaded.size == (5, 6, 7) and loaded.num_slices == (5, 6, 7)[axis]
    normalised = z_score(values, 0.5, 99.5)
    slices = [loaded.image_slice(i) for i in range(loaded.num_slices)]
    for index, found in enumerate(slices):
        assert found.dtype == np.float32
        # from the whole scan: a slice of the normalised volume, not a normalised slice
        np.testing.assert_allclose(found, normalised.take(index, axis)[None], atol=1e-5)
        np.testing.assert_array_equal(loaded.label_slice(index), (labels == 255).take(index, axis))
    np.testing.assert_allclose(loaded.assemble([s[0] for s in slices]), normalised, atol=1e-5)
    np.testing.assert_array_equal(loaded.assemble([loaded.label_slice(i) for i in range(loaded.num_slices)]), loaded.labels)


def test_an_image_is_its_only_slice(tmp_path):
    values = np.random.default_rng(0).integers(0, 255, (6, 8))
    loaded = load(png(tmp_path / "a.png", values), png(tmp_path / "m.png", (values > 99) * 255))
    assert loaded.axis is None and loaded.num_slices == 1 and loaded.size == (6, 8)
    np.testing.assert_allclose(loaded.image_slice(0), z_score(values, 0.5, 99.5)[None], atol=1e-5)
    np.testing.assert_array_equal(loaded.label_slice(0), values > 99)
    np.testing.assert_array_equal(loaded.assemble([loaded.label_slice(0)]), loaded.labels)


@pytest.mark.parametrize("low, high", [(0, 100), (0.5, 99.5), (10, 60)])
def test_normalisation_by_percentiles(volume, low, high):
    image, _, values, _ = volume((1, 1, 1), (6, 20, 22))
    loaded = load(image, normalisation=PercentileZScore(low=low, high=high))
    np.testing.assert_allclose(loaded.image_slice(2)[0], z_score(values, low, high)[2], atol=1e-5)


def test_fixed_normalisation_and_every_channel(tmp_path):
    values = np.random.default_rng(0).integers(0, 60000, (6, 8, 3)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb")
    fixed = FixedNormalisation(kind="fixed", low=1000, high=50000, mean=30000, std=9000)
    found = load(tmp_path / "a.tif", channels="rgb", normalisation=fixed).image_slice(0)
    np.testing.assert_allclose(found, (np.moveaxis(values, -1, 0).clip(1000, 50000) - 30000.0) / 9000, atol=1e-5)
    own = load(tmp_path / "a.tif", channels="rgb").image_slice(0)
    for channel in range(3):
        np.testing.assert_allclose(own[channel], z_score(values[..., channel], 0.5, 99.5), atol=1e-5)


def test_a_scan_keeps_its_dtype_until_it_is_normalised(volume):
    image, _, values, _ = volume((1, 1, 1))
    loaded = load(image)
    assert loaded.values.dtype == np.int16 and loaded.labels is None
    before = loaded.values.copy()
    loaded.image_slice(0)
    np.testing.assert_array_equal(loaded.values, before)
    np.testing.assert_array_equal(loaded.values[0], values)


def test_slices_without_contrast(tmp_path):
    values = np.zeros((3, 4, 5), np.int16)
    values[1, 2, 2] = 7
    sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / "a.nii"))
    loaded = load(tmp_path / "a.nii")
    assert [loaded.is_constant(i) for i in range(3)] == [True, False, True]
    np.testing.assert_array_equal(load(png(tmp_path / "flat.png", np.full((4, 4), 9))).image_slice(0), 0)


def test_a_mask_of_another_size_names_both_sizes(tmp_path):
    image, mask = png(tmp_path / "a.png", np.zeros((6, 8))), png(tmp_path / "m.png", np.zeros((8, 6)))
    with pytest.raises(InputError, match=r"m\.png: the mask is 8×6, its image 6×8"):
        load(image, mask)


def test_a_mask_of_a_volume_of_another_size(volume, tmp_path):
    image, _, _, _ = volume((1, 1, 1))
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 6, 7), np.uint8)), str(tmp_path / "other.nii"))
    with pytest.raises(InputError, match=r"the mask is 4×6×7, its image 5×6×7"):
        load(image, tmp_path / "other.nii")


def test_raw_values_become_class_indices_in_the_order_of_the_recipe():
    mask = np.array([[0, 255, 7], [3, 0, 255]])
    classes = {0: "background", 255: "tumour", 3: "oedema"}
    found = encode_labels(mask, classes, [7], Path("m.png"))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, [[0, 1, IGNORE], [2, 0, 1]])
    np.testing.assert_array_equal(encode_labels(mask - 5, {-5: "b", 250: "t", -2: "o"}, [2], Path("m.png")), found)


def test_values_that_no_class_lists_are_all_listed():
    mask = np.array([[0, 255, 7], [3, 9, 255]])
    with pytest.raises(InputError) as error:
        encode_labels(mask, CLASSES, [9], Path("m.png"))
    assert str(error.value).startswith("m.png: the mask holds the values 3, 7, which data.classes does not list.")
    assert "0: background, 255: tumour" in str(error.value) and "data.ignore" in str(error.value)
    with pytest.raises(InputError, match=r"1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 89 more"):
        encode_labels(np.arange(100), CLASSES, [], Path("m.png"))
    with pytest.raises(InputError, match=r"JPEG changes values when it compresses: write masks as PNG\.$"):
        encode_labels(mask, CLASSES, [9], Path("m.JPG"))


def test_values_that_no_class_lists_are_counted_over_all_masks(tmp_path):
    image = png(tmp_path / "a.png", np.zeros((2, 2)))
    masks = [png(tmp_path / f"m{n}.png", np.array([[0, 255], [n % 3, 255]])) for n in range(6)]
    loading = dict(channels="grey", normalisation=PercentileZScore(), classes=CLASSES)
    with pytest.raises(
        InputError, match=r"m1\.png: .* the value 1, .* In all, 4 of 6 masks hold such values: 1 \(in 2\), 2 \(in 2\)\.$"
    ):
        load_cases([case(image, mask) for mask in masks], **loading)
    with pytest.raises(InputError) as error:
        load_cases([case(image, masks[1]), case(image, masks[0])], **loading)
    assert "In all" not in str(error.value)
    masks[4].write_bytes(b"no image")
    with pytest.raises(InputError, match=r"In all, 3 of 6 masks"):
        load_cases([case(image, mask) for mask in masks], **loading)


@pytest.mark.parametrize(("colour", "lost"), [((9, 9, 9), False), ((9, 9, 8), True)])
def test_colours_that_grey_loses_are_known(tmp_path, colour, lost):
    image = tmp_path / "a.png"
    Image.fromarray(np.array([[[5, 5, 5], colour]], np.uint8)).save(image)
    assert load(image).colour_lost == lost
    assert not load(image, channels="rgb").colour_lost and not load(image, channels=3).colour_lost


def test_ignored_values_in_a_file(tmp_path):
    image = png(tmp_path / "a.png", np.arange(4).reshape(2, 2))
    mask = png(tmp_path / "m.png", np.array([[0, 255], [100, 101]]))
    np.testing.assert_array_equal(load(image, mask, ignore=[100, 101]).labels, [[0, 1], [IGNORE, IGNORE]])


def test_the_first_file_at_fault_is_named(tmp_path):
    good, bad = png(tmp_path / "good.png", np.zeros((4, 4))), tmp_path / "bad.png"
    bad.write_text("no image")
    with pytest.raises(InputError, match=r"bad\.png"):
        load_cases([case(good), case(bad), case(good)], "grey", PercentileZScore())


def test_cases_come_in_their_order_and_progress_sees_each(tmp_path):
    paths = [png(tmp_path / f"{i}.png", np.full((4, 4), i)) for i in range(12)]
    seen = []

    def progress(items, total):
        assert total == 12
        for item in items:
            seen.append(int(item.values[0, 0, 0]))
            yield item

    loaded = load_cases([case(path) for path in paths], "grey", PercentileZScore(), progress=progress)
    assert [one.case.files for one in loaded] == [(path,) for path in paths] and seen == list(range(12))


def test_hashes_of_file_and_pixels(tmp_path):
    values = np.random.default_rng(0).integers(0, 255, (9, 9))
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / "a.png", compress_level=9)
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / "b.png", compress_level=0)
    values[3, 3] += 1
    a, b, c = load(tmp_path / "a.png"), load(tmp_path / "b.png"), load(png(tmp_path / "c.png", values))
    assert a.file_sha256 == hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest() != b.file_sha256
    assert a.pixel_sha256 == b.pixel_sha256 != c.pixel_sha256


def test_equal_bytes_in_another_shape_are_other_pixels(tmp_path):
    values = np.arange(24)
    a, b = load(png(tmp_path / "a.png", values.reshape(4, 6))), load(png(tmp_path / "b.png", values.reshape(6, 4)))
    assert a.pixel_sha256 != b.pixel_sha256


def test_the_digest_of_a_source_is_of_its_images_in_any_order(tmp_path):
    paths = [png(tmp_path / f"{i}.png", np.full((4, 4), i)) for i in range(3)]
    loaded = load_cases([case(path) for path in paths], "grey", PercentileZScore())
    assert source_digest(loaded) == source_digest(loaded[::-1]) != source_digest(loaded[:2])
    assert source_digest(loaded) != source_digest([*loaded, loaded[0]])


def test_take_slice():
    labels = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    np.testing.assert_array_equal(take_slice(labels, 1, 2), labels[:, 2])
    assert take_slice(labels[0], None, 0) is not None and take_slice(labels[0], None, 0).shape == (3, 4)


def test_the_hash_of_the_pixels_is_of_the_file_and_not_of_the_recipe(tmp_path):
    path = png(tmp_path / "a.png", np.arange(16).reshape(4, 4))
    assert load(path, channels="grey").pixel_sha256 == load(path, channels="rgb").pixel_sha256


def nifti(path: Path, values: np.ndarray, spacing=(3, 2, 1)) -> Path:
    image = sitk.GetImageFromArray(values)
    image.SetSpacing([float(s) for s in spacing[::-1]])
    sitk.WriteImage(image, str(path))
    return path


def test_channels_in_files_of_their_own(tmp_path):
    random = np.random.default_rng(0)
    ct, pet = random.integers(-1000, 3000, (3, 4, 5)).astype(np.int16), random.random((3, 4, 5)).astype(np.float32)
    files = nifti(tmp_path / "ct.nii", ct), nifti(tmp_path / "pet.nii", pet)
    (loaded,) = load_cases([several(*files, file_per_channel=True)], 2, PercentileZScore())
    np.testing.assert_array_equal(loaded.values, np.stack([ct.astype(np.float32), pet]))  # exactly
    assert loaded.size == (3, 4, 5) and loaded.spacing == (3, 2, 1) and len(loaded.intensities) == 2
    np.testing.assert_allclose(loaded.image_slice(1)[0], z_score(ct, 0.5, 99.5)[1], atol=1e-5)
    np.testing.assert_allclose(loaded.image_slice(1)[1], z_score(pet, 0.5, 99.5)[1], atol=1e-5)
    one = load(files[0])
    joined = [read_case(several(*order, file_per_channel=True), 2).pixel_sha256 for order in (files, files[::-1])]
    assert len({loaded.pixel_sha256, one.pixel_sha256, joined[1]}) == 3 and joined[0] == loaded.pixel_sha256
    assert loaded.file_sha256 == files_sha256(files)


def test_one_file_a_channel_may_be_one_file(tmp_path):
    path = nifti(tmp_path / "a.nii", np.arange(60, dtype=np.int16).reshape(3, 4, 5))
    one, same = read_case(case(path), 1), read_case(several(path, file_per_channel=True), 1)
    np.testing.assert_array_equal(one.values, same.values)
    assert one.pixel_sha256 == same.pixel_sha256


@pytest.mark.parametrize(
    "shape, spacing, grid",
    [((3, 4, 6), (3, 2, 1), "3×4×6 at 3, 2, 1 mm"), ((3, 4, 5), (3, 2, 1.01), "3×4×5 at 3, 2, 1.01 mm")],
)
def test_channels_of_two_grids(tmp_path, shape, spacing, grid):
    first = nifti(tmp_path / "a.nii", np.zeros((3, 4, 5), np.int16))
    other = nifti(tmp_path / "b.nii", np.zeros(shape, np.int16), spacing)
    with pytest.raises(InputError) as error:
        read_case(several(first, other, file_per_channel=True), 2)
    assert f"b.nii: {grid}; a.nii, the first channel, 3×4×5 at 3, 2, 1 mm." in str(error.value)


def test_spacings_that_differ_by_rounding_are_one_grid(tmp_path):
    files = [nifti(tmp_path / f"{i}.nii", np.zeros((3, 4, 5), np.int16), (3, 2, 1 + 1e-5 * i)) for i in range(2)]
    assert read_case(several(*files, file_per_channel=True), 2).values.shape == (2, 3, 4, 5)


def test_other_channels_than_there_are_files(tmp_path):
    files = [png(tmp_path / f"{i}.png", np.zeros((4, 4))) for i in range(2)]
    for channels, wanted in (("rgb", 3), ("grey", 1), (3, 3)):
        with pytest.raises(
            InputError, match=rf"0\.png and 1 more: 2 channels, .*={channels} wants {wanted}\. Set data\.channels=2"
        ):
            read_case(several(*files, file_per_channel=True), channels)
    colour = tmp_path / "colour.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(colour)
    with pytest.raises(InputError, match=r"colour\.png: has 3 channels; it is one channel of a case"):
        read_case(several(files[0], colour, file_per_channel=True), 2)


def test_a_spacing_beside_the_file_is_the_spacing(tmp_path):
    path = nifti(tmp_path / "a.nii", np.zeros((3, 4, 5), np.int16))
    assert read_case(several(path, spacing=(5.0, 0.5, 0.25)), 1).spacing == (5, 0.5, 0.25)
    with pytest.raises(InputError, match=r"a\.nii: the spacing beside it is 1, 1, the scan has 3 dimensions"):
        read_case(several(path, spacing=(1.0, 1.0)), 1)


def test_a_series_of_slices_is_one_scan(tmp_path):
    values = np.random.default_rng(0).integers(0, 900, (3, 8, 8)).astype(np.int16)
    files = []
    for z, plane in enumerate(values):
        image = sitk.GetImageFromArray(plane[None])
        image.SetSpacing((1, 1, 2))
        tags = {"0020|000e": "1.2.3", "0020|0013": str(z), "0020|0032": f"0\\0\\{2 * z}", "0020|0037": "1\\0\\0\\0\\1\\0"}
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        files.append(tmp_path / f"slice{z}.dcm")
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(files[-1]))
        writer.Execute(image)
    (loaded,) = load_cases([several(*files)], "grey", PercentileZScore())
    np.testing.assert_array_equal(loaded.values[0], values)
    assert loaded.size == (3, 8, 8) and loaded.spacing[0] == 2


def test_the_hash_of_several_files_is_of_their_hashes_in_order(tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"two")
    a, b = (hashlib.sha256(text).hexdigest() for text in (b"one", b"two"))
    assert files_sha256([tmp_path / "a"]) == a
    assert files_sha256([tmp_path / "a", tmp_path / "b"]) == hashlib.sha256((a + b).encode()).hexdigest()


def test_where_a_case_is(tmp_path):
    assert case(tmp_path / "a.png").where() == str(tmp_path / "a.png")
    assert several(tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png").where() == f"{tmp_path / 'a.png'} and 2 more"
