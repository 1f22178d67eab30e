import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from resunet.config import DataSettings, PercentileZScore
from resunet.data.cases import read_case
from resunet.data.index import IndexRequest, index
from resunet.data.preparing import prepare_scans
from resunet.data.source import Source, assign_parts, open_source
from resunet.data.store import Store
from resunet.errors import InputError

GROUPS = 12  # of two images each; the first six have masks on the first


def write_tree(root: Path) -> Path:
    """Images of 12 patients, a volume and a DICOM series of two others, and masks for half of the patients."""
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    rows = [("stem", "group", "position")]
    for group in range(GROUPS):
        for i in range(2):
            stem = f"p{group:02}-{i}"
            pixels = np.kron(rng.integers(0, 250, (6, 6)), np.ones((6, 6))).astype(np.uint8)
            Image.fromarray(pixels).save(root / "images" / f"{stem}.png")
            rows.append((stem, f"patient{group}", "" if group == 3 else str(40 + 9 * i)))
            if group < 6 and i == 0:
                Image.fromarray((pixels > 128).astype(np.uint8) * 255).save(root / "masks" / f"{stem}.png")
    sitk.WriteImage(
        sitk.GetImageFromArray(rng.integers(0, 900, (4, 16, 16)).astype(np.int16)), str(root / "images" / "vol.nii.gz")
    )
    rows.append(("vol", "patient-vol", ""))
    with open(root / "groups.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    (root.parent / "salt").write_text("ab" * 32)
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    root = write_tree(tmp_path_factory.mktemp("tree") / "source")
    index(IndexRequest((root,), root.parent / "m.parquet", root / "masks", workers=1, salt_file=root.parent / "salt"))
    return root


@pytest.fixture
def opened(tree: Path) -> Callable[..., Source]:
    def make(masks: bool = False, **changes: object) -> Source:
        values = {"source": tree.parent / "m.parquet", "salt_file": tree.parent / "salt", "names": "keep"} | changes
        return open_source(DataSettings(**values), masks)  # type: ignore[arg-type]

    return make


def test_its_cases_are_those_of_the_folder(tree, opened):
    cases = {case.stem: case for case in opened().cases}
    folder = open_source(DataSettings(source=tree, salt_file=tree.parent / "salt"), masks=False)
    assert set(cases) == {case.stem for case in folder.cases} and len(cases) == 25
    for one in folder.cases:
        mine = cases[one.stem]
        assert mine.files == one.files and mine.group_hmac == one.group_hmac and mine.part is None
        assert mine.position == one.position == (None if one.stem[:3] in ("p03", "vol") else int(one.stem[-1]))
        assert mine.known.shape == read_case(one, "grey").values.shape[1:]
        stats = [path.stat() for path in one.files]
        assert mine.known.stamps == tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)
    with_mask = {stem for stem, case in cases.items() if case.mask is not None}
    assert with_mask == {f"p{group:02}-0" for group in range(6)}
    assert all(cases[stem].mask == tree / "masks" / f"{stem}.png" for stem in with_mask)
    assert opened().salt_fingerprint == folder.salt_fingerprint and opened().has_groups and opened().labelled


def test_names_are_kept_only_where_that_is_asked_for(opened):
    hashed = opened(names="hash").cases[3]
    assert "p" not in hashed.id and len(hashed.id) == 32 and hashed.group == hashed.group_hmac
    assert opened().cases[3].id == opened().cases[3].stem == hashed.stem


def test_kept_names_are_told_apart_by_their_folders(tmp_path):
    root = tmp_path / "source"
    (tmp_path / "salt").write_text("ab" * 32)
    for patient in ("p1", "p2"):
        (root / patient).mkdir(parents=True)
        for ending in ("png", "bmp") if patient == "p1" else ("png",):
            Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) + len(ending)).save(root / patient / f"flair.{ending}")
    index(IndexRequest((root,), tmp_path / "m.parquet", None, workers=1, salt_file=tmp_path / "salt"))
    settings = DataSettings(source=tmp_path / "m.parquet", salt_file=tmp_path / "salt", names="keep")
    assert {case.id for case in open_source(settings, masks=False).cases} <= {"p1/flair.png", "p1/flair.bmp", "p2/flair"}
    assert len({case.id for case in open_source(settings, masks=False).cases}) == len(open_source(settings, masks=False).cases)


def test_a_sequence_like_any(opened):
    cases = opened().cases
    assert [case.id for case in cases[3:9:2]] == [cases[i].id for i in (3, 5, 7)]
    assert cases[-1].id == list(cases)[-1].id and len(cases[:0]) == 0
    assert [len(opened(masks=True).cases), len(cases)] == [6, 25]


@pytest.mark.parametrize("stratify", [False, True])
def test_labelled_groups_are_split_and_all_others_are_pool(opened, stratify):
    """The unlabelled scans of val and test patients are in no pool; fine-tuning makes the same split of the labelled ones."""
    source = assign_parts(opened(), 3, stratify)
    parts = {part: {case.group for case in source.part(part)} for part in ("pool", "val", "test")}
    assert not parts["pool"] & (parts["val"] | parts["test"]) and not parts["val"] & parts["test"]
    assert sum(len(groups) for groups in parts.values()) == 13 and len(source.part(None)) == 0
    assert [len(parts[part]) for part in ("val", "test")] == [1, 1]
    labelled = {case.group for case in opened(masks=True).cases}
    assert parts["val"] | parts["test"] <= labelled and len(parts["pool"] & labelled) == 4
    assert len(source.part("val", "test")) == 4  # both images of each
    finetuned = assign_parts(opened(masks=True), 3, stratify)
    for part, groups in parts.items():
        assert {case.group for case in finetuned.part(part)} == groups & labelled
    other = assign_parts(opened(names="hash"), 3, stratify)
    assert [case.part for case in other.cases] == [case.part for case in source.cases]


def test_evidence_is_in_the_order_of_the_cases(opened):
    part = assign_parts(opened(), 3).part("val", "test")
    evidence = part.evidence()
    assert evidence.table.column("file_sha256").to_pylist() == [case.known.file_sha256 for case in part]
    assert evidence.table.column("group").to_pylist() == [case.group_hmac for case in part]
    whole = opened().cases.evidence()
    rows = whole.table.column("file_sha256").to_pylist()
    for i, case in enumerate(part):
        np.testing.assert_array_equal(evidence.thumbnail(i), whole.thumbnail(rows.index(case.known.file_sha256)))
    assert len(opened().cases[:0].evidence()) == 0 and opened().cases[:0].evidence().hashes().shape[0] == 0


def test_what_is_prepared_is_what_the_folder_gives(tree, opened, tmp_path):
    folder = open_source(DataSettings(source=tree, salt_file=tree.parent / "salt"), masks=False)
    of = {}
    for name, source in (("manifest", opened()), ("folder", folder)):
        prepared = prepare_scans(source.cases, "grey", PercentileZScore(), Store(tmp_path / name))
        of[name] = {case.stem: (one.key, one.num_slices) for case, one in zip(source.cases, prepared, strict=True)}
    assert of["manifest"] == of["folder"]


def test_the_split_of_what_was_indexed(tmp_path):
    root = write_tree(tmp_path / "source")
    shutil.rmtree(root / "masks")
    stems = sorted(path.name.partition(".")[0] for path in (root / "images").iterdir())
    (root / "splits.json").write_text(json.dumps({"pool": stems[:10], "val": stems[10:14], "test": stems[14:20]}))
    index(IndexRequest((root,), tmp_path / "m.parquet", workers=1, salt_file=tmp_path / "salt"))
    settings = DataSettings(source=tmp_path / "m.parquet", salt_file=tmp_path / "salt")
    source = open_source(settings, masks=False)
    assert {part: sorted(case.stem for case in source.part(part)) for part in ("pool", "val", "test", None)} == {
        "pool": stems[:10],
        "val": stems[10:14],
        "test": stems[14:20],
        None: stems[20:],
    }
    assert source.has_splits and assign_parts(source, 0) is source
    with pytest.raises(InputError, match="no scan of this manifest has a mask"):
        open_source(settings, masks=True)


def test_a_manifest_without_its_paths(tree, tmp_path):
    for path in tree.parent.glob("m.*"):
        if path.is_file() and path.name != "m.paths.parquet":
            shutil.copy(path, tmp_path)
    source = open_source(DataSettings(source=tmp_path / "m.parquet", salt_file=tree.parent / "salt"), masks=False)
    with pytest.raises(InputError, match=r"m\.paths\.parquet: is missing"):
        _ = source.cases[0]
