"""quantised/, beside the model/ that it was made of: graphs in INT8, golden cases, and quantised.json, which says what they are."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.quantisation.settings import Method
from resunet.bundle.contract import FileFacts, FootprintFacts, Golden, Graph, InputFacts, OutputFacts
from resunet.bundle.engines import open_engine, version_of
from resunet.bundle.scorer import EngineScorer
from resunet.bundle.seal import described, file_faults
from resunet.bundle.typed import build
from resunet.errors import CheckFailed, EnvironmentFault, InputError
from resunet.files import write_text
from resunet.inference.window import Footprint

FOLDER = "quantised"
FACTS = "quantised.json"
SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Quantised:
    """quantised.json.

    weights_sha256: of the float model. steps, calibration: of training, and patches. keep_float: layers that were not rounded.

    graphs: files below the folder, the preferred one first. difference: of logits between each runtime that was there and the
    PyTorch module that the graphs were made of, on training patches, over max(1, the largest of them). files: all, by sha256.
    """

    schema_version: int
    method: Method
    grid: str
    steps: int
    calibration: int
    keep_float: tuple[str, ...]
    weights_sha256: str
    spatial_dims: Literal[2, 3]
    input: InputFacts
    output: OutputFacts
    footprint: FootprintFacts
    graphs: tuple[Graph, ...]
    golden: tuple[Golden, ...]
    difference: Mapping[str, float]
    versions: Mapping[str, str]
    files: Mapping[str, FileFacts]


def write_facts(folder: Path, facts: Quantised) -> None:
    """quantised.json, with the digests of the files that stand."""
    whole = dataclasses.replace(facts, files=described(folder))
    write_text(folder / FACTS, json.dumps(dataclasses.asdict(whole), indent=2) + "\n")


def read_quantised(folder: Path) -> Quantised:
    """What a folder holds, of which every byte is as it was written.

    Raises:
        InputError: nothing quantised there. CheckFailed: another schema, or a file was changed.
    """
    path = folder / FACTS
    if not path.is_file():
        raise InputError(f"{folder}: holds nothing quantised (no {FACTS}). resunet compress makes it.")
    try:
        facts = build(Quantised, json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise CheckFailed(f"{path}: {error}. Quantise the run again.") from error
    if facts.schema_version != SCHEMA_VERSION:
        raise CheckFailed(f"{path}: schema_version={facts.schema_version}; this version reads {SCHEMA_VERSION}.")
    named = [graph.file for graph in facts.graphs] + [golden.file for golden in facts.golden]
    if faults := file_faults(folder, facts.files, named, FACTS, {FACTS}):
        listed = "\n".join(f"  {fault}" for fault in faults)
        raise CheckFailed(f"{folder}: is not as it was quantised; quantise again:\n{listed}")
    return facts


def open_quantised(folder: Path) -> EngineScorer:
    """The quantised network on the preferred engine that is installed, as predictions and figures want it.

    Raises:
        InputError, CheckFailed: as `read_quantised`. EnvironmentFault: no engine of it is installed.
    """
    facts = read_quantised(folder)
    found = Footprint(**dataclasses.asdict(facts.footprint))
    for graph in facts.graphs:
        if version_of(graph.runtime) is not None:
            return EngineScorer(open_engine(folder, facts, graph), found, facts.spatial_dims)
    names = " or ".join(graph.runtime for graph in facts.graphs)
    raise EnvironmentFault(f"{folder}: needs {names}: pip install 'resunet[export]'.")
