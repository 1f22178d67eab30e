"""What lies quantised beside a model, into its bundle."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from finetune.deploy.graph import INPUT, write_openvino
from finetune.quantisation.result import FOLDER, Quantised, read_quantised
from resunet.bundle.contract import Golden, Graph, QuantisationFacts
from resunet.errors import CheckFailed, InputError

_INT8 = "graphs/int8"


def quantised_beside(model: Path, weights: str, formats: Sequence[str]) -> tuple[Path, Quantised]:
    """The folder beside a model directory, and what it holds. weights: sha256 of the model's.

    Raises:
        InputError: none there, one of other weights, or none of the formats is of it.
        CheckFailed: it was changed.
    """
    folder = model.parent / FOLDER
    if model.name != "model" or not folder.is_dir():
        raise InputError(f"--precision int8: {model} has no {FOLDER}/ beside it. resunet compress quantises a run.")
    facts = read_quantised(folder)
    if facts.weights_sha256 != weights:
        raise InputError(f"--precision int8: {folder} was made of other weights than {model} holds. Quantise the run again.")
    usable = ("onnx", "openvino", "tensorrt") if (folder / "model.onnx").is_file() else ("openvino",)
    if not set(usable) & set(formats):
        raise InputError(f"--formats {','.join(formats)}: what {facts.method} made in int8 is of {', '.join(usable)}.")
    return folder, facts


def graphs_of_quantised(
    folder: Path, facts: Quantised, bundle: Path, formats: Sequence[str]
) -> tuple[list[Graph], tuple[Golden, ...], tuple[str, ...]]:
    """Write graphs/int8/ and the golden cases of a bundle: its graphs, its cases, and what of them TensorRT would refuse."""
    from finetune.deploy.tensorrt_check import tensorrt_faults

    into = bundle / _INT8
    into.mkdir(parents=True)
    (bundle / "golden").mkdir(exist_ok=True)
    for case in facts.golden:
        shutil.copyfile(folder / case.file, bundle / case.file)
    onnx, tolerance = folder / "model.onnx", facts.graphs[0].tolerance
    graphs: list[Graph] = []
    faults = tensorrt_faults(onnx) if onnx.is_file() else ()
    if "tensorrt" in formats and onnx.is_file():
        from finetune.deploy.tensorrt_build import build_engine

        if faults:
            raise CheckFailed("TensorRT would refuse the int8 graph (quantise with grid=symmetric):\n" + "\n".join(faults))
        build_engine(onnx, into / "model.plan", INPUT, facts.input.count, facts.spatial_dims)
        graphs.append(Graph("tensorrt", "int8", f"{_INT8}/model.plan", None, None, tolerance))
    for graph in facts.graphs:
        wanted = {"openvino": "openvino", "onnxruntime": "onnx"}[graph.runtime]
        if wanted not in formats:
            continue
        if graph.runtime == "onnxruntime":
            shutil.copyfile(onnx, into / "model.onnx")
            graphs.append(replace(graph, file=f"{_INT8}/model.onnx"))
        elif onnx.is_file():
            version = write_openvino(onnx, into / "model.xml", half_weights=False)
            graphs.append(replace(graph, file=f"{_INT8}/model.xml", opset=None, ir=version))
        else:
            for name in ("model.xml", "model.bin"):
                shutil.copyfile(folder / name, into / name)
            graphs.append(replace(graph, file=f"{_INT8}/model.xml"))
    return graphs, facts.golden, faults


def quantisation_facts(quantised: tuple[Path, Quantised] | None) -> QuantisationFacts | None:
    """What the contract says of it."""
    if quantised is None:
        return None
    facts = quantised[1]
    return QuantisationFacts(facts.method, facts.grid, facts.steps, facts.calibration)
