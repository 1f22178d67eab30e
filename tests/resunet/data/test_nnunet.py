import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from PIL import Image

from resunet.config import DataSettings, PercentileZScore
from resunet.data.cases import load_cases
from resunet.data.source import assign_parts, open_source
from resunet.data.splits import write_splits
from resunet.errors import InputError

LABELS = {"background": 0, "core": 1, "edema": 2}
CLASSES = {0: "background", 1: "core", 2: "edema"}


def volume(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-500, 500, (3, 4, 5)).astype(np.int16)


def put(path: Path, values: np.ndarray, spacing=(2, 1, 1)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(values)
    image.SetSpacing([float(s) for s in spacing[::-1]])
    sitk.WriteImage(image, str(path))


def describe(root: Path, **changes) -> None:
    """dataset.json of two channels; None takes a key out."""
    values = {"channel_names": {"0": "T1", "1": "T2"}, "labels": LABELS, "numTraining": 10, "file_ending": ".nii.gz"}
    kept = {key: value for key, value in (values | changes).items() if value is not None}
    (root / "dataset.json").write_text(json.dumps(kept))


@pytest.fixture
def root(tmp_path) -> Path:
    """Ten training and three test cases of two channels, with masks."""
    root = tmp_path / "Dataset001_Brain"
    for number in range(13):
        part = "Tr" if number < 10 else "Ts"
        for channel in range(2):
            put(root / f"images{part}" / f"b_{number:02}_{channel:04}.nii.gz", volume(2 * number + channel))
        put(root / f"labels{part}" / f"b_{number:02}.nii.gz", np.full((3, 4, 5), number % 3, np.uint8))
    describe(root)
    (tmp_path / "salt").write_text("ab" * 32)
    return root


def opened(root: Path, masks: bool = True, classes=None, ignore=(), **changes):
    values = dict(source=root, salt_file=root.parent / "salt", channels=2, names="keep") | changes
    return open_source(DataSettings(**values), masks, classes, ignore)


def fault(root: Path, masks: bool = True, classes=None, ignore=(), **changes) -> str:
    with pytest.raises(InputError) as error:
        opened(root, masks, classes, ignore, **changes)
    return str(error.value)


def parts(source) -> dict[str, set[str]]:
    return {part: set(stems) for part, stems in source.stems().items()}


def test_a_data_set_is_listed_by_case(root):
    source = opened(root)
    assert [case.id for case in source.cases] == [f"b_{number:02}" for number in range(13)]
    assert [file.name for file in source.cases[3].files] == ["b_03_0000.nii.gz", "b_03_0001.nii.gz"]
    assert source.cases[3].mask == root / "labelsTr" / "b_03.nii.gz"
    assert source.cases[11].mask == root / "labelsTs" / "b_11.nii.gz"
    assert source.labelled and not source.has_groups
    assert {case.mask for case in opened(root, masks=False).cases} == {None}


def test_channels_are_read_in_their_order_beside_the_mask(root):
    loaded = load_cases(opened(root).cases[:4], 2, PercentileZScore(), CLASSES)
    for number, case in enumerate(loaded):
        np.testing.assert_array_equal(case.values, [volume(2 * number), volume(2 * number + 1)])
        assert case.values.dtype == np.int16 and case.spacing == (2, 1, 1)
        assert (case.labels == number % 3).all()


def test_test_cases_are_the_test_part_and_the_rest_is_split(root):
    source = opened(root)
    assert source.has_splits and source.open_parts == ("pool", "val")
    assert parts(source)["test"] == {"b_10", "b_11", "b_12"} and not parts(source)["pool"]
    assert any("imagesTs is the test part" in note for note in source.notes())
    assigned = assign_parts(source, 0)
    assert parts(assigned)["test"] == {"b_10", "b_11", "b_12"}
    assert (len(parts(assigned)["pool"]), len(parts(assigned)["val"])) == (9, 1)
    assert assign_parts(opened(root, masks=False), 0).stems() == assigned.stems()
    assert len({tuple(assign_parts(source, seed).stems()["val"]) for seed in range(9)}) > 1


def test_without_test_masks_training_cases_are_split_in_three(root):
    for path in (root / "labelsTs").iterdir():
        path.unlink()
    labelled = opened(root)
    assert len(labelled.cases) == 10 and not labelled.has_splits
    assert "3 cases have no mask: they are left out." in labelled.notes()
    pretrained = assign_parts(opened(root, masks=False), 0)
    assigned = assign_parts(labelled, 0)
    assert all(parts(assigned).values()) and parts(assigned)["pool"] == parts(pretrained)["pool"]
    assert parts(pretrained)["test"] == parts(assigned)["test"] | {"b_10", "b_11", "b_12"}


def test_without_any_masks_training_cases_are_the_pool(root):
    for folder in ("labelsTr", "labelsTs"):
        for path in (root / folder).iterdir():
            path.unlink()
    source = opened(root, masks=False)
    assert not source.labelled and assign_parts(source, 0) is source
    assert len(source.part("pool")) == 10 and len(source.part("test")) == 3
    assert "10 training or listed cases without a mask" in fault(root)


def test_groups_stay_whole(root):
    (root / "groups.csv").write_text("stem,group\n" + "".join(f"b_{i:02},g{i // 2}\n" for i in range(13)))
    source = assign_parts(opened(root), 0)
    assert source.has_groups and [len(source.part(part)) for part in ("pool", "val", "test")] == [8, 2, 3]
    rows = "".join(f"b_{i:02},g{i // 2},{i}\n" for i in range(13))
    (root / "groups.csv").write_text("stem,group,position\n" + rows)
    assert [case.position for case in opened(root).cases] == [0, 1] * 6 + [None]
    (root / "groups.csv").write_text("stem,group\n" + "".join(f"b_{i:02},g{i // 4}\n" for i in range(13)))
    assert "'g2' in imagesTr and imagesTs" in fault(root)


def test_a_split_beside_it_is_the_split(root):
    lists = {"pool": ["b_00", "b_10"], "val": ["b_01"], "test": ["b_02"]}
    write_splits(root / "splits.json", lists)
    source = opened(root)
    assert source.stems() == lists and source.open_parts == ()
    assert any("9 of the images in no part" in note for note in source.notes())
    (root / "labelsTs" / "b_10.nii.gz").unlink()
    assert "1 training or listed cases without a mask: b_10" in fault(root)


def test_an_assigned_split_written_down_is_the_same_split(root):
    assigned = assign_parts(opened(root), 3)
    write_splits(root / "splits.json", assigned.stems())
    assert assign_parts(opened(root), 0).stems() == assigned.stems()


def test_masks_and_images_belong_together(root):
    (root / "labelsTr" / "b_03.nii.gz").rename(root / "labelsTr" / "b_33.nii.gz")
    assert "labelsTr: 1 masks without an image: b_33" in fault(root)
    (root / "labelsTr" / "b_33.nii.gz").unlink()
    assert "1 training or listed cases without a mask: b_03" in fault(root)


def test_a_case_needs_all_its_channels(root):
    (root / "imagesTr" / "b_03_0001.nii.gz").rename(root / "imagesTr" / "b_03_0002.nii.gz")
    assert "imagesTr: 1 cases without exactly the channels _0000, _0001: b_03" in fault(root)


def test_a_file_without_a_channel(root):
    (root / "imagesTr" / "b_03_0001.nii.gz").rename(root / "imagesTr" / "other.nii.gz")
    assert "1 files whose name does not end in a channel (_0000): other.nii.gz" in fault(root)


def test_hidden_and_other_files_are_passed_over(root):
    (root / "imagesTr" / "._b_03_0001.nii.gz").write_text("")
    (root / "imagesTr" / "notes.txt").write_text("")
    assert len(opened(root).cases) == 13


def test_one_case_is_not_both_for_training_and_test(root):
    for channel in range(2):
        put(root / "imagesTs" / f"b_03_{channel:04}.nii.gz", volume(0))
    assert "1 cases are both for training and in imagesTs: b_03" in fault(root)


@pytest.mark.parametrize("channels, given", [(1, "grey"), (3, "rgb"), (4, 4)])
def test_other_channels_than_the_recipes(root, channels, given):
    message = fault(root, channels=given)
    assert f"data.channels={given}: " in message and "names 2 channels (0: T1, 1: T2). Set data.channels=2." in message


def test_a_number_of_cases_that_is_not_there(root):
    describe(root, numTraining=11)
    assert "numTraining=11, but there are 10 training cases" in fault(root)
    describe(root, numTraining=None)
    assert len(opened(root).cases) == 13


@pytest.mark.parametrize("key", ["channel_names", "labels", "file_ending"])
def test_a_description_without_a_key(root, key):
    describe(root, **{key: None})
    assert f"  {key}: is required" in fault(root)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"channel_names": {"1": "T1", "2": "T2"}}, "the keys must be 0, 1, 2 and so on"),
        ({"file_ending": ".b2nd"}, "file_ending='.b2nd': formats read: .nii"),
        ({"file_ending": ".nrrd"}, "holds no *_0000.nrrd"),
        ({"labels": {"background": "none"}}, "labels.background.0='none': Input should be a valid integer"),
        ({"labels": {"background": 0, "core": []}}, "labels.core.0=[]: Input should be a valid integer"),
        ({"labels": ["background"]}, "labels=['background']: Input should be a valid dictionary"),
    ],
)
def test_a_description_that_cannot_be(root, changes, message):
    describe(root, **changes)
    assert message in fault(root)


def test_a_description_that_is_no_json(root):
    (root / "dataset.json").write_text("{")
    assert "dataset.json: not valid JSON" in fault(root)
    (root / "dataset.json").unlink()
    assert "dataset.json: is missing, beside imagesTr/" in fault(root)


def test_version_one_is_told_what_converts_it(root):
    describe(root, channel_names=None, modality={"0": "MRI"}, labels={"0": "background", "1": "core"}, file_ending=None)
    message = fault(root)
    assert "'modality'" in message and "nnUNetv2_convert_MSD_dataset" in message


def test_the_recipes_classes_are_those_of_the_data_set(root):
    assert opened(root, classes=CLASSES).remarks == opened(root).remarks
    renamed = {0: "Hintergrund", 1: "Kern", 2: "Ödem"}
    assert len(opened(root, classes=renamed).cases) == 13
    assert len(opened(root, classes={0: "background", 1: "core"}, ignore=[2]).cases) == 13


@pytest.mark.parametrize(
    "classes, message",
    [
        ({0: "background", 255: "core"}, "the recipe does not say what 1 and 2 is; the data set has no class 255"),
        ({0: "background", 1: "edema", 2: "core"}, "edema and core has another value there"),
        ({1: "core", 0: "background", 2: "edema"}, "0 is the background and has to come first"),
        ({1: "core", 2: "edema"}, "the recipe does not say what 0 is"),
    ],
)
def test_other_classes_than_the_data_set_has(root, classes, message):
    text = fault(root, classes=classes)
    assert message in text and "has the labels {background: 0, core: 1, edema: 2}" in text
    assert "Set 'data.classes={0: background, 1: core, 2: edema}'." in text
    assert len(opened(root, masks=False, classes=classes).cases) == 13  # nobody reads the masks


def test_what_is_to_be_ignored(root):
    describe(root, labels=LABELS | {"ignore": 3})
    text = fault(root, classes=CLASSES)
    assert "does not say what 3 is" in text
    assert "Set 'data.classes={0: background, 1: core, 2: edema}', data.ignore=[3]." in text
    assert "the data set has no class 3" in fault(root, classes=CLASSES | {3: "unknown"})
    assert len(opened(root, classes=CLASSES, ignore=[3]).cases) == 13


def test_regions_are_read_as_the_mask_values_they_are_made_of(root):
    describe(root, labels={"background": 0, "whole": [1, 2], "core": [1]}, regions_class_order=[2, 1])
    text = fault(root, classes={0: "background", 1: "whole"})
    assert "Regions (whole = 1+2) belong in data.regions; name every mask value in data.classes: 0, 1 and 2" in text
    assert "whole has another value there" in text
    source = opened(root, classes=CLASSES)
    assert any("names regions (whole = 1+2)" in note for note in source.notes())
    assert not any("regions" in note for note in opened(root, masks=False).notes())


def test_colour_images_hold_their_channels_in_one_file(tmp_path):
    root = tmp_path / "Dataset002"
    pixels = np.random.default_rng(0).integers(0, 255, (3, 6, 7, 3)).astype(np.uint8)
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    for number in range(3):
        Image.fromarray(pixels[number]).save(root / "imagesTr" / f"r_{number}_0000.png")
        Image.fromarray(np.ones((6, 7), np.uint8)).save(root / "labelsTr" / f"r_{number}.png")
    (tmp_path / "salt").write_text("ab" * 32)
    describe(root, channel_names={"0": "R", "1": "G", "2": "B"}, file_ending=".png", numTraining=3)
    loaded = load_cases(opened(root, channels="rgb").cases, "rgb", PercentileZScore(), CLASSES)
    np.testing.assert_array_equal(np.stack([case.values for case in loaded]), pixels.transpose(0, 3, 1, 2))
    assert "names 3 channels" in fault(root, channels="grey")
    describe(root, channel_names={"0": "a", "1": "b"}, file_ending=".png", numTraining=3)
    assert "without exactly the channels _0000, _0001" in fault(root, channels=2)


def test_the_spacing_of_a_tiff_stands_beside_it(tmp_path):
    root = tmp_path / "Dataset003"
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    values = np.arange(60, dtype=np.uint16).reshape(3, 4, 5)
    tifffile.imwrite(root / "imagesTr" / "t_0000.tif", values, photometric="minisblack")
    tifffile.imwrite(root / "labelsTr" / "t.tif", (values > 9).astype(np.uint8), photometric="minisblack")
    (tmp_path / "salt").write_text("ab" * 32)
    describe(root, channel_names={"0": "EM"}, file_ending=".tif", numTraining=1)

    def spacing():
        return load_cases(opened(root, channels=1).cases, 1, PercentileZScore())[0].spacing

    assert spacing() == (1, 1, 1)
    beside = root / "imagesTr" / "t.json"
    beside.write_text('{"spacing": [2, 0.5, 0.25]}')
    assert spacing() == (2, 0.5, 0.25)
    beside.write_text('{"spacing": [2, 0.5]}')
    with pytest.raises(InputError, match=r"t_0000\.tif: the spacing beside it is 2, 0\.5, the scan has 3 dimensions"):
        spacing()
    for text in ("{", "[]", '{"spacing": 3}', '{"spacing": ["a"]}', '{"spacing": [0, 1, 1]}', '{"spacing": []}'):
        beside.write_text(text)
        assert str(beside) in fault(root, channels=1)


def test_training_cases_may_lie_elsewhere(root, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    root.joinpath("imagesTr").rename(elsewhere)
    listed = {
        f"x{i}": {
            "images": [f"../elsewhere/b_{i:02}_0000.nii.gz", str(elsewhere / f"b_{i:02}_0001.nii.gz")],
            "label": f"labelsTr/b_{i:02}.nii.gz",
        }
        for i in range(4)
    }
    describe(root, dataset=listed, numTraining=4)
    source = opened(root)
    assert [case.id for case in source.cases] == ["b_10", "b_11", "b_12", "x0", "x1", "x2", "x3"]
    (loaded,) = load_cases([source.cases[5]], 2, PercentileZScore(), CLASSES)
    np.testing.assert_array_equal(loaded.values, [volume(4), volume(5)])
    assert (loaded.labels == 2).all()
    describe(root, dataset=listed | {"x4": {"images": ["gone"], "label": "gone"}}, numTraining=5)
    assert "1 cases under 'dataset' without 2 images: x4" in fault(root)
    describe(root, dataset=listed | {"x4": {"images": ["gone", "too"], "label": "gone"}}, numTraining=5)
    assert "3 files under 'dataset' that are not there" in fault(root)
