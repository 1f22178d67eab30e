"""Networks of volumes through everything that fine-tuning does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image

from finetune.evaluation.evaluate import EvaluateRequest, evaluate
from finetune.explanation.explain import explain
from finetune.explanation.gradcam import grad_cam, layers_of, tile
from finetune.explanation.request import ExplainRequest
from finetune.inference.predict import PredictRequest, predict
from finetune.inference.window import predict_values
from finetune.labelled import read_labelled, resolve
from finetune.loop import finetune
from finetune.planning.page import page
from finetune.planning.plan import make_plan
from finetune.recipe import FinetuneRecipe
from resunet.checkpoint import ModelConfig, read_config, read_weights
from resunet.config import validate
from resunet.data.leakage import ARCHIVE
from resunet.encoder import ResidualEncoder
from resunet.errors import InputError
from resunet.fingerprint import fingerprint
from resunet.model import ResUNet, load_model
from resunet.runtime import normalise, percentile_intensity
from resunet.transfer import Receipt

SIZE = (9, 20, 18)  # z, y, x
SPACING = (1.0, 1.2, 4.0)  # x, y, z: thick slices


def write_volumes(root: Path) -> Path:
    """Seven patients with a bright ball each, and a salt beside the folder."""
    at = np.mgrid[: SIZE[0], : SIZE[1], : SIZE[2]]
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    rng, stems = np.random.default_rng(0), [f"v{number}" for number in range(7)]
    for stem in stems:
        centre = [rng.integers(3, n - 3) for n in SIZE]
        ball = sum((axis - c) ** 2 for axis, c in zip(at, centre, strict=True)) < 12
        values = rng.normal(100, 20, SIZE) + 200 * ball
        for name, content in (("images", values.astype(np.int16)), ("masks", ball.astype(np.uint8))):
            image = sitk.GetImageFromArray(content)
            image.SetSpacing(SPACING)
            sitk.WriteImage(image, str(root / name / f"{stem}.nii.gz"))
    (root / "splits.json").write_text(json.dumps({"pool": stems[:4], "val": stems[4:5], "test": stems[5:]}))
    (root.parent / "salt").write_text("cd" * 32)
    return root


def volumes_recipe(source: Path, out: Path, **changes: object) -> FinetuneRecipe:
    data = {"source": str(source), "salt_file": str(source.parent / "salt"), "classes": {0: "background", 1: "ball"}}
    values: dict = {
        "out": str(out),
        "steps": 3,
        "batch": 2,
        "patch": [8, 16, 16],
        "warmup": 0,
        "log_every": 1,
        "validate_every": 2,
        "data": data | {"names": "keep"},
        "model": {"channels": [4, 8], "units": 1, "spatial_dims": 3},
        "augment": {"elastic": {"sigma": 2}},
        "optimizer": {"lr": 1e-2},
        "wandb": {"mode": "disabled"},
    }
    for key, value in changes.items():
        values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
    return validate(FinetuneRecipe, values, "recipe")


@pytest.fixture(scope="session")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_volumes(tmp_path_factory.mktemp("volumes") / "source")


@pytest.fixture(scope="session")
def run(volumes: Path) -> Path:
    """A finished run. Not to be changed."""
    return finetune(volumes_recipe(volumes, volumes.parent / "run", steps=30, validate_every=15, optimizer={"lr": 2e-2}))


def test_a_network_of_volumes_is_trained_and_evaluated(run: Path, volumes: Path, tmp_path: Path) -> None:
    config = read_config(run / "model")
    assert config.architecture.spatial_dims == 3 and config.spacing == pytest.approx(SPACING[::-1])
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert losses[-1] < 0.7 * losses[0]
    summary = json.loads((run / "evaluation" / "summary.json").read_text(encoding="utf-8"))
    assert summary["cases"] == 2 and summary["dice"]["mean"] > 0.3
    request = EvaluateRequest(source=volumes, salt_file=volumes.parent / "salt", names="keep")
    again = json.loads((evaluate(run, request, tmp_path / "e") / "summary.json").read_text(encoding="utf-8"))
    assert again["dice"] == summary["dice"]


def test_resume_and_rerun_give_the_same_weights(run: Path, volumes: Path, tmp_path: Path) -> None:
    first, second = (finetune(volumes_recipe(volumes, tmp_path / name, steps=2)) for name in "ab")
    one, other = (read_weights(folder / "model" / "model.safetensors") for folder in (first, second))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_encoder_of_volumes_is_transferred(volumes: Path, encoder: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    network = ResidualEncoder(1, (4, 8), units=1, spatial_dims=3)
    network.config = ModelConfig(architecture=network.config.architecture, feature_check=fingerprint(network))
    network.save_pretrained(tmp_path / "volumes")
    shutil.copy(encoder / ARCHIVE, tmp_path / "volumes")
    done = finetune(volumes_recipe(volumes, tmp_path / "run", steps=1, encoder=str(tmp_path / "volumes")))
    receipt = Receipt.model_validate_json((done / "receipt.json").read_text(encoding="utf-8"))
    assert receipt.encoder_share_loaded == 1 and receipt.feature_error <= receipt.feature_tolerance
    flat = volumes_recipe(
        volumes, tmp_path / "flat", patch=[16, 16], model={"spatial_dims": 2}, encoder=str(tmp_path / "volumes")
    )
    with pytest.raises(InputError, match=r"spatial_dims: encoder 3, network 2"):
        finetune(flat)


def test_prediction_of_a_run_has_the_geometry_of_its_input(run: Path, volumes: Path, tmp_path: Path) -> None:
    out = predict(run, [volumes], tmp_path / "out", PredictRequest(flips=True)).out
    for path in sorted((volumes / "images").iterdir()):
        mask, image = nibabel.load(out / path.name), nibabel.load(path)
        assert (mask.affine == image.affine).all() and mask.shape == image.shape


def test_the_recipe_of_volumes(volumes: Path, tmp_path: Path) -> None:
    assert volumes_recipe(volumes, tmp_path / "a", model={"spatial_dims": 3}).patch == (8, 16, 16)
    base = {"out": "a", "steps": 1, "data": {"source": "x", "classes": {0: "a", 1: "b"}}}
    assert FinetuneRecipe.model_validate(base).patch == (128, 128)
    assert FinetuneRecipe.model_validate(base | {"model": {"spatial_dims": 3}}).patch == (64, 64, 64)
    with pytest.raises(InputError, match=r"patch=\[16, 16\]: model\.spatial_dims=3 takes three numbers, \(z, y, x\)"):
        volumes_recipe(volumes, tmp_path / "a", patch=[16, 16])
    with pytest.raises(InputError, match=r"1/16 of the size, would see it as one position; give it a side above 16"):
        volumes_recipe(volumes, tmp_path / "a", patch=[8, 16, 16], model={"channels": [4] * 5})


def test_images_are_refused_before_anything_is_written(
    recipe: Callable[..., FinetuneRecipe], run: Path, source: Path, tmp_path: Path
) -> None:
    ours = recipe(model={"spatial_dims": 3}, patch=[8, 16, 16])
    with pytest.raises(InputError, match=r"c\d\da?\.png: is an image of two dimensions"):
        finetune(ours)
    assert not ours.out.exists()
    with pytest.raises(InputError, match="is an image of two dimensions"):
        read_labelled(resolve(ours), quiet=True)
    request = ExplainRequest(inputs=(source / "images",), salt_file=source.parent / "salt")
    with pytest.raises(InputError, match="is an image of two dimensions"):
        explain(run, request, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_plan_of_volumes(volumes: Path, tmp_path: Path) -> None:
    plan = make_plan(volumes_recipe(volumes, tmp_path / "a", model={"channels": [4, 8, 8]}, steps=5))
    text = " ".join(page(plan).split())
    assert plan.recipe.patch == (8, 20, 20)  # 9 × 20 × 18 voxels to multiples of 4
    assert "the median volume is 9 × 20 × 18 voxels" in text and "32 × 24 × 20 mm" in text
    assert "sliced along" not in text and "each training volume" in text
    assert any("4 mm across the slices and 1 mm within" in one and "16 × 4.8 × 4 mm" in one for one in plan.warnings)
    deep = make_plan(volumes_recipe(volumes, tmp_path / "a", model={"channels": [4] * 4}, steps=5))
    assert any("9 voxels along its shortest axis, less than two positions" in one for one in deep.warnings)


def test_volumes_are_explained_slice_by_slice(run: Path, volumes: Path, tmp_path: Path) -> None:
    request = ExplainRequest(inputs=(volumes,), salt_file=volumes.parent / "salt", names="keep", slices=1, lesions=1)
    record = json.loads((explain(run, request, tmp_path / "out") / "explain.json").read_text(encoding="utf-8"))
    assert len(record["cases"]) >= 5
    assert np.median([one["share_inside"] for one in record["cases"] if one["share_inside"] is not None]) > 0.1
    for one in record["cases"]:
        with Image.open(tmp_path / "out" / one["picture"]) as picture:
            assert 0 <= one["slice"] < SIZE[0] and picture.size[0] > 300


def test_grad_cam_of_a_volume_is_that_of_windows_that_are_the_whole() -> None:
    torch.manual_seed(3)
    model = ResUNet(1, 3, (4, 8, 12), spatial_dims=3).eval().requires_grad_(False)
    torch.nn.init.normal_(model.head.weight)
    image = torch.randn(1, 12, 14, 9)
    region = np.zeros((12, 14, 9), bool)
    region[3:6, 4:9, 2:6] = True
    layer = layers_of(model, 1)["decoder.blocks.1"]
    assert (layer.stride, layer.channels) == (1, 4)
    found = grad_cam(model, layer, image, 1, region)
    features, target = [], torch.tensor(region)
    handle = model.decoder.blocks[1].register_forward_hook(lambda _, __, out: features.append(out.requires_grad_()))
    logits = model(image[None])[0, 1]
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[target].sum(), features[0])
    weights = gradient[0].mean(dim=(1, 2, 3))
    expected = sum(w * plane for w, plane in zip(weights, features[0][0], strict=True)).relu() * (gradient[0] != 0).any(dim=0)
    np.testing.assert_allclose(found.heat, expected.detach().numpy(), atol=1e-6)
    tiling = tile(region.shape, 64, 0.25, torch.device("cpu"))
    np.testing.assert_allclose(grad_cam(model, layer, image, 1, region, tiling).heat, found.heat, atol=1e-5)
    assert found.mean_logit == pytest.approx(logits[target].mean().item(), abs=1e-5)


def test_evaluation_and_prediction_see_the_same(run: Path, volumes: Path) -> None:
    model = load_model(run)
    values = sitk.GetArrayFromImage(sitk.ReadImage(str(volumes / "images" / "v5.nii.gz")))[None]
    intensities = percentile_intensity(values, 0.5, 99.5)
    labels = predict_values(model, values, 0, intensities, torch.device("cpu"))
    with torch.no_grad():
        expected = model(torch.from_numpy(normalise(values, intensities))[None])[0, 0] > 0
    assert (labels == expected.numpy()).mean() > 0.999
