"""contract.json: everything that a product has to know of a bundle, and a digest of everything in it.

Whoever writes a runtime of their own finds here what ours does: read the scan in `input.orientation`, normalise it as a whole,
give it to a graph, blend logits, decide, post-process.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from resunet.bundle.typed import build
from resunet.inference.predict import Behaviour
from resunet.inference.window import Footprint
from resunet.runtime import Intensity, ObjectRule, Percentiles

SCHEMA_VERSION = 2
CONTRACT = "contract.json"
SEAL = "contract.sha256"

Runtime = Literal["openvino", "onnxruntime", "tensorrt", "pytorch"]
Precision = Literal["fp32", "bf16", "fp16", "int8"]


@dataclass(frozen=True)
class InputFacts:
    """What a graph takes: (N, count, *size) float32, normalised. Any N, any size; images up to `stride` a side are continued.

    channels: how a scan is read: 'grey', 'rgb' or a number. spacing: mm in array order that it was trained at, null: as each
    scan has it; nothing is resampled. orientation: of a volume's axes z, y, x from their ends: LPS, each grows towards it.
    """

    name: str
    channels: str | int
    count: int
    spacing: tuple[float, ...] | None
    orientation: Literal["LPS"]


@dataclass(frozen=True)
class Normalising:
    """Clip to [low, high], subtract mean, divide by std. 'percentile_zscore': low and high are percentiles (0–100) of the whole
    scan, a channel at a time, mean and std those of what is clipped."""

    kind: Literal["percentile_zscore", "fixed"]
    low: float
    high: float
    mean: float | None
    std: float | None

    @property
    def rule(self) -> Intensity | Percentiles:
        if self.mean is None or self.std is None:
            return Percentiles(self.low, self.high)
        return Intensity(self.low, self.high, self.mean, self.std)


@dataclass(frozen=True)
class OutputFacts:
    """What a graph gives: logits (N, channels, *size). One channel: sigmoid, foreground above `threshold`; else softmax, a
    channel a class in the order of `classes`, the largest wins."""

    name: str
    channels: int
    values: Literal["logits"]
    activation: Literal["sigmoid", "softmax"]
    threshold: float | None


@dataclass(frozen=True)
class FootprintFacts:
    """By which `resunet.inference.window.plan_slices` decides what is seen whole."""

    floats: float
    logits: int
    stride: int


@dataclass(frozen=True)
class WindowFacts:
    """How a scan is seen that does not fit whole: windows of `size` pixels a side, `overlap` of it shared with the next, their
    logits blended with Gaussian weights of `sigma` × size, at least 0.001. memory: GiB."""

    memory: float
    size: int
    overlap: float
    weights: Literal["gaussian"]
    sigma: float


@dataclass(frozen=True)
class ClassName:
    """value: in masks."""

    value: int
    name: str


@dataclass(frozen=True)
class Rule:
    name: str
    largest_only: bool
    smallest: int


@dataclass(frozen=True)
class PostprocessingFacts:
    """Which objects are removed of a mask, and what spoke for it."""

    rules: tuple[Rule, ...]
    described: str


@dataclass(frozen=True)
class Point:
    """See `resunet.decision.OperatingPoint`."""

    threshold: float
    budget: float
    clean: int
    alarmed: int


@dataclass(frozen=True)
class Origin:
    """Hashes and versions only."""

    weights_sha256: str
    data_sha256: str | None
    recipe_sha256: str | None
    parent_sha256: str | None
    members_sha256: tuple[str, ...]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Graph:
    """The network for a runtime at a precision.

    file: below the bundle; of PyTorch a model directory. opset: ONNX's; ir: OpenVINO's version of its format; null elsewhere.
    tolerance: how far logits may be from the live network's in fp32, over max(1, the largest of them); in int8 from those of the
    rounded network in PyTorch.
    """

    runtime: Runtime
    precision: Precision
    file: str
    opset: int | None
    ir: int | None
    tolerance: float


@dataclass(frozen=True)
class Golden:
    """A synthetic scan with the live network's logits and mask. window: pixels a side, null: seen whole; flips: as --tta.

    precision: of whose answers they are: fp32 for all graphs but those in int8, which have a network of their own.
    """

    file: str
    precision: Literal["fp32", "int8"]
    window: int | None
    flips: bool


@dataclass(frozen=True)
class TensorRtFacts:
    """What the ONNX graph was found to hold that TensorRT `version` does not take."""

    version: str
    faults: tuple[str, ...]


@dataclass(frozen=True)
class QuantisationFacts:
    """How the int8 graphs were made: qat and nncf_qat trained with rounded values for `steps`, ptq and nncf_ptq took ranges from
    `calibration` training patches. grid: of activations."""

    method: str
    grid: str
    steps: int
    calibration: int


@dataclass(frozen=True)
class FileFacts:
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Contract:
    """contract.json. resunet: the version that wrote it. graphs: the preferred one first."""

    schema_version: int
    resunet: str
    architecture: str
    parameters: int
    spatial_dims: Literal[2, 3]
    input: InputFacts
    normalisation: Normalising
    output: OutputFacts
    footprint: FootprintFacts
    window: WindowFacts
    class_names: tuple[ClassName, ...]
    regions: Mapping[str, tuple[str, ...]] | None
    postprocessing: PostprocessingFacts | None
    operating_point: Point | None
    provenance: Origin
    graphs: tuple[Graph, ...]
    golden: tuple[Golden, ...]
    tensorrt: TensorRtFacts | None
    quantisation: QuantisationFacts | None
    files: Mapping[str, FileFacts]

    @property
    def classes(self) -> dict[int, str]:
        """Raw mask value → name, background first."""
        return {one.value: one.name for one in self.class_names}

    @property
    def measured(self) -> Footprint:
        return Footprint(self.footprint.floats, self.footprint.logits, self.footprint.stride)

    def behaviour(self) -> Behaviour:
        """How scans are read and masks decided."""
        names = [one.name for one in self.class_names]
        rules = self.postprocessing.rules if self.postprocessing else ()
        return Behaviour(
            input_channels=self.input.channels,
            rule=self.normalisation.rule,
            classes=self.classes,
            object_rules=tuple(ObjectRule(names.index(rule.name), rule.largest_only, rule.smallest) for rule in rules),
            described=self.postprocessing.described if self.postprocessing else "",
            weights=self.provenance.weights_sha256,
        )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"


def parse(text: str) -> Contract:
    """contract.json's text.

    Raises:
        ValueError: not JSON, another schema, a key or value that is not allowed, or values that contradict each other.
    """
    raw = json.loads(text)
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(f"schema_version={version!r}: this version reads {SCHEMA_VERSION}")
    contract = build(Contract, raw)
    if fault := _contradiction(contract):
        raise ValueError(fault)
    return contract


def _contradiction(contract: Contract) -> str | None:
    """What cannot be, of values that are allowed one by one."""
    names = [one.name for one in contract.class_names]
    binary = len(names) == 2
    channels = 1 if binary else len(names)
    wanted = OutputFacts(contract.output.name, channels, "logits", *(("sigmoid", 0.5) if binary else ("softmax", None)))
    rules = contract.postprocessing.rules if contract.postprocessing else ()
    normalisation = contract.normalisation
    constants = (normalisation.mean is not None, normalisation.std is not None)
    read_as = contract.input.channels
    checks = {
        f"output={contract.output}: of {len(names)} classes it must be {wanted}": contract.output == wanted,
        "class_names: at least two, of different values": len(contract.classes) == len(names) >= 2,
        f"footprint.logits must be {channels}": contract.footprint.logits == channels,
        f"input.channels={read_as!r} is not of count={contract.input.count}": contract.input.count
        == {"grey": 1, "rgb": 3}.get(str(read_as), read_as),
        f"postprocessing.rules name a class that is not in {names[1:]}": {rule.name for rule in rules} <= set(names[1:]),
        "normalisation: mean and std belong to kind 'fixed', and std is above 0": constants
        == (normalisation.kind == "fixed",) * 2
        and (normalisation.std is None or normalisation.std > 0),
        "normalisation: low below high, percentiles from 0 to 100": normalisation.low < normalisation.high
        and (normalisation.kind == "fixed" or (normalisation.low >= 0 and normalisation.high <= 100)),
        "footprint: floats above 0, stride at least 1": contract.footprint.floats > 0 and contract.footprint.stride >= 1,
        "window: size at least 1, overlap 0 to 0.75, memory and sigma above 0": contract.window.size >= 1
        and 0 <= contract.window.overlap <= 0.75
        and min(contract.window.memory, contract.window.sigma) > 0,
        "operating_point.threshold: between 0 and 1": contract.operating_point is None
        or 0 < contract.operating_point.threshold < 1,
        "golden.window: at least 1, or null": all(one.window is None or one.window >= 1 for one in contract.golden),
        "graphs and golden: at least one of each": bool(contract.graphs and contract.golden),
        "golden: a case for graphs in int8, and one for all others": {one.precision for one in contract.golden}
        == {"int8" if graph.precision == "int8" else "fp32" for graph in contract.graphs},
        "quantisation: of graphs in int8, and of no others": (contract.quantisation is not None)
        == any(graph.precision == "int8" for graph in contract.graphs),
    }
    return next((fault for fault, fine in checks.items() if not fine), None)
