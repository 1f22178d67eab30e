"""A TensorRT engine, on the GPU and with the version of TensorRT that it was built for. Memory is CUDA's, through cuda-python."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from resunet.errors import CheckFailed, EnvironmentFault, InputError
from resunet.inference.window import Floats

if TYPE_CHECKING:
    from resunet.bundle.engines import Engine, Signed

_LARGEST = {2: (16, 1024), 3: (4, 192)}  # images at once, and pixels a side, that an engine is built for


def largest_of(spatial_dims: int) -> tuple[int, int]:
    """Images at once, and pixels a side, that an engine takes."""
    return _LARGEST[spatial_dims]


def open_plan(path: Path, contract: "Signed") -> "Engine":
    """The engine of a file.

    Raises:
        EnvironmentFault: no cuda-python. CheckFailed: an engine of another GPU or version of TensorRT.
    """
    import tensorrt as trt

    try:
        from cuda.bindings import runtime as cuda
    except ModuleNotFoundError as error:
        raise EnvironmentFault("TensorRT needs cuda-python: pip install cuda-python.") from error
    logger = trt.Logger(trt.Logger.WARNING)
    engine = trt.Runtime(logger).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise CheckFailed(f"{path.name}: TensorRT {trt.__version__} does not take it here; export it on this machine.")
    context = engine.create_execution_context()
    stream = _done(cuda.cudaStreamCreate())

    def run(images: Floats) -> Floats:
        images = np.ascontiguousarray(images, np.float32)
        if not context.set_input_shape(contract.input.name, images.shape):
            batch, side = largest_of(contract.spatial_dims)
            raise InputError(
                f"{images.shape}: the engine takes {batch} at once and {side} pixels a side at most. Set a smaller --memory, so "
                "that windows are used, or another --runtime."
            )
        logits = np.empty((len(images), contract.output.channels, *images.shape[2:]), np.float32)
        given, made = _done(cuda.cudaMalloc(images.nbytes)), _done(cuda.cudaMalloc(logits.nbytes))
        try:
            kind = cuda.cudaMemcpyKind
            _done(cuda.cudaMemcpy(given, images.ctypes.data, images.nbytes, kind.cudaMemcpyHostToDevice))
            context.set_tensor_address(contract.input.name, int(given))
            context.set_tensor_address(contract.output.name, int(made))
            if not context.execute_async_v3(int(stream)):
                raise CheckFailed(f"{path.name}: TensorRT did not run it; what it said stands above.")
            _done(cuda.cudaStreamSynchronize(stream))
            _done(cuda.cudaMemcpy(logits.ctypes.data, made, logits.nbytes, kind.cudaMemcpyDeviceToHost))
        finally:
            _done(cuda.cudaFree(given))
            _done(cuda.cudaFree(made))
        return logits

    return run


def _done(answer: tuple[Any, ...]) -> Any:
    """What a call of CUDA gives beside its status."""
    status, *given = answer
    if int(status) != 0:
        raise EnvironmentFault(f"CUDA: {status}. Free memory of the GPU, or look at its driver.")
    return given[0] if given else None
