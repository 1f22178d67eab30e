"""The shipped sweep: what a W&B agent would start for a trial is started here, with W&B's own making of the command."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

pytestmark = pytest.mark.filterwarnings("default")  # wandb's own
SWEEPS = Path(__file__).parents[2] / "configs" / "sweep"


@pytest.fixture
def resunet(tmp_path) -> Path:
    """The program, wherever it is installed."""
    script = tmp_path / "bin" / "resunet"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m resunet "$@"\n')
    script.chmod(0o755)
    return script


@pytest.fixture
def start(resunet, tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """What an agent starts for the first trial of a sweep, with further words."""

    def started(sweep: dict, trial: dict, *words: str) -> subprocess.CompletedProcess:
        made = create_sweep_command_args({"args": trial})
        made["program"] = [sweep["program"]]
        command = []
        for word in create_sweep_command(sweep["command"]):
            command += made[word[2:-1]] if word.startswith("${") else [word]
        environment = os.environ | {
            "PATH": f"{resunet.parent}:{os.environ['PATH']}",
            "WANDB_SWEEP_ID": "sweep123",
            "WANDB_RUN_ID": "trial123",
        }
        environment.pop("WANDB_API_KEY", None)  # so that the run falls back to offline
        done = subprocess.run(
            [*command, *words], cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", check=False
        )
        assert done.returncode == 0, done.stderr
        return done

    return started


def first_trial(name: str) -> tuple[dict, dict]:
    sweep = yaml.safe_load((SWEEPS / name).read_text(encoding="utf-8"))
    its = sweep["parameters"].items()
    return sweep, {name: {"value": one["values"][0] if "values" in one else one["min"]} for name, one in its}


def test_workers_of_a_label_curve_are_runs_of_their_own(start, source, offline, tmp_path, read_mirror):
    """The agent's names for its trial do not become those of the cells."""
    tiny = ["patch=[16,16]", "model.channels=[4,8]", "precision=fp32", "data.classes={0: background, 255: lesion}"]
    words = [f"finetune.{key}" for key in (*tiny, f"data.source={source}", f"data.salt_file={tmp_path}/salt")]
    words += ["arms.pretrained={model: {squeeze_excite: true}}", "budgets=[1]", "draws=1", "steps=[1]", "out=curve"]
    start(*first_trial("label_curve.yaml"), *words)
    runs = [
        read_mirror(tmp_path / "curve" / "cells" / arm / "1" / "draw-0" / "steps-1", finished=2).run()
        for arm in ("scratch", "pretrained")
    ]
    assert [list(run.tags) for run in runs] == [["scratch"], ["pretrained"]]
    assert len({run.run_id for run in runs} | {"trial123"}) == 3 and not any(run.sweep_id for run in runs)


def test_a_trial_of_the_shipped_sweep_runs(start, source, offline, tmp_path, read_mirror):
    sweep, trial = first_trial("brain_tumor.yaml")
    tiny = ["steps=2", "patch=[16,16]", "model.channels=[4,8]", "precision=fp32", "data.labelled=null"]
    tiny += [f"data.source={source}", f"data.salt_file={tmp_path}/salt", "data.classes={0: background, 255: lesion}"]
    done = start(sweep, trial, *tiny)
    run = tmp_path / "runs" / "sweep" / "trial123"
    assert Path(done.stdout.splitlines()[-1]) == run.relative_to(tmp_path)
    recorded = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert (recorded["status"], recorded["wandb_id"]) == ("done", "trial123")
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    for name, its in trial.items():
        group, _, key = name.rpartition(".")
        assert (config[group] if group else config)[key] == its["value"]
    mirrored = read_mirror(run)
    assert (mirrored.run().run_id, mirrored.run().sweep_id) == ("trial123", "sweep123")
    # W&B's optimiser and hyperband look the name up in lines of the history
    assert any(sweep["metric"]["name"] in line for line in mirrored.history())
    assert not (run / "evaluation").exists()
