"""The whole chain on the CPU, through the real commands."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from resunet.cli import main

TINY = ["precision=fp32", "model.channels=[4,8,16]", "wandb.mode=disabled", "log_every=1", "warmup=0"]
PRETRAIN = [*TINY, "batch=8", "views.size=24", "head.hidden=16", "head.output=8", "data.workers=0"]
FINETUNE = [*TINY, "batch=4", "patch=[32,32]", "data.classes={0: background, 255: disc}", "data.labelled=2"]


def run(*arguments: str) -> int:
    return main(list(arguments))


@pytest.fixture
def recipes(tmp_path: Path, write_blobs: Callable[..., Path], salt: Path) -> dict[str, list[str]]:
    source = [f"data.source={write_blobs()}", f"data.salt_file={salt}"]
    return {"pretrain": [*PRETRAIN, *source], "finetune": [*FINETUNE, *source]}


def test_chain(tmp_path: Path, recipes: dict[str, list[str]], salt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder, pretrained, scratch = tmp_path / "encoder", tmp_path / "pretrained", tmp_path / "scratch"
    assert run("pretrain", "brain_tumor", *recipes["pretrain"], "steps=4", f"out={encoder}") == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(encoder)
    steps = ["steps=60", "validate_every=20", "optimizer.lr=0.01"]
    assert run("finetune", "brain_tumor", *recipes["finetune"], *steps, f"out={pretrained}", f"encoder={encoder}") == 0
    assert run("finetune", "brain_tumor", *recipes["finetune"], *steps, f"out={scratch}") == 0
    assert run("compare", str(pretrained), str(scratch), "--out", str(tmp_path / "report")) == 0
    data = recipes["finetune"][-2].removeprefix("data.source=")
    again = ["--data", data, "--out", str(tmp_path / "again"), "--salt-file", str(salt)]
    assert run("evaluate", str(pretrained), *again) == 0

    receipt = json.loads((pretrained / "receipt.json").read_text(encoding="utf-8"))
    assert receipt["encoder_share_loaded"] == 1.0
    assert {tensor["state"] for tensor in receipt["tensors"]} == {"loaded", "fresh"}
    assert not (scratch / "receipt.json").exists()
    summary = json.loads((pretrained / "evaluation" / "summary.json").read_text(encoding="utf-8"))
    assert summary["dice"]["n"] == 5 and len(summary["dice"]["ci95"]) == 2
    assert summary["dice"]["mean"] > 0.5, "bright discs are easy"
    evaluated = json.loads((tmp_path / "again" / "summary.json").read_text(encoding="utf-8"))
    assert evaluated["dice"] == summary["dice"], "the saved model gives the figures of the live one"
    comparison = json.loads((tmp_path / "report" / "compare.json").read_text(encoding="utf-8"))
    difference = comparison["paired_dice_difference"]["pretrained - scratch"]
    means = comparison["dice"]["pretrained"]["mean"] - comparison["dice"]["scratch"]["mean"]
    assert difference["n"] == 5 and difference["mean"] == pytest.approx(means, abs=1e-9)
    for report in (encoder, pretrained, scratch, tmp_path / "report"):
        page = (report / "report.html").read_text(encoding="utf-8")
        assert not re.search(r"""(src|href)=["'](?!data:|#)|<script|@import""", page), "opens without a network"
    for folder in (encoder, pretrained, scratch, tmp_path / "report", tmp_path / "again"):
        for path in folder.rglob("*"):
            assert "Mueller" not in path.name
            if path.is_file() and path.suffix != ".png":
                assert b"Mueller" not in path.read_bytes(), path


def test_a_source_without_splits(tmp_path: Path, write_blobs: Callable[..., Path], salt: Path) -> None:
    """Pretraining leaves out what fine-tuning will hold out, whatever the salt; the draw is the same everywhere."""
    other = tmp_path / "other_salt"
    other.write_text("3c" * 32)
    source = f"data.source={write_blobs(splits=False)}"
    encoder, chosen = tmp_path / "encoder", []
    assert run("pretrain", "brain_tumor", *PRETRAIN, source, f"data.salt_file={salt}", "steps=1", f"out={encoder}") == 0
    for name, file in (("one", salt), ("two", other)):
        arguments = [*FINETUNE, source, f"data.salt_file={file}", "steps=1", f"out={tmp_path / name}", f"encoder={encoder}"]
        assert run("finetune", "brain_tumor", *arguments) == 0
        record = json.loads((tmp_path / name / "run.json").read_text(encoding="utf-8"))
        chosen.append({part: record["inputs"][part] for part in ("train", "val", "test")})
    assert chosen[0] == chosen[1]
    notes = json.loads((tmp_path / "two" / "evaluation" / "summary.json").read_text(encoding="utf-8"))["notes"]
    assert any("group evidence unavailable" in note for note in notes)


def test_test_is_not_read_while_val_chooses(tmp_path: Path, recipes: dict[str, list[str]]) -> None:
    out = tmp_path / "run"
    assert run("finetune", "brain_tumor", *recipes["finetune"], "steps=1", "evaluate_test=false", f"out={out}") == 0
    assert not (out / "evaluation").exists() and (out / "model" / "config.json").exists()
    assert "Not evaluated" in (out / "report.html").read_text(encoding="utf-8")


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from finetune.comparison.compare import compare
    from resunet.cli import _finetune, _pretrain
    from resunet.data.phantom import PhantomConfig
    from resunet.demo import Stages, run_demo

    tiny = ["model.channels=[4,8,16]", "batch=4", "wandb.mode=disabled"]
    stages = Stages(
        pretrain=lambda recipe, overrides: _pretrain(recipe, [*overrides, *tiny, "views.size=24", "data.workers=0"]),
        finetune=lambda recipe, overrides: _finetune(recipe, [*overrides, *tiny, "patch=[32,32]"]),
        compare=compare,
    )
    patients = PhantomConfig(pool=3, val=1, test=2, spacing_mm=(4, 4, 8))
    report = run_demo(tmp_path / "demo", 20, stages, patients)
    page = report.read_text(encoding="utf-8")
    assert "SIMULATED" in page and "What came from pretraining" in page and "100.0% of the encoder" in page
    runs = [
        json.loads((tmp_path / "demo" / arm / "config.json").read_text(encoding="utf-8")) for arm in ("pretrained", "scratch")
    ]
    assert runs[0].pop("encoder") and runs[1].pop("encoder") is None
    assert {key for key in runs[0] if runs[0][key] != runs[1][key]} == {"out"}, "the arms differ in the encoder alone"
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == [
        "data", "pretrain", "pretrained", "report", "scratch",
    ]  # fmt: skip


@pytest.mark.parametrize("arguments", [["resunet", "doctor"], ["pretrain"], ["finetune"]])
def test_a_real_process_of_every_entry_point(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", *arguments], cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=120, check=False
    )
    assert "Traceback" not in done.stderr
    if arguments[0] == "resunet":
        assert done.returncode == 0 and "torch" in done.stdout
    else:
        assert done.returncode == 2 and "RECIPE" in done.stderr


@pytest.mark.parametrize("fault", ["", "uneven", "broken"])
def test_two_ranks(fault: str, tmp_path: Path, recipes: dict[str, list[str]]) -> None:
    out = tmp_path / "two"
    changes = ["batch=9"] if fault == "uneven" else ["data.workers=1"]
    if fault == "broken":  # of the share of the second rank, which tells nobody
        (tmp_path / "blobs" / "images" / "PATIENT-Mueller00-1.png").write_bytes(b"nothing")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
            *("--main_process_port", "0", "-m", "pretrain", "brain_tumor", *recipes["pretrain"], *changes),
            *("processes=2", "steps=2", "model.norm=group", f"out={out}"),
        ],
        capture_output=True, encoding="utf-8", timeout=240, check=False,
    )  # fmt: skip
    if fault:
        message = {"uneven": "2 ranks do not divide it exactly", "broken": "PATIENT-Mueller00-1.png: cannot be read"}[fault]
        assert done.returncode != 0 and done.stderr.count(message) == 1, done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert "2 ranks on cpu, batch 8 scans (4 a rank)" in done.stderr
    alone = tmp_path / "one"
    assert run("pretrain", "brain_tumor", *recipes["pretrain"], "steps=2", "model.norm=group", f"out={alone}") == 0
    records = [json.loads((folder / "run.json").read_text(encoding="utf-8")) for folder in (out, alone)]
    assert records[0]["status"] == "done" and records[0]["inputs"] == records[1]["inputs"]
    assert (out / "model" / "archive.parquet").read_bytes() == (alone / "model" / "archive.parquet").read_bytes()
    assert (out / "model" / "model.safetensors").stat().st_size == (alone / "model" / "model.safetensors").stat().st_size


def test_processes_are_checked(recipes: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("pretrain", "brain_tumor", *recipes["pretrain"], "processes=2", f"out={tmp_path / 'run'}") == 2
    assert "wants 2 ranks, 1 started" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
