import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from finetune.deploy.graph import write_module
from finetune.deploy.tensorrt_check import tensorrt_faults
from finetune.quantisation import pt2e
from finetune.quantisation.sensitivity import measure_rounding
from resunet.errors import InputError
from resunet.model import ResUNet, UNet

CONVOLUTIONS = ("Conv", "ConvTranspose")


def trained(network: nn.Module, dims: int) -> nn.Module:
    """With batch statistics that are not those of initialisation."""
    torch.manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    return network.eval()


@pytest.mark.parametrize(
    "network, size",
    [
        (ResUNet(1, 2, (4, 8), units=1, squeeze_excite=True), (17, 22)),
        (UNet(1, 2, (4, 8)), (15, 9)),
        (ResUNet(1, 2, (4, 8), units=1, spatial_dims=3), (9, 8, 11)),
    ],
)
def test_folding_batch_norm_changes_nothing(network, size):
    trained(network, len(size))
    captured = pt2e.capture(network, 1, training=False)
    before = len(list(captured.graph.nodes))
    pt2e.fold_batch_norm(captured)
    assert len(list(captured.graph.nodes)) < before
    assert not [node for node in captured.graph.nodes if "batch_norm" in str(node.target)]
    x = torch.randn(3, 1, *size)
    with torch.no_grad():
        torch.testing.assert_close(captured(x), network(x), atol=1e-5, rtol=1e-5)


def test_a_convolution_in_integers():
    """What is converted is what integers give, by numpy: weights, inputs, bias."""
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, padding=1)
    x = torch.randn(2, 2, 12, 9)
    prepared = pt2e.prepare(layer, 2, trained=False, with_batch_norm=False, grid="affine")
    prepared(x)
    converted = pt2e.convert(prepared)
    node = next(one for one in converted.graph.nodes if "conv2d" in str(one.target))
    scale, zero = node.args[0].args[1:3]
    q = np.clip(np.round(x.numpy() / scale) + zero, 0, 255) - zero
    weight = layer.weight.detach().numpy()
    scales = np.abs(weight).max(axis=(1, 2, 3)) / 127
    rounded = np.round(weight / scales[:, None, None, None]).clip(-127, 127)
    bias = np.round(layer.bias.detach().numpy() / (scales * scale))
    whole = F.conv2d(
        torch.from_numpy(q).double(), torch.from_numpy(rounded).double(), torch.from_numpy(bias).double(), padding=1
    )
    wanted = whole.numpy() * (scales * scale)[:, None, None]
    with torch.no_grad():
        np.testing.assert_allclose(converted(x).numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize("grid", ["affine", "symmetric"])
def test_the_graph_is_the_converted_module(tmp_path, grid):
    torch.manual_seed(0)
    network = trained(ResUNet(2, 3, (4, 8), units=1), 2)
    prepared = pt2e.prepare(network, 2, trained=False, with_batch_norm=False, grid=grid)
    prepared(torch.randn(4, 2, 24, 24))
    assert pt2e.unobserved(prepared) == []
    converted, path = pt2e.convert(prepared), tmp_path / "model.onnx"
    write_module(converted, 2, 2, path)
    made = {output: node.op_type for node in onnx.load(path).graph.node for output in node.output}
    nodes = onnx.load(path).graph.node
    convolutions = [node for node in nodes if node.op_type in CONVOLUTIONS]
    assert len(convolutions) == 11 and all(made[one] == "DequantizeLinear" for node in convolutions for one in node.input[:2])
    additions = [node for node in nodes if node.op_type == "Add"]
    assert len(additions) == 4 and all(made[one] == "DequantizeLinear" for node in additions for one in node.input)
    weights = [
        one for one in onnx.load(path).graph.initializer if one.data_type == onnx.TensorProto.INT8 and len(one.dims) == 4
    ]
    assert len(weights) == len(convolutions)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # every operator as it is written
    session = onnxruntime.InferenceSession(str(path), options)
    for size in ((1, 2, 16, 16), (3, 2, 17, 23), (2, 2, 5, 30)):
        x = torch.randn(size)
        with torch.no_grad():
            wanted = converted(x).numpy()
        found = session.run(None, {"scan": x.numpy()})[0]
        assert np.quantile(np.abs(found - wanted), 0.9) < 1e-5  # the others: a value on the border was rounded the other way
    refused = tensorrt_faults(path)
    assert refused == () if grid == "symmetric" else any("UINT8" in fault for fault in refused)


def test_training_with_batch_norm_that_then_stands_still():
    torch.manual_seed(0)
    network = trained(ResUNet(1, 2, (4, 8), units=1), 2)
    assert pt2e.foldable_in_training(network)
    prepared = pt2e.prepare(network, 1, trained=True, with_batch_norm=True, grid="affine")
    statistics = {name: value.clone() for name, value in prepared.named_buffers() if name.endswith("running_mean")}
    x = torch.randn(4, 1, 16, 16)
    prepared(x).sum().backward()
    moved = {name: value.clone() for name, value in prepared.named_buffers() if name in statistics}
    assert all((moved[name] != before).any() for name, before in statistics.items()) and len(statistics) == 9
    assert all(one.grad is not None and one.grad.isfinite().all() for one in prepared.parameters())
    pt2e.freeze_statistics(prepared)
    pt2e.set_ranges(prepared, moving=False)
    frozen = prepared(x).detach()
    assert all((value == moved[name]).all() for name, value in prepared.named_buffers() if name in moved)
    converted = pt2e.convert(prepared)
    assert not [node for node in converted.graph.nodes if "batch_norm" in str(node.target)]
    with torch.no_grad():
        difference = (converted(x) - frozen).abs() / frozen.abs().max()
    assert difference.mean() < 0.02  # zero points are rounded at the end
    network.decoder.blocks[0].unit.norm1.eps = 1e-3
    assert not pt2e.foldable_in_training(network)
    assert not pt2e.foldable_in_training(ResUNet(1, 2, (4, 8), units=1, spatial_dims=3))


def test_ranges_move_only_while_they_are_told_to():
    torch.manual_seed(0)
    network = trained(ResUNet(1, 2, (4, 8), units=1), 2)
    prepared = pt2e.prepare(network, 1, trained=True, with_batch_norm=False, grid="affine")
    pt2e.set_ranges(prepared, moving=True, rounding=False)
    x = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(prepared(x), network(x), atol=1e-5, rtol=1e-5)  # nothing is rounded yet
        pt2e.set_ranges(prepared, moving=False)
        before = {name: value.clone() for name, value in prepared.named_buffers() if name.endswith("max_val")}
        prepared(100 * x)
    after = dict(prepared.named_buffers())
    assert all((after[name] == value).all() for name, value in before.items())
    pt2e.set_ranges(prepared, moving=True)
    prepared(100 * x)
    assert any((after[name] != value).any() for name, value in before.items())


def test_what_stays_in_float_is_not_rounded():
    network = trained(ResUNet(1, 2, (4, 8), units=1), 2)
    whole, some = (
        pt2e.rounding_by_layer(pt2e.prepare(network, 1, True, False, "affine", keep))
        for keep in ((), ("encoder.levels.0.0.conv1",))
    )
    assert list(whole)[:2] == ["encoder.levels.0.0.conv1", "encoder.levels.0.0.conv2"] and "encoder.levels.0.0" in whole
    assert all(len(its) == 2 for its in whole.values()), "an input and a weight, or two inputs"
    assert list(some) == list(whole)[1:]
    with pytest.raises(InputError, match=r"keep_float: conv9: no such layer\. They are: encoder\.levels\.0\.0\.conv1, "):
        pt2e.prepare(network, 1, True, False, "affine", ("conv9",))


def test_the_harm_of_a_layer_is_that_of_rounding_it_alone():
    torch.manual_seed(0)
    network, x = trained(ResUNet(1, 2, (4, 8), units=1), 2), torch.randn(2, 1, 16, 16)
    seen = []

    def closeness(module):
        with torch.no_grad():
            seen.append(module(x))
            return -float((seen[-1] - network(x)).abs().mean())

    found = measure_rounding(network, 1, "affine", [x], closeness, 2)
    assert found.dice == pytest.approx(0, abs=1e-5) and all(one.dice < -5e-6 for one in found.layers)
    worst = min(found.layers, key=lambda one: one.dice)
    assert found.worst(1) == [worst.layer] and found.told(1)[0].startswith(f"{worst.layer} (alone in INT8 Dice −")
    others = [one.layer for one in found.layers if one.layer != worst.layer]
    alone = pt2e.prepare(network, 1, True, False, "affine", others)
    pt2e.set_ranges(alone, moving=True, rounding=False)
    with torch.no_grad():
        alone(x)
        pt2e.set_ranges(alone, moving=False)
        torch.testing.assert_close(alone(x), seen[1 + [one.layer for one in found.layers].index(worst.layer)])
