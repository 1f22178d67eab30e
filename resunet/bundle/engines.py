"""The runtimes that a bundle's graphs run on. Each is a function (N, C, *size) float32 → logits (N, K, *size) float32.

A runtime is imported when a graph of it is opened, so that a machine needs only its own.
"""

import functools
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from resunet.bundle.contract import Graph, InputFacts, OutputFacts, Runtime
from resunet.bundle.onnx_header import opset_of
from resunet.errors import CheckFailed, EnvironmentFault, InputError
from resunet.inference.window import Floats

Engine = Callable[[Floats], Floats]


class Signed(Protocol):
    """What says what a graph takes and gives: a contract."""

    @property
    def spatial_dims(self) -> Literal[2, 3]: ...
    @property
    def input(self) -> InputFacts: ...
    @property
    def output(self) -> OutputFacts: ...


_MODULES: dict[Runtime, str] = {
    "openvino": "openvino",
    "onnxruntime": "onnxruntime",
    "tensorrt": "tensorrt",
    "pytorch": "torch",
}
_NAMES: dict[Runtime, str] = {
    "openvino": "OpenVINO",
    "onnxruntime": "ONNX Runtime",
    "tensorrt": "TensorRT",
    "pytorch": "PyTorch",
}
# fp16 of OpenVINO is how weights are kept; what int8 leaves in floating point is in single
_HINTS = {"fp32": "f32", "fp16": "f32", "bf16": "bf16", "int8": "f32"}


def name_of(runtime: Runtime) -> str:
    """As its makers write it."""
    return _NAMES[runtime]


@functools.cache
def version_of(runtime: Runtime) -> str | None:
    """The installed version; None without it."""
    module = _MODULES[runtime]
    if importlib.util.find_spec(module) is None:
        return None
    for package in importlib.metadata.packages_distributions().get(module, [module]):
        return importlib.metadata.version(package).split("-")[0]
    return None


def open_engine(folder: Path, contract: Signed, graph: Graph) -> Engine:
    """A graph of a bundle in `folder`, ready to run.

    Raises:
        CheckFailed: the graph is not what the contract says, or its runtime does not take it.
        EnvironmentFault: the runtime is not installed, or not all that it needs.
    """
    if version_of(graph.runtime) is None:
        raise EnvironmentFault(f"{name_of(graph.runtime)} is not installed: pip install -r requirements.txt, of the bundle.")
    refuse_format(folder, graph)
    path = folder / graph.file
    openers: dict[Runtime, Callable[[Path, Signed, Graph], Engine]] = {
        "openvino": _openvino,
        "onnxruntime": _onnxruntime,
        "pytorch": _pytorch,
        "tensorrt": _tensorrt,
    }
    try:
        return _telling(openers[graph.runtime](path, contract, graph), graph)
    except RuntimeError as error:  # of onnxruntime's own errors, and OpenVINO's, the base
        raise CheckFailed(f"{graph.file}: {name_of(graph.runtime)} does not take it: {_first_line(error)}") from error
    except ModuleNotFoundError as error:  # PyTorch alone does not make the network: resunet's own dependencies do
        raise EnvironmentFault(
            f"{graph.file}: running it with {name_of(graph.runtime)} needs {error.name}, too: pip install resunet with all that it "
            "needs, or use a graph of another runtime (--runtime)."
        ) from error
    except ImportError as error:  # installed, and a library that it links to is not there
        raise EnvironmentFault(
            f"{graph.file}: {name_of(graph.runtime)} is installed and does not load: {_first_line(error)}. Install it again, or "
            "use a graph of another runtime (--runtime)."
        ) from error


def _telling(engine: Engine, graph: Graph) -> Engine:
    """An engine whose own errors, of memory mostly, are faults of the scan that it was given."""

    def run(images: Floats) -> Floats:
        try:
            return engine(images)
        except Exception as error:  # the runtimes' errors share no public base
            raise InputError(
                f"{graph.file}: {name_of(graph.runtime)} cannot run it on {images.shape}: {_first_line(error)}. Free memory, lower "
                "--memory, or use a graph of another runtime (--runtime)."
            ) from error

    return run


def refuse_format(folder: Path, graph: Graph) -> None:
    """Raises CheckFailed unless a graph has the opset, or the version of OpenVINO's format, that the contract states."""
    path = folder / graph.file
    if graph.opset is not None and (found := opset_of(path)) != graph.opset:
        raise CheckFailed(f"{graph.file}: is of opset {found}, the contract says {graph.opset}.")
    if graph.ir is not None and (found := ir_of(path)) != graph.ir:
        raise CheckFailed(f"{graph.file}: is of IR version {found}, the contract says {graph.ir}.")


def ir_of(path: Path) -> int | None:
    """The version of OpenVINO's format that an .xml is in."""
    with open(path, encoding="utf-8", errors="replace") as file:
        found = re.search(r'<net\b[^>]*\bversion="(\d{1,4})"', file.read(4096))
    return int(found[1]) if found else None


def _onnxruntime(path: Path, contract: Signed, graph: Graph) -> Engine:
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    # TF32, CUDA's default from Ampere on, has 10 bits of mantissa: not what fp32 says, nor within its tolerance
    wanted = [("CUDAExecutionProvider", {"use_tf32": 0}), ("CPUExecutionProvider", {})]
    providers = [one for one in wanted if one[0] in onnxruntime.get_available_providers()]
    try:
        session = onnxruntime.InferenceSession(str(path), providers=providers)
    except Exception as error:  # onnxruntime's errors share no public base
        raise CheckFailed(f"{graph.file}: ONNX Runtime does not take it: {_first_line(error)}") from error
    shapes = {one.name: one.shape for one in (*session.get_inputs(), *session.get_outputs())}
    _refuse_signature(contract, graph, {name: (len(shape), shape[1]) for name, shape in shapes.items()})
    names, given = [contract.output.name], contract.input.name

    def run(images: Floats) -> Floats:
        return np.asarray(session.run(names, {given: np.ascontiguousarray(images)})[0], np.float32)

    return run


def _openvino(path: Path, contract: Signed, graph: Graph) -> Engine:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    shapes = {one.any_name: one.partial_shape for one in (*model.inputs, *model.outputs)}
    found = {name: (len(shape), shape[1].get_length() if shape[1].is_static else None) for name, shape in shapes.items()}
    _refuse_signature(contract, graph, found)
    # without the hint a CPU that has bfloat16 computes in it
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": _HINTS[graph.precision]})
    request = compiled.create_infer_request()

    def run(images: Floats) -> Floats:
        return np.array(request.infer([np.ascontiguousarray(images)])[0], np.float32)

    return run


def _pytorch(path: Path, contract: Signed, graph: Graph) -> Engine:
    import torch

    from resunet.model import load_model

    network = load_model(path)

    def run(images: Floats) -> Floats:
        with torch.no_grad():
            return np.asarray(network(torch.from_numpy(np.ascontiguousarray(images))).numpy(), np.float32)

    return run


def _tensorrt(path: Path, contract: Signed, graph: Graph) -> Engine:
    from resunet.bundle.tensorrt_engine import open_plan

    return open_plan(path, contract)


def _refuse_signature(contract: Signed, graph: Graph, found: dict[str, tuple[int, object]]) -> None:
    """found: name → (dimensions, channels or None) of what the graph takes and gives."""
    rank = 2 + contract.spatial_dims
    wanted = {contract.input.name: (rank, contract.input.count), contract.output.name: (rank, contract.output.channels)}
    fits = found.keys() == wanted.keys() and all(found[name] in (its, (rank, None)) for name, its in wanted.items())
    if not fits:
        raise CheckFailed(f"{graph.file}: takes and gives {found} (dimensions, channels); the contract says {wanted}.")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
