import itertools

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference
from torch import nn

from finetune.inference.window import (
    Footprint,
    Inference,
    Plan,
    footprint,
    plan_slices,
    predict_scores,
    predict_values,
)
from resunet.errors import InputError
from resunet.inference.window import predict_scores as scores_with
from resunet.inference.window import predict_values as predict_with
from resunet.model import ResUNet, UNet
from resunet.runtime import Intensity, normalise, percentile_intensity

CPU = torch.device("cpu")
WINDOWS = Plan(at_once=0, window=32, windows=2, rows=4)


def scan(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-500, 2000, shape).astype(np.int16)


def network(num_classes: int = 3, **arguments) -> ResUNet:
    """Its head is made large, so that all classes are predicted somewhere."""
    torch.manual_seed(0)
    model = ResUNet(1, num_classes, arguments.pop("channels", (4, 8)), units=1, **arguments)
    nn.init.normal_(model.head.weight)
    return model.eval()


def predicted(model: nn.Module, values: np.ndarray, axis: int | None = None, **settings) -> np.ndarray:
    precision, probabilities, plan = (settings.pop(key, None) for key in ("precision", "probabilities", "plan"))
    intensities = percentile_intensity(values, 0.5, 99.5)
    inference = Inference(**settings)
    return predict_values(model, values, axis, intensities, CPU, precision or "fp32", inference, bool(probabilities), plan)


def normalised(values: np.ndarray) -> np.ndarray:
    return normalise(values, percentile_intensity(values, 0.5, 99.5))


def by_hand(model: nn.Module, image: np.ndarray) -> torch.Tensor:
    """(C, y, x), normalised → logits (1, K, y, x)."""
    with torch.no_grad():
        return model(torch.from_numpy(np.ascontiguousarray(image))[None])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_volume_goes_slice_by_slice(axis):
    values, model = scan(1, 11, 13, 9), network()
    labels = predicted(model, values, axis)
    scores = predicted(model, values, axis, probabilities=True)
    assert labels.shape == (11, 13, 9) and labels.dtype == np.uint8 and len(np.unique(labels)) == 3
    assert scores.shape == (3, 11, 13, 9) and scores.dtype == np.float32
    whole = normalised(values)  # of the volume, not of the slice
    for i in range(values.shape[axis + 1]):
        expected = by_hand(model, whole.take(i, axis=axis + 1)).softmax(dim=1)[0].numpy()
        np.testing.assert_allclose(scores.take(i, axis=axis + 1), expected, atol=1e-5)
    assert (scores.argmax(axis=0) == labels).mean() > 0.999  # a tie may fall either way


def test_more_slices_than_a_batch_keep_their_order():
    values, model = scan(1, 35, 8, 8), network(4)
    labels, whole = predicted(model, values, 0), normalised(values)
    alone = np.stack([by_hand(model, whole[:, i]).argmax(dim=1)[0].numpy() for i in range(35)])
    assert (labels == alone).mean() > 0.999 and len({one.tobytes() for one in labels}) > 17


def test_an_image_of_odd_size_is_predicted_whole():
    labels = predicted(network(2), scan(1, 17, 23))
    assert labels.shape == (17, 23) and set(np.unique(labels)) == {0, 1}
    assert predicted(network(2), scan(1, 17, 23), probabilities=True).shape == (1, 17, 23)


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (16, 16), (2, 40)])
def test_an_image_smaller_than_the_coarsest_stride(size, norm):
    model = network(2, channels=(4, 4, 4, 4, 4), norm=norm)
    assert footprint(model, 1, CPU).stride == 16
    assert predicted(model, scan(1, *size)).shape == size
    assert predicted(model, scan(1, 3, *size), 0, flips=True).shape == (3, *size)


def test_bf16_decides_almost_everywhere_the_same():
    values, model = scan(1, 32, 32), network()
    assert (predicted(model, values, precision="bf16") == predicted(model, values)).mean() > 0.95


def test_prediction_is_in_evaluation_mode_and_changes_nothing():
    model, values = network(), scan(1, 16, 16)
    model.train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = values.copy()
    first, second = predicted(model, values), predicted(model, values)
    assert not model.training and (first == second).all() and (values == before).all()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_flips_are_averaged():
    values, model = scan(1, 12, 15), network()
    image = normalised(values)
    total = sum(
        np.flip(by_hand(model, np.flip(image, dims)).numpy(), [d + 1 for d in dims]) for dims in ((), (1,), (2,), (1, 2))
    )
    expected = torch.from_numpy(total / 4).softmax(dim=1)[0].numpy()
    found = predicted(model, values, flips=True, probabilities=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - predicted(model, values, probabilities=True)).max() > 0.01
    mirrored = predicted(model, np.ascontiguousarray(values[..., ::-1]), flips=True, probabilities=True)
    np.testing.assert_allclose(mirrored[..., ::-1], found, atol=1e-5)


@pytest.mark.parametrize("size", [(170, 27), (30, 67), (137, 50), (33, 33)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.7])
def test_bands_of_windows_give_what_monai_gives_for_the_whole_image(size, overlap):
    values, model = scan(1, *size), network(3)
    found = predicted(model, values, overlap=overlap, probabilities=True, plan=WINDOWS)
    image = torch.from_numpy(normalised(values))[None]
    with torch.no_grad():
        window = [min(32, length) for length in size]  # what is shorter than the window is not padded to it
        expected = sliding_window_inference(image, window, 1, model, overlap, "gaussian")
    np.testing.assert_allclose(found, expected.softmax(dim=1)[0].numpy(), atol=1e-5)


def test_every_pixel_comes_from_where_it_is():
    values, model = scan(1, 150, 70), nn.Conv2d(1, 3, 1)  # sees one pixel: windows change nothing
    windows = predicted(model, values, probabilities=True, plan=WINDOWS)
    np.testing.assert_allclose(windows, predicted(model, values, probabilities=True), atol=1e-6)


def test_slices_of_a_volume_go_through_windows_too():
    values, model = scan(1, 70, 3, 50), nn.Conv2d(1, 2, 1)
    labels = predicted(model, values, 1, plan=WINDOWS)
    assert (labels == predicted(model, values, 1)).mean() > 0.999 and len(np.unique(labels)) == 2


def test_the_plan_stays_within_its_memory():
    found = Footprint(floats=320, logits=1, stride=16)
    values = np.lib.stride_tricks.as_strided(np.zeros(1, np.int16), (1, 400, 512, 512), (0, 0, 0, 0))
    assert plan_slices(found, values, (512, 512), 400 * 512**2, Inference()).at_once > 1
    large = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint16), (1, 8192, 8192), (0, 0, 0))
    plan = plan_slices(found, large, (8192, 8192), 8192**2, Inference())
    assert plan.at_once == 0 and plan.window == 512 and plan.windows >= 1 and plan.rows >= 4
    less = plan_slices(found, large, (8192, 8192), 8192**2, Inference(memory=2.2))
    assert (less.rows, less.windows, less.window) < (plan.rows, plan.windows, plan.window)


@pytest.mark.parametrize("memory", [1.32, 4.0])
@pytest.mark.parametrize("classes", [2, 3, 12])
def test_scores_are_of_the_windows_of_masks_however_many_classes(classes, memory, monkeypatch):
    plans = []

    def planned(*arguments):
        plans.append(plan_slices(*arguments))
        return plans[-1]

    monkeypatch.setattr("resunet.inference.window.plan_slices", planned)
    values, model = scan(1, 6, 90, 70), network(classes)
    intensities = percentile_intensity(values, 0.5, 99.5)
    labels, foreground = predict_scores(model, values, 0, intensities, CPU, inference=Inference(memory=memory))
    assert np.array_equal(labels, predicted(model, values, 0, memory=memory)) and plans[0] == plans[1]
    each = predicted(model, values, 0, probabilities=True, plan=plans[0])
    np.testing.assert_allclose(foreground, each[0] if classes == 2 else each[1:].sum(axis=0), atol=1e-6)


def test_what_is_kept_of_a_prediction_does_not_grow_with_its_classes():
    """Of a thoracic CT and 14 classes maps of all would take 1.5 GB."""
    settings, large = Inference(), np.lib.stride_tricks.as_strided(np.zeros(1, np.int16), (1, 100, 512, 512), (0,) * 4)

    class Still:
        spatial_dims, footprint = 2, Footprint(400.0, 14, 16)

        def __call__(self, images):
            raise StopIteration(len(images))

    with pytest.raises(StopIteration):
        scores_with(Still(), large, 0, [Intensity(0, 1, 0, 1)], settings)
    with pytest.raises(InputError, match="memory=4 GiB: too little"):
        predict_with(Still(), large, 0, [Intensity(0, 1, 0, 1)], settings, probabilities=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_no_background(bad):
    model, values = network(), scan(1, 9, 11)
    with torch.no_grad():
        model.head.bias[1] = bad
    intensities = percentile_intensity(values, 0.5, 99.5)
    with pytest.raises(InputError, match="gives values that are not finite"):
        predicted(model, values)
    with pytest.raises(InputError, match="gives values that are not finite"):
        predict_scores(model, values, None, intensities, CPU)


def test_too_little_memory_is_said_with_what_would_do():
    model, values = network(2), scan(1, 500, 500)
    with pytest.raises(InputError, match=r"memory=0.5 GiB: too little.*1 × 500 × 500 int16.*--memory (\S+)\.$") as caught:
        predicted(model, values, memory=0.5)
    enough = float(str(caught.value).rsplit(" ", 1)[1].rstrip("."))
    assert predicted(model, values, memory=enough).shape == (500, 500)


def test_a_footprint_is_of_the_network():
    narrow, wide = network(2, channels=(4, 8)), network(2, channels=(8, 16, 16))
    assert footprint(wide, 1, CPU).floats == pytest.approx(2 * footprint(narrow, 1, CPU).floats, rel=0.1)
    assert (footprint(narrow, 1, CPU).stride, footprint(wide, 1, CPU).stride) == (2, 4)
    assert footprint(UNet(1, 5, (4, 8, 16)).eval(), 1, CPU)[1:] == (5, 4)


VOLUME_WINDOWS = Plan(at_once=0, window=16, windows=2, rows=2)


@pytest.mark.parametrize("axis", [None, 0, 2])
def test_a_network_of_volumes_sees_them_whole(axis):
    values, model = scan(1, 11, 13, 9), network(spatial_dims=3)
    expected = by_hand(model, normalised(values)).softmax(dim=1)[0].numpy()
    scores, labels = predicted(model, values, axis, probabilities=True), predicted(model, values, axis)
    assert scores.shape == (3, 11, 13, 9) and labels.shape == (11, 13, 9) and len(np.unique(labels)) >= 2
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert (scores.argmax(axis=0) == labels).mean() > 0.999


@pytest.mark.parametrize("size", [(50, 20, 17), (12, 33, 16), (17, 9, 40)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.7])
def test_bands_of_windows_give_what_monai_gives_for_the_whole_volume(size, overlap):
    values, model = scan(1, *size), network(3, spatial_dims=3)
    found = predicted(model, values, overlap=overlap, probabilities=True, plan=VOLUME_WINDOWS)
    image = torch.from_numpy(normalised(values))[None]
    with torch.no_grad():
        expected = sliding_window_inference(image, [min(16, n) for n in size], 1, model, overlap, "gaussian")
    np.testing.assert_allclose(found, expected.softmax(dim=1)[0].numpy(), atol=1e-5)
    assert np.abs(found - predicted(model, values, probabilities=True)).max() > 1e-3  # windows end where the volume does not


def test_every_voxel_comes_from_where_it_is():
    values, model = scan(1, 40, 22, 19), nn.Conv3d(1, 3, 1)  # sees one voxel: windows change nothing
    windows = predicted(model, values, probabilities=True, plan=VOLUME_WINDOWS)
    np.testing.assert_allclose(windows, predicted(model, values, probabilities=True), atol=1e-6)


def test_a_volume_is_flipped_over_three_axes():
    values, model = scan(1, 7, 10, 9), network(spatial_dims=3)
    image = normalised(values)
    mirrored = [dims for count in range(4) for dims in itertools.combinations((1, 2, 3), count)]
    total = sum(np.flip(by_hand(model, np.flip(image, dims)).numpy(), [d + 1 for d in dims]) for dims in mirrored)
    expected = torch.from_numpy(total / 8).softmax(dim=1)[0].numpy()
    found = predicted(model, values, flips=True, probabilities=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - predicted(model, values, probabilities=True)).max() > 0.01


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 5, 2), (2, 3, 20), (8, 8, 8)])
def test_a_volume_smaller_than_the_coarsest_stride(size, norm):
    model = network(2, channels=(4, 4, 4, 4), norm=norm, spatial_dims=3)
    assert footprint(model, 1, CPU).stride == 8
    assert predicted(model, scan(1, *size), flips=True).shape == size


def test_an_image_is_refused_by_a_network_of_volumes():
    with pytest.raises(InputError, match=r"is an image of 20 × 30 pixels; this model is of volumes"):
        predicted(network(spatial_dims=3), scan(1, 20, 30))


@pytest.mark.parametrize("memory", [3.0, 4.0, 8.0])
def test_the_plan_of_a_large_volume_stays_within_its_memory(memory):
    """By hand: of all that is held together, the bytes."""
    found = Footprint(floats=160, logits=3, stride=16)
    size = (400, 512, 512)
    values = np.lib.stride_tricks.as_strided(np.zeros(1, np.int16), (1, *size), (0, 0, 0, 0))
    out = 400 * 512**2
    plan = plan_slices(found, values, size, out, Inference(memory=memory))
    assert plan.at_once == 0 and plan.window >= 32 and plan.windows >= 1 and plan.rows >= 2
    height = plan.window + (plan.rows - 1) * int(plan.window * 0.75)
    band = 4 * (4 + 2 * 3 + 4) * height * 512 * 512
    passes = plan.windows * plan.window**3 * 4 * (160 + 3 + 12)
    assert 1.25 * 2**30 + values.nbytes + 2 * out + band + passes <= memory * 2**30
    thin = plan_slices(found, values[:, :60], (60, 512, 512), 60 * 512**2, Inference(memory=memory))
    assert thin.at_once or thin.window > plan.window  # windows of few slices may be wider


def test_too_little_memory_for_a_volume_is_said_with_what_would_do():
    model, values = network(2, spatial_dims=3), scan(1, 100, 90, 80)
    with pytest.raises(InputError, match=r"memory=0.5 GiB: too little for a scan of 1 × 100 × 90 × 80") as caught:
        predicted(model, values, memory=0.5)
    enough = float(str(caught.value).rsplit(" ", 1)[1].rstrip("."))
    plan = plan_slices(footprint(model, 1, CPU), values, values.shape[1:], values[0].size, Inference(memory=enough))
    assert plan.rows >= 2 and plan.window == 32
    with pytest.raises(InputError):
        plan_slices(footprint(model, 1, CPU), values, values.shape[1:], values[0].size, Inference(memory=enough - 0.1))


def test_a_footprint_of_volumes_is_of_the_network():
    narrow, wide = (network(2, channels=widths, spatial_dims=3) for widths in ((4, 8), (8, 16, 16)))
    assert footprint(wide, 1, CPU).floats == pytest.approx(2 * footprint(narrow, 1, CPU).floats, rel=0.1)
    assert (footprint(narrow, 1, CPU).stride, footprint(wide, 1, CPU).stride) == (2, 4)
    flat = network(2, channels=(8, 16, 16))
    assert footprint(wide, 1, CPU).floats == pytest.approx(footprint(flat, 1, CPU).floats, rel=0.1)  # a pixel's
