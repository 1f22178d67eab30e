"""A bundle predicts what its model predicts, in the same files; and it needs no PyTorch for it."""

import re
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from PIL import Image

from resunet.bundle import Bundle
from resunet.cli import main
from resunet.errors import InputError

BLOCKED = ("torch", "torchvision", "monai", "omegaconf", "accelerate", "pyarrow", "highdicom", "lightly", "scipy")


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of odd sizes, an oblique volume, a volume that is sliced along another axis, a TIFF with a resolution."""
    folder = tmp_path_factory.mktemp("scans")
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 255, (33, 47), np.uint8)).save(folder / "a.png")
    Image.fromarray(random.integers(0, 255, (1, 9), np.uint8)).save(folder / "thin.png")
    picture = random.integers(0, 60000, (40, 31)).astype(np.uint16)
    tifffile.imwrite(folder / "b.tif", picture, resolution=(300, 150), resolutionunit="INCH")
    turned = sitk.GetImageFromArray(random.integers(-500, 1500, (5, 24, 21)).astype(np.int16))
    turned.SetSpacing((0.7, 0.8, 4.0))
    turned.SetOrigin((10.0, -20.0, 30.5))
    turned.SetDirection((0.0, -1.0, 0.0, 0.8, 0.0, -0.6, 0.6, 0.0, 0.8))
    sitk.WriteImage(turned, str(folder / "oblique.nii.gz"))
    sitk.WriteImage(turned, str(folder / "turned.nrrd"))
    return folder


def same_files(first: Path, second: Path, tolerance: float = 0) -> set[str]:
    """Checks that two folders hold the same masks, or probabilities, in the same geometry; which ones."""
    names = {path.name for path in first.iterdir()}
    assert names == {path.name for path in second.iterdir()}
    for name in names:
        one, other = first / name, second / name
        if tolerance == 0:
            assert one.read_bytes() == other.read_bytes() or name.endswith(".gz"), name
        if name.endswith(".gz"):
            images = [nibabel.load(path) for path in (one, other)]
            np.testing.assert_array_equal(images[0].affine, images[1].affine)
            values = [np.asarray(image.dataobj) for image in images]
        elif name.endswith(".nrrd"):
            values = [sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in (one, other)]
        elif ".tif" in name:
            values = [tifffile.imread(path) for path in (one, other)]
        else:
            values = [np.asarray(Image.open(path)) for path in (one, other)]
        assert values[0].dtype == values[1].dtype and (len(np.unique(values[0])) > 1 or name.startswith("thin"))
        np.testing.assert_allclose(values[0], values[1], atol=tolerance)
    return names


@pytest.mark.parametrize(
    "options, tolerance",
    [
        ([], 0),
        (["--tta"], 0),
        (["--threshold", "0.3"], 0),
        (["--operating-point"], 0),
        (["--probabilities", "--tta"], 1e-5),
        (["--runtime", "onnxruntime"], 0),
    ],
)
def test_files_are_those_of_the_model(exported, scans, tmp_path, options, tolerance):
    model, bundle = exported
    theirs = [option for option in options if option not in ("--runtime", "onnxruntime")]
    assert main(["predict", str(model), str(scans), "--out", str(tmp_path / "model"), *theirs]) == 0
    assert main(["predict", str(bundle), str(scans), "--out", str(tmp_path / "bundle"), *options]) == 0
    assert len(same_files(tmp_path / "model", tmp_path / "bundle", tolerance)) == 5


def test_windows_are_those_of_the_model(exported, tmp_path):
    """What does not fit into the memory that both are given is seen through windows."""
    model, bundle = exported
    (tmp_path / "scans").mkdir()
    values = np.random.default_rng(0).integers(0, 255, (900, 700), np.uint8)
    Image.fromarray(values).save(tmp_path / "scans" / "large.png")
    options = ["--memory", "1.3", "--window", "64", "--overlap", "0.5"]
    for name, what in (("model", model), ("bundle", bundle)):
        assert main(["predict", str(what), str(tmp_path / "scans"), "--out", str(tmp_path / name), *options]) == 0
    assert main(["predict", str(bundle), str(tmp_path / "scans"), "--out", str(tmp_path / "whole")]) == 0
    same_files(tmp_path / "model", tmp_path / "bundle")
    assert (tmp_path / "whole" / "large.png").read_bytes() != (tmp_path / "bundle" / "large.png").read_bytes()


COMMAND = "from resunet.cli import main; sys.exit(main(sys.argv[1:]))"


def without_torch(*arguments: str, code: str = COMMAND, blocked: tuple[str, ...] = BLOCKED) -> subprocess.CompletedProcess[str]:
    """`resunet …` in a process where what a product does not have cannot be imported; pydantic may be, by typer."""
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); {code}"
    return subprocess.run([sys.executable, "-P", "-c", code, *arguments], capture_output=True, encoding="utf-8", check=False)


def test_it_needs_no_pytorch(exported, scans, tmp_path):
    model, bundle = exported
    zipped = bundle.with_name(f"{bundle.name}.zip")
    done = without_torch("verify", str(zipped))
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines()[2:]] == ["equal", "equal", "installed"]
    done = without_torch("predict", str(zipped), str(scans), "--out", str(tmp_path / "bundle"))
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "bundle"), done.stderr
    assert main(["predict", str(model), str(scans), "--out", str(tmp_path / "model")]) == 0
    same_files(tmp_path / "model", tmp_path / "bundle")


def test_neither_does_the_example_in_the_readme(exported, scans, tmp_path):
    """As it stands there, but for its paths; without pydantic and typer, too."""
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(from resunet.bundle.*?)```", readme, re.DOTALL)
    assert len(example.splitlines()) <= 10
    code = example.replace("tumour.bundle", str(exported[1])).replace("scan.nii.gz", str(scans / "oblique.nii.gz"))
    done = without_torch(code=f"exec({code!r})", blocked=(*BLOCKED, "pydantic", "typer"))
    assert done.returncode == 0, done.stderr
    labels = Bundle.open(exported[1]).segmenter().predict_scan(scans / "oblique.nii.gz")
    assert str(int((labels == 1).sum())) in done.stdout


def test_what_a_product_does_not_have_is_named(exported, scans, tmp_path):
    manifest = tmp_path / "m.parquet"
    manifest.write_bytes(b"")
    done = without_torch("predict", str(exported[1]), str(manifest), "--out", str(tmp_path / "a"))
    assert done.returncode == 3 and "needs pyarrow" in done.stderr, done.stderr
    done = without_torch("predict", str(exported[1]), str(scans), "--out", str(tmp_path / "a"), "--runtime", "pytorch")
    assert done.returncode == 3 and "PyTorch is needed, and not installed" in done.stderr, done.stderr
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--precision", "fp16"], "the bundle has no such graph. It has openvino fp32, onnxruntime fp32, pytorch fp32"),
        (["--runtime", "tensorrt"], "tensorrt: the bundle has no such graph"),
        (["--overlap", "1"], "overlap=1.0: must be 0 to 0.75"),
        (["--window", "8", "--memory", "0"], "window=8: must be at least 64"),
        (["--memory", "inf"], "memory=inf: must be above 0, and finite"),
        (["--threshold", "0.3", "--operating-point"], "give one of them"),
    ],
)
def test_what_a_bundle_refuses(exported, scans, tmp_path, capsys, options, message):
    assert main(["predict", str(exported[1]), str(scans), "--out", str(tmp_path / "a"), *options]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "a").exists()


def test_a_runtime_is_of_bundles(exported, scans, tmp_path, capsys):
    assert main(["predict", str(exported[0]), str(scans), "--out", str(tmp_path / "a"), "--runtime", "openvino"]) == 2
    assert "--runtime openvino: is of bundles" in capsys.readouterr().err


def test_one_scan_that_cannot_be_read(exported, scans, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    inputs = [str(tmp_path / "broken.png"), str(scans / "a.png")]
    assert main(["predict", str(exported[1]), *inputs, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.err.count("broken.png: cannot be read") == 1 and "1 input could not be predicted" in said.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.png"]


def test_the_api(exported, scans):
    bundle = Bundle.open(exported[1])
    segmenter = bundle.segmenter()
    labels = segmenter.predict_scan(scans / "oblique.nii.gz")
    assert labels.dtype == np.uint8 and labels.size == 24 * 5 * 21
    scores = segmenter.predict(np.zeros((1, 9, 7)), (1, 1), probabilities=True)
    assert scores.shape == (1, 9, 7) and scores.dtype == np.float32
    with pytest.raises(InputError, match=r"must be \(1, y, x\) or \(1, z, y, x\)"):
        segmenter.predict(np.zeros((2, 9, 7)), (1, 1))
    with pytest.raises(InputError, match="NaN"):
        segmenter.predict(np.full((1, 9, 7), np.nan), (1, 1))


@pytest.mark.parametrize(
    "values, spacing, message",
    [
        (np.zeros((1, 8, 8), complex), (1, 1), "must be real numbers"),
        (np.full((1, 8, 8), None), (1, 1), "must be real numbers"),
        (np.zeros((1, 0, 8), np.float32), (1, 1), "and at least one"),
        (np.zeros((1, 8, 8), np.float32), (0, 1), "must be millimetres above 0"),
        (np.zeros((1, 4, 8, 8), np.float32), (float("nan"), 1, 1), "must be millimetres above 0"),
        (np.full((1, 8, 8), np.inf, np.float32), (1, 1), "NaN or infinite"),
    ],
)
def test_values_that_a_product_should_not_hand_in(exported, values, spacing, message):
    with pytest.raises(InputError, match=message):
        Bundle.open(exported[1]).segmenter().predict(values, spacing)


def test_a_binary_image_is_an_image(exported):
    image = np.random.default_rng(0).random((1, 32, 32)) > 0.5
    segmenter = Bundle.open(exported[1]).segmenter()
    assert np.array_equal(segmenter.predict(image, (1, 1)), segmenter.predict(image.astype(np.uint8), (1, 1)))
