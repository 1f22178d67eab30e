"""The last step: what pruning left, or the run itself, to INT8, and through the same gate."""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.compression.gate import Scores, Verdict, judge, scores_of
from finetune.compression.steps import kept
from finetune.compression.subject import Subject
from finetune.evaluation.evaluate import measure_cases
from finetune.evaluation.outputs import Measured
from finetune.quantisation.settings import QuantiseSettings
from resunet.checkpoint import model_folder, read_config
from resunet.data.cases import LoadedCase
from resunet.files import folder_aside, write_text
from resunet.progress import say

NAME = "int8"
_GRAPHS = (".onnx", ".xml", ".bin")


@dataclass(frozen=True)
class Quantised:
    """run: whose network it is. folder: the graph. bytes: of its files."""

    run: Path
    folder: Path
    bytes: int
    verdict: Verdict
    seconds: float


def quantise_step(subject: Subject, settings: QuantiseSettings, run: Path, start: Scores) -> Quantised:
    """Quantise a run's network and judge it on val; each only if it has not been done.

    Raises:
        EnvironmentFault: a package that the method needs is missing.
    """
    from finetune.quantisation.quantise import quantise

    out = subject.settings.out
    folder, took = out / "steps" / NAME, out / "val" / f"{NAME}-seconds.json"
    if not folder.is_dir():
        say(f"compress {NAME}: {settings.method}")
        began = time.perf_counter()
        quantise(run, settings, folder)
        write_text(took, json.dumps(round(time.perf_counter() - began, 1)))
    measured = kept(
        out / "val" / f"{NAME}.json",
        Scores,
        lambda: scores_of([one.row() for one in measure_int8(subject, folder, run, subject.data.val)]),
    )
    verdict = judge(start, measured, subject.settings.gate)
    say(f"compress {NAME}: {'accepted' if verdict.accepted else 'refused: ' + '; '.join(verdict.reasons)}")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in _GRAPHS)
    seconds = json.loads(took.read_text(encoding="utf-8")) if took.is_file() else 0.0
    return Quantised(run, folder, size, verdict, seconds)


def measure_int8(subject: Subject, folder: Path, run: Path, cases: list[LoadedCase]) -> list[Measured]:
    """Whole cases, as the engine predicts them, after the post-processing of the network that was quantised."""
    from finetune.quantisation.result import open_quantised

    rules = read_config(model_folder(run)).object_rules()
    return measure_cases(open_quantised(folder), cases, subject.targets, subject.accelerator.device, "fp32", rules=rules)


def keep_quantised(quantised: Quantised, out: Path) -> None:
    """quantised/ beside the model/ that it was made of."""
    with folder_aside(out / "quantised") as aside:
        shutil.copytree(quantised.folder, aside, dirs_exist_ok=True)


def record_of_int8(quantised: Quantised, method: str) -> dict[str, Any]:
    """As it stands in compress.json."""
    return {
        "name": NAME,
        "method": method,
        "bytes": quantised.bytes,
        "seconds": quantised.seconds,
        "accepted": quantised.verdict.accepted,
    } | (quantised.verdict.model_dump(mode="json"))
