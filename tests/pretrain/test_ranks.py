import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "accelerate"
SCRIPT = Path(__file__).with_name("two_ranks.py")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def volumes(archive: Path) -> Path:
    for i in range(4):
        values = np.random.default_rng(i).integers(0, 900, (6, 24, 32), dtype=np.int16)
        sitk.WriteImage(sitk.GetImageFromArray(values), str(archive / f"volume{i}.nii.gz"))
    return archive


def test_two_processes_are_one(recipe, volumes, tmp_path):
    """Started by the shipped configuration: losses, gradients, memory bank, whole runs in 2D and 3D, and who is named after a
    fault."""
    exact = {"model": {"norm": "group"}, "head": {"batch_norm": False}, "steps": 3, "batch": 8, "cache_chunk": 6, "seed": 2}
    exact["optimizer"] = {
        "name": "lars",
        "lr": 0.1,
    }  # AdamW moves a weight by its rate even where the gradient is rounding only
    objective = {"same_group": "ignore", "position_threshold": 0.3}
    folders = {}
    for processes in (1, 2):
        folder = folders[processes] = tmp_path / str(processes)
        folder.mkdir()
        ours = recipe(**exact, objective=objective, processes=processes, out=str(folder / "run"))
        (folder / "recipe.json").write_text(ours.model_dump_json(), encoding="utf-8")
        deep = exact | {"model": {"norm": "group", "spatial_dims": 3}, "batch": 4, "views": {"size": 8}}
        ours = recipe(**deep, processes=processes, out=str(folder / "volumes"))
        (folder / "volumes.json").write_text(ours.model_dump_json(), encoding="utf-8")
        places = exact | {
            "model": {"norm": "group", "channels": [4, 8, 8]},
            "cache_chunk": None,
            "views": {"scale": [0.7, 1.0]},
        }
        ours = recipe(**places, dense={"points": 6, "pairs": 16}, processes=processes, out=str(folder / "dense"))
        (folder / "dense.json").write_text(ours.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "two_cpu_processes.yaml")]
    command += ["--main_process_port", str(free_port()), str(SCRIPT), str(folders[2])]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launched = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    runpy.run_path(str(SCRIPT))["run"](folders[1])
    _, errors = launched.communicate(timeout=240)
    assert launched.returncode == 0, errors
    assert "2 ranks on cpu, batch 8 scans (4 a rank)" in errors and errors.count("7.png") == 1

    (alone,), ranks = ([torch.load(path) for path in sorted(folders[n].glob("results-*.pt"))] for n in (1, 2))
    assert len(ranks) == 2 and len(alone) == 11
    unequal = [{key: float(value) for key, value in one.pop("dense, unequal").items()} for one in (alone, *ranks)]
    assert [(one["few"], one["none"], one["loss of none"] > 0) for one in unequal] == [(26, 24, True), *[(4, 0, False)] * 2]
    for name, wanted in alone.items():
        for its in ranks:
            assert its[name].keys() == wanted.keys()
            for key, value in wanted.items():
                atol = 1e-5 if name == "dense" else 1e-6  # its gradients are several times as large
                torch.testing.assert_close(its[name][key], value, atol=atol, rtol=1e-5, msg=f"{name}: {key}")
        assert max(float(value.abs().max()) for key, value in wanted.items() if key.endswith("weight")) > 1e-3
    for name in ("plain", "volumes"):
        for key, value in alone[name].items():
            torch.testing.assert_close(alone[f"{name}, cached"][key], value, atol=1e-6, rtol=1e-5)
    assert alone["scan-aware"]["loss 0"] != alone["plain"]["loss 0"]
    for name in ("bank", "bank_ptr"):  # bit for bit: the bank of a resumed run is that of the main rank
        assert torch.equal(ranks[0]["memory bank"][f"memory_bank.{name}"], ranks[1]["memory bank"][f"memory_bank.{name}"])

    for run, dims in (("run", 4), ("volumes", 5), ("dense", 4)):
        weights, others = (load_file(folders[n] / run / "model" / "model.safetensors") for n in (1, 2))
        assert weights["levels.0.0.conv1.weight"].ndim == dims
        for key, value in weights.items():
            torch.testing.assert_close(others[key], value, atol=1e-5, rtol=0, msg=f"{run}: {key}")
        logged = [(folders[n] / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines() for n in (1, 2)]
        for one, other in zip(*logged, strict=True):
            assert json.loads(one) == pytest.approx(json.loads(other), rel=1e-4)
    skipped = [json.loads((folders[n] / "skipped.jsonl").read_text(encoding="utf-8")) for n in (1, 2)]
    assert skipped[0] == skipped[1] and skipped[0]["scans"] == ["id7"]


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_accelerate_reads_its_configurations(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    ranks, machines = {"one_gpu": (1, 1), "several_gpus": (8, 1), "several_machines": (16, 2), "two_cpu_processes": (2, 1)}[
        name
    ]
    assert (config.num_processes, config.num_machines, config.use_cpu) == (ranks, machines, False)
    assert config.distributed_type.value == ("NO" if ranks == 1 else "MULTI_GPU")
    assert (config.main_process_ip is not None) == (machines > 1)


def test_four_configurations_are_shipped():
    assert len(list(CONFIGS.glob("*.yaml"))) == 4
