import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resunet.config import DataSettings
from resunet.data.source import open_source
from resunet.errors import InputError

STEMS = ("ann_1", "ann_2", "bob_1", "cat_1", "dan_1")


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(path)


@pytest.fixture
def root(tmp_path) -> Path:
    """Five images with masks, of four patients, and a split."""
    for stem in STEMS:
        put(tmp_path / "source" / "images" / f"{stem}.png")
        put(tmp_path / "source" / "masks" / f"{stem}.bmp")
    write_groups(tmp_path / "source")
    write_splits(tmp_path / "source", pool=["ann_1", "ann_2", "bob_1"], val=["cat_1"], test=["dan_1"])
    (tmp_path / "salt").write_text(bytes(range(32)).hex())
    return tmp_path / "source"


def write_groups(
    root: Path, rows: str = "".join(f"{stem},{stem[:3]}\n" for stem in STEMS), header: str = "stem,group\n"
) -> None:
    (root / "groups.csv").write_text(header + rows)


def write_splits(root: Path, **parts) -> None:
    (root / "splits.json").write_text(json.dumps(parts))


def settings(root: Path, **values) -> DataSettings:
    return DataSettings(**(dict(source=root, salt_file=root.parent / "salt") | values))


def fault(root: Path, masks: bool = True) -> str:
    with pytest.raises(InputError) as error:
        open_source(settings(root), masks)
    return str(error.value)


def test_a_source_is_listed_by_stem_with_masks_groups_and_parts(root):
    source = open_source(settings(root, names="keep"), masks=True)
    assert [case.id for case in source.cases] == list(STEMS)
    assert [case.group for case in source.cases] == [stem[:3] for stem in STEMS]
    assert [case.part for case in source.cases] == ["pool", "pool", "pool", "val", "test"]
    assert [[file.name for file in case.files] for case in source.cases] == [[f"{stem}.png"] for stem in STEMS]
    assert [case.mask.name for case in source.cases] == [f"{stem}.bmp" for stem in STEMS]
    assert [case.id for case in source.part("pool")] == ["ann_1", "ann_2", "bob_1"]
    assert source.has_groups and source.has_splits and source.notes() == []


def test_an_image_without_a_mask(root):
    (root / "masks" / "bob_1.bmp").unlink()
    assert "1 images without a mask: bob_1. Add the masks" in fault(root)
    assert len(open_source(settings(root), masks=False).cases) == 5


def test_a_mask_without_an_image(root):
    put(root / "masks" / "eve_1.png")
    assert "1 masks without an image: eve_1. Add the images" in fault(root)


def test_masks_that_have_more_to_their_names(root):
    for path in sorted((root / "masks").iterdir()):
        path.rename(path.with_stem(f"{path.stem}_mask"))
    text = fault(root)
    assert "5 images without a mask: " in text and text.endswith(
        "There are masks that are called STEM_mask: give them the images' stems."
    )
    (root / "masks" / "bob_1_mask.bmp").unlink()
    assert fault(root).endswith("Add the masks, or remove the images."), "not of all"


def test_many_images_without_a_mask_are_counted_and_some_named(root):
    for i in range(8):
        put(root / "images" / f"x{i}.png")
    assert "8 images without a mask: x0, x1, x2, x3, x4, …" in fault(root)


def test_no_masks_at_all(root):
    for path in (root / "masks").iterdir():
        path.unlink()
    assert f"no mask in {root / 'masks'}" in fault(root)
    (root / "masks").rmdir()
    assert f"no mask in {root / 'masks'}" in fault(root)


def test_an_image_without_a_group(root):
    write_groups(root, "ann_1,ann\nann_2,ann\nbob_1,bob\ncat_1,cat\n")
    assert "1 images without a row: dan_1" in fault(root)


def test_a_row_without_a_group(root):
    write_groups(root, "ann_1,ann\nann_2,ann\nbob_1,bob\ncat_1,\ndan_1\n")
    assert "2 rows without a group: cat_1, dan_1" in fault(root)


def test_groups_with_other_columns(root):
    write_groups(root, "ann_1;ann\n", header="stem;group\n")
    assert "groups.csv: the columns are ['stem;group']; it must have stem and group" in fault(root)


def test_groups_as_a_spreadsheet_writes_them(root):
    text = "note,stem,group\r\n" + "".join(f'"a, b",{stem},{stem[:3]}\r\n' for stem in STEMS)
    (root / "groups.csv").write_bytes(text.encode("utf-8-sig"))
    assert [case.group for case in open_source(settings(root, names="keep"), True).cases] == [stem[:3] for stem in STEMS]


def test_a_split_with_an_unknown_stem(root):
    write_splits(root, pool=["ann_1", "ann_2", "zoe_1"], val=["cat_1"], test=["dan_1"])
    assert "1 stems without an image: zoe_1" in fault(root)


def test_a_split_with_a_stem_twice(root):
    write_splits(root, pool=["ann_1", "ann_2", "ann_1"], val=["cat_1"], test=["dan_1"])
    assert "1 stems that are listed twice: ann_1" in fault(root)


def test_a_patient_in_two_parts(root):
    write_splits(root, pool=["ann_1", "bob_1"], val=["cat_1"], test=["ann_2", "dan_1"])
    assert "for example 'ann' in pool and test" in fault(root)
    (root / "groups.csv").unlink()
    assert len(open_source(settings(root), True).part("test")) == 2


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"pool": [], "val": []}',
        '{"pool": [], "val": [], "test": [], "x": []}',
        '{"pool": 1, "val": [], "test": []}',
    ],
)
def test_a_split_of_another_form(root, text):
    (root / "splits.json").write_text(text)
    assert str(root / "splits.json") in fault(root)


def test_two_images_of_one_stem(root):
    put(root / "images" / "ann_1.bmp")
    message = fault(root, masks=False)
    assert "ann_1.png" in message and "ann_1.bmp" in message and "the same stem" in message


def test_an_empty_folder(tmp_path):
    message = fault(tmp_path, masks=False)
    assert f"no image in {tmp_path}" in message and ".nii.gz" in message
    (tmp_path / "images").mkdir()
    assert f"no image in {tmp_path / 'images'}" in fault(tmp_path, masks=False)


def test_a_plain_folder_is_read_through_and_through(tmp_path):
    for name in ("a.png", "x/a.png", "x/y/b.tif", ".hidden.png"):
        put(tmp_path / "plain" / name)
    (tmp_path / "salt").write_text("00" * 32)
    (tmp_path / "plain" / "x" / "notes.txt").write_text("")
    source = open_source(settings(tmp_path / "plain", names="keep"), masks=False)
    assert [case.id for case in source.cases] == ["a", "x/a", "x/y/b"]


def test_what_is_no_image_is_passed_over(root):
    (root / "images" / "Thumbs.db").write_text("")
    put(root / "images" / "._ann_1.png")
    assert len(open_source(settings(root), True).cases) == 5


def test_groups_in_another_encoding(root):
    write_groups(root)
    (root / "groups.csv").write_bytes((root / "groups.csv").read_bytes().replace(b"bob\n", "Bøb\n".encode("latin-1")))
    assert "groups.csv" in fault(root)


def test_a_stem_in_two_groups(root):
    with open(root / "groups.csv", "a") as file:
        file.write("ann_1,dan\n")
    assert "ann_1" in fault(root)


def test_the_place_of_a_slice_is_read_beside_its_group(root):
    write_groups(root, "ann_1,ann,12\nann_2,ann,14\nbob_1,bob,\ncat_1,cat,3\ndan_1,dan,1\n", "stem,group,position\n")
    cases = open_source(settings(root, names="keep"), masks=True).cases
    assert {case.id: case.position for case in cases} == {"ann_1": 0, "ann_2": 1, "bob_1": None, "cat_1": None, "dan_1": None}
    write_groups(root, "ann_1,ann,12\nann_2,ann,1/4\nbob_1,b,\ncat_1,c,\ndan_1,d,\n", "stem,group,position\n")
    assert "1 rows whose position is no number from 0 on: ann_2 (1/4)" in fault(root)
