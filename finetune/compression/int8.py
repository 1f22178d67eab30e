"""The last steps: what pruning left, or the run itself, to INT8, and through the same gate.

First as it was asked for. If the gate refuses that, or nothing came of it, without training where training was asked for, and then
with ever more of the layers that hurt in float32.
"""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from finetune.compression.gate import Scores, Verdict, failed, judge, scores_of
from finetune.compression.sensitivity import spread
from finetune.compression.steps import kept
from finetune.compression.subject import Subject
from finetune.evaluation.evaluate import measure_cases
from finetune.evaluation.outputs import Measured
from finetune.inference.window import footprint
from finetune.quantisation.sensitivity import RoundingSensitivity, measure_rounding
from finetune.quantisation.settings import QuantiseSettings
from resunet.bundle.scorer import EngineScorer
from resunet.checkpoint import model_folder, read_config
from resunet.data.cases import LoadedCase
from resunet.errors import CheckFailed
from resunet.files import folder_aside, write_text
from resunet.model import load_finetuned
from resunet.progress import say

NAME, ROUNDING = "int8", "rounding.json"
_GRAPHS = (".onnx", ".xml", ".bin")
_WORST = 2  # layers that stay in float32 first; twice as many with every retry


@dataclass(frozen=True)
class Quantised:
    """One try. run: whose network it is. folder: the graph, of so many bytes; not there where nothing came of it."""

    name: str
    settings: QuantiseSettings
    run: Path
    folder: Path
    bytes: int
    verdict: Verdict
    seconds: float
    hurt: tuple[str, ...]


def quantise_steps(subject: Subject, settings: QuantiseSettings, run: Path, start: Scores) -> tuple[Quantised, ...]:
    """Quantise a run's network and judge it on val, until one way is accepted; each only if it has not been done.

    Raises:
        EnvironmentFault: a package that the method needs is missing.
    """
    tried: list[Quantised] = []
    for asked in _ways(subject, settings, run):
        name = NAME if not tried else f"{NAME}-{len(tried) + 1}"
        tried.append(_step(subject, asked, run, start, name))
        if tried[-1].verdict.accepted:
            break
    return tuple(tried)


def _ways(subject: Subject, settings: QuantiseSettings, run: Path) -> Iterator[QuantiseSettings]:
    """What is asked for, and what is tried after each refusal."""
    yield settings
    if settings.trains:
        yield settings.model_copy(update={"method": "nncf_ptq" if settings.by_nncf else "ptq"})
    kept_float = settings.keep_float
    for retry in range(0 if settings.by_nncf else settings.retries):
        worst = _hurt(subject, settings, run).worst(_WORST * 2**retry)
        more = tuple(dict.fromkeys([*settings.keep_float, *worst]))
        if set(more) == set(kept_float):  # no more of them hurt
            return
        kept_float = more
        yield settings.model_copy(update={"keep_float": more})


def _step(subject: Subject, settings: QuantiseSettings, run: Path, start: Scores, name: str) -> Quantised:
    from finetune.quantisation.quantise import quantise

    out = subject.settings.out
    folder, took, fault = out / "steps" / name, out / "val" / f"{name}-seconds.json", out / "val" / f"{name}-failed.json"
    beside = f", {len(settings.keep_float)} layers in float32" if settings.keep_float else ""
    if fault.is_file():
        return _failed(name, settings, run, folder, fault)
    if not folder.is_dir():
        say(f"compress {name}: {settings.method}{beside}")
        began = time.perf_counter()
        try:
            quantise(run, settings, folder)
        except CheckFailed as error:
            say(f"compress {name}: failed: {error}")
            write_text(fault, json.dumps({"reason": str(error), "seconds": round(time.perf_counter() - began, 1)}))
            return _failed(name, settings, run, folder, fault)
        write_text(took, json.dumps(round(time.perf_counter() - began, 1)))
    measured = kept(
        out / "val" / f"{name}.json",
        Scores,
        lambda: scores_of([one.row() for one in measure_int8(subject, folder, run, subject.data.val)]),
    )
    verdict = judge(start, measured, subject.settings.gate, subject.targets.names)
    say(f"compress {name}: {'accepted' if verdict.accepted else 'refused: ' + '; '.join(verdict.reasons)}")
    hurt: tuple[str, ...] = ()
    if not verdict.accepted and not settings.by_nncf:
        hurt = tuple(_hurt(subject, settings, run).told())
        say(f"compress {name}: layers that hurt most by themselves: {'; '.join(hurt) or 'none'}")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in _GRAPHS)
    seconds = json.loads(took.read_text(encoding="utf-8")) if took.is_file() else 0.0
    return Quantised(name, settings, run, folder, size, verdict, seconds, hurt)


def _failed(name: str, settings: QuantiseSettings, run: Path, folder: Path, fault: Path) -> Quantised:
    """A try that came to nothing, as it was noted."""
    noted = json.loads(fault.read_text(encoding="utf-8"))
    return Quantised(name, settings, run, folder, 0, failed(noted["reason"]), noted["seconds"], ())


def _hurt(subject: Subject, settings: QuantiseSettings, run: Path) -> RoundingSensitivity:
    """val Dice of every layer alone in INT8; measured once."""
    from finetune.quantisation.quantise import engine_of
    from finetune.quantisation.training import calibration_batches

    network, config = load_finetuned(model_folder(run))
    cases = spread(subject.data.val, settings.sensitivity_cases)
    architecture, recipe = config.architecture, subject.recipe.model_copy(update={"precision": "fp32"})
    found = footprint(network, architecture.in_channels, torch.device("cpu"))

    def dice(module: fx.GraphModule) -> float:
        scorer = EngineScorer(engine_of(module), found, architecture.spatial_dims)
        return subject.dice(scorer, cases, config.object_rules())

    def measured() -> RoundingSensitivity:
        batches = calibration_batches(recipe, settings, subject.sampler())
        return measure_rounding(network, architecture.in_channels, settings.grid, batches, dice, len(cases))

    return kept(subject.settings.out / ROUNDING, RoundingSensitivity, measured)


def measure_int8(subject: Subject, folder: Path, run: Path, cases: Sequence[LoadedCase]) -> list[Measured]:
    """Whole cases, as the engine predicts them, after the post-processing of the network that was quantised."""
    from finetune.quantisation.result import open_quantised

    rules, device = read_config(model_folder(run)).object_rules(), subject.accelerator.device
    scorer, inference = open_quantised(folder), subject.recipe.inference
    return measure_cases(scorer, list(cases), subject.targets, device, "fp32", rules=rules, inference=inference)


def keep_quantised(quantised: Quantised, out: Path) -> None:
    """quantised/ beside the model/ that it was made of."""
    with folder_aside(out / "quantised") as aside:
        shutil.copytree(quantised.folder, aside, dirs_exist_ok=True)


def record_of_int8(quantised: Quantised) -> dict[str, Any]:
    """As it stands in compress.json."""
    return {
        "name": quantised.name,
        "method": quantised.settings.method,
        "keep_float": list(quantised.settings.keep_float),
        "bytes": quantised.bytes,
        "seconds": quantised.seconds,
        "accepted": quantised.verdict.accepted,
        "hurt": list(quantised.hurt),
    } | (quantised.verdict.model_dump(mode="json"))
