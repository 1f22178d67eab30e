"""What of an ONNX graph TensorRT 11 does not take, found by walking the graph.

TensorRT itself is not needed. Operators and restrictions: onnx-tensorrt's docs/operators.md (as of 8.5; later lists only grow);
opsets: "ONNX Opset Guide" of TensorRT's documentation (11.x: 9 to 25).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper, shape_inference

from finetune.deploy.graph import TENSORRT_VERSION

_OPSETS = range(9, 26)
# fmt: off
_OPERATORS = frozenset({
    "Abs", "Add", "And", "ArgMax", "ArgMin", "AveragePool", "BatchNormalization", "Cast", "Ceil", "Celu", "Clip",
    "Concat", "Constant", "ConstantOfShape", "Conv", "ConvTranspose", "Cos", "CumSum", "DepthToSpace",
    "DequantizeLinear", "Div", "Elu", "Equal", "Erf", "Exp", "Expand", "Flatten", "Floor", "Gather", "GatherElements",
    "GatherND", "Gemm", "GlobalAveragePool", "GlobalMaxPool", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish",
    "Identity", "InstanceNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log", "LogSoftmax", "MatMul", "Max",
    "MaxPool", "Mean", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Pad", "Pow", "PRelu", "QuantizeLinear", "Range",
    "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
    "ReduceProd", "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Resize", "Round", "ScatterElements", "ScatterND",
    "Selu", "Shape", "Sigmoid", "Sign", "Sin", "Size", "Slice", "Softmax", "Softplus", "Softsign", "Split", "Sqrt",
    "Squeeze", "Sub", "Sum", "Tanh", "Tile", "TopK", "Transpose", "Unsqueeze", "Where", "Xor",
})
# fmt: on
_TYPES = {
    *(TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN),
    *(TensorProto.INT8, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL),
}
# Inputs, by number, that must be known when the engine is built; where an operator takes them.
_CONSTANT = {"Slice": (3,), "Squeeze": (1,), "Unsqueeze": (1,), "TopK": (1,), "CumSum": (1,), "InstanceNormalization": (1, 2)}
_CONVOLUTIONS = ("Conv", "ConvTranspose")


def tensorrt_faults(path: Path) -> tuple[str, ...]:
    """Everything that TensorRT 11 would refuse; empty where it takes the graph."""
    model = shape_inference.infer_shapes(onnx.load(path))
    return tuple(dict.fromkeys(_faults(model)))


def _faults(model: onnx.ModelProto) -> Iterator[str]:
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version not in _OPSETS:
            yield f"opset {opset.version}: TensorRT {TENSORRT_VERSION} takes {_OPSETS.start} to {_OPSETS.stop - 1}"
    if model.functions:
        yield f"{len(model.functions)} functions, which are not operators"
    graph = model.graph
    constants = {one.name: one for one in graph.initializer}
    constants |= {
        node.output[0]: its.t
        for node in graph.node
        if node.op_type == "Constant"
        for its in node.attribute
        if its.name == "value"
    }
    kinds = {one.name: one.data_type for one in graph.initializer}
    kinds |= {one.name: one.type.tensor_type.elem_type for one in (*graph.input, *graph.output, *graph.value_info)}
    for name, kind in kinds.items():
        if kind not in _TYPES:
            yield f"{name}: is of {TensorProto.DataType.Name(kind)}, which TensorRT does not compute with"
    for node in graph.node:
        yield from _node_faults(node, constants)


def _node_faults(node: onnx.NodeProto, constants: Mapping[str, TensorProto]) -> Iterator[str]:
    where = f"{node.op_type} {node.name}"
    if node.domain not in ("", "ai.onnx") or node.op_type not in _OPERATORS:
        yield f"{where}: TensorRT has no such operator" + (f" of {node.domain}" if node.domain else "")
        return
    for number in _CONSTANT.get(node.op_type, ()):
        if len(node.input) > number and node.input[number] and node.input[number] not in constants:
            yield f"{where}: input {number} must be a constant"
    if (
        node.op_type in _CONVOLUTIONS
        and (weight := constants.get(node.input[1])) is not None
        and len(weight.dims) not in (4, 5)
    ):
        yield f"{where}: convolves {len(weight.dims) - 2} dimensions, TensorRT 2 or 3"
    if node.op_type == "MaxPool" and len(node.output) > 1:
        yield f"{where}: gives indices"
    if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2 and node.input[2]:
        zero = constants.get(node.input[2])
        if zero is None or np.any(numpy_helper.to_array(zero)):
            yield f"{where}: its zero point must be a constant 0"
