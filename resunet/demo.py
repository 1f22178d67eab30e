"""`resunet demo`: the whole chain on the embedded data set, within a time that is measured rather than hoped for.

The stages are handed in, because the library knows neither application.
"""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resunet.data.phantom import PhantomConfig, write_phantom
from resunet.doctor import fastest_precision
from resunet.errors import InputError
from resunet.files import refuse_taken
from resunet.progress import progress, say
from resunet.report import Section

Stage = Callable[[str, Sequence[str]], Path]  # recipe name, overrides → run directory

_NAMES = ("pretrained", "scratch")
_SHORTEST = 20
# With little time, patients are saved first: fewer are simulated.
_LITTLE_TIME = 300
_FEW_PATIENTS = PhantomConfig(pool=16, val=2, test=6)
# Shares of the time that is left once the patients are made; the rest is evaluation and the report.
_PRETRAIN, _FINETUNE = 0.34, 0.23
_MOST = {"pretrain": 600, "finetune": 500}
# Below this nothing is learned: a busy machine takes longer instead. Per second of the time asked for.
_LEAST = {"pretrain": 0.0, "finetune": 0.4}
_CALIBRATION_STEPS = 6


@dataclass(frozen=True)
class Stages:
    """The applications, as the command line passes them in."""

    pretrain: Stage
    finetune: Stage
    compare: Callable[..., Path]


def run_demo(out: Path, seconds: float, stages: Stages, patients: PhantomConfig | None = None) -> Path:
    """Make the archive, pretrain, fine-tune twice, compare; the report's path.

    Args:
        out: a new folder.
        seconds: aimed at; the steps of all stages are scaled to it by timing a few of them first.
        patients: the simulated data set; 40 patients by default, 24 where there is little time.

    Raises:
        InputError: `out` exists, or so little time that nothing can be shown.
    """
    refuse_taken(out)
    if seconds < _SHORTEST:
        raise InputError(f"--seconds {seconds:g}: at least {_SHORTEST}; nothing is learned in less.")
    started = time.perf_counter()
    patients = patients or (PhantomConfig() if seconds >= _LITTLE_TIME else _FEW_PATIENTS)
    precision = fastest_precision()
    say(f"demo: simulated patients, {precision}, about {seconds:.0f} seconds; {out}")
    data = _write_patients(out / "data", patients)
    common = [f"data.source={data}", f"precision={precision}"]
    left = seconds - (time.perf_counter() - started)
    pretrain_seconds = _step_seconds(stages.pretrain, out, common)
    finetune_seconds = _step_seconds(stages.finetune, out, [*common, "evaluate_test=false"])
    pretrain_steps = _steps("pretrain", seconds, _PRETRAIN * left / pretrain_seconds)
    finetune_steps = _steps("finetune", seconds, _FINETUNE * left / finetune_seconds)

    encoder = stages.pretrain("demo", [*common, f"out={out / 'pretrain'}", f"steps={pretrain_steps}"])
    budget = [*common, f"steps={finetune_steps}", f"validate_every={max(1, finetune_steps // 5)}"]
    pretrained = stages.finetune("demo", [*budget, f"out={out / 'pretrained'}", f"encoder={encoder}"])
    scratch = stages.finetune("demo", [*budget, f"out={out / 'scratch'}"])
    say("demo: writing the report")
    recipe = json.loads((pretrained / "config.json").read_text(encoding="utf-8"))
    folder = stages.compare(
        [pretrained, scratch],
        out / "report",
        names=_NAMES,
        title="Did pretraining help? Simulated MS patients",
        preamble=[_what_was_done(patients, recipe, pretrain_steps, finetune_steps, time.perf_counter() - started)],
        notes=["The patients are SIMULATED: no figure here says how a model does on real ones."],
    )
    return folder / "report.html"


def _write_patients(folder: Path, patients: PhantomConfig) -> Path:
    steps = progress(range(patients.patients), patients.patients, "simulate patients")
    folder.parent.mkdir(parents=True, exist_ok=True)

    def advance(done: int, total: int) -> None:
        next(steps, None)

    return write_phantom(folder, patients, progress=advance)


def _step_seconds(stage: Stage, out: Path, common: Sequence[str]) -> float:
    """Seconds a step of a stage takes on this machine, from a run of a few steps that is thrown away."""
    with tempfile.TemporaryDirectory(dir=out) as folder:
        run = stage("demo", [*common, f"out={folder}/run", f"steps={_CALIBRATION_STEPS}", "wandb.mode=disabled"])
        record: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return float(record["seconds_per_step"])


def _steps(stage: str, seconds: float, affordable: float) -> int:
    """Steps of a stage: what its share of the time affords, within limits."""
    return min(_MOST[stage], max(5, int(_LEAST[stage] * seconds), int(affordable)))


def _what_was_done(
    patients: PhantomConfig, recipe: dict[str, Any], pretrain_steps: int, finetune_steps: int, seconds: float
) -> Section:
    labelled = int(recipe["data"]["labelled"])
    val = min(labelled, patients.val)
    return Section(
        "What was done",
        text=[
            f"{patients.patients} multiple-sclerosis patients were simulated on the anatomy of the MNI152 template "
            f"(FLAIR-like contrast, {' × '.join(f'{s:g}' for s in patients.spacing_mm)} mm voxels), with exact lesion masks.",
            f"The encoder was pretrained by SimCLR for {pretrain_steps} steps on the scans of {patients.pool} patients, "
            "without their masks.",
            f"{labelled + val} patients were labelled: {labelled} to train on, {val} to choose the checkpoint by. Two networks "
            f"were fine-tuned on them for {finetune_steps} steps each, with the same seed, patches and augmentation: one "
            "from that encoder, one from scratch.",
            f"Both were measured on the same {patients.test} patients, whom no step had seen. It took {seconds:.0f} seconds.",
            "One draw of labelled patients and one seed: another draw can turn the answer round. The steps of scratch are "
            "those of the pretrained arm; pretraining's own time comes on top of the latter.",
        ],
    )
