"""One archive with a little of everything, indexed once; then what happens to it. Each index starts processes: few of them."""

import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pydicom
import pytest
import SimpleITK as sitk
import tifffile
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from resunet.data.describe import PERCENTILES
from resunet.data.identity import Salt
from resunet.data.index import IndexRequest, index
from resunet.data.manifest import ROWS, beside, open_manifest, path_from
from resunet.data.pool import Limits
from resunet.errors import EnvironmentFault, InputError

# Planted wherever a name may stand; also the days and the places.
SECRETS = ("Quellbrunn", "QB-4711", "Zettelwirt", "OTHER-9931", "ACC-77120", "19610203", "Sankt-Nimmer", "Waldfried")
KEY = bytes(range(32))


def image(seed, size=(40, 48), dtype=np.uint8):
    """Smooth, and no copy of another."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, np.iinfo(dtype).max, (5, 6)).astype(np.float64)
    return np.kron(coarse, np.ones((size[0] // 5, size[1] // 6))).astype(dtype)


def write_slice(path, series, number, patient="QB-4711", study="1.2.3.4", seed=None):
    data = pydicom.Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid(entropy_srcs=[str(path)])
    data.PatientID, data.PatientName, data.OtherPatientIDs = patient, "Quellbrunn^Waldfried", "OTHER-9931"
    data.AccessionNumber, data.InstitutionName, data.PatientBirthDate = "ACC-77120", "Sankt-Nimmer", "19610203"
    data.StudyDate, data.SeriesDescription, data.Modality = "19610203", "Quellbrunn", "CT"
    data.StudyInstanceUID, data.SeriesInstanceUID, data.InstanceNumber = study, series, number
    data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, 2.5 * number], [1, 0, 0, 0, 1, 0]
    data.PixelSpacing, data.SliceThickness = [0.5, 0.75], 2.5
    pixels = image(1000 + number if seed is None else seed, dtype=np.uint16) // 16
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 12, 11
    data.PixelData = pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return pixels


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, pixels) if path.suffix == ".tif" else Image.fromarray(pixels).save(path)


def plant(root):
    """The archive. A patient is in the headers of two series, one under the ending .png, and by name in groups.csv."""
    for number in range(4):
        write_slice(root / "Quellbrunn_Waldfried" / f"IM{number}", "1.2.3.4.5", number)
    write_slice(root / "other" / "QB-4711.png", "1.2.3.4.6", 1, seed=7)
    write_slice(root / "other" / "nobody.dcm", "1.2.9.9.1", 1, patient="", study="1.2.9", seed=8)
    write_slice(root / "other" / "nobody2.dcm", "1.2.9.9.2", 1, patient="", study="1.2.9", seed=9)
    for name, seed in (("Zettelwirt", 1), ("second", 2), ("third", 3)):
        save(root / "set" / "images" / f"{name}.png", image(seed))
        save(root / "set" / "masks" / f"{name}.png", image(seed + 50))
    (root / "set" / "groups.csv").write_text("stem,group\nZettelwirt,QB-4711\nsecond,QB-4711\n")
    (root / "set" / "splits.json").write_text('{"pool": ["Zettelwirt", "second"], "val": ["third"], "test": []}')
    save(root / "grey16.tif", image(4, dtype=np.uint16))
    save(root / "colour.jpg", np.stack([image(seed) for seed in (5, 6, 7)], axis=-1))
    volume = sitk.GetImageFromArray(np.stack([image(seed).astype(np.float32) / 3 for seed in range(20, 26)]))
    volume.SetSpacing((0.7, 0.8, 3.0))
    sitk.WriteImage(volume, root / "volume.nii.gz")
    (root / "link.png").symlink_to("set/images/third.png")
    (root / "loop").symlink_to(".")
    (root / "gone.png").symlink_to("Quellbrunn.png")
    (root / "Quellbrunn.txt").write_text("no scan")
    (root / "cut.png").write_bytes((root / "set" / "images" / "second.png").read_bytes()[:60])
    (root / "header.QB-4711").write_text("no scan")
    (root / "header.mhd").write_text(
        "ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_UCHAR\nElementDataFile = Quellbrunn.raw\n"
    )
    shutil.copy(root / "grey16.tif", os.fsencode(root) + b"/\xffold\nname.tif")


def request(sources, out, **changes):
    salt = out.parent / "salt"
    out.parent.mkdir(exist_ok=True, parents=True)
    if not salt.exists():
        salt.write_text(KEY.hex())
    return IndexRequest((sources,), out, workers=2, salt_file=salt, **changes)


def written(out):
    """name → bytes of a manifest's files."""
    return {path.name: path.read_bytes() for path in out.parent.iterdir() if path.name != "salt"}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    root = tmp_path_factory.mktemp("archive")
    plant(root)
    return root


@pytest.fixture(scope="module")
def indexed(archive, tmp_path_factory):
    """The manifest, and what a person saw."""
    out = tmp_path_factory.mktemp("indexed") / "m.parquet"
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr(
            "sys.stderr",
            type(
                "Log",
                (),
                {"write": lambda self, text: lines.append(text), "flush": lambda self: None, "isatty": lambda self: False},
            )(),
        )
        index(request(archive, out))
    return open_manifest(out), "".join(lines)


@pytest.fixture(scope="module")
def rows(archive, indexed):
    """Path of the first file below the archive → row."""
    manifest, _ = indexed
    table = pq.read_table(manifest.path).to_pylist()
    return {os.path.relpath(manifest.files(i)[0], archive): row for i, row in enumerate(table)}


def test_every_readable_scan_has_a_row_and_every_other_file_a_reason(archive, indexed, rows):
    images = {f"set/images/{name}.png" for name in ("Zettelwirt", "second", "third")}
    old = os.fsdecode(b"\xffold\nname.tif")
    others = {
        "other/QB-4711.png",
        "other/nobody.dcm",
        "other/nobody2.dcm",
        "grey16.tif",
        "colour.jpg",
        "volume.nii.gz",
        "link.png",
        old,
    }
    assert set(rows) == images | others | {"Quellbrunn_Waldfried/IM0"}
    rejects = pq.read_table(beside(indexed[0].path, "rejects.parquet")).to_pylist()
    reasons = {os.path.relpath(path_from(one["path"]), archive): one["reason"] for one in rejects}
    assert list(reasons) == sorted(reasons) == ["Quellbrunn.txt", "cut.png", "gone.png", "header.QB-4711", "header.mhd"]
    assert reasons["gone.png"] == "a link to nowhere"
    assert reasons["Quellbrunn.txt"].startswith(".txt is not a format this reads: .nii,")
    assert all(reasons.values())


def test_rows_are_what_other_readers_find(archive, rows):
    expected = {
        "set/images/second.png": (np.asarray(Image.open(archive / "set/images/second.png")), (1, 1), "png"),
        "grey16.tif": (tifffile.imread(archive / "grey16.tif"), (1, 1), "tiff"),
        "colour.jpg": (np.moveaxis(np.asarray(Image.open(archive / "colour.jpg")), -1, 0), (1, 1), "jpeg"),
        "link.png": (np.asarray(Image.open(archive / "set/images/third.png")), (1, 1), "png"),
    }
    volume = sitk.ReadImage(archive / "volume.nii.gz")
    expected["volume.nii.gz"] = (sitk.GetArrayFromImage(volume), volume.GetSpacing()[::-1], "nifti")
    series = sitk.ReadImage([str(archive / "Quellbrunn_Waldfried" / f"IM{number}") for number in range(4)])
    expected["Quellbrunn_Waldfried/IM0"] = (sitk.GetArrayFromImage(series), series.GetSpacing()[::-1], "dicom")
    for name, (values, spacing, format) in expected.items():
        row = rows[name]
        colour = values.ndim == 3 and format == "jpeg"
        assert (row["format"], row["dtype"], row["channels"]) == (format, values.dtype.name, 3 if colour else 1)
        assert tuple(row["shape"]) == (values.shape[1:] if colour else values.shape)
        assert np.allclose(row["spacing"], spacing, rtol=1e-6)
        assert np.allclose(row["percentiles"], np.percentile(values, PERCENTILES), rtol=1e-6)
    assert len({row["pixel_sha256"] for row in rows.values()}) == len(rows) - 2  # the link, and the copy with the old name


def test_hashes_and_sizes_are_those_of_the_files(archive, rows):
    for name in ("set/images/second.png", "volume.nii.gz", "link.png"):
        data = (archive / name).read_bytes()
        assert (rows[name]["file_sha256"], rows[name]["bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))
    slices = [(archive / "Quellbrunn_Waldfried" / f"IM{number}").read_bytes() for number in range(4)]
    series = rows["Quellbrunn_Waldfried/IM0"]
    digests = "".join(hashlib.sha256(data).hexdigest() for data in slices)
    assert series["file_sha256"] == hashlib.sha256(digests.encode()).hexdigest()
    assert (series["files"], series["bytes"], series["modality"]) == (4, sum(map(len, slices)), "CT")


def test_ids_groups_masks_and_splits(archive, indexed, rows):
    salt = Salt(KEY)
    assert rows["grey16.tif"]["id"] == salt.identify("file", "grey16.tif")
    patient = salt.identify("group", "QB-4711")
    theirs = {name for name, row in rows.items() if row["group"] == patient}
    assert theirs == {"Quellbrunn_Waldfried/IM0", "other/QB-4711.png", "set/images/Zettelwirt.png", "set/images/second.png"}
    assert rows["other/nobody.dcm"]["group"] == rows["other/nobody2.dcm"]["group"] == salt.identify("study", "1.2.9")
    assert rows["other/nobody.dcm"]["series"] == salt.identify("series", "1.2.9.9.1")
    assert rows["grey16.tif"]["group"] == salt.identify("path", os.path.realpath(archive / "grey16.tif"))
    assert rows["link.png"]["group"] == rows["set/images/third.png"]["group"]  # one file
    assert rows["set/images/third.png"]["split"] == "val" and rows["grey16.tif"]["split"] is None
    manifest, _ = indexed
    assert manifest.files_of(rows["set/images/third.png"]["mask"]) == (archive / "set/masks/third.png",)
    assert rows["volume.nii.gz"]["mask"] is None
    assert not manifest.groups_known


def test_rows_are_sorted_and_have_the_schema(indexed):
    manifest, _ = indexed
    table = pq.read_table(manifest.path)
    assert table.schema.remove_metadata().equals(ROWS)
    ids = table.column("id").to_pylist()
    assert ids == sorted(set(ids))
    paths = pq.read_table(beside(manifest.path, "paths.parquet"))
    keys = list(zip(paths.column("id").to_pylist(), paths.column("order").to_pylist(), strict=True))
    assert keys == sorted(keys)


def test_nothing_but_the_paths_names_anybody(indexed):
    manifest, said = indexed
    secrets = [re.compile(re.escape(secret), re.IGNORECASE) for secret in SECRETS]
    secrets += [re.compile(re.escape(uid)) for uid in ("1.2.3.4", "1.2.9")]
    for name, data in written(manifest.path).items():
        values = [repr(pq.read_table(manifest.path.parent / name).to_pylist())] if name.endswith(".parquet") else []
        if name in ("m.paths.parquet", "m.rejects.parquet"):
            table = pq.read_table(manifest.path.parent / name).drop_columns(["path"])
            data, values = b"", [repr(table.to_pylist()), repr(table.schema)]
        for text in (name, data.decode("latin-1"), *values, said):
            assert [secret.pattern for secret in secrets if secret.search(text)] == [], name


def test_what_holds_paths_is_private(indexed):
    modes = {path.name: path.stat().st_mode & 0o777 for path in indexed[0].path.parent.iterdir() if path.name != "salt"}
    assert {name for name, mode in modes.items() if mode == 0o600} == {"m.paths.parquet", "m.rejects.parquet"}
    assert len(modes) == 5  # rows, paths, rejects, thumbnails, page; no parts, no locks, nothing aside


def test_a_second_run_reads_nothing_and_changes_nothing(archive, indexed, capsys):
    manifest, _ = indexed
    before = written(manifest.path)
    index(request(archive, manifest.path))
    assert " files, 0 of them new or changed" in capsys.readouterr().err
    assert written(manifest.path) == before


def test_what_changed_is_read_and_the_result_is_that_of_a_fresh_index(archive, indexed, tmp_path, capsys):
    """Also after a run that ended before it could write the manifest: what it read is kept."""
    root = tmp_path / "archive"
    shutil.copytree(archive, root, symlinks=True)
    out, fresh = tmp_path / "one" / "m.parquet", tmp_path / "two" / "m.parquet"
    splits = root / "set" / "splits.json"
    good = splits.read_text(encoding="utf-8")
    shutil.copy(root / "other" / "QB-4711.png", root / "set" / "images" / "fourth.png")  # groups.csv does not know it,
    splits.write_text('{"pool": ["Zettelwirt"], "val": ["fourth"], "test": []}')  # but its header is of the same patient
    with pytest.raises(InputError, match="both are of one patient"):
        index(request(root, out))
    capsys.readouterr()
    parts = out.parent / "m.parts"
    assert parts.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in parts.iterdir()} == {0o600}
    assert not any(
        secret.encode() in path.read_bytes() for path in parts.glob("files*") for secret in ("OTHER-9931", "1.2.3.4")
    )

    splits.write_text(good)
    (parts / "scans-000099.parquet").write_bytes(b"cut off")
    index(request(root, out))
    assert " 0 of them new" in capsys.readouterr().err
    (root / "Quellbrunn_Waldfried" / "IM3").unlink()
    (root / "volume.nii.gz").unlink()
    save(root / "grey16.tif", image(44, dtype=np.uint16))
    save(root / "new.png", image(45))
    (out.parent / f".m.paths.parquet.{'0' * 32}").write_text("left by a kill")
    index(request(root, out))
    assert " 2 of them new" in capsys.readouterr().err
    index(request(root, fresh))
    assert written(out) == written(fresh)
    by_name = {
        os.path.relpath(manifest_files[0], root): len(manifest_files) for manifest_files in all_files(open_manifest(out))
    }
    assert by_name["Quellbrunn_Waldfried/IM0"] == 3 and "new.png" in by_name and "volume.nii.gz" not in by_name


def session_of(pid):
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def all_files(manifest):
    return [manifest.files(row) for row in range(manifest.num_rows)]


def test_another_salt_hides_other_names_and_no_pixels_are_read_again(archive, indexed, tmp_path, capsys):
    manifest, _ = indexed
    out = tmp_path / "m.parquet"
    shutil.copytree(manifest.path.parent, tmp_path, dirs_exist_ok=True)
    (tmp_path / "salt").write_text(bytes(32).hex())
    index(request(archive, out))
    assert " 7 of them new" in capsys.readouterr().err  # the headers
    other = open_manifest(out)
    assert other.salt_fingerprint != manifest.salt_fingerprint
    assert not set(other.column("group").to_pylist()) & set(manifest.column("group").to_pylist())
    assert sorted(other.column("pixel_sha256").to_pylist()) == sorted(manifest.column("pixel_sha256").to_pylist())
    assert len(list(tmp_path.glob("*.npy"))) == 1


def test_a_broken_slice_costs_itself_only_and_leaves_a_gap_that_is_told(tmp_path, capsys):
    for number in range(4):
        write_slice(tmp_path / "a" / f"IM{number}", "1.2.3", number)
    path = tmp_path / "a" / "IM2"
    data = pydicom.dcmread(path)
    data.PixelData = data.PixelData[:100]
    data.save_as(path)
    out = tmp_path / "a" / "m.parquet"  # in its own archive, which it is no part of
    for _ in range(2):
        index(request(tmp_path / "a", out))
        manifest = open_manifest(out)
        assert [[file.name for file in files] for files in all_files(manifest)] == [["IM0", "IM1", "IM3"]]
        rejects = pq.read_table(beside(out, "rejects.parquet")).to_pylist()
        assert [Path(one["path"]).name for one in rejects] == ["IM2", "salt"]
        told = capsys.readouterr().err
        assert "1 DICOM volume has gaps: two neighbouring slices lie more than 1.5 times as far apart" in told
        assert f"the 3 files from {tmp_path / 'a' / 'IM0'}" in told


def test_masks_of_another_folder_and_a_damaged_manifest(tmp_path, capsys):
    root, out = tmp_path / "root", tmp_path / "m.parquet"
    save(root / "deep" / "a.png", image(1))
    save(root / "b.png", image(2))
    save(root / "labels" / "deep" / "a.tif", image(3))
    out.write_bytes(b"PAR1 and no more")
    index(request(root, out, masks=root / "labels"))
    assert "is not used, everything is read again" in capsys.readouterr().err
    manifest = open_manifest(out)
    masks = {manifest.files(i)[0].name: mask for i, mask in enumerate(manifest.column("mask").to_pylist())}
    assert set(masks) == {"a.png", "b.png"} and masks["b.png"] is None
    assert manifest.files_of(masks["a.png"]) == (root / "labels" / "deep" / "a.tif",)


def test_an_output_that_is_something_else_or_in_use(archive, indexed, tmp_path):
    with pytest.raises(InputError, match=r"ends in .parquet"):
        index(request(archive, tmp_path / "m.csv"))
    pq.write_table(pq.read_table(indexed[0].path).replace_schema_metadata(None), tmp_path / "mine.parquet")
    with pytest.raises(InputError, match="is no manifest and would be replaced"):
        index(request(archive, tmp_path / "mine.parquet"))
    (tmp_path / "m.parts").mkdir()
    with open(tmp_path / "m.parts" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another resunet index is writing it"):
            index(request(archive, tmp_path / "m.parquet"))
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        index(IndexRequest((archive,), tmp_path / "file" / "m.parquet", salt_file=tmp_path / "salt"))


def test_an_archive_with_nothing_to_read(tmp_path):
    with pytest.raises(InputError, match="no files there"):
        index(request(tmp_path, tmp_path / "out" / "m.parquet", masks=tmp_path / "out"))
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(InputError, match=r"none of 1 files can be read:\n.*a.png: "):
        index(request(tmp_path / "a.png", tmp_path / "out" / "m.parquet"))


def test_sigterm_keeps_what_was_read_and_leaves_nobody_behind(archive, indexed, tmp_path):
    """The real command; stopped, then run to its end."""
    command = [sys.executable, "-m", "resunet", "index", str(archive), "--out", str(tmp_path / "m.parquet"), "--workers", "2"]
    command += ["--salt-file", str(indexed[0].path.parent / "salt")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8", start_new_session=True) as process:
        first = process.stderr.readline()
        os.killpg(process.pid, signal.SIGTERM)  # as a batch system does: the workers get it, too
        rest = process.stderr.read()
        assert process.wait() == 143, first + rest
    assert "new or changed" in first and "goes on where it was" in rest and "Traceback" not in rest
    theirs = [one for one in psutil.process_iter() if session_of(one.pid) == process.pid]
    assert not psutil.wait_procs(theirs, timeout=10)[1]
    assert not (tmp_path / "m.parquet").exists()
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'm.parquet'}\n"), done.stderr
    assert written(tmp_path / "m.parquet") == written(indexed[0].path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_rejected_until_it_may(tmp_path):
    root, out = tmp_path / "root", tmp_path / "m.parquet"
    for number in range(2):
        save(root / f"{number}.png", image(number))
    (root / "1.png").chmod(0)
    index(request(root, out))
    (reject,) = pq.read_table(beside(out, "rejects.parquet")).to_pylist()
    assert reject["reason"] == "cannot be read: Permission denied"
    (root / "1.png").chmod(0o600)
    index(request(root, out))
    assert open_manifest(out).num_rows == 2


def test_limits_that_were_raised_are_tried(tmp_path):
    save(tmp_path / "a" / "big.png", np.tile(image(1), (100, 100)))
    save(tmp_path / "a" / "small.png", image(2))
    out = tmp_path / "m.parquet"
    index(request(tmp_path / "a", out, limits=Limits(gib=0.02)))
    (reject,) = pq.read_table(beside(out, "rejects.parquet")).to_pylist()
    assert "memory" in reject["reason"] or "GiB" in reject["reason"] or "brought the reader down" in reject["reason"]
    index(request(tmp_path / "a", out))
    assert open_manifest(out).num_rows == 2
