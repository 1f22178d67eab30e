import json
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from resunet.data.index import IndexRequest, index
from resunet.errors import InputError
from resunet.inference.inputs import Inputs, list_inputs


def image(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (9, 8), np.uint8)).save(path)
    return path


def nifti(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.eye(4)), path)
    return path


def series(folder: Path, number: int, names=("1.2.3", "1.2.4", "1.2.5")) -> list[Path]:
    """Slices from the highest to the lowest."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
        meta.MediaStorageSOPInstanceUID = f"1.2.{number}.{i + 1}"
        dataset = FileDataset(None, {}, preamble=b"\0" * 128, file_meta=meta)
        dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        dataset.SeriesInstanceUID, dataset.Rows, dataset.Columns = f"1.3.{number}", 4, 4
        dataset.ImagePositionPatient, dataset.ImageOrientationPatient = [0, 0, -i], [1, 0, 0, 0, 1, 0]
        dataset.save_as(folder / name, enforce_file_format=True)
    return [folder / name for name in names]


def listed(found: Inputs) -> dict[str, list[str]]:
    return {one.name: [path.name for path in one.case.files] for one in found.scans}


def test_files_are_called_by_their_stems(tmp_path):
    files = [image(tmp_path / "b" / "x.1.png"), nifti(tmp_path / "a" / "y.nii.gz"), nifti(tmp_path / "z.nii")]
    assert listed(list_inputs(files, "grey")) == {"x.1": ["x.1.png"], "y": ["y.nii.gz"], "z": ["z.nii"]}


def test_a_folder_keeps_its_shape(tmp_path):
    for name in ("a.png", "deep/er/a.png", "deep/b.png"):
        image(tmp_path / name)
    (tmp_path / "README.md").write_text("no scan")
    (tmp_path / "deep" / "broken.nii.gz").write_text("no scan either, but it says so")
    found = list_inputs([tmp_path], "grey")
    assert list(listed(found)) == ["a", "deep/b", "deep/broken", "deep/er/a"]
    assert found.strangers == 1 and found.faults == ()


def test_masks_beside_images_are_no_scans(tmp_path):
    image(tmp_path / "images" / "a.png"), image(tmp_path / "masks" / "a.png")
    assert listed(list_inputs([tmp_path], "grey")) == {"a": ["a.png"]}


def test_dicom_series_of_folders_and_of_files(tmp_path):
    up = ["1.2.5", "1.2.4", "1.2.3"]
    files = series(tmp_path / "ct", 1)
    assert listed(list_inputs([tmp_path / "ct"], "grey")) == {"ct": up}
    assert listed(list_inputs(files, "grey")) == {"ct": up}
    assert listed(list_inputs(files[:1], "grey")) == {"1.2.3": ["1.2.3"]}
    series(tmp_path / "mr", 2)
    image(tmp_path / "mr" / "x.png")
    assert listed(list_inputs([tmp_path], "grey")) == {"ct": up, "mr": up, "mr/x": ["x.png"]}
    series(tmp_path / "ct", 3, ("a.dcm", "b.dcm"))
    assert listed(list_inputs([tmp_path / "ct"], "grey")) == {"1.2.5": up, "b": ["b.dcm", "a.dcm"]}


def test_a_missing_slice_is_told(tmp_path, capsys):
    files = series(tmp_path / "ct", 1, ("1", "2", "3", "4", "5"))
    list_inputs(files, "grey")
    assert capsys.readouterr().err == ""
    list_inputs([*files[:2], *files[3:]], "grey")
    assert "1 DICOM volume has gaps: two neighbouring slices" in capsys.readouterr().err


def test_an_nnunet_data_set_and_its_test_images(tmp_path):
    root = tmp_path / "Dataset001"
    names = ["imagesTr/a", "imagesTr/b", "imagesTs/c"]
    for name in names:
        nifti(root / f"{name}_0000.nii.gz"), nifti(root / f"{name}_0001.nii.gz")
    about = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "x": 1}, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(about | {"numTraining": 2}))
    found = list_inputs([root], 2)
    assert listed(found) == {stem: [f"{stem}_0000.nii.gz", f"{stem}_0001.nii.gz"] for stem in "abc"}
    assert all(one.case.file_per_channel for one in found.scans)
    assert list(listed(list_inputs([root / "imagesTs"], 2))) == ["c"]
    one = [root / "imagesTs" / f"c_000{channel}.nii.gz" for channel in (0, 1)]
    assert listed(list_inputs(one[:1], 2)) == listed(list_inputs(one, 2)) == {"c": [path.name for path in one]}
    with pytest.raises(InputError, match="names 2 channels"):
        list_inputs([root], 4)


def test_a_manifest(tmp_path):
    for seed, name in enumerate(("a/x.png", "b/x.png", "b/y.png")):
        image(tmp_path / "scans" / name, seed)
    salt = tmp_path / "salt"
    salt.write_text("5a" * 32)
    manifest = index(IndexRequest((tmp_path / "scans",), tmp_path / "M.parquet", None, 1, salt))
    found = list_inputs([manifest], "grey")
    names = {one.name: one.case.files[0].relative_to(tmp_path / "scans").as_posix() for one in found.scans}
    assert sorted(names.values()) == ["a/x.png", "b/x.png", "b/y.png"]
    assert names.pop("y") == "b/y.png" and all(len(name) == 32 for name in names), "two are called x: by their ids"


def test_two_of_one_name_are_refused(tmp_path):
    image(tmp_path / "a" / "x.png"), image(tmp_path / "b" / "x.png"), nifti(tmp_path / "a" / "x.nii")
    for inputs in ([tmp_path / "a"], [tmp_path / "a" / "x.png", tmp_path / "b" / "x.png"]):
        with pytest.raises(InputError, match=r"x\.\w+ and .*x\.png would both be written as x\."):
            list_inputs(inputs, "grey")


def test_nothing_to_predict(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        list_inputs([image(tmp_path / "a.png"), tmp_path / "b.png"], "grey")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no scan there"):
        list_inputs([tmp_path / "empty"], "grey")


def test_a_dicom_file_without_an_image_is_a_fault_of_its_own(tmp_path):
    image(tmp_path / "a.png")
    (path,) = series(tmp_path / "plan", 1, ("a.dcm",))
    dataset = pydicom.dcmread(path)
    del dataset.Rows
    dataset.save_as(path)
    found = list_inputs([tmp_path], "grey")
    assert list(listed(found)) == ["a"] and len(found.faults) == 1 and "has no image" in found.faults[0]


def test_what_stands_in_a_study_beside_its_images_is_passed_over(tmp_path):
    series(tmp_path / "study", 1)
    mask, structures = series(tmp_path / "study", 2, ("mask.dcm", "structures.dcm"))
    for path, modality in ((mask, "SEG"), (structures, "RTSTRUCT")):
        dataset = pydicom.dcmread(path)
        dataset.Modality = modality
        if modality == "RTSTRUCT":
            del dataset.Rows
        dataset.save_as(path)
    found = list_inputs([tmp_path / "study"], "grey")
    assert (listed(found), found.faults, found.strangers) == ({"study": ["1.2.5", "1.2.4", "1.2.3"]}, (), 2)
    image(tmp_path / "a.png")
    named = list_inputs([tmp_path / "a.png", mask, structures], "grey")
    assert list(listed(named)) == ["a"] and named.strangers == 0, "somebody meant these"
    assert "mask.dcm: is no scan but a DICOM file of modality SEG" in named.faults[0] and "has no image" in named.faults[1]
