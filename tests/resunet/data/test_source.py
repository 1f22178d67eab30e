import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resunet.config import DataSettings
from resunet.data.identity import Salt
from resunet.data.source import assign_parts, divide, draw_labelled, hold_out, open_source
from resunet.data.splits import draw_groups, write_splits
from resunet.errors import InputError

STEMS = ("ann_1", "ann_2", "bob_1", "cat_1", "dan_1")
SALT = Salt(bytes(range(32)))


def put(path: Path, values=0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), values, np.uint8)).save(path)


@pytest.fixture
def root(tmp_path) -> Path:
    """Five images with masks, of four patients, and a split."""
    for stem in STEMS:
        put(tmp_path / "source" / "images" / f"{stem}.png")
        put(tmp_path / "source" / "masks" / f"{stem}.bmp")
    rows = "".join(f"{stem},{stem[:3]}\n" for stem in STEMS)
    (tmp_path / "source" / "groups.csv").write_text("stem,group\n" + rows)
    splits = {"pool": ["ann_1", "ann_2", "bob_1"], "val": ["cat_1"], "test": ["dan_1"]}
    (tmp_path / "source" / "splits.json").write_text(json.dumps(splits))
    (tmp_path / "salt").write_text(bytes(range(32)).hex())
    return tmp_path / "source"


@pytest.fixture
def lesions(tmp_path) -> Path:
    """40 patients of two images each, no split; in 12 patients, those of a number below 12, the second mask has a lesion."""
    root = tmp_path / "lesions"
    rows = ["stem,group"]
    for number in range(40):
        for i in range(2):
            put(root / "images" / f"p{number:02}_{i}.png")
            put(root / "masks" / f"p{number:02}_{i}.png", 255 if number < 12 and i else 0)
            rows.append(f"p{number:02}_{i},p{number:02}")
    (root / "groups.csv").write_text("\n".join(rows))
    (tmp_path / "salt").write_text(bytes(range(32)).hex())
    return root


def settings(root: Path, **values) -> DataSettings:
    return DataSettings(**(dict(source=root, salt_file=root.parent / "salt") | values))


def fault(root: Path, masks: bool = True) -> str:
    with pytest.raises(InputError) as error:
        open_source(settings(root), masks)
    return str(error.value)


def groups(source, part: str) -> set[str]:
    return {case.group_name for case in source.part(part)}


def with_lesion(names: set[str]) -> int:
    return sum(int(name[1:]) < 12 for name in names)


def test_ids_are_hmacs_unless_names_are_kept(root):
    source = open_source(settings(root), masks=False)
    for case, stem in zip(source.cases, STEMS, strict=True):
        assert case.id == SALT.identify("file", stem)
        assert case.group == case.group_hmac == SALT.identify("group", stem[:3])
        assert stem not in case.id + case.group
        assert case.mask is None
    kept = open_source(settings(root, names="keep"), masks=False)
    assert [case.group_hmac for case in kept.cases] == [case.group_hmac for case in source.cases]
    assert source.cases[0].group == source.cases[1].group != source.cases[2].group


def test_without_groups_each_image_is_its_own(root):
    (root / "groups.csv").unlink()
    source = open_source(settings(root, names="keep"), masks=True)
    assert [case.group for case in source.cases] == list(STEMS)
    assert not source.has_groups and len(source.notes()) == 1 and "groups.csv" in source.notes()[0]


def test_without_splits_nobody_has_a_part_until_it_is_assigned(root):
    (root / "splits.json").unlink()
    source = open_source(settings(root), masks=True)
    assert {case.part for case in source.cases} == {None}
    assert not source.has_splits and "splits.json" in source.notes()[0]
    assigned = assign_parts(source, 0)
    parts = {}
    for case in assigned.cases:
        assert parts.setdefault(case.group, case.part) == case.part
    assert set(parts.values()) == {"pool", "val", "test"}
    assert assign_parts(source, 0) == assigned
    assert any(assign_parts(source, seed).cases != assigned.cases for seed in range(1, 9))


def test_the_owners_split_is_kept(root):
    source = open_source(settings(root), masks=True)
    assert assign_parts(source, 3) is source


def test_no_folder(tmp_path):
    put(tmp_path / "file.png")
    for path in (tmp_path / "none", tmp_path / "file.png"):
        assert f"data.source={path}: no such folder" in fault(path)


def test_an_assigned_split_does_not_depend_on_how_names_are_recorded(root):
    for i in range(20):
        put(root / "images" / f"p{i:02d}.png")
    (root / "groups.csv").unlink()
    (root / "splits.json").unlink()
    kept = assign_parts(open_source(settings(root, names="keep"), False), 0)
    hashed = assign_parts(open_source(settings(root, names="hash"), False), 0)
    assert [case.part for case in kept.cases] == [case.part for case in hashed.cases]


def test_a_manifest_is_told_apart(tmp_path):
    (tmp_path / "m.parquet").write_bytes(b"")
    assert "m.parquet: not a readable manifest" in fault(tmp_path / "m.parquet")


def test_names_are_only_where_splits_need_them(root):
    source = open_source(settings(root), masks=True)
    assert [case.stem for case in source.cases] == list(STEMS)
    assert source.stems() == {"pool": ["ann_1", "ann_2", "bob_1"], "val": ["cat_1"], "test": ["dan_1"]}
    assert source.labelled and open_source(settings(root), masks=False).labelled


def test_an_assigned_split_can_be_written_and_edited(lesions):
    assigned = assign_parts(open_source(settings(lesions), True), 5)
    write_splits(lesions / "splits.json", assigned.stems())
    own = open_source(settings(lesions), True)
    assert own.stems() == assigned.stems() and own.has_splits and assign_parts(own, 0) is own


@pytest.mark.parametrize("seed", range(3))
def test_a_stratified_split_is_balanced_by_what_the_masks_hold(lesions, seed):
    source = open_source(settings(lesions), masks=True)
    assigned = assign_parts(source, seed, stratify=True)
    sizes = {part: groups(assigned, part) for part in ("pool", "val", "test")}
    assert {part: len(its) for part, its in sizes.items()} == {"pool": 28, "val": 4, "test": 8}
    for part, expected in (("pool", 8.4), ("val", 1.2), ("test", 2.4)):
        assert abs(with_lesion(sizes[part]) - expected) < 2
    assert not sizes["pool"] & (sizes["val"] | sizes["test"]) and not sizes["val"] & sizes["test"]
    assert assigned.stems() != assign_parts(source, seed).stems()


def test_the_split_is_the_same_whoever_asks(lesions):
    """What pretraining leaves out is what fine-tuning holds out, which knows classes and keeps other names."""
    first = open_source(settings(lesions, stratify=True), masks=True)
    second = open_source(settings(lesions, names="keep"), masks=True, classes={0: "background", 255: "lesion"}, ignore=[7])
    for stratify in (False, True):
        assert assign_parts(first, 1, stratify).stems() == assign_parts(second, 1, stratify).stems()


def test_an_unreadable_mask_stops_a_stratified_split(lesions):
    (lesions / "masks" / "p07_0.png").write_text("no image")
    source = open_source(settings(lesions), masks=True)
    with pytest.raises(InputError, match=r"p07_0\.png"):
        assign_parts(source, 0, stratify=True)
    assert assign_parts(source, 0).part("pool")


@pytest.mark.parametrize("stratify", [False, True])
def test_draws_are_nested_and_limit_val_alike(lesions, stratify):
    source = assign_parts(open_source(settings(lesions), True), 0)
    strata = {f"p{number:02}": str(number < 12) for number in range(40)} if stratify else None
    assert draw_labelled(source, None, 3, stratify) is source
    before = (set(), set())
    for count in (1, 3, 4, 9, 28):
        drawn = draw_labelled(source, count, 3, stratify)
        now = groups(drawn, "pool"), groups(drawn, "val")
        assert (len(now[0]), len(now[1])) == (count, min(count, 4))
        assert before[0] < now[0] and before[1] <= now[1]
        assert now[1] == set(draw_groups(groups(source, "val"), min(count, 4), 3, strata))
        assert drawn.part("test") == source.part("test") and len(drawn.cases) == len(source.cases)
        assert all(len([case for case in drawn.cases if case.group_name == name and case.part]) == 2 for name in now[0])
        before = now
    assert groups(draw_labelled(source, 0.25, 3, stratify), "pool") == groups(draw_labelled(source, 7, 3, stratify), "pool")
    assert len({frozenset(groups(draw_labelled(source, 3, draw, stratify), "pool")) for draw in range(5)}) > 1


def test_an_order_of_groups_is_drawn_from_its_beginning_and_val_as_ever(lesions):
    source = assign_parts(open_source(settings(lesions), True), 0)
    order = sorted(groups(source, "pool"), reverse=True)
    for count, expected in ((1, 1), (5, 5), (0.25, 7)):
        drawn = draw_labelled(source, count, 3, order=order)
        assert groups(drawn, "pool") == set(order[:expected])
        assert groups(drawn, "val") == groups(draw_labelled(source, count, 3), "val")
    with pytest.raises(InputError, match=r"data\.labelled=29: the pool has only 28 groups"):
        draw_labelled(source, 29, 3, order=order)


def test_stratified_draws_are_balanced(lesions):
    source = assign_parts(open_source(settings(lesions), True), 0, stratify=True)
    share = with_lesion(groups(source, "pool")) / 28
    for draw in range(4):
        for count in range(1, 29):
            drawn = groups(draw_labelled(source, count, draw, stratify=True), "pool")
            assert abs(with_lesion(drawn) - share * count) < 1
    plain = [with_lesion(groups(draw_labelled(source, 9, draw), "pool")) for draw in range(9)]
    assert max(abs(count - share * 9) for count in plain) > 1  # chance alone does not do it


@pytest.mark.parametrize("stratify", [False, True])
def test_each_fold_holds_out_others_and_test_stays(lesions, stratify):
    source = draw_labelled(assign_parts(open_source(settings(lesions), True), 0, stratify), 10, 1, stratify)
    labelled = groups(source, "pool") | groups(source, "val")
    fold_of = divide(source, 3, 0, stratify)
    assert fold_of.keys() == labelled and fold_of == divide(source, 3, 0, stratify) != divide(source, 3, 1, stratify)
    held_out = []
    for fold in range(3):
        now = hold_out(source, fold_of, fold)
        pool, val = groups(now, "pool"), groups(now, "val")
        assert pool | val == labelled and not pool & val and val == {name for name, its in fold_of.items() if its == fold}
        assert now.part("test") == source.part("test") and len(now.part(None)) == len(source.part(None))
        assert {case.stem for case in now.part("pool", "val")} == {case.stem for case in source.part("pool", "val")}
        held_out += list(val)
    assert sorted(held_out) == sorted(labelled)
