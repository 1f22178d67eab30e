"""`resunet export`: a run or a model directory → a bundle, proven before it stands.

resunet export runs/tumour --out tumour.bundle --formats onnx,openvino,pytorch --precision fp32,bf16 --zip
"""

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from finetune.deploy.card import card, read_figures, read_int8_figures
from finetune.deploy.golden import write_goldens
from finetune.deploy.graph import INPUT, OPSET, OUTPUT, TENSORRT_VERSION, write_onnx, write_openvino
from finetune.deploy.mirrored import mirror_bundle
from finetune.deploy.quantised import graphs_of_quantised, quantisation_facts, quantised_beside
from finetune.deploy.requirements import requirements
from finetune.inference.predict import behaviour_of
from finetune.inference.window import Inference, LiveNetwork, footprint
from finetune.quantisation.result import Quantised
from resunet.bundle.bundle import Bundle
from resunet.bundle.contract import (
    SCHEMA_VERSION,
    ClassName,
    Contract,
    FootprintFacts,
    Golden,
    Graph,
    InputFacts,
    Normalising,
    Origin,
    OutputFacts,
    Point,
    PostprocessingFacts,
    Precision,
    Rule,
    Runtime,
    TensorRtFacts,
    WindowFacts,
)
from resunet.bundle.scorer import SIGMA
from resunet.bundle.seal import described, write_sealed
from resunet.bundle.unzip import zip_folder
from resunet.bundle.verify import Row, check_graphs, table
from resunet.checkpoint import CONFIG, WEIGHTS, ModelConfig, model_folder, without_patients
from resunet.config import FixedNormalisation
from resunet.errors import CheckFailed, EnvironmentFault, InputError
from resunet.files import file_aside, folder_aside, refuse_taken, sha256
from resunet.inference.predict import Behaviour
from resunet.model import Segmenter, load_finetuned
from resunet.progress import say

Format = Literal["onnx", "openvino", "pytorch", "tensorrt"]
FORMATS: tuple[Format, ...] = ("onnx", "openvino", "pytorch", "tensorrt")
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16", "int8")

# Of logits, over max(1, the largest of them). Measured on trained and on random networks in 2D and 3D: below 1e-5, 2e-3 and 4e-2.
_TOLERANCES: dict[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 1e-1}
_MODULES = {
    "onnx": "onnx onnxscript onnxruntime",
    "openvino": "onnx onnxscript openvino",
    "pytorch": "",
    "tensorrt": "onnx onnxscript tensorrt",
}


@dataclass(frozen=True)
class ExportRequest:
    """What `resunet export` takes beside run and output. formats and precisions: in any order; zipped: a file beside the folder."""

    formats: tuple[str, ...] = ("onnx", "openvino", "pytorch")
    precisions: tuple[str, ...] = ("fp32",)
    zipped: bool = False


@dataclass(frozen=True)
class Source:
    """A loaded segmenter, and where it lies."""

    folder: Path
    network: Segmenter
    config: ModelConfig
    behaviour: Behaviour
    quantised: tuple[Path, Quantised] | None = None


def export(run: Path, out: Path, request: ExportRequest) -> Path:
    """Write the bundle of a run or a model directory; `out`, a folder. With `zipped` there is a file of that name and .zip, too.

    Raises:
        InputError: no segmenter there, `out` exists, or a format or precision that is none, or that no format has.
        EnvironmentFault: a format's packages are missing.
        CheckFailed: a graph does not answer as the live network does, or TensorRT would refuse it; nothing is written.
    """
    formats, precisions = _refuse_wrong(out, request)
    folder = model_folder(run)
    network, config = load_finetuned(folder)
    behaviour = behaviour_of(config, sha256(folder / WEIGHTS))
    quantised = quantised_beside(folder, behaviour.weights, formats) if "int8" in precisions else None
    source = Source(folder, network.eval(), config, behaviour, quantised)
    whole = folder.parent if folder.name == "model" else None
    figures = None if whole is None else read_figures(whole / "evaluation" / "summary.json")
    int8 = None if whole is None else read_int8_figures(whole / "test.json")
    with folder_aside(out) as aside:
        contract = _write_graphs(aside, source, formats, precisions)
        rows = check_graphs(aside, contract)
        _refuse_failures(rows)
        (aside / "README.md").write_text(card(contract, rows, figures, int8), encoding="utf-8")
        (aside / "requirements.txt").write_text(requirements(contract), encoding="utf-8")
        digest = write_sealed(aside, replace(contract, files=described(aside)))
        Bundle.open(aside)  # what was written can be read
        if request.zipped:
            with file_aside(_zip_of(out)) as file:
                zip_folder(aside, file)
    for line in table(rows):
        say(line)
    say(f"sha256 of the bundle, to be noted: {digest}")
    mirror_bundle(folder, out, digest, rows)
    return out


def _refuse_wrong(out: Path, request: ExportRequest) -> tuple[tuple[Format, ...], tuple[Precision, ...]]:
    formats = tuple(one for one in FORMATS if one in request.formats)
    precisions = tuple(one for one in PRECISIONS if one in request.precisions)
    if wrong := sorted(set(request.formats) - set(FORMATS)) or not formats:
        raise InputError(
            f"--formats {','.join(request.formats)}: {wrong or 'none'} is no format; there are {', '.join(FORMATS)}."
        )
    if wrong := sorted(set(request.precisions) - set(PRECISIONS)) or not precisions:
        raise InputError(
            f"--precision {','.join(request.precisions)}: {wrong or 'none'} is no precision; there are {', '.join(PRECISIONS)}."
        )
    if precisions == ("int8",):  # the network in PyTorch is of another precision than what is asked for
        formats = tuple(one for one in formats if one != "pytorch")
        if not formats:
            raise InputError("--precision int8: is of graphs. Add onnx or openvino to --formats.")
    if "bf16" in precisions and "openvino" not in formats:
        raise InputError(
            "--precision bf16: of the formats OpenVINO alone computes in it. Add openvino to --formats, or take fp16."
        )
    if precisions == ("bf16",) and (others := [one for one in formats if one in ("onnx", "tensorrt")]):
        raise InputError(
            f"--formats {','.join(request.formats)}: {' and '.join(others)} would have no graph, as of the formats OpenVINO alone "
            "computes in bf16. Leave them out, or add fp32 or fp16 to --precision."
        )
    if "fp16" in precisions and not {"onnx", "openvino", "tensorrt"} & set(formats):
        raise InputError("--precision fp16: is of graphs. Add onnx or openvino to --formats.")
    for path in (out, *([_zip_of(out)] if request.zipped else [])):
        refuse_taken(path)
    for one in formats:
        if missing := [module for module in _MODULES[one].split() if importlib.util.find_spec(module) is None]:
            how = (
                "install NVIDIA's TensorRT 11 or newer on the machine that has the GPU, and export there."
                if missing == ["tensorrt"]
                else "pip install 'resunet[export]'."
            )
            raise EnvironmentFault(f"--formats {one}: {', '.join(missing)} is not installed: {how}")
    return formats, precisions


def _zip_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.zip")


def _write_graphs(folder: Path, source: Source, formats: Sequence[Format], precisions: Sequence[Precision]) -> Contract:
    """graphs/, model/ and golden/; the contract, but for its files."""
    channels = source.config.architecture.in_channels
    graphs: list[Graph] = []
    faults: tuple[str, ...] | None = None
    single = folder / "graphs" / "fp32" / "model.onnx"
    floating = [one for one in precisions if one != "int8"]
    if set(formats) != {"pytorch"} and floating:
        from finetune.deploy.tensorrt_check import tensorrt_faults  # needs onnx, which --formats pytorch does not

        write_onnx(source.network, channels, single)
        faults = tensorrt_faults(single)
        if faults:
            say("TensorRT would refuse the graph: " + "; ".join(faults))
    if "tensorrt" in formats:
        graphs += _tensorrt(folder, source, single, floating, faults or ())
    if "openvino" in formats:
        graphs += _openvino(folder, single, floating)
    if "onnx" in formats:
        if "fp32" in precisions:
            graphs.append(_graph("onnxruntime", "fp32", "graphs/fp32/model.onnx", opset=OPSET))
        if "fp16" in precisions:
            half = folder / "graphs" / "fp16" / "model.onnx"
            write_onnx(source.network, channels, half, torch.float16)
            graphs.append(_graph("onnxruntime", "fp16", "graphs/fp16/model.onnx", opset=OPSET))
    if not any(graph.file == "graphs/fp32/model.onnx" for graph in graphs):
        single.unlink(missing_ok=True)
    if "pytorch" in formats:
        _write_model(folder / "model", source)
        graphs.append(_graph("pytorch", "fp32", "model"))
    golden: tuple[Golden, ...] = ()
    if graphs:
        dims, cpu = source.config.architecture.spatial_dims, torch.device("cpu")
        golden = write_goldens(
            folder,
            lambda flips: LiveNetwork(source.network.eval(), channels, cpu, "fp32", flips),
            channels,
            dims,
            source.behaviour,
            Inference().overlap,
        )
    if source.quantised is not None:
        rounded, cases, found = graphs_of_quantised(*source.quantised, folder, formats)
        graphs += rounded
        golden += cases
        faults = found if faults is None else tuple(dict.fromkeys((*faults, *found)))
    trt = None if faults is None else TensorRtFacts(TENSORRT_VERSION, faults)
    return replace(_contract(source), graphs=tuple(graphs), golden=golden, tensorrt=trt)


def _graph(
    runtime: Runtime,
    precision: Precision,
    file: str,
    opset: int | None = None,
    ir: int | None = None,
) -> Graph:
    return Graph(runtime, precision, file, opset, ir, _TOLERANCES[precision])


def _openvino(folder: Path, onnx: Path, precisions: Sequence[Precision]) -> list[Graph]:
    """bf16 is the fp32 graph, computed in it; fp16 keeps the weights so."""
    graphs = []
    if "fp32" in precisions or "bf16" in precisions:
        version = write_openvino(onnx, folder / "graphs" / "fp32" / "model.xml", half_weights=False)
        wanted = [one for one in precisions if one != "fp16"]
        graphs += [_graph("openvino", one, "graphs/fp32/model.xml", ir=version) for one in wanted]
    if "fp16" in precisions:
        version = write_openvino(onnx, folder / "graphs" / "fp16" / "model.xml", half_weights=True)
        graphs.append(_graph("openvino", "fp16", "graphs/fp16/model.xml", ir=version))
    return graphs


def _tensorrt(folder: Path, source: Source, onnx: Path, precisions: Sequence[Precision], faults: Sequence[str]) -> list[Graph]:
    from finetune.deploy.tensorrt_build import build_engine

    if faults:
        raise CheckFailed("TensorRT would refuse the graph:\n" + "\n".join(f"  {fault}" for fault in faults))
    architecture, graphs = source.config.architecture, []
    for one in precisions:
        if one == "bf16":
            continue
        graph = onnx
        if one == "fp16":
            graph = folder / "half.onnx"
            write_onnx(source.network, architecture.in_channels, graph, torch.float16)
        file = f"graphs/{one}/model.plan"
        build_engine(graph, folder / file, INPUT, architecture.in_channels, architecture.spatial_dims)
        graphs.append(_graph("tensorrt", one, file))
    (folder / "half.onnx").unlink(missing_ok=True)
    return graphs


def _write_model(folder: Path, source: Source) -> None:
    """The model directory without archive.parquet: what it was trained on stays at home."""
    folder.mkdir()
    (folder / WEIGHTS).write_bytes((source.folder / WEIGHTS).read_bytes())
    (folder / CONFIG).write_text(without_patients(source.config).model_dump_json(indent=2) + "\n", encoding="utf-8")


def _refuse_failures(rows: Sequence[Row]) -> None:
    if failed := [f"  {row.graph.runtime} {row.graph.precision}: {row.fault}" for row in rows if row.fault is not None]:
        raise CheckFailed("graphs do not answer as the live network does; nothing was written:\n" + "\n".join(failed))
    if unseen := [f"  {row.graph.runtime} {row.graph.precision}: {row.verdict}" for row in rows if not row.replayed]:
        raise EnvironmentFault("graphs could not be replayed here, so that nothing was written:\n" + "\n".join(unseen))


def _contract(source: Source) -> Contract:
    """What does not depend on formats."""
    config, architecture = source.config, source.config.architecture
    assert config.classes is not None
    binary = len(config.classes) == 2
    rule, post, point, origin = config.normalisation, config.postprocessing, config.operating_point, config.provenance
    fixed = (rule.mean, rule.std) if isinstance(rule, FixedNormalisation) else (None, None)
    measured = footprint(source.network, architecture.in_channels, torch.device("cpu"))
    usual = Inference()
    return Contract(
        schema_version=SCHEMA_VERSION,
        resunet=importlib.metadata.version("resunet"),
        architecture=architecture.name,
        parameters=sum(one.numel() for one in source.network.parameters()),
        spatial_dims=architecture.spatial_dims,
        input=InputFacts(INPUT, config.input_channels, architecture.in_channels, config.spacing, "LPS"),
        normalisation=Normalising(rule.kind, rule.low, rule.high, *fixed),
        output=OutputFacts(OUTPUT, measured.logits, "logits", *(("sigmoid", 0.5) if binary else ("softmax", None))),
        footprint=FootprintFacts(*measured),
        window=WindowFacts(usual.memory, usual.window, usual.overlap, "gaussian", SIGMA),
        class_names=tuple(ClassName(value, name) for value, name in config.classes.items()),
        regions=config.regions,
        postprocessing=None
        if post is None
        else PostprocessingFacts(tuple(Rule(**one.model_dump()) for one in post.rules), post.described()),
        operating_point=None if point is None else Point(**point.model_dump()),
        provenance=Origin(
            source.behaviour.weights,
            origin.data_sha256,
            origin.recipe_sha256,
            origin.parent_sha256,
            origin.members_sha256,
            origin.versions,
        ),
        graphs=(),
        golden=(),
        tensorrt=None,
        quantisation=quantisation_facts(source.quantised),
        files={},
    )
