import tempfile
from pathlib import Path

import pytest
import torch

from resunet import doctor
from resunet.data.identity import default_salt_file


@pytest.mark.filterwarnings("default")  # wandb's own, on import
def test_every_subject_has_a_finding(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.chdir(tmp_path)
    rows = dict(doctor.examine())
    assert all(rows.values())
    assert torch.__version__.startswith(rows["version of torch"])
    assert f"{torch.get_num_threads()} threads" in rows["cores and threads"]
    assert rows["working folder"].startswith(f"{tmp_path}: writable")
    assert rows["temporary folder"].startswith(f"{tempfile.gettempdir()}: writable")
    assert str(default_salt_file()) in rows["salt for ids"] and "first run" in rows["salt for ids"]
    assert "no key" in rows["Weights & Biases"]
    if not torch.cuda.is_available():
        assert "CPU" in rows["GPUs"] and "fp16 needs a GPU" in rows["precision"]
    assert not default_salt_file().exists()  # looking makes nothing


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    assert "NOT writable" in doctor._folder_line(tmp_path / "none")


def test_step_seconds_are_measured_in_both_precisions():
    assert doctor.step_seconds("fp32") > 0
    assert doctor.step_seconds("bf16") > 0


@pytest.mark.parametrize("bf16, expected", [(0.5, "bf16"), (2.0, "fp32")])
def test_the_faster_precision_is_taken(monkeypatch, bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "step_seconds", {"fp32": 1.0, "bf16": bf16}.get)
    assert doctor.fastest_precision() == expected


def test_the_examination_leaves_the_folder_as_it_was(tmp_path):
    doctor._folder_line(tmp_path)
    assert list(Path(tmp_path).iterdir()) == []
