"""`resunet predict` as a person starts it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from resunet.checkpoint import ModelConfig
from resunet.cli import main
from resunet.model import ResUNet


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = ResUNet(1, 2, (4, 8), units=1)
    nn.init.normal_(network.head.weight)
    network.config = ModelConfig(architecture=network.config.architecture, classes={0: "background", 255: "disc"})
    network.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    (tmp_path / "scans").mkdir()
    for i in range(5):
        values = np.random.default_rng(i).integers(0, 255, (20 + i, 30), np.uint8)
        Image.fromarray(values).save(tmp_path / "scans" / f"s{i}.png")
    return tmp_path / "scans"


def test_the_command(tmp_path: Path, model: Path, scans: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["predict", str(model), str(scans), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert sorted(path.name for path in out.iterdir()) == [f"s{i}.png" for i in range(5)]
    assert set(np.unique(np.asarray(Image.open(out / "s0.png")))) == {0, 255}
    assert main(["predict", str(model), str(scans), "--out", str(out)]) == 2
    assert main(["predict", str(model), str(scans), "--out", str(tmp_path / "a"), "--overlap", "1"]) == 2
    assert main(["predict", str(model), str(scans), "--out", str(tmp_path / "a"), "--precision", "int8"]) == 2
    assert not (tmp_path / "a").exists()
    messages = capsys.readouterr().err
    assert "is not empty" in messages and "overlap" in messages and "'fp32', 'bf16'" in messages
    (scans / "s3.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert main(["predict", str(model), str(scans), "--out", str(tmp_path / "b")]) == 2
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'b'}\n" and len(list((tmp_path / "b").iterdir())) == 4
    assert said.err.count("s3.png: cannot be read") == 1 and "1 input could not be predicted" in said.err


def test_two_ranks_share_the_files(tmp_path: Path, model: Path, scans: Path) -> None:
    alone, two = tmp_path / "alone", tmp_path / "two"
    assert main(["predict", str(model), str(scans), "--out", str(alone)]) == 0
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
            *("--main_process_port", "0", "-m", "resunet", "predict", str(model), str(scans), "--out", str(two)),
        ],
        cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(two) and done.stdout.count(str(two)) == 1
    assert "2 ranks on cpu, 5 scans" in done.stderr and "predict 3/3" in done.stderr
    assert {path.name: path.read_bytes() for path in two.iterdir()} == {
        path.name: path.read_bytes() for path in alone.iterdir()
    }
