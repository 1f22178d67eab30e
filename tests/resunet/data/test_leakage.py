import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from resunet.config import DataSettings, PercentileZScore
from resunet.data.cases import LoadedCase, load_cases
from resunet.data.evidence import COLUMNS, SCHEMA, Evidence
from resunet.data.identity import Salt
from resunet.data.leakage import (
    ARCHIVE,
    evidence_of_cases,
    find_leaks,
    merge_archives,
    read_archive,
    refuse_leaks,
    write_archive,
)
from resunet.data.perceptual import HASH_BYTES
from resunet.data.source import open_source
from resunet.errors import CheckFailed, InputError

KEYS = {"mine": bytes(range(32)), "theirs": bytes(range(1, 33))}
SAME = ("sha256 of the pixels", "perceptual, distance 0 without thumbnails to verify it")  # of no thumbnails beside an encoder
STEMS = ("ann_secret_1", "ann_secret_2", "bob_secret_1")


def pixels(number: int) -> np.ndarray:
    """Smooth blobs, as different from each other as scans of different parts of the body."""
    coarse = np.random.default_rng(number).integers(0, 255, (8, 8)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC))


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
def archive(tmp_path) -> Evidence:
    """What is known of an archive beside its encoder: no thumbnails."""
    cases = loaded(folder(tmp_path / "archive", dict(zip(STEMS, range(3), strict=True))))
    write_archive(tmp_path / ARCHIVE, evidence_of_cases(cases, fingerprint()))
    return read_archive(tmp_path)


def evidence(archive: Evidence, cases: list[LoadedCase], salt: str = "mine") -> list[tuple[str, ...]]:
    return [leak.evidence for leak in find_leaks(archive, evidence_of_cases(cases, fingerprint(salt)))]


def of_rows(rows: list[tuple[str, str, str, bytes]], salt: str = "f") -> Evidence:
    columns = list(zip(*rows, strict=True)) or [[]] * len(SCHEMA)
    return Evidence(pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA), salt)


def rows(archive: Evidence) -> list[tuple]:
    return sorted(tuple(row.values()) for row in archive.table.to_pylist())


def jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "jpeg", quality=75)
    return buffer.getvalue()


def test_what_was_never_seen_is_no_leak(tmp_path, archive):
    assert evidence(archive, loaded(folder(tmp_path / "test", {"cat_1": 10, "dan_1": 11}))) == []


def test_another_image_of_a_patient_is_found_by_group(tmp_path, archive):
    cases = loaded(folder(tmp_path / "test", {"ann_9": 10, "cat_1": 11}))
    (leak,) = find_leaks(archive, evidence_of_cases(cases, fingerprint()))
    assert leak.evidence == ("group",) and cases[leak.row].case.stem == "ann_9"


def test_a_copy_under_another_name_is_found_by_its_file(tmp_path, archive):
    assert evidence(archive, loaded(folder(tmp_path / "test", {"cat_1": 1}))) == [("sha256 of the file", *SAME)]


def test_a_copy_that_was_encoded_again_is_found_by_its_pixels(tmp_path, archive):
    assert evidence(archive, loaded(folder(tmp_path / "test", {"cat_1": 1}, compress_level=0))) == [SAME]


def test_the_same_case_is_found_by_everything(tmp_path, archive):
    cases = loaded(folder(tmp_path / "test", {"ann_secret_1": 0}))
    assert evidence(archive, cases) == [("group", "sha256 of the file", *SAME)]


def test_other_salts_give_no_evidence_by_group_but_hashes_still(tmp_path, archive):
    cases = loaded(folder(tmp_path / "test", {"ann_secret_1": 10, "bob_secret_1": 2}), salt="theirs")
    assert evidence(archive, cases, salt="theirs") == [("sha256 of the file", *SAME)]


def test_equal_hmacs_of_different_salts_are_not_compared(tmp_path, archive):
    cases = loaded(folder(tmp_path / "test", {"ann_9": 10}))
    assert evidence(archive, cases, salt="theirs") == []


def test_an_empty_archive_holds_nothing(tmp_path):
    cases = loaded(folder(tmp_path / "test", {"ann_9": 10}))
    assert evidence(of_rows([], fingerprint()), cases) == []
    assert find_leaks(evidence_of_cases(cases, fingerprint()), of_rows([], fingerprint())) == []


def test_the_record_survives_being_written_and_names_nobody(tmp_path, archive):
    cases = loaded(folder(tmp_path / "again", dict(zip(STEMS, range(3), strict=True))))
    assert rows(archive) == rows(evidence_of_cases(cases, fingerprint())) and archive.salt_fingerprint == fingerprint()
    content = (tmp_path / ARCHIVE).read_bytes()
    assert not any(word in content for word in (b"secret", b"ann", b"bob", str(tmp_path).encode()))
    table = pq.read_table(tmp_path / ARCHIVE)
    assert table.column_names == ["group", "file_sha256", "pixel_sha256", "perceptual"] == list(COLUMNS)
    written = list(zip(*(column.to_pylist() for column in table.columns), strict=True))
    assert written == sorted(written) and len(written) == 3
    assert all(len(row[3]) == HASH_BYTES for row in written)


def test_the_same_record_is_written_with_the_same_bytes(tmp_path, archive):
    for name in "ab":
        order = sorted(rows(archive), reverse=name == "a") * (2 if name == "b" else 1)  # each row once
        write_archive(tmp_path / name, of_rows(order, archive.salt_fingerprint))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_empty_record_survives_too(tmp_path):
    write_archive(tmp_path / ARCHIVE, of_rows([]))
    assert len(read_archive(tmp_path)) == 0 and read_archive(tmp_path).salt_fingerprint == "f"


def test_a_missing_or_broken_record_is_the_users_fault(tmp_path):
    with pytest.raises(InputError, match=r"has no archive\.parquet"):
        read_archive(tmp_path)
    (tmp_path / ARCHIVE).write_bytes(b"not parquet")
    with pytest.raises(InputError, match="not a readable archive record"):
        read_archive(tmp_path)
    write_archive(tmp_path / ARCHIVE, of_rows([("a", "b", "c", bytes(HASH_BYTES))]))
    table = pq.read_table(tmp_path / ARCHIVE).drop_columns(["group"])
    pq.write_table(table, tmp_path / ARCHIVE)
    with pytest.raises(InputError):
        read_archive(tmp_path)


def test_records_are_merged(archive):
    inherited = of_rows([("group", "file", "pixels", bytes(HASH_BYTES))], archive.salt_fingerprint)
    merged = merge_archives(archive, inherited)
    assert rows(merged) == sorted(rows(archive) + rows(inherited)) and merged.salt_fingerprint == archive.salt_fingerprint
    assert rows(merge_archives(archive, None)) == rows(archive)


def test_groups_of_another_salt_are_dropped_and_their_hashes_kept(tmp_path, archive):
    theirs = evidence_of_cases(loaded(folder(tmp_path / "theirs", {"cat_1": 7}), salt="theirs"), fingerprint("theirs"))
    merged = merge_archives(archive, theirs)
    assert merged.salt_fingerprint == archive.salt_fingerprint
    ((_, *hashes),) = rows(theirs)
    assert rows(merged) == sorted([*rows(archive), ("", *hashes)])
    cases = loaded(folder(tmp_path / "test", {"cat_1": 8, "dan_1": 7}))
    assert evidence(merged, cases) == [("sha256 of the file", *SAME)]
    assert merged.thumbnail is None


def test_leaks_stop_unless_they_are_allowed_by_name(tmp_path, archive):
    loaded_cases = loaded(folder(tmp_path / "test", {"ann_9": 10, "cat_1": 2, "dan_1": 11}))
    leaks = find_leaks(archive, evidence_of_cases(loaded_cases, fingerprint()))
    cases = [one.case for one in loaded_cases]
    with pytest.raises(CheckFailed) as error:
        refuse_leaks(leaks, cases, "test", "the pretraining archive", allowed=False)
    message = str(error.value)
    assert message.startswith("2 test cases are among the pretraining archive:")
    assert "ann_9.png (group)" in message and "cat_1.png (sha256 of the file; sha256 of the pixels; percep" in message
    assert "dan_1" not in message
    assert "allow=[leak]" in message
    assert refuse_leaks(leaks, cases, "test", "the archive", allowed=True) == ["leak: 2 test cases are among the archive"]
    assert refuse_leaks([], cases, "test", "the archive", allowed=False) == []
    assert refuse_leaks([], cases, "test", "x", allowed=True) == []


def test_many_leaks_are_counted_and_some_named(tmp_path, archive):
    cases = loaded(folder(tmp_path / "test", {"ann_9": 10}))
    leaks = find_leaks(archive, evidence_of_cases(cases, fingerprint())) * 23
    with pytest.raises(CheckFailed, match=r"23 test cases(?s:.*)… and 3 more"):
        refuse_leaks(leaks, [one.case for one in cases], "test", "the archive", allowed=False)


@pytest.mark.parametrize("attack", ["jpeg", "resized", "rotated", "flipped"])
def test_a_copy_that_was_changed_is_found_by_its_look_alone(tmp_path, archive, attack):
    """Under another name and another salt, beside an encoder and with thumbnails."""
    (tmp_path / "test").mkdir()
    image, path = pixels(1), tmp_path / "test" / "anything.png"
    if attack == "jpeg":
        path.with_suffix(".jpg").write_bytes(jpeg(image))
    else:
        changed = {
            "resized": lambda: np.asarray(Image.fromarray(image).resize((51, 51), Image.Resampling.BICUBIC)),
            "rotated": lambda: np.rot90(image),
            "flipped": lambda: image[:, ::-1],
        }[attack]()
        Image.fromarray(np.ascontiguousarray(changed)).save(path)
    Image.fromarray(pixels(11)).save(tmp_path / "test" / "innocent.png")
    cases = loaded(tmp_path / "test", salt="theirs")
    (leak,) = find_leaks(archive, evidence_of_cases(cases, fingerprint("theirs")))
    assert cases[leak.row].case.stem == "anything"
    assert len(leak.evidence) == 1 and leak.evidence[0].startswith("perceptual, distance")
    verified = evidence_of_cases(loaded(tmp_path / "archive"), fingerprint())
    (leak,) = find_leaks(verified, evidence_of_cases(cases, fingerprint("theirs")))
    assert leak.evidence[0].startswith("perceptual, correlation 0.99") or leak.evidence[0].endswith("1.000")


def test_no_thumbnail_goes_beside_a_model(tmp_path):
    cases = loaded(folder(tmp_path / "archive", {"ann_1": 0}))
    write_archive(tmp_path / ARCHIVE, evidence_of_cases(cases, fingerprint()))
    assert cases[0].look.thumbnail.tobytes() not in (tmp_path / ARCHIVE).read_bytes()
    assert read_archive(tmp_path).thumbnail is None


def test_images_without_contrast_are_no_copies_of_each_other(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((20, 20), 7, np.uint8)).save(tmp_path / name / f"{name}.png")
    one, other = (evidence_of_cases(loaded(tmp_path / name), fingerprint()) for name in ("one", "other"))
    assert find_leaks(one, other) == []
