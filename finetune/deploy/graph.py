"""A network as a graph: ONNX by PyTorch's dynamo exporter, OpenVINO's IR from that.

Batch and sizes are open. What the graph does with odd sizes is what the network does, because sizes are computed in it.
"""

import copy
import io
import math
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from resunet.bundle.engines import ir_of
from resunet.ensemble import Ensemble
from resunet.errors import CheckFailed
from resunet.layout import spatial_dims_of
from resunet.model import UNet

if TYPE_CHECKING:
    import onnx  # of the extra `export`: imported where a graph is written

OPSET = 18  # the oldest that PyTorch's exporter writes without a converter; TensorRT 11 takes 9 to 25
TENSORRT_VERSION = "11"  # what graphs are checked for; see `finetune.deploy.tensorrt_check`
INPUT, OUTPUT = "scan", "logits"
_SIZES = {2: (37, 45), 3: (21, 27, 19)}  # unequal and odd, so that nothing is taken for the same or for a constant


class _Graph(nn.Module):
    """A network that takes and gives float32, and computes in `dtype`."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = graphable(network).eval().to(dtype=dtype)
        self.dtype = dtype

    def forward(self, scan: Tensor) -> Tensor:
        x = scan.to(self.dtype)
        if isinstance(self.network, Ensemble):
            return _mean(self.network, x)
        logits: Tensor = self.network(x).float()
        return logits


def graphable(network: nn.Module) -> nn.Module:
    """A copy on the CPU, in operators that every engine takes."""
    copied = copy.deepcopy(network).to(device="cpu")
    for part in copied.modules():
        if isinstance(part, UNet):
            part.pool = _pool  # type: ignore[assignment]
    return copied


def example_of(channels: int, dims: int) -> Tensor:
    """A batch to capture a network with."""
    return torch.randn(2, channels, *_SIZES[dims], generator=torch.Generator().manual_seed(0))


def _mean(ensemble: Ensemble, x: Tensor) -> Tensor:
    """`Ensemble.forward` in operators that stay finite: the exporter writes log(sigmoid(x)) and log(exp(a) + exp(b))."""
    total: Tensor | None = None
    for member in ensemble.members:
        logits = member(x).float()
        scores = -F.softplus(-torch.cat([logits, -logits], dim=1)) if ensemble.one_logit else logits.log_softmax(dim=1)
        total = scores if total is None else torch.maximum(total, scores) + F.softplus(-(total - scores).abs())
    assert total is not None
    return total[:, :1] - total[:, 1:] if ensemble.one_logit else total - math.log(len(ensemble.members))


def _pool(x: Tensor, kernel: int, ceil_mode: bool) -> Tensor:
    """The U-Net's pooling, which continues an odd side, without ceil_mode: OpenVINO refuses that for a side of one."""
    assert kernel == 2 and ceil_mode
    beyond = [side for n in reversed(x.shape[2:]) for side in (0, n % 2)]
    x = F.pad(x, beyond, value=torch.finfo(x.dtype).min)
    return F.max_pool2d(x, 2) if x.ndim == 4 else F.max_pool3d(x, 2)


def write_onnx(network: nn.Module, channels: int, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the graph of a network: (N, channels, *size) float32 → logits float32, computed in `dtype`.

    Raises:
        CheckFailed: the graph does not keep its batch or a size open.
    """
    write_module(_Graph(network, dtype).eval(), channels, spatial_dims_of(network), path)


def write_module(module: nn.Module, channels: int, dims: int, path: Path) -> None:
    """Write the graph of a module whose argument is `scan`; see `write_onnx`."""
    import onnx

    example = example_of(channels, dims)
    open_axes = dict.fromkeys((0, *range(2, 2 + dims)), Dim.DYNAMIC)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter's own parts
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            dynamic_shapes=(open_axes,),
            external_data=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    _strip(model)
    _name_axes(model, dims)
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())


def _strip(model: "onnx.ModelProto") -> None:
    """The exporter writes where each node comes from, with files and lines of this machine."""
    model.doc_string = ""
    del model.metadata_props[:]
    graph = model.graph
    graph.doc_string = ""
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]


def _name_axes(model: "onnx.ModelProto", dims: int) -> None:
    names = ["batch", None, *("z", "y", "x")[3 - dims :]]
    for value in (*model.graph.input, *model.graph.output):
        axes = value.type.tensor_type.shape.dim
        fixed = [axis for axis, name in zip(axes, names, strict=True) if name is not None and axis.HasField("dim_value")]
        if value in model.graph.input and fixed:
            raise CheckFailed(f"{value.name}: the exporter made a constant of a size. This is a fault of ours: report it.")
        for axis, name in zip(axes, names, strict=True):
            if name is not None:
                axis.dim_param = name
    del model.graph.value_info[:]  # of the exporter's own names for sizes


def write_openvino(source: Path, path: Path, half_weights: bool) -> int:
    """An ONNX file as OpenVINO's IR (path.xml and path.bin), its weights in fp16 where wanted; the version of the format."""
    import openvino

    path.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(openvino.Core().read_model(source), path, compress_to_fp16=half_weights)
    version = ir_of(path)
    assert version is not None, "openvino.save_model writes the version"
    return version
