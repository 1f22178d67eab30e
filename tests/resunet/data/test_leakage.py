from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from resunet.config import DataSettings, PercentileZScore
from resunet.data.cases import LoadedCase, load_cases
from resunet.data.identity import Salt
from resunet.data.leakage import (
    ARCHIVE,
    Archive,
    describe_archive,
    find_leaks,
    merge_archives,
    read_archive,
    refuse_leaks,
    write_archive,
)
from resunet.data.source import open_source
from resunet.errors import CheckFailed, InputError

KEYS = {"mine": bytes(range(32)), "theirs": bytes(range(1, 33))}
STEMS = ("ann_secret_1", "ann_secret_2", "bob_secret_1")


def pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 255, (12, 12)).astype(np.uint8)


def folder(root: Path, images: dict[str, int], compress_level: int = 6) -> Path:
    """Images by stem, numbered pixels; the group is what stands before the first underscore."""
    (root / "images").mkdir(parents=True)
    for stem, number in images.items():
        Image.fromarray(pixels(number)).save(root / "images" / f"{stem}.png", compress_level=compress_level)
    (root / "groups.csv").write_text("stem,group\n" + "".join(f"{stem},{stem.split('_')[0]}\n" for stem in images))
    return root


def loaded(root: Path, salt: str = "mine") -> list[LoadedCase]:
    file = root.parent / f"{salt}.salt"
    file.write_text(KEYS[salt].hex())
    source = open_source(DataSettings(source=root, salt_file=file), masks=False)
    return load_cases(source.cases, "grey", PercentileZScore())


def fingerprint(salt: str = "mine") -> str:
    return Salt(KEYS[salt]).fingerprint


@pytest.fixture
def archive(tmp_path) -> Archive:
    return describe_archive(loaded(folder(tmp_path / "archive", dict(zip(STEMS, range(3), strict=True)))), fingerprint())


def evidence(archive: Archive, cases: list[LoadedCase], salt: str = "mine") -> list[tuple[str, ...]]:
    return [leak.evidence for leak in find_leaks(archive, cases, fingerprint(salt))]


def test_what_was_never_seen_is_no_leak(tmp_path, archive):
    assert evidence(archive, loaded(folder(tmp_path / "test", {"cat_1": 10, "dan_1": 11}))) == []


def test_another_image_of_a_patient_is_found_by_group(tmp_path, archive):
    cases = loaded(folder(tmp_path / "test", {"ann_9": 10, "cat_1": 11}))
    (leak,) = find_leaks(archive, cases, fingerprint())
    assert leak.evidence == ("group",) and leak.case is cases[0]


def test_a_copy_under_another_name_is_found_by_its_file(tmp_path, archive):
    assert evidence(archive, loaded(folder(tmp_path / "test", {"cat_1": 1}))) == [
        ("sha256 of the file", "sha256 of the pixels")
    ]


def test_a_copy_that_was_encoded_again_is_found_by_its_pixels(tmp_path, archive):
    assert evidence(archive, loaded(folder(tmp_path / "test", {"cat_1": 1}, compress_level=0))) == [("sha256 of the pixels",)]


def test_the_same_case_is_found_by_everything(tmp_path, archive):
    cases = loaded(folder(tmp_path / "test", {"ann_secret_1": 0}))
    assert evidence(archive, cases) == [("group", "sha256 of the file", "sha256 of the pixels")]


def test_other_salts_give_no_evidence_by_group_but_hashes_still(tmp_path, archive):
    cases = loaded(folder(tmp_path / "test", {"ann_secret_1": 10, "bob_secret_1": 2}), salt="theirs")
    assert evidence(archive, cases, salt="theirs") == [("sha256 of the file", "sha256 of the pixels")]


def test_equal_hmacs_of_different_salts_are_not_compared(tmp_path, archive):
    cases = loaded(folder(tmp_path / "test", {"ann_9": 10}))
    assert evidence(archive, cases, salt="theirs") == []


def test_an_empty_archive_holds_nothing(tmp_path):
    cases = loaded(folder(tmp_path / "test", {"ann_9": 10}))
    assert evidence(Archive(frozenset(), fingerprint()), cases) == []


def test_the_record_survives_being_written_and_names_nobody(tmp_path, archive):
    write_archive(tmp_path / ARCHIVE, archive)
    assert read_archive(tmp_path) == archive
    content = (tmp_path / ARCHIVE).read_bytes()
    assert not any(word in content for word in (b"secret", b"ann", b"bob", str(tmp_path).encode()))
    table = pq.read_table(tmp_path / ARCHIVE)
    assert table.column_names == ["group", "file_sha256", "pixel_sha256"]
    rows = list(zip(*(column.to_pylist() for column in table.columns), strict=True))
    assert rows == sorted(rows) and len(rows) == 3


def test_the_same_record_is_written_with_the_same_bytes(tmp_path, archive):
    for name in "ab":
        write_archive(tmp_path / name, Archive(frozenset(sorted(archive.rows, reverse=name == "a")), archive.salt_fingerprint))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_empty_record_survives_too(tmp_path):
    write_archive(tmp_path / ARCHIVE, Archive(frozenset(), "f"))
    assert read_archive(tmp_path) == Archive(frozenset(), "f")


def test_a_missing_or_broken_record_is_the_users_fault(tmp_path):
    with pytest.raises(InputError, match=r"has no archive\.parquet"):
        read_archive(tmp_path)
    (tmp_path / ARCHIVE).write_bytes(b"not parquet")
    with pytest.raises(InputError, match="not a readable archive record"):
        read_archive(tmp_path)
    write_archive(tmp_path / ARCHIVE, Archive(frozenset({("a", "b", "c")}), "f"))
    table = pq.read_table(tmp_path / ARCHIVE).drop_columns(["group"])
    pq.write_table(table, tmp_path / ARCHIVE)
    with pytest.raises(InputError):
        read_archive(tmp_path)


def test_records_are_merged(archive):
    inherited = Archive(frozenset({("group", "file", "pixels")}), archive.salt_fingerprint)
    merged = merge_archives(archive, inherited)
    assert merged == Archive(archive.rows | inherited.rows, archive.salt_fingerprint)
    assert merge_archives(archive, None) is archive


def test_groups_of_another_salt_are_dropped_and_their_hashes_kept(tmp_path, archive):
    theirs = describe_archive(loaded(folder(tmp_path / "theirs", {"cat_1": 7}), salt="theirs"), fingerprint("theirs"))
    merged = merge_archives(archive, theirs)
    assert merged.salt_fingerprint == archive.salt_fingerprint
    ((_, file, pixel),) = theirs.rows
    assert merged.rows == archive.rows | {("", file, pixel)}
    cases = loaded(folder(tmp_path / "test", {"cat_1": 8, "dan_1": 7}))
    assert evidence(merged, cases) == [("sha256 of the file", "sha256 of the pixels")]


def test_leaks_stop_unless_they_are_allowed_by_name(tmp_path, archive):
    leaks = find_leaks(archive, loaded(folder(tmp_path / "test", {"ann_9": 10, "cat_1": 2})), fingerprint())
    with pytest.raises(CheckFailed) as error:
        refuse_leaks(leaks, "test", "the pretraining archive", allowed=False)
    message = str(error.value)
    assert message.startswith("2 test cases are among the pretraining archive:")
    assert "ann_9.png (group)" in message and "cat_1.png (sha256 of the file, sha256 of the pixels)" in message
    assert "allow=[leak]" in message
    assert refuse_leaks(leaks, "test", "the archive", allowed=True) == ["leak: 2 test cases are among the archive"]
    assert refuse_leaks([], "test", "the archive", allowed=False) == refuse_leaks([], "test", "x", allowed=True) == []


def test_many_leaks_are_counted_and_some_named(tmp_path, archive):
    leaks = find_leaks(archive, loaded(folder(tmp_path / "test", {"ann_9": 10})), fingerprint()) * 23
    with pytest.raises(CheckFailed, match=r"23 test cases(?s:.*)… and 3 more"):
        refuse_leaks(leaks, "test", "the archive", allowed=False)
