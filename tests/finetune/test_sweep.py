"""The shipped sweep: what a W&B agent would start for a trial is started here, with W&B's own making of the command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

pytestmark = pytest.mark.filterwarnings("default")  # wandb's own
SWEEPS = sorted((Path(__file__).parents[2] / "configs" / "sweep").glob("*.yaml"))


@pytest.fixture
def resunet(tmp_path) -> Path:
    """The program, wherever it is installed."""
    script = tmp_path / "bin" / "resunet"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m resunet "$@"\n')
    script.chmod(0o755)
    return script


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_trial_of_a_shipped_sweep_runs(path, resunet, source, offline, tmp_path, read_mirror):
    sweep = yaml.safe_load(path.read_text(encoding="utf-8"))
    trial = {name: {"value": its["values"][0] if "values" in its else its["min"]} for name, its in sweep["parameters"].items()}
    made = create_sweep_command_args({"args": trial})
    made["program"] = [sweep["program"]]
    command = []
    for word in create_sweep_command(sweep["command"]):
        command += made[word[2:-1]] if word.startswith("${") else [word]
    tiny = ["steps=2", "patch=[16,16]", "model.channels=[4,8]", "precision=fp32", "data.labelled=null"]
    tiny += [f"data.source={source}", f"data.salt_file={tmp_path}/salt", "data.classes={0: background, 255: lesion}"]
    environment = os.environ | {
        "PATH": f"{resunet.parent}:{os.environ['PATH']}",
        "WANDB_SWEEP_ID": "sweep123",
        "WANDB_RUN_ID": "trial123",
    }
    environment.pop("WANDB_API_KEY", None)  # so that the run falls back to offline
    done = subprocess.run([*command, *tiny], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
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
    metric = sweep["metric"]["name"].split(".")
    assert set(metric[1:]) <= set(mirrored.summary()[metric[0]])  # what the sweep optimises is there
    assert not (run / "evaluation").exists()
