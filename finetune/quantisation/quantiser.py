"""Which tensors of a captured network are rounded to INT8, and how.

Weights: a scale a channel, zero point 0, −127 to 127. Activations: a scale a tensor, on one of two grids. Affine: 0 to 255; what
a ReLU gives has its zero point at 0, so that ONNX Runtime leaves the ReLU to the rounding. Symmetric: −128 to 127, zero point 0,
which TensorRT asks for. Both go as far as ONNX's QuantizeLinear does.

Rounded are the inputs of convolutions, transposed or not, and of additions of feature maps; all else stays in floating point: norms
that cannot be folded, hard swish, the gates of squeeze-and-excitation, and what the head gives, the logits.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torchao.quantization.pt2e import (
    FakeQuantize,
    HistogramObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
)
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

_ATEN = torch.ops.aten
# Operator → the axis of the weight that counts its output's channels.
CONVOLUTIONS: dict[Callable[..., Any], int] = {
    _ATEN.conv2d.default: 0,
    _ATEN.conv3d.default: 0,
    _ATEN.conv2d.padding: 0,
    _ATEN.conv3d.padding: 0,
    _ATEN.conv_transpose2d.input: 1,
    _ATEN.conv_transpose3d.input: 1,
}
ADDITIONS = (_ATEN.add.Tensor, _ATEN.add_.Tensor)
_KEY = "quantization_annotation"
_GRIDS: dict[str, dict[str, Any]] = {
    "affine": dict(dtype=torch.uint8, quant_min=0, quant_max=255, qscheme=torch.per_tensor_affine),
    "symmetric": dict(dtype=torch.int8, quant_min=-128, quant_max=127, qscheme=torch.per_tensor_symmetric),
}
_LEAST_SCALE = 2.0**-20  # of a channel whose weights are all 0, as pruning and dead units leave them
_MOMENTUM = 0.05  # of the ranges' moving average in training


class ConvolutionQuantizer(Quantizer):
    """Annotates the graph that `torch.export` made of a network.

    trained: ranges for QAT, otherwise those of one calibration. keep_float: layers, as `layer_of` calls them, that are left alone.
    """

    def __init__(self, trained: bool, grid: Literal["affine", "symmetric"], keep_float: Sequence[str] = ()) -> None:
        super().__init__()
        self.keep_float = frozenset(keep_float)
        self.activations = _activations(trained, _GRIDS[grid])
        self.weights = {axis: _weights(trained, axis) for axis in set(CONVOLUTIONS.values())}

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        for node in model.graph.nodes:
            if not is_rounded(node) or layer_of(node) in self.keep_float:
                continue
            given, other = node.args[:2]
            own = self.weights[CONVOLUTIONS[node.target]] if node.target in CONVOLUTIONS else self.activations
            self._round(node, {given: self.activations, other: own})
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """Nothing that was annotated can be refused: every specification is this class's own."""

    @staticmethod
    def _round(node: fx.Node, inputs: dict[fx.Node, QuantizationSpec]) -> None:
        node.meta[_KEY] = QuantizationAnnotation(input_qspec_map=dict(inputs), _annotated=True)


def is_rounded(node: fx.Node) -> bool:
    """A convolution, or an addition of feature maps: its two first inputs are rounded."""
    if node.target in CONVOLUTIONS:
        return True
    return node.target in ADDITIONS and all(_is_feature_map(one) for one in node.args[:2])


def layer_of(node: fx.Node) -> str:
    """The module that a captured operator belongs to, by its name in the network; of an addition the unit that adds."""
    name = [path for path, _ in node.meta["nn_module_stack"].values()][-1]
    return str(name) or "network"


def _is_feature_map(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 4


def _activations(trained: bool, values: dict[str, Any]) -> QuantizationSpec:
    if not trained:
        return QuantizationSpec(observer_or_fake_quant_ctr=HistogramObserver.with_args(eps=_LEAST_SCALE), **values)
    observer = MovingAverageMinMaxObserver.with_args(averaging_constant=_MOMENTUM, eps=_LEAST_SCALE)
    made = FakeQuantize.with_args(observer=observer)
    return QuantizationSpec(observer_or_fake_quant_ctr=made, **values)


def _weights(trained: bool, axis: int) -> QuantizationSpec:
    values: dict[str, Any] = dict(
        dtype=torch.int8, quant_min=-127, quant_max=127, qscheme=torch.per_channel_symmetric, ch_axis=axis
    )
    if not trained:
        return QuantizationSpec(observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=_LEAST_SCALE), **values)
    # the weights' own ranges at every step, not their average: they are known exactly
    # torchao drops a specification's axis for whatever is no observer; torch's fused operator has axis 0 only
    observer = MovingAveragePerChannelMinMaxObserver.with_args(ch_axis=axis, averaging_constant=1.0, eps=_LEAST_SCALE)
    made = FakeQuantize.with_args(observer=observer)
    return QuantizationSpec(observer_or_fake_quant_ctr=made, **values)
