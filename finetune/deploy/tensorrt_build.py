"""An ONNX graph → a TensorRT engine, on the machine and for the GPU that it will run on.

TensorRT 11 knows strongly typed networks only: the precision is the graph's.
"""

from pathlib import Path

from resunet.bundle.tensorrt_engine import largest_of
from resunet.errors import CheckFailed, EnvironmentFault

_OLDEST = 11
_USUAL = {2: 256, 3: 96}  # pixels a side that it is tuned for


def build_engine(onnx: Path, path: Path, name: str, channels: int, spatial_dims: int) -> None:
    """Write the engine of a graph whose input is `name`, (N, channels, *size).

    Raises:
        EnvironmentFault: a TensorRT before 11. CheckFailed: TensorRT refuses the graph, with its own words.
    """
    import tensorrt as trt

    if int(trt.__version__.split(".")[0]) < _OLDEST:
        raise EnvironmentFault(f"TensorRT {trt.__version__}: {_OLDEST} or newer is needed. Install it, or leave tensorrt out.")
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx.read_bytes()):
        faults = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise CheckFailed(f"{onnx.name}: TensorRT refuses it: {faults}")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default where there is one: 10 bits of mantissa, which is not fp32
    profile = builder.create_optimization_profile()
    batch, side = largest_of(spatial_dims)
    sizes = ((1, 1), (1, _USUAL[spatial_dims]), (batch, side))
    profile.set_shape(name, *((n, channels, *[length] * spatial_dims) for n, length in sizes))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise CheckFailed(f"{onnx.name}: TensorRT built no engine; what it said stands above.")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(plan))
