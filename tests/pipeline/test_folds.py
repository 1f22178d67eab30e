"""Cross-validation and the ensemble of its folds, as a person starts them."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from resunet.cli import main

TINY = ["precision=fp32", "model.channels=[4,8]", "model.units=1", "model.norm=group", "wandb.mode=disabled", "warmup=0"]
RECIPE = ["brain_tumor", *TINY, "steps=2", "batch=4", "patch=[32,32]", "data.classes={0: background, 255: disc}"]


def test_two_ranks_and_what_follows(
    tmp_path: Path, write_blobs: Callable[..., Path], salt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blobs, out = write_blobs(), tmp_path / "two"
    recipe = [*RECIPE, "data.folds=2", "data.labelled=2", f"data.source={blobs}", f"data.salt_file={salt}"]
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
            *("--main_process_port", "0", "-m", "finetune", *recipe, "processes=2", f"out={out}"),
        ],
        capture_output=True, encoding="utf-8", timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(out)
    again = tmp_path / "again"
    assert main(["evaluate", str(out), "--data", str(blobs), "--salt-file", str(salt), "--out", str(again)]) == 0
    first, second = (json.loads((f / "summary.json").read_text(encoding="utf-8")) for f in (out / "evaluation", again))
    assert first["dice"] == second["dice"] and first["cases"] == 10
    left_out = json.loads((out / "cross_validation" / "summary.json").read_text(encoding="utf-8"))
    assert (left_out["cases"], left_out["groups"]) == (8, 4)

    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Mueller" not in page and "Ensemble of 2" in page

    capsys.readouterr()
    members = [str(out / "fold-0"), str(out / "fold-1")]
    assert main(["ensemble", *members, "--out", str(tmp_path / "both")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'both'}\n"
    weights = [folder / "model.safetensors" for folder in (tmp_path / "both", out / "model")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert main(["ensemble", *members, "--out", str(tmp_path / "both")]) == 2
    assert main(["explain", str(out), str(blobs / "images"), "--out", str(tmp_path / "why")]) == 2
    assert "is an ensemble, and Grad-CAM is of the layers of one network" in capsys.readouterr().err
    assert not (tmp_path / "why").exists()
    assert main(["predict", str(tmp_path / "both"), str(blobs / "images"), "--out", str(tmp_path / "masks")]) == 0
    assert len(list((tmp_path / "masks").iterdir())) == 30
