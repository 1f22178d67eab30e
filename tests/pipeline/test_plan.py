"""Before training, through the real command."""

from collections.abc import Callable
from pathlib import Path

import pytest

from resunet.cli import main

TINY = ["precision=fp32", "model.channels=[4,8,16]", "wandb.mode=disabled", "warmup=0", "batch=4", "patch=[32,32]", "steps=2"]


@pytest.fixture
def arguments(tmp_path: Path, write_blobs: Callable[..., Path], salt: Path) -> list[str]:
    data = [f"data.source={write_blobs()}", f"data.salt_file={salt}", "data.classes={0: background, 255: disc}"]
    return ["finetune", "brain_tumor", *TINY, *data, "data.labelled=null", f"out={tmp_path / 'run'}"]


def test_the_planned_recipe_trains(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "planned.yaml"
    assert main([*arguments, "--plan", "--write", str(written)]) == 0
    told = capsys.readouterr().out
    assert told.splitlines()[-1] == str(written) and "44 × 39 pixels" in told and "Warnings\n--------\n" in told
    assert "Mueller" not in told and not (tmp_path / "run").exists()
    assert main(["finetune", str(written)]) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert '"patch": [\n    44,\n    40\n  ]' in (tmp_path / "run" / "config.json").read_text(encoding="utf-8")


def test_checks_and_their_exit_codes(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.planning.command.SWEEP_STEPS", 40)
    page = tmp_path / "lr.html"
    assert main([*arguments, "--find-lr", "--write", str(page), "optimizer.lr=0.03"]) == 0
    told = capsys.readouterr().out
    assert "optimizer.lr=" in told and "<svg" in page.read_text(encoding="utf-8")
    assert main([*arguments, "--overfit", "optimizer.lr=0.03"]) == 0
    assert "overfit: passed" in capsys.readouterr().out
    monkeypatch.setattr("finetune.planning.command.OVERFIT_STEPS", 3)
    assert main([*arguments, "--overfit", "optimizer.lr=1e-9"]) == 1
    assert "overfit: FAILED" in capsys.readouterr().err
    assert main([*arguments, "--overfit", "--plan"]) == 2
    assert main([*arguments, "--write", str(page)]) == 2
    assert "one of --plan" in capsys.readouterr().err and not (tmp_path / "run").exists()
