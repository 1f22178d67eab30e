"""Golden cases: synthetic scans with the live network's answers, replayed on a runtime."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from resunet.bundle.contract import Contract, Golden, Graph
from resunet.bundle.engines import Engine
from resunet.bundle.scorer import scorer_of
from resunet.errors import CheckFailed
from resunet.inference.window import Floats, Plan, Scorer, decide, predict_logits
from resunet.runtime import Intensity, ObjectRule, Percentiles, intensities_by, remove_objects, slice_axis

_WINDOWS = 3  # at once, and rows of them together


# Of pixels that a graph may decide otherwise. Rounding moves those whose logits are near the border; a systematic shift within the
# tolerance of half a precision moves more.
MOST_DECIDED = 0.1


@dataclass(frozen=True)
class GoldenCase:
    """values: (C, *size) of a scan. logits: (1 or K, *size). mask: class indices after post-processing, uint8 (*size)."""

    values: NDArray
    spacing: NDArray[np.float64]
    logits: Floats
    mask: NDArray[np.uint8]


@dataclass(frozen=True)
class Whole:
    """Settings of a golden case; whether it is seen whole, its plan says."""

    overlap: float
    flips: bool
    memory: float = 4.0
    window: int = 512


def read_golden(path: Path) -> GoldenCase:
    """A case from its .npz; nothing is unpickled.

    Raises:
        CheckFailed: it holds something else.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            case = GoldenCase(*(stored[name] for name in ("values", "spacing", "logits", "mask")))
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckFailed(f"{path.name}: is no golden case: {error}") from error
    if not case.values.shape[1:] == case.logits.shape[1:] == case.mask.shape or case.logits.dtype != np.float32:
        raise CheckFailed(f"{path.name}: scan, logits and mask do not fit each other.")
    if not np.isfinite(case.logits).all():
        raise CheckFailed(f"{path.name}: its logits are not finite.")
    return case


def write_golden(path: Path, case: GoldenCase) -> None:
    np.savez_compressed(path, values=case.values, spacing=case.spacing, logits=case.logits, mask=case.mask)


def answer(
    scorer: Scorer, values: NDArray, spacing: NDArray, rule: Intensity | Percentiles, golden: Golden, overlap: float
) -> Floats:
    """The logits of a golden case, seen as it says."""
    axis = slice_axis(tuple(spacing)) if values.ndim == 4 else None
    plan = Plan(16, 0, 0, 0) if golden.window is None else Plan(0, golden.window, _WINDOWS, _WINDOWS)
    return predict_logits(scorer, values, axis, intensities_by(values, rule), Whole(overlap, golden.flips), plan)


def mask_of(logits: Floats, rules: tuple[ObjectRule, ...]) -> NDArray[np.uint8]:
    """Logits (1 or K, *size) → post-processed class indices."""
    return remove_objects(decide(logits[None])[0], rules)


@dataclass(frozen=True)
class Replayed:
    """How far a runtime is from the live network, over all golden cases.

    difference: the largest of logits, over max(1, the largest of the live network's). decided: the share of pixels that it decides
    otherwise, before post-processing: such as have logits that the difference can carry over.
    """

    difference: float
    decided: float


def replay(folder: Path, contract: Contract, graph: Graph, engine: Engine) -> Replayed:
    """Run the golden cases.

    Raises:
        CheckFailed: it is above the graph's tolerance, decides more than MOST_DECIDED otherwise, or a mask is not what the logits
            make of it. It says which case.
    """
    behaviour = contract.behaviour()
    largest, otherwise, pixels = 0.0, 0, 0
    for golden in (one for one in contract.golden if (one.precision == "int8") == (graph.precision == "int8")):
        case = read_golden(folder / golden.file)
        if not np.array_equal(mask_of(case.logits, behaviour.object_rules), case.mask):
            raise CheckFailed(f"{golden.file}: its logits, decided and post-processed by the contract, are not its mask.")
        scorer = scorer_of(contract, engine, golden.flips)
        found = answer(scorer, case.values, case.spacing, behaviour.rule, golden, contract.window.overlap)
        if found.shape != case.logits.shape or not np.isfinite(found).all():
            raise CheckFailed(f"{golden.file}: {graph.runtime} gives {found.shape}, or values that are not finite.")
        scale = max(1.0, float(np.abs(case.logits).max()))
        difference = float(np.abs(found - case.logits).max()) / scale
        largest = max(largest, difference)
        if difference > graph.tolerance:
            raise CheckFailed(
                f"{golden.file}: logits are {difference:.2g} from the live network's, the tolerance is {graph.tolerance:g}."
            )
        otherwise += int((decide(found[None]) != decide(case.logits[None])).sum())
        pixels += case.mask.size
    share = otherwise / max(1, pixels)
    if share > MOST_DECIDED:
        raise CheckFailed(
            f"{graph.file}: {graph.runtime} decides {share:.1%} of the golden cases' pixels otherwise than the live network; more "
            f"than {MOST_DECIDED:.0%} is another segmenter, however near its logits are."
        )
    return Replayed(largest, share)
