import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from finetune.deploy.graph import OPSET, write_onnx, write_openvino
from finetune.deploy.tensorrt_check import tensorrt_faults
from resunet.bundle.onnx_header import opset_of
from resunet.ensemble import Ensemble
from resunet.errors import CheckFailed
from resunet.model import ResUNet, UNet


def network(kind: type, *arguments, **named) -> nn.Module:
    model = kind(*arguments, **named)
    nn.init.normal_(model.head.weight)
    return model.eval()


def run_onnx(path: Path, x: torch.Tensor) -> np.ndarray:
    import onnxruntime

    return onnxruntime.InferenceSession(str(path)).run(None, {"scan": x.numpy()})[0]


def run_openvino(path: Path, x: torch.Tensor) -> np.ndarray:
    import openvino

    write_openvino(path, path.with_suffix(".xml"), half_weights=False)
    core = openvino.Core()
    return core.compile_model(path.with_suffix(".xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x.numpy())[0]


def test_a_plain_u_net_of_any_size(tmp_path):
    """OpenVINO refuses to pool a side of one with ceil_mode, which the network has."""
    torch.manual_seed(0)
    model, path = network(UNet, 2, 3, (4, 4, 8)), tmp_path / "g" / "model.onnx"
    write_onnx(model, 2, path)
    assert model.pool is torch.nn.functional.max_pool2d  # the network itself is as it was
    for size in ((1, 2, 16, 16), (3, 2, 17, 23), (2, 2, 1, 30), (1, 2, 5, 3)):
        x = torch.randn(size)
        with torch.no_grad():
            expected = model(x).numpy()
        for run in (run_onnx, run_openvino):
            np.testing.assert_allclose(run(path, x), expected, atol=1e-5)
    assert tensorrt_faults(path) == () and opset_of(path) == OPSET
    inputs = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    assert [axis.dim_param or axis.dim_value for axis in inputs] == ["batch", 2, "y", "x"]


def test_an_ensemble_of_sure_members_stays_finite(tmp_path):
    """log(sigmoid(x)) and log(exp(a) + exp(b)), which PyTorch's exporter writes, are minus infinity from a logit of -100 on."""
    torch.manual_seed(0)
    members = [network(ResUNet, 1, 2, (4, 4), units=1) for _ in range(2)]
    for member in members:
        member.head.weight.data *= 300
    model, path = Ensemble(members).eval(), tmp_path / "model.onnx"
    write_onnx(model, 1, path)
    x = torch.randn(1, 1, 15, 18)
    with torch.no_grad():
        expected = model(x).numpy()
    assert np.abs(expected).max() > 400 and np.isfinite(expected).all()
    for run in (run_onnx, run_openvino):
        np.testing.assert_allclose(run(path, x), expected, rtol=1e-5, atol=1e-4)


def test_the_graph_names_no_file_of_this_machine(tmp_path):
    path = tmp_path / "model.onnx"
    write_onnx(network(ResUNet, 1, 3, (4, 4), units=1, norm="instance"), 1, path)
    data = path.read_bytes()
    assert not re.search(rb"\.py\b|/resunet|/site-packages|stack_trace", data)
    x = torch.randn(2, 1, 9, 14)
    assert run_onnx(path, x).shape == (2, 3, 9, 14)


def graph_of(path: Path, nodes: list, kind: int = TensorProto.FLOAT, opset: int = 18, constants=()) -> Path:
    value = [helper.make_tensor_value_info(name, kind, ["n", 1, "y", "x"]) for name in ("a", "b")]
    made = helper.make_graph(nodes, "g", value[:1], value[1:], list(constants))
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("own", 1)]), path)
    return path


def test_what_tensorrt_does_not_take(tmp_path):
    path, node = tmp_path / "x.onnx", helper.make_node
    assert tensorrt_faults(graph_of(path, [node("Relu", ["a"], ["b"])])) == ()
    (fault,) = tensorrt_faults(graph_of(path, [node("Hardmax", ["a"], ["b"], "h")]))
    assert fault == "Hardmax h: TensorRT has no such operator"
    (fault,) = tensorrt_faults(graph_of(path, [node("Relu", ["a"], ["b"], domain="own")]))
    assert "no such operator of own" in fault
    faults = tensorrt_faults(graph_of(path, [node("Relu", ["a"], ["b"])], TensorProto.DOUBLE))
    assert faults == tuple(f"{name}: is of DOUBLE, which TensorRT does not compute with" for name in "ab")
    (fault,) = tensorrt_faults(graph_of(path, [node("Relu", ["a"], ["b"])], opset=26))
    assert fault == "opset 26: TensorRT 11 takes 9 to 25"
    zero = [helper.make_tensor("s", TensorProto.FLOAT, [], [0.1]), helper.make_tensor("z", TensorProto.INT8, [], [3])]
    both = [node("QuantizeLinear", ["a", "s", "z"], ["q"]), node("DequantizeLinear", ["q", "s", "z"], ["b"])]
    assert len(tensorrt_faults(graph_of(path, both, constants=zero))) == 2
    zero[1] = helper.make_tensor("z", TensorProto.INT8, [], [0])
    assert tensorrt_faults(graph_of(path, both, constants=zero)) == ()


@pytest.mark.parametrize("version", [9, 18, 300])
def test_the_opset_is_read_from_the_bytes(tmp_path, version):
    path = graph_of(tmp_path / "x.onnx", [helper.make_node("Relu", ["a"], ["b"])], opset=version)
    assert opset_of(path) == version
    path.write_bytes(path.read_bytes()[:9])
    with pytest.raises(CheckFailed, match="is no ONNX file"):
        opset_of(path)
    path.write_bytes(b"")
    assert opset_of(path) is None
