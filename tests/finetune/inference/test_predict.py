from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image
from torch import nn

from finetune.inference.predict import PredictRequest, predict, predict_case
from finetune.inference.window import Inference
from resunet.checkpoint import ModelConfig
from resunet.data.cases import Case, LoadedCase, load_cases
from resunet.errors import InputError
from resunet.model import ResUNet

CPU = torch.device("cpu")
CLASSES = {0: "background", 7: "lesion", 200: "tumour"}
PLAIN = PredictRequest()


def write_model(folder: Path, channels: str | int = "grey", num_classes: int = 3, spatial_dims: int = 2) -> Path:
    """A network with random weights whose head is large, so that all classes are predicted somewhere."""
    torch.manual_seed(0)
    count = {"grey": 1, "rgb": 3}.get(channels, channels)
    network = ResUNet(count, num_classes, (4, 4, 4, 4, 8), units=1, spatial_dims=spatial_dims)
    nn.init.normal_(network.head.weight)
    classes = dict(list(CLASSES.items())[:num_classes])
    network.config = ModelConfig(architecture=network.config.architecture, input_channels=channels, classes=classes)
    network.save_pretrained(folder)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def volume(path: Path, *shape: int, seed: int = 0, pixdim=(1, 1, 5)) -> Path:
    values = np.random.default_rng(seed).integers(-500, 2000, shape).astype(np.int16)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([*pixdim, 1.0])), path)
    return path


def picture(path: Path, *shape: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(1).integers(0, 255, shape, np.uint8)).save(path)
    return path


def loaded(path: Path, channels="grey") -> LoadedCase:
    (one,) = load_cases(
        [Case("a", "a", "a", "a", None, (path,), None)], channels, ModelConfig.model_fields["normalisation"].default
    )
    return one


def test_what_is_written_is_what_evaluation_measures(tmp_path, model):
    """With the model's own mask values, in the file's frame."""
    from resunet.model import load_model

    path = volume(tmp_path / "scans" / "v.nii.gz", 12, 20, 3)
    image = picture(tmp_path / "scans" / "i.png", 23, 17)
    done = predict(model, [tmp_path / "scans"], tmp_path / "out", PLAIN)
    assert (done.out, done.written, done.faults) == (tmp_path / "out", 2, ())
    assert sorted(file.name for file in done.out.iterdir()) == ["i.png", "v.nii.gz"]
    network, raw = load_model(model), np.array(list(CLASSES))
    measured = raw[predict_case(network, loaded(path), CPU, "fp32")]
    assert set(np.unique(measured)) == set(CLASSES)
    scan = sitk.DICOMOrient(sitk.ReadImage(str(done.out / "v.nii.gz")), "LPS")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(scan), measured)
    np.testing.assert_array_equal(
        np.asarray(Image.open(done.out / "i.png")), raw[predict_case(network, loaded(image), CPU, "fp32")]
    )


def test_settings_reach_the_network(tmp_path, model):
    from resunet.model import load_model

    path = volume(tmp_path / "v.nii", 12, 20, 3)
    plain, mirrored = (
        nibabel.load(predict(model, [path], tmp_path / name, request).out / "v.nii")
        for name, request in (("a", PredictRequest(probabilities=True)), ("b", PredictRequest(probabilities=True, flips=True)))
    )
    assert plain.shape == mirrored.shape == (12, 20, 3, 3) and plain.get_data_dtype() == np.float32
    assert np.abs(plain.get_fdata() - mirrored.get_fdata()).max() > 0.01
    labels = predict_case(load_model(model), loaded(path), CPU, "fp32", Inference(flips=True))
    found = sitk.GetArrayFromImage(sitk.DICOMOrient(sitk.ReadImage(str(tmp_path / "b" / "v.nii"))[:, :, :, 0], "LPS"))
    assert ((found < 1 / 3) | (labels == 0)).mean() > 0.6  # the background's share is small where it was not chosen
    with pytest.raises(InputError, match=r"memory=0\.3 GiB: too little for a scan of 1 × 3 × 20 × 12"):
        predict(model, [path], tmp_path / "c", PredictRequest(memory=0.3))


def test_an_image_smaller_than_the_stride(tmp_path, model):
    out = predict(model, [picture(tmp_path / "a.png", 3, 2)], tmp_path / "out", PLAIN).out
    assert np.asarray(Image.open(out / "a.png")).shape == (3, 2)


def test_good_files_are_predicted_and_bad_ones_listed(tmp_path, model, capsys):
    picture(tmp_path / "in" / "good.png", 9, 9)
    (tmp_path / "in" / "cut.png").write_bytes((tmp_path / "in" / "good.png").read_bytes()[:60])
    volume(tmp_path / "in" / "zero.nii", 5, 5, 5)
    content = bytearray((tmp_path / "in" / "zero.nii").read_bytes())
    content[80:84] = np.float32(0).tobytes()  # pixdim[1]
    content[252:256] = bytes(4)  # no qform, no sform
    (tmp_path / "in" / "zero.nii").write_bytes(content)
    sitk.WriteImage(sitk.Image([4, 4, 4], sitk.sitkVectorInt16, 4), str(tmp_path / "in" / "many.nrrd"))
    done = predict(model, [tmp_path / "in"], tmp_path / "out", PLAIN)
    assert done.written == 1 and [path.name for path in done.out.iterdir()] == ["good.png"]
    said = capsys.readouterr().err
    assert len(done.faults) == 3 and "the spacing in its header is 0 × 1 × 5 mm" in said
    for name in ("cut.png", "zero.nii", "many.nrrd"):
        assert sum(f"{name}: " in fault for fault in done.faults) == 1 and said.count(f"{name}: ") == 1


def test_another_number_of_channels(tmp_path, capsys):
    four, rgb = write_model(tmp_path / "four", 4), write_model(tmp_path / "rgb", "rgb")
    path = volume(tmp_path / "a.nii", 5, 5, 5)
    with pytest.raises(InputError, match=r"a\.nii: has 1 channel, 4 is wanted") as caught:
        predict(four, [path], tmp_path / "out", PLAIN)
    assert "by the model, which was trained so" in str(caught.value) and not (tmp_path / "out").exists()
    picture(tmp_path / "grey.png", 9, 9)  # grey as three equal channels, as the recipe's 'rgb' says
    assert predict(rgb, [tmp_path / "grey.png"], tmp_path / "out", PLAIN).written == 1
    with pytest.raises(InputError, match="none of 2 inputs could be predicted; nothing was written"):
        predict(four, [path, tmp_path / "grey.png"], tmp_path / "two", PLAIN)
    assert not (tmp_path / "two").exists() and capsys.readouterr().err.count("4 is wanted") == 2


def test_nothing_is_overwritten(tmp_path, model):
    out = tmp_path / "out"
    out.mkdir()
    path = picture(tmp_path / "a.png", 9, 9)
    assert predict(model, [path], out, PLAIN).written == 1  # an empty folder is as good as a new one
    before = (out / "a.png").read_bytes()
    with pytest.raises(InputError, match="exists already, and is not empty"):
        predict(model, [picture(tmp_path / "b.png", 7, 7)], out, PLAIN)
    with pytest.raises(InputError, match="exists already"):
        predict(model, [path], path, PLAIN)
    assert [(one.name, one.read_bytes()) for one in out.iterdir()] == [("a.png", before)]


def test_only_a_model_with_classes_predicts(tmp_path):
    ResUNet(1, 2, (4, 8)).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=r"config\.json names no classes"):
        predict(tmp_path / "model", [tmp_path], tmp_path / "out", PLAIN)


def oblique(path: Path, *shape: int) -> np.ndarray:
    """Voxels of 1 × 1 × 5 mm, turned about two axes, z and x swapped, one axis mirrored; the affine."""
    a, b = np.deg2rad([20, -15])
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    turn = turn @ np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.array([[0, 0, 5], [0, -1, 0], [1, 0, 0]])
    affine[:3, 3] = 12.5, -30, 7
    values = np.random.default_rng(0).integers(-500, 2000, shape).astype(np.int16)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    return nibabel.load(path).affine


def test_a_model_of_volumes_writes_the_geometry_of_its_input(tmp_path):
    from resunet.model import load_model

    model = write_model(tmp_path / "model", spatial_dims=3)
    affine = oblique(tmp_path / "in" / "o.nii.gz", 20, 22, 5)
    source = sitk.ReadImage(str(tmp_path / "in" / "o.nii.gz"))
    sitk.WriteImage(source, str(tmp_path / "in" / "n.nrrd"))
    out = predict(model, [tmp_path / "in"], tmp_path / "out", PLAIN).out
    written = nibabel.load(out / "o.nii.gz")
    assert (written.affine == affine).all() and written.shape == (20, 22, 5)
    raw = np.array(list(CLASSES))
    expected = raw[predict_case(load_model(model), loaded(tmp_path / "in" / "o.nii.gz"), CPU, "fp32")]
    assert len(np.unique(expected)) > 1
    for name in ("o.nii.gz", "n.nrrd"):
        mask = sitk.ReadImage(str(out / name))
        for part in ("GetOrigin", "GetSpacing", "GetDirection"):
            assert getattr(mask, part)() == pytest.approx(getattr(source, part)(), abs=1e-6)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.DICOMOrient(mask, "LPS")), expected)


def test_a_model_of_volumes_takes_no_image(tmp_path):
    model = write_model(tmp_path / "model", spatial_dims=3)
    with pytest.raises(InputError, match=r"a\.png: is an image of 20 × 30 pixels; this model is of volumes"):
        predict(model, [picture(tmp_path / "a.png", 20, 30)], tmp_path / "out", PLAIN)
    assert not (tmp_path / "out").exists()
