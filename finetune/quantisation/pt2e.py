"""A network through torchao's pt2e: captured, prepared, trained or calibrated by others, converted to integers.

A captured network is a graph of ATen operators, `torch.fx.GraphModule`, of any batch and size. It has no modes: what `train` and
`eval` change is written into its operators.
"""

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchao.quantization.pt2e import FakeQuantizeBase, ObserverBase, move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

from finetune.deploy.graph import example_of, graphable
from finetune.quantisation.quantiser import ADDITIONS, CONVOLUTIONS, ConvolutionQuantizer, is_rounded, layer_of
from resunet.errors import InputError
from resunet.layout import spatial_dims_of

_BATCH_NORM = torch.ops.aten.batch_norm.default
_DEQUANTISE = torch.ops.quantized_decomposed.dequantize_per_tensor.default
_DEQUANTISE_CHANNELS = torch.ops.quantized_decomposed.dequantize_per_channel.default
_TRAINING, _EPSILON = 5, 7  # of its arguments
_FOLDABLE_EPSILON = (
    1e-5  # the only one that torchao's patterns of a convolution with batch norm know; another is silently replaced
)


def foldable_in_training(network: nn.Module) -> bool:
    """Whether torchao trains and then folds this network's batch norms: in 2D, and with the usual epsilon."""
    norms = [one for one in network.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
    return spatial_dims_of(network) == 2 and all(one.eps == _FOLDABLE_EPSILON for one in norms)


def prepare(
    network: nn.Module,
    channels: int,
    trained: bool,
    with_batch_norm: bool,
    grid: Literal["affine", "symmetric"],
    keep_float: Sequence[str] = (),
) -> fx.GraphModule:
    """A network with observers, or for training with rounding, whose ranges nobody has seen yet.

    Args:
        with_batch_norm: keep it apart while training, with statistics that move; otherwise it is folded here.
        keep_float: layers that are not rounded.

    Raises:
        InputError: a name in `keep_float` that no layer has.
    """
    with _quiet():
        captured = capture(network, channels, training=with_batch_norm)
        if not with_batch_norm:
            fold_batch_norm(captured)
        refuse_unknown_layers(captured, keep_float)
        quantizer = ConvolutionQuantizer(trained, grid, keep_float)
        prepared = prepare_qat_pt2e(captured, quantizer) if trained else prepare_pt2e(captured, quantizer)
    assert isinstance(prepared, fx.GraphModule)
    return prepared


def refuse_unknown_layers(captured: fx.GraphModule, keep_float: Sequence[str]) -> None:
    """Raises InputError for a name that none of a graph's rounded layers has."""
    layers = list(dict.fromkeys(layer_of(node) for node in captured.graph.nodes if is_rounded(node)))
    if unknown := sorted(set(keep_float) - set(layers)):
        raise InputError(f"quantise.keep_float: {', '.join(unknown)}: no such layer. They are: {', '.join(layers)}.")


def capture(network: nn.Module, channels: int, training: bool) -> fx.GraphModule:
    """(N, channels, *size) → logits as a graph of operators with parameters of its own, by the network's names."""
    dims = spatial_dims_of(network)
    open_axes = dict.fromkeys((0, *range(2, 2 + dims)), Dim.DYNAMIC)
    copied = graphable(network).train(training)
    program = torch.export.export(copied, (example_of(channels, dims),), dynamic_shapes=(open_axes,))
    # its guards are of strides, which no operator here minds
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return module


@torch.no_grad()
def fold_batch_norm(captured: fx.GraphModule) -> None:
    """Every batch norm that follows a convolution becomes part of its weights and bias, in place, by its running statistics."""
    graph = captured.graph
    for norm in [node for node in graph.nodes if node.target is _BATCH_NORM]:
        convolution = norm.args[0]
        if convolution.target not in CONVOLUTIONS or len(convolution.users) > 1:
            continue
        weight, bias = convolution.args[1], convolution.args[2] if len(convolution.args) > 2 else None
        scale, shift, mean, variance = (_value(captured, one) for one in norm.args[1:5])
        own = None if bias is None else _value(captured, bias)
        transposed = CONVOLUTIONS[convolution.target] == 1
        folded = fuse_conv_bn_weights(
            _value(captured, weight), own, mean, variance, norm.args[_EPSILON], scale, shift, transposed
        )
        name = f"folded_{convolution.name}"
        captured.register_parameter(f"{name}_weight", folded[0])
        captured.register_parameter(f"{name}_bias", folded[1])
        with graph.inserting_before(convolution):
            nodes = [graph.get_attr(f"{name}_{part}") for part in ("weight", "bias")]
        for node, value in zip(nodes, folded, strict=True):
            node.meta["val"] = convolution.meta["val"].fake_mode.from_tensor(value, static_shapes=True)
        convolution.args = (convolution.args[0], *nodes, *convolution.args[3:])
        norm.replace_all_uses_with(convolution)
        graph.erase_node(norm)
    graph.eliminate_dead_code()
    captured.recompile()
    captured.delete_all_unused_submodules()


def rounding_by_layer(prepared: fx.GraphModule) -> dict[str, list[FakeQuantizeBase]]:
    """Of a network prepared for training: layer → what rounds its inputs and its weights, in the order of computation."""
    parts = dict(prepared.named_modules())
    found: dict[str, list[FakeQuantizeBase]] = {}
    for node in prepared.graph.nodes:
        if node.target in (*CONVOLUTIONS, *ADDITIONS):
            own = [parts.get(str(one.target)) for one in node.args[:2] if isinstance(one, fx.Node)]
            found.setdefault(layer_of(node), []).extend(one for one in own if isinstance(one, FakeQuantizeBase))
    return {layer: its for layer, its in found.items() if its}


def freeze_statistics(prepared: fx.GraphModule) -> None:
    """Batch norm by its running statistics from here on, which stand still; its scale and shift go on learning."""
    for node in prepared.graph.nodes:
        if node.target is _BATCH_NORM:
            node.args = (*node.args[:_TRAINING], False, *node.args[_TRAINING + 1 :])
    prepared.recompile()


def set_ranges(prepared: fx.GraphModule, moving: bool, rounding: bool = True) -> None:
    """Whether the ranges of activations follow what is seen, and whether values are rounded. Of weights they always follow."""
    for one in prepared.modules():
        if isinstance(one, FakeQuantizeBase):
            own = one.is_per_channel
            one.enable_observer(moving or bool(own))
            one.enable_fake_quant(rounding)


def convert(prepared: fx.GraphModule) -> fx.GraphModule:
    """What was trained or calibrated, in evaluation mode, with weights as integers between Q and DQ; `prepared` stays as it is."""
    with _quiet():
        copied = copy.deepcopy(prepared)
        if any(node.target is _BATCH_NORM for node in copied.graph.nodes):
            move_exported_model_to_eval(copied)
        converted = convert_pt2e(copied)
    assert isinstance(converted, fx.GraphModule)
    _round_biases(converted)
    return converted


@torch.no_grad()
def _round_biases(converted: fx.GraphModule) -> None:
    """Biases become whole multiples of what a product of input and weight counts, in place.

    ONNX Runtime adds them as such integers, OpenVINO and PyTorch in floating point: so all add the same.
    """
    for node in converted.graph.nodes:
        if node.target not in CONVOLUTIONS or len(node.args) < 3 or node.args[2] is None:
            continue
        given, weight, bias = node.args[:3]
        if given.target is not _DEQUANTISE or weight.target is not _DEQUANTISE_CHANNELS:
            continue
        scales = _value(converted, weight.args[1])
        value = _value(converted, bias)
        unit = scales.double() * float(given.args[1])
        value.copy_((value.double() / unit).round() * unit)


def unobserved(prepared: fx.GraphModule) -> list[str]:
    """Names of ranges that saw nothing: there is no scale for them."""
    found = [(name, one) for name, one in prepared.named_modules() if isinstance(one, ObserverBase)]
    return [
        name for name, one in found if isinstance(low := getattr(one, "min_val", None), Tensor) and not low.isfinite().all()
    ]


def _value(captured: fx.GraphModule, node: fx.Node) -> Tensor:
    value: object = captured
    for part in str(node.target).split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torchao and torch.export warn of in their own parts."""
    logger = logging.getLogger("torchao")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
