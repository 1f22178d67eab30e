import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from accelerate import Accelerator

from pretrain.archive import read_archive
from pretrain.loop import pretrain
from pretrain.non_finite import NonFinite, suspects, to_blame
from pretrain.recipe import PretrainRecipe
from pretrain.step import fault_of, gradient_norm
from resunet.data.cases import Case
from resunet.data.order import batch_order
from resunet.errors import CheckFailed, Stopped

HUGE = {  # so that the scan of 1e30 stays as it is: finite, until a network squares it
    "normalisation": {"kind": "fixed", "low": -1e38, "high": 1e38, "mean": 0, "std": 1000},
    "views": {"noise": 0, "intensity": 0},
}


@pytest.fixture
def archive(archive: Path) -> Path:
    tifffile.imwrite(archive / "huge.tif", np.random.default_rng(0).random((24, 24)).astype(np.float32) * 1e30)
    return archive


@pytest.fixture
def huge(recipe: Callable[..., PretrainRecipe]) -> Callable[..., PretrainRecipe]:
    def make(norm: str = "group", **changes: object) -> PretrainRecipe:
        exact = {"model": {"norm": norm}, "head": {"batch_norm": norm == "batch"}, "on_non_finite": "skip"}
        return recipe(**HUGE, **(exact | changes))

    return make


def id_and_steps(ours: PretrainRecipe) -> tuple[str, list[int]]:
    """The id of the scan, and which steps it is in (from 1)."""
    scans = read_archive(ours, Accelerator(cpu=True)).scans
    (item,) = [i for i, case in enumerate(scans.cases) if case.stem == "huge"]
    steps = [step + 1 for step in range(ours.steps) if item in batch_order(10, ours.batch, ours.seed, step)]
    return scans.cases[item].id, steps


def skipped(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "skipped.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_step_is_left_out_and_the_scan_named(huge, capsys):
    ours = huge(steps=8)
    its_id, steps = id_and_steps(ours)
    assert 1 < len(steps) < 8
    out = pretrain(ours)
    found = skipped(out)
    assert [line["step"] for line in found] == steps
    assert all(line["scans"] == [its_id] and line["evidence"] == "scans whose outputs are not finite" for line in found)
    assert str(ours.data.source / "huge.tif") in capsys.readouterr().err, "the terminal says which file to look at"
    assert all("huge" not in path.read_text(encoding="utf-8") for path in (out / "skipped.jsonl", out / "report.html"))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "skipped" in line] == steps
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    assert f"{len(steps)} of 8 steps were left out" in (out / "report.html").read_text(encoding="utf-8")


def test_it_leaves_no_trace_in_the_network(huge):
    """Batch norm's running statistics and the memory bank are those of before."""
    ours = huge("batch", steps=8, objective={"memory_bank": 4})
    _, steps = id_and_steps(ours)
    out = pretrain(ours)
    assert [line["step"] for line in skipped(out)] == steps
    assert {line["what"] for line in skipped(out)} == {"the running statistics of batch norm are not finite"}
    state = torch.load(out / "checkpoints" / "last" / "state.pt", weights_only=True)
    assert state["network"]["encoder.levels.0.0.norm1.num_batches_tracked"] == 8 - len(steps)
    for tensor in (*state["network"].values(), *state["loss"].values()):
        assert tensor.isfinite().all()


def test_stop_names_them_too(huge):
    ours = huge(steps=8, on_non_finite="stop")
    _, steps = id_and_steps(ours)
    message = rf"step {steps[0]}: the loss is not finite \(nan\); scans whose outputs are not finite: \S*huge\.tif\. .*skip"
    with pytest.raises(CheckFailed, match=message):
        pretrain(ours)
    assert not (ours.out / "skipped.jsonl").exists()


def test_a_network_that_diverges_stops_all_the_same(recipe):
    ours = recipe(steps=30, warmup=0, optimizer={"lr": 1e36}, on_non_finite="skip", checkpoint_every=1)
    with pytest.raises(CheckFailed, match=r"10 steps in a row were like this\. Start anew with a lower"):
        pretrain(ours)
    assert [line["step"] for line in skipped(ours.out)] == list(range(2, 11))
    assert [path.name for path in (ours.out / "checkpoints").iterdir() if not path.is_symlink()] == ["step-1"], (
        "before it diverged"
    )


def test_a_gradient_that_is_not_finite_counts():
    accelerator, layer = Accelerator(cpu=True), torch.nn.Linear(3, 1, bias=False)
    optimizer = accelerator.prepare(torch.optim.SGD(layer.parameters()))
    for gradient, norm in ([3.0, 0.0, 4.0], 5.0), ([1.0, torch.inf, 0.0], torch.inf):
        layer.weight.grad = torch.tensor([gradient])
        assert gradient_norm(layer, optimizer, accelerator) == norm
    assert fault_of(1.0, 5.0, layer, accelerator) is None
    assert fault_of(1.0, torch.inf, layer, accelerator) == "the gradient is not finite (inf)"
    assert fault_of(torch.nan, torch.nan, layer, accelerator) == "the loss is not finite (nan)"


def test_a_scaler_is_ready_for_the_step_after(tmp_path, monkeypatch):
    """With fp16 it has unscaled the gradients of a step that is left out, and would refuse those of the next."""
    accelerator, layer = Accelerator(cpu=True), torch.nn.Linear(3, 1)
    monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
    accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    optimizer = accelerator.prepare(torch.optim.SGD(layer.parameters()))
    leaving = NonFinite(tmp_path, True, [Case("id0", "", "", "", None, (Path("0.png"),), None)], True)
    for step in range(3):
        optimizer.zero_grad()
        accelerator.backward(layer(torch.full((1, 3), torch.inf)).sum())
        assert not np.isfinite(gradient_norm(layer, optimizer, accelerator))
        rows = suspects(torch.tensor([0]), torch.zeros(2, 1, 2, 2), torch.full((2, 3), torch.nan))
        leaving.leave_out(step + 1, "the loss is not finite (nan)", rows, accelerator)
    assert [line["step"] for line in map(json.loads, (tmp_path / "skipped.jsonl").read_text().splitlines())] == [1, 2, 3]


def test_a_resumed_run_left_out_the_same_steps(huge, tmp_path, sigterm_after):
    whole, stopped = (huge(steps=8, out=str(tmp_path / name)) for name in ("whole", "stopped"))
    pretrain(whole)
    sigterm_after(3)
    with pytest.raises(Stopped):
        pretrain(stopped)
    with (stopped.out / "skipped.jsonl").open("a", encoding="utf-8") as file:  # as if it had died after steps it never saved
        file.write('{"step": 8, "what": "", "evidence": "", "scans": []}\n{"step": 9, "wh')
    pretrain(stopped.model_copy(update={"resume": True}))
    for name in ("skipped.jsonl", "metrics.jsonl", "model/model.safetensors"):
        assert (stopped.out / name).read_bytes() == (whole.out / name).read_bytes()


def test_blame():
    views, projection = torch.zeros(6, 1, 2, 2), torch.zeros(6, 4)
    scan = torch.tensor([5, 9, 5])
    rows = suspects(scan, views, projection)
    assert to_blame(rows) == ("the scans of the step", [5, 9])
    projection[4, 1] = torch.nan  # the second view of the second
    assert to_blame(suspects(scan, views, projection)) == ("scans whose outputs are not finite", [9])
    assert to_blame(suspects(scan, views, projection + torch.inf)) == ("the scans of the step", [5, 9])
    views[0, 0, 1, 1] = torch.inf
    assert to_blame(suspects(scan, views, projection)) == ("scans whose views are not finite", [5])
