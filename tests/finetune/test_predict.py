import numpy as np
import pytest
import torch
from torch import nn

from finetune.predict import decide, predict_case, predict_slices
from resunet.data.cases import Case, LoadedCase
from resunet.model import ResUNet
from resunet.runtime import normalise, percentile_intensity

CPU = torch.device("cpu")


def case(values: np.ndarray, spacing: tuple[float, ...]) -> LoadedCase:
    return LoadedCase(
        case=Case("a", "a", "a", "a", None, image=None, mask=None),
        values=values,
        spacing=spacing,
        intensities=percentile_intensity(values, 0.5, 99.5),
        labels=None,
        file_sha256="",
        pixel_sha256="",
    )


def volume(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-500, 2000, shape).astype(np.int16)


def network(num_classes: int = 3) -> ResUNet:
    """Its head is made large, so that all classes are predicted somewhere."""
    torch.manual_seed(0)
    model = ResUNet(1, num_classes, (4, 8), units=1)
    nn.init.normal_(model.head.weight)
    return model


def test_decisions():
    logits = torch.tensor([-3.0, 0.0, 1e-6, 3.0]).view(1, 1, 2, 2)
    assert decide(logits).tolist() == [[[0, 0], [1, 1]]]
    many = torch.tensor([[1.0, 5.0], [2.0, -1.0], [1.5, 4.0]]).view(1, 3, 1, 2)
    assert decide(many).tolist() == [[[1, 0]]] and decide(many).dtype == decide(logits).dtype == torch.uint8
    high = torch.zeros(1, 254, 1, 1)
    high[0, 253] = 1
    assert decide(high).item() == 253


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_volume_is_predicted_slice_by_slice_along_its_coarsest_axis(axis):
    values = volume(1, 11, 13, 9)
    spacing = tuple(4.0 if i == axis else 1.0 for i in range(3))
    model = network()
    predicted = predict_case(model, case(values, spacing), CPU, "fp32")
    assert predicted.shape == (11, 13, 9) and predicted.dtype == np.uint8
    assert len(np.unique(predicted)) == 3
    whole = normalise(values, percentile_intensity(values, 0.5, 99.5))  # of the volume, not of the slice
    for i in range(values.shape[axis + 1]):
        image = torch.from_numpy(whole.take(i, axis=axis + 1))[None]
        with torch.no_grad():
            by_hand = model.eval()(image)[0].argmax(dim=0).numpy()
        assert (predicted.take(i, axis=axis) == by_hand).mean() > 0.999  # a tie may fall either way


def test_more_slices_than_a_batch_keep_their_order():
    values = volume(1, 35, 8, 8)
    model = network(4)
    predicted = predict_case(model, case(values, (5, 1, 1)), CPU, "fp32")
    alone = [predict_slices(model, case(values, (5, 1, 1)).image_slice(i)[None], CPU, "fp32")[0] for i in range(35)]
    assert (predicted == np.stack(alone)).mean() > 0.999
    assert len({one.tobytes() for one in predicted}) > 17


def test_an_image_of_odd_size_is_predicted_whole():
    predicted = predict_case(network(2), case(volume(1, 17, 23), (1, 1)), CPU, "fp32")
    assert predicted.shape == (17, 23) and set(np.unique(predicted)) == {0, 1}


def test_bf16_decides_almost_everywhere_the_same():
    one = case(volume(1, 32, 32), (1, 1))
    model = network()
    assert (predict_case(model, one, CPU, "bf16") == predict_case(model, one, CPU, "fp32")).mean() > 0.95


def test_prediction_is_in_evaluation_mode_and_changes_nothing():
    model, one = network(), case(volume(1, 16, 16), (1, 1))
    model.train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    values = one.values.copy()
    first, second = (predict_case(model, one, CPU, "fp32") for _ in range(2))
    assert not model.training and (first == second).all() and (one.values == values).all()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
