import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from finetune.evaluation.metrics import measure_case
from finetune.evaluation.wrong import wrong_lesions
from finetune.explanation.explain import chosen_slices, explain
from finetune.explanation.gradcam import (
    Layer,
    Tiling,
    cascade,
    class_logits,
    default_layer,
    describe_layers,
    grad_cam,
    layers_of,
    randomised,
    rank_correlation,
    share_inside,
    tapped,
    tile,
)
from finetune.explanation.heatmap import heat_picture
from finetune.explanation.request import ExplainRequest
from finetune.inference.window import predict_values
from resunet.data.cases import IGNORE
from resunet.errors import InputError
from resunet.model import ResUNet, UNet, load_model
from resunet.runtime import percentile_intensity

CPU = torch.device("cpu")


def network(kind=ResUNet, num_classes: int = 2, **arguments) -> nn.Module:
    torch.manual_seed(3)  # one whose maps are not empty
    model = kind(1, num_classes, (4, 8, 12), **arguments)
    nn.init.normal_(model.head.weight)
    return model.eval().requires_grad_(False)


def image_and_region(height: int, width: int) -> tuple[torch.Tensor, np.ndarray]:
    region = np.zeros((height, width), bool)
    region[3:9, 5:12] = True
    return torch.randn(1, height, width, generator=torch.Generator().manual_seed(0)), region


def slow_grad_cam(windows, weights: torch.Tensor, region: np.ndarray, stride: int):
    """By hand, position by position. windows: (rows, columns, logits (y, x) with a graph, the features (1, K, y, x) of it)."""
    total = torch.zeros(region.shape)
    for rows, columns, _, _ in windows:
        total[rows, columns] += weights
    target = torch.tensor(0.0)
    for rows, columns, logits, _ in windows:
        for y, x in zip(*np.nonzero(region[rows, columns]), strict=True):
            target = target + logits[y, x] * weights[y, x] / total[rows, columns][y, x]
    gradients = torch.autograd.grad(target, [features for *_, features in windows], allow_unused=True, materialize_grads=True)
    touched = [(*window, g[0]) for window, g in zip(windows, gradients, strict=True) if (g != 0).any()]
    alpha = torch.cat([g.flatten(1) for *_, g in touched], dim=1).mean(dim=1)
    heat = torch.zeros(region.shape)
    for rows, columns, _, features, gradient in touched:
        coarse = torch.zeros(features.shape[2:])
        for y in range(coarse.shape[0]):
            for x in range(coarse.shape[1]):
                if gradient[:, y, x].abs().sum() > 0:
                    coarse[y, x] = max(
                        0.0, sum(float(a * v) for a, v in zip(alpha, features.detach()[0, :, y, x], strict=True))
                    )
        grown = F.interpolate(coarse[None, None], [n * stride for n in coarse.shape], mode="bilinear")[0, 0]
        heat[rows, columns] += grown[: weights.shape[0], : weights.shape[1]] * weights
    return (heat / total).numpy(), float(target.detach()) / region.sum()


def by_hand(model: ResUNet, image: torch.Tensor, level: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (1, K, y, x) and the features of an encoder level that they were made from."""
    x, features = image[None], []
    for number, stage in enumerate(model.encoder.levels):
        x = stage(x)
        if number == level:
            x = taken = x.detach().requires_grad_()
        features.append(x)
    return model.head(model.decoder(features)), taken


@pytest.mark.parametrize(("num_classes", "index"), [(2, 1), (2, 0), (3, 2)])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_grad_cam_is_what_autograd_gives_by_hand(num_classes, index, level):
    model = network(num_classes=num_classes)
    image, region = image_and_region(19, 26)
    logits, taken = by_hand(model, image, level)
    of_class = logits[0, index] if num_classes > 2 else logits[0, 0] * (1 if index else -1)
    whole = (slice(0, 19), slice(0, 26), of_class, taken)
    heat, mean = slow_grad_cam([whole], torch.ones(19, 26), region, 2**level)
    found = grad_cam(model, layers_of(model, 1)[f"encoder.levels.{level}"], image, index, region)
    np.testing.assert_allclose(found.heat, heat, rtol=1e-4, atol=1e-4 * heat.max())
    assert found.mean_logit == pytest.approx(mean, rel=1e-4) and heat.max() > 0


@pytest.mark.parametrize("level", [0, 2])
def test_windows_are_stitched_as_inference_stitches_their_logits(level):
    """By hand through all windows at once; some of them the region does not reach."""
    model = network(num_classes=3)
    image, region = image_and_region(20, 44)
    tiling = tile((20, 44), 16, 0.25, CPU)
    assert len(tiling.places) == 2 * 4
    windows = []
    for rows, columns in tiling.places:
        logits, taken = by_hand(model, image[:, rows, columns], level)
        windows.append((rows, columns, logits[0, 1], taken))
    heat, mean = slow_grad_cam(windows, tiling.weight, region, 2**level)
    found = grad_cam(model, layers_of(model, 1)[f"encoder.levels.{level}"], image, 1, region, tiling)
    np.testing.assert_allclose(found.heat, heat, rtol=1e-4, atol=1e-4 * heat.max())
    assert found.mean_logit == pytest.approx(mean, rel=1e-4) and heat.max() > 0
    assert (found.heat[:, 28:] == 0).all()  # no window there sees the region


def test_windows_lie_and_weigh_as_in_monai():
    from monai.inferers import sliding_window_inference

    image = torch.randn(1, 1, 50, 70)
    seen = []

    def score(x: torch.Tensor) -> torch.Tensor:
        seen.extend(one.clone() for one in x)
        return torch.full_like(x, float(len(seen)))

    blended = sliding_window_inference(image, (32, 32), 1, score, 0.25, mode="gaussian")[0, 0]
    tiling = tile((50, 70), 32, 0.25, CPU)
    assert len(seen) == len(tiling.places)
    total, ours = torch.zeros(50, 70), torch.zeros(50, 70)
    for number, (place, window) in enumerate(zip(tiling.places, seen, strict=True), 1):
        assert torch.equal(image[0, :, *place], window)
        ours[place] += number * tiling.weight
        total[place] += tiling.weight
    torch.testing.assert_close(ours / total, blended)


def test_one_window_over_the_image_is_the_image():
    model = network()
    image, region = image_and_region(24, 31)
    for layer in list(layers_of(model, 1).values())[::5]:
        whole, windowed = (grad_cam(model, layer, image, 1, region, t) for t in (None, tile((24, 31), 64, 0.25, CPU)))
        np.testing.assert_allclose(windowed.heat, whole.heat, rtol=1e-4, atol=1e-5 * whole.heat.max())
        assert windowed.mean_logit == pytest.approx(whole.mean_logit, rel=1e-5)


class Linear(nn.Module):
    """logit = b · (a x), pixel by pixel."""

    def __init__(self, a: list[float], b: list[float]) -> None:
        super().__init__()
        self.features = nn.Conv2d(1, len(a), 1, bias=False)
        self.head = nn.Conv2d(len(a), 1, 1, bias=False)
        self.features.weight = nn.Parameter(torch.tensor(a).view(-1, 1, 1, 1))
        self.head.weight = nn.Parameter(torch.tensor(b).view(1, -1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


def test_a_linear_network_has_a_closed_form():
    """Channel k weighs b_k |R| / N, so that the map is ReLU(Σ a_k b_k x) |R| / N in the region R of N pixels, 0 outside."""
    a, b = [2.0, -1.0, 0.5], [1.0, 3.0, -2.0]
    slope = sum(x * y for x, y in zip(a, b, strict=True))
    image, region = image_and_region(16, 20)
    x, share = image[0].numpy(), region.sum() / region.size
    for index, sign in ((1, 1), (0, -1)):
        found = grad_cam(Linear(a, b), Layer("features", 3, 1), image, index, region)
        np.testing.assert_allclose(found.heat, np.maximum(sign * slope * x, 0) * share * region, rtol=1e-5, atol=1e-6)
        assert found.mean_logit == pytest.approx(sign * slope * x[region].mean(), rel=1e-5)
    # pixel by pixel, windows change nothing but the number of positions that the weight is a mean over
    tiling = Tiling([(slice(0, 16), slice(0, 12)), (slice(0, 16), slice(8, 20))], torch.rand(16, 12) + 0.1)
    windowed = grad_cam(Linear(a, b), Layer("features", 3, 1), image, 1, region, tiling)
    expected = np.maximum(slope * x, 0) * region * region.sum() / (2 * 16 * 12)
    np.testing.assert_allclose(windowed.heat, expected, rtol=1e-5, atol=1e-6)


def test_the_layers_of_networks():
    for kind, default, others in (
        (ResUNet, "encoder.levels.2", {"head", "decoder.blocks.0", "encoder.levels.0.0.norm1", "decoder.blocks.1.up"}),
        (UNet, "down.2", {"head", "merge.0", "down.1.1", "up.1", "down.0.2"}),
    ):
        layers = layers_of(network(kind), 1)
        assert default_layer(layers).name == default and others < set(layers)
        assert (layers[default].channels, layers[default].stride) == (12, 4)
        assert "encoder" not in layers and "encoder.levels.0.0.activation" not in layers  # a list; twice a pass
        listed = describe_layers(layers)
        assert all(name.split(".")[-1] in listed for name in layers)
    assert default_layer(layers_of(ResUNet(1, 2, (2, 2, 2, 2, 2)), 1)).name == "decoder.blocks.1"
    assert default_layer(layers_of(UNet(1, 2, (2, 2, 2, 2)), 1)).name == "merge.0"
    excited = layers_of(ResUNet(1, 2, (4, 8), squeeze_excite=True), 1)
    assert "decoder.blocks.0.excite" in excited and "decoder.blocks.0.excite.reduce" not in excited  # one pixel


def test_what_follows_in_place_does_not_change_what_was_taken():
    model = network(UNet)
    image, _ = image_and_region(16, 16)
    layer = layers_of(model, 1)["down.0.1"]  # an in-place ReLU comes next
    with tapped(model, layer) as tap:
        explained = model(image[None])
    assert tap.activations.min() < 0 and torch.equal(explained.detach(), model(image[None]))
    with torch.no_grad():
        torch.testing.assert_close(tap.activations.detach(), model.down[0][1](model.down[0][0](image[None])))
    assert not any(module._forward_hooks for module in model.modules())


def test_shares_and_correlations():
    heat = np.array([[1, 3], [0, 4]], np.float32)
    assert share_inside(heat, heat > 2) == pytest.approx(7 / 8)
    assert share_inside(0 * heat, heat > 2) is None
    assert rank_correlation(heat, heat**2) == pytest.approx(1) and rank_correlation(heat, -heat) == pytest.approx(-1)
    padded = [np.pad(one, 9) for one in (heat, 4 - heat)]
    assert rank_correlation(*padded) == pytest.approx(-1)  # what is 0 in both does not count
    assert rank_correlation(heat, 0 * heat) is None and rank_correlation(0 * heat, heat) is None
    assert class_logits(torch.ones(1, 1, 2, 2), 0).mean() == -1


def test_weights_are_randomised_from_the_head_down():
    model = network()
    for name, value in model.named_buffers():
        if name.endswith("running_mean"):
            value.fill_(2)  # as training leaves it: not what a fresh norm has
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    stages, changed = [], set()
    for stage, other in randomised(model, 3):
        different = {name for name, value in other.state_dict().items() if not torch.equal(value, before[name])}
        weights = {
            name
            for name in before
            if "conv" in name or name.endswith("running_mean") or name in ("head.weight", "decoder.blocks.0.up.weight")
        }
        assert {name for name in different - changed if not name.startswith(stage)} == set()
        assert {name for name in weights if name.startswith(stage)} <= different
        stages.append(stage)
        changed |= different
    levels = [f"encoder.levels.{i}" for i in (2, 1, 0)]
    assert stages == ["head", "decoder.blocks.1", "decoder.blocks.0", *levels]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_map_of_a_trained_network_goes_with_its_weights(runs):
    """Adebayo et al. 2018: what does not depend on the weights explains nothing of them."""
    model = load_model(runs[0]).requires_grad_(False)
    layers = layers_of(model, 1)
    source = runs[0].parent / "labelled"
    correlations = []
    for path in sorted((source / "images").iterdir())[-4:]:
        values = np.asarray(Image.open(path)).astype(np.float32)
        image = torch.from_numpy((values - values.mean()) / values.std())[None]
        region = np.asarray(Image.open(source / "masks" / path.name)) > 0
        found = cascade(model, layers["encoder.levels.1"], image, 1, region)
        again = cascade(model, layers["encoder.levels.1"], image, 1, region)
        assert list(found) == ["head", "decoder.blocks.0", "encoder.levels.1", "encoder.levels.0"] and found == again
        correlations.append([0.0 if value is None else value for value in found.values()])
    assert np.abs(np.mean(correlations, axis=0)[-1]) < 0.8 and np.max(np.abs(np.array(correlations)[:, -1])) < 0.97


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_wrong_lesions_are_those_that_metrics_count(axis):
    rng = np.random.default_rng(5)
    shape = (40, 50) if axis is None else (9, 14, 12)
    truth, predicted = (
        (rng.random(shape) > 0.9).astype(np.uint8) * rng.integers(1, 3, shape).astype(np.uint8) for _ in range(2)
    )
    truth[rng.random(shape) > 0.95] = IGNORE
    wrong = wrong_lesions(truth, predicted, axis)
    measured = measure_case(truth, predicted, 3, (1.0,) * len(shape)).classes
    for index, counts in enumerate(measured, 1):
        missed = [size for size, found in zip(counts.lesion_sizes, counts.lesion_found, strict=True) if not found]
        ours = {kind: [w.voxels for w in wrong if (w.kind, w.class_index) == (kind, index)] for kind in ("missed", "false")}
        assert sorted(ours["missed"]) == sorted(missed) and len(ours["false"]) == counts.lesions_false > 0
    plane = tuple(n for i, n in enumerate(shape) if i != axis)
    for one in wrong:
        own, other = (truth, predicted) if one.kind == "missed" else (predicted, truth)
        if axis is not None:
            own, other = own.take(one.index, axis=axis), other.take(one.index, axis=axis)
        region = one.region(plane)
        assert 0 < region.sum() <= one.voxels and (axis is not None or region.sum() == one.voxels)
        assert (own[region] == one.class_index).all() and (other[region] != one.class_index).all()


def test_the_slice_with_most_of_a_lesion_is_shown():
    truth = np.zeros((5, 8, 8), np.uint8)
    truth[1, 2:4, 2:4] = truth[2, 2:6, 2:6] = truth[3, 3, 3] = 1
    (one,) = wrong_lesions(truth, np.zeros_like(truth), 0)
    assert (one.kind, one.index, one.voxels, one.region((8, 8)).sum()) == ("missed", 2, 21, 16)


def test_slices_with_most_of_a_class():
    there = np.zeros((6, 4, 4), bool)
    there[1, 0, :2] = there[4, :2] = there[5, 0, 0] = there[2, 0, :3] = True
    assert chosen_slices(there, 0, 2) == [2, 4] and chosen_slices(there, 0, 9) == [1, 2, 4, 5]
    assert chosen_slices(there, 0, None) == list(range(6))
    assert chosen_slices(np.zeros_like(there), 0, 3) == [3] and chosen_slices(there[0], None, 3) == [0]


def test_a_picture_shows_the_map_where_it_is():
    grey = np.full((80, 120, 3), 90, np.uint8)
    heat, mask = np.zeros((80, 120), np.float32), np.zeros((80, 120), bool)
    heat[10:30, 80:100], mask[60:70, 10:25] = 2, True
    picture = heat_picture(grey, heat, mask, None, "title")
    without = heat_picture(grey, 0 * heat, mask, None, "title")
    height, width = picture.shape[:2]
    differs = (picture != without).any(axis=2)
    differs[:, int(width * 0.88) :] = differs[int(height * 0.8) :] = False  # colour bar; the line that says there is nothing
    rows, columns = np.nonzero(differs)
    assert rows.mean() < 0.5 * height and columns.mean() > 0.6 * width
    assert picture[rows, columns].mean(axis=0)[2] < picture[rows, columns].mean(axis=0)[0]  # the yellow end
    plain = heat_picture(grey, heat, np.zeros_like(mask), None, "title")
    assert ((picture == 255).all(axis=2) & (plain == 90).all(axis=2)).sum() > 100  # the white outline, over scan
    assert heat_picture(grey, heat, mask, ~mask, "title", mask).shape[1] > width  # a close-up, beside
    assert (grey == 90).all() and heat.max() == 2


def test_small_objects_of_large_images_keep_their_outline():
    grey, heat, mask = np.zeros((2000, 1000, 3), np.uint8), np.zeros((2000, 1000), np.float32), np.zeros((2000, 1000), bool)
    bare = heat_picture(grey, heat, mask, None, "title")
    mask[1003, 501] = True
    assert (heat_picture(grey, heat, mask, None, "title") != bare).any()
    assert max(bare.shape) < 2000


def request_for(source: Path, **changes) -> ExplainRequest:
    values = {"inputs": (source,), "names": "keep", "salt_file": source.parent / "salt", "lesions": 2}
    return ExplainRequest.model_validate(values | changes)


def some_cases(runs, folder: Path, count: int) -> Path:
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
        for path in sorted((runs[0].parent / "labelled" / name).iterdir())[-count:]:
            shutil.copy(path, folder / name)
    shutil.copy(runs[0].parent / "salt", folder.parent / "salt")
    return folder


def test_explaining_writes_its_files(runs, tmp_path):
    source = some_cases(runs, tmp_path / "source", 3)
    out = explain(runs[0], request_for(source, sanity=True, layer="encoder.levels.1"), tmp_path / "out")
    record = json.loads((out / "explain.json").read_text(encoding="utf-8"))
    assert record["layer"] == "encoder.levels.1" and {one["id"] for one in record["cases"]} == {"c11a", "c12a", "c13a"}
    model = load_model(runs[0])
    for one in record["cases"]:
        assert (one["class"], one["slice"], one["windows"]) == ("lesion", None, 1)
        assert one["target"] in ("predicted region", "whole image") and (out / one["picture"]).is_file()
        assert (one["share_inside"] is None) == (one["target"] == "whole image" or one["largest"] == 0)
    wrong = {"missed": [], "false": []}
    for stem in ("c11a", "c12a", "c13a"):
        values = np.asarray(Image.open(source / "images" / f"{stem}.png"))[None]
        truth = (np.asarray(Image.open(source / "masks" / f"{stem}.png")) > 0).astype(np.uint8)
        predicted = predict_values(model, values, None, percentile_intensity(values, 0.5, 99.5), CPU)
        (entry,) = (one for one in record["cases"] if one["id"] == stem)
        assert entry["pixels"] == ((predicted == 1).sum() or predicted.size)
        for one in wrong_lesions(truth, predicted, None):
            wrong[one.kind].append(one.voxels)
    assert record["lesions_found"] == {kind: len(sizes) for kind, sizes in wrong.items()} and sum(map(len, wrong.values()))
    for kind, sizes in wrong.items():
        shown = [one for one in record["lesions"] if one["kind"] == kind]
        assert [one["voxels"] for one in shown] == sorted(sizes, reverse=True)[:2]
        for rank, one in enumerate(shown, 1):
            assert one["rank"] == rank and one["picture"].startswith(f"lesions/{kind}-{rank:02}-{one['voxels']}-voxels-c1")
        assert all((out / one["picture"]).is_file() and one["target"] == f"{kind} lesion" for one in shown)
    assert record["sanity"][0]["randomised_from_head_to"] == "head"
    page = (out / "explain.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") == len(record["cases"]) + len(record["lesions"]) and "Randomised from" in page
    assert {path.name for path in out.iterdir()} <= {"explain.json", "explain.html", "overlays", "lesions"}


def test_what_post_processing_removes_is_explained_as_missed(runs, tmp_path):
    source = some_cases(runs, tmp_path / "source", 3)
    model = tmp_path / "model"
    shutil.copytree(runs[0] / "model", model)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    rule = {"name": list(config["classes"].values())[1], "largest_only": False, "smallest": 10**6}
    config["postprocessing"] = {
        "rules": [rule], "val_groups": 2, "val_dice": [0.1, 0.2], "val_lesion_recall": [1.0, 1.0],
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = {}
    for name, folder in (("plain", runs[0]), ("removed", model)):
        record = json.loads(
            (explain(folder, request_for(source), tmp_path / name) / "explain.json").read_text(encoding="utf-8")
        )
        found[name] = [one["kind"] for one in record["lesions"]]
    assert found["plain"].count("missed") < len(found["removed"]) == found["removed"].count("missed")


def test_a_volume_is_explained_by_the_slices_with_most_of_a_class(runs, tmp_path):
    images = sorted((runs[0].parent / "labelled" / "images").iterdir())[:5]
    values = np.stack([np.asarray(Image.open(path)) for path in images])
    volume = sitk.GetImageFromArray(values)
    volume.SetSpacing((1, 1, 4))
    sitk.WriteImage(volume, str(tmp_path / "patient.nii.gz"))
    (tmp_path / "salt").write_text("cd" * 32)
    predicted = predict_values(load_model(runs[0]), values[None], 0, percentile_intensity(values[None], 0.5, 99.5), CPU)
    request = request_for(tmp_path / "patient.nii.gz", names="hash", slices=2)
    counts = (predicted == 1).sum(axis=(1, 2))
    record = json.loads((explain(runs[0], request, tmp_path / "two") / "explain.json").read_text(encoding="utf-8"))
    # nibabel's and SimpleITK's axes are not ours: a slice is known by how much of the class it holds
    assert counts.max() > 0
    assert sorted(one["pixels"] for one in record["cases"]) == sorted(count for count in np.sort(counts)[-2:] if count)
    assert record["lesions_found"] is None and "patient" not in json.dumps(record)
    assert not list((tmp_path / "two").rglob("*patient*"))
    every = explain(runs[0], request.model_copy(update={"slices": None}), tmp_path / "all")
    assert [one["slice"] for one in json.loads((every / "explain.json").read_text(encoding="utf-8"))["cases"]] == list(range(5))


def test_nothing_predicted_is_explained_by_the_whole_image(runs, tmp_path):
    run = shutil.copytree(runs[0], tmp_path / "run", symlinks=True)
    model = load_model(run)
    nn.init.constant_(model.head.bias, -50)
    model.save_pretrained(run / "model")
    source = some_cases(runs, tmp_path / "source", 1)
    record = json.loads((explain(run, request_for(source), tmp_path / "out") / "explain.json").read_text(encoding="utf-8"))
    (one,) = record["cases"]
    assert (one["target"], one["pixels"], one["share_inside"]) == ("whole image", 24 * 24, None) and one["mean_logit"] < -10
    assert record["lesions_found"] == {"missed": 1, "false": 0} and record["lesions"][0]["target"] == "missed lesion"


@pytest.mark.parametrize("size", [(1, 2), (4, 3), (24, 1)])
def test_an_image_smaller_than_the_stride(tmp_path, size):
    """Instance norm refuses a single position."""
    model = network(norm="instance")
    model.config = model.config.model_copy(update={"classes": {0: "background", 1: "lesion"}})
    model.save_pretrained(tmp_path / "model")
    Image.fromarray(np.arange(size[0] * size[1], dtype=np.uint8).reshape(size) * 9).save(tmp_path / "tiny.png")
    (tmp_path / "salt").write_text("cd" * 32)
    out = explain(tmp_path / "model", request_for(tmp_path / "tiny.png", sanity=True), tmp_path / "out")
    assert json.loads((out / "explain.json").read_text(encoding="utf-8"))["cases"][0]["pixels"] <= size[0] * size[1]


def test_one_bad_scan_does_not_cost_the_others(runs, tmp_path, capsys):
    source = some_cases(runs, tmp_path / "source", 2)
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(source / "masks" / "c12a.png")
    record = json.loads((explain(runs[0], request_for(source), tmp_path / "out") / "explain.json").read_text(encoding="utf-8"))
    assert {one["id"] for one in record["cases"]} == {"c13a"} and record["lesions_found"] is not None
    assert "1 input could not be read or predicted: left out." in record["notes"]
    assert "c12a" in capsys.readouterr().err
    (source / "images" / "c13a.png").unlink(), (source / "masks" / "c13a.png").unlink()
    with pytest.raises(InputError, match="c12a"):
        explain(runs[0], request_for(source), tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("given", ["", "imagesTr"])
def test_masks_of_an_nnunet_data_set_are_found(runs, tmp_path, given):
    source, root = some_cases(runs, tmp_path / "source", 2), tmp_path / "Dataset001"
    for ours, theirs, channel in (("images", "imagesTr", "_0000"), ("masks", "labelsTr", "")):
        (root / theirs).mkdir(parents=True)
        for path in (source / ours).iterdir():
            shutil.copy(path, root / theirs / f"{path.stem}{channel}.png")
    about = {"channel_names": {"0": "x"}, "labels": {"background": 0, "lesion": 255}, "numTraining": 2, "file_ending": ".png"}
    (root / "dataset.json").write_text(json.dumps(about))
    out = explain(runs[0], request_for(source, inputs=(root / given,)), tmp_path / "out")
    record = json.loads((out / "explain.json").read_text(encoding="utf-8"))
    assert record["lesions_found"] is not None and record["notes"] == []
    (root / "labelsTr" / "c12a.png").unlink()
    out = explain(runs[0], request_for(source, inputs=(root / given,)), tmp_path / "half")
    record = json.loads((out / "explain.json").read_text(encoding="utf-8"))
    assert record["notes"] == ["1 of 2 inputs have no mask: what is missed or false in them is not looked at."]


def test_what_users_get_wrong(runs, tmp_path):
    source = some_cases(runs, tmp_path / "source", 1)
    (tmp_path / "empty").mkdir()
    for changes, message in (
        ({"layer": "encoder.levels.9"}, r"(?s)--layer encoder\.levels\.9: is no layer.*decoder\.blocks\.0 .*head"),
        ({"layer": "?"}, r"(?s)encoder\.levels\.1 \(1/2 of the size, 8 channels\): \.0 \.0\.conv1"),
        ({"class_name": "tumour"}, r"--class tumour: is no class.*background, lesion"),
        ({"masks": tmp_path / "empty"}, r"--masks .*empty: holds no mask with the name of an input"),
        ({"masks": tmp_path / "nothing"}, r"--masks .*nothing: no such folder"),
        ({"inputs": (tmp_path / "nothing",)}, r"nothing: no such file or folder"),
    ):
        with pytest.raises(InputError, match=message):
            explain(runs[0], request_for(source, **changes), tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"--out .*source: exists already"):
        explain(runs[0], request_for(source), source)
