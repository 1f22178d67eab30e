import pytest
import torch

from finetune.comparison.cost import cost_section, costs_of
from resunet.model import ResUNet


@pytest.fixture
def models(tmp_path):
    for name, dims, channels in (("flat", 2, (4, 8)), ("deep", 3, (4, 8)), ("wide", 2, (8, 16))):
        ResUNet(1, 2, channels, spatial_dims=dims).save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in ("flat", "deep", "wide")}


def test_cost_is_of_each_model_as_it_was_saved(models):
    costs = costs_of(models)
    for name, folder in models.items():
        network = ResUNet.from_pretrained(folder)
        assert costs[name].parameters == sum(one.numel() for one in network.parameters())
        assert costs[name].weights_bytes == (folder / "model.safetensors").stat().st_size
        assert costs[name].seconds > 0
    assert (costs["flat"].size, costs["deep"].size) == ((256, 256), (64, 64, 64))


def test_operations_are_those_of_the_convolutions(tmp_path):
    network = ResUNet(1, 2, (4, 8))
    network.save_pretrained(tmp_path / "model")
    found: list[int] = []

    def count(layer, inputs, output):
        # 2 · (weights a position) · positions; a transposed convolution's positions are its input's
        positions = inputs[0] if isinstance(layer, torch.nn.ConvTranspose2d) else output
        found.append(2 * layer.weight.numel() * positions[0, 0].numel())

    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            layer.register_forward_hook(count)
    network.eval()(torch.zeros(1, 1, 256, 256))
    assert costs_of({"model": tmp_path / "model"})["model"].gflop == pytest.approx(sum(found) / 1e9)


def test_the_table_has_a_column_for_each_and_the_first_is_one(models):
    costs = costs_of(models)
    rows = {row[0]: row[1:] for row in cost_section(costs).table}
    assert rows[""] == ["flat", "deep", "wide"]
    assert rows["Input"] == ["256×256", "64×64×64", "256×256"]
    assert rows["Speed, flat = 1"][0] == "1.00"
    assert float(rows["Parameters, million"][2]) == pytest.approx(costs["wide"].parameters / 1e6, abs=0.005)


def test_a_network_that_is_deeper_than_the_usual_input_has_a_larger_one(tmp_path):
    """At stride 64 an input of 64³ is one position, which instance norm refuses."""
    ResUNet(1, 2, (2,) * 7, units=1, norm="instance", spatial_dims=3).save_pretrained(tmp_path / "model")
    assert costs_of({"model": tmp_path / "model"})["model"].size == (128, 128, 128)
