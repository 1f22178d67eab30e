import json

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.loop import pretrain
from pretrain.planning.page import page
from pretrain.planning.plan import make_plan
from pretrain.probe.probe import evaluating
from resunet.checkpoint import read_config
from resunet.data.leakage import read_archive
from resunet.encoder import ResidualEncoder
from resunet.errors import InputError, Stopped
from resunet.report import read_metrics

FIGURES = {"probe_dice", "probe_alignment", "probe_uniformity", "probe_rankme", "probe_std"}


def test_a_probe_changes_nothing_of_the_training(probed, tmp_path):
    with_it, without = (probed(steps=3, probe=probe, out=str(tmp_path / str(probe))) for probe in ({}, None))
    states = []
    for recipe in (with_it, without):
        states.append(torch.load(pretrain(recipe) / "checkpoints" / "last" / "state.pt", weights_only=True))
    assert all(torch.equal(tensor, states[1]["network"][name]) for name, tensor in states[0]["network"].items())
    read = [(recipe.out / "model" / "model.safetensors").read_bytes() for recipe in (with_it, without)]
    assert read[0] == read[1]
    assert not FIGURES & read_metrics(without.out).keys() and not (without.out / "probe").exists()
    assert read_config(without.out / "model").provenance.probe is None


def test_it_looks_before_the_first_step_at_every_nth_and_after_the_last(probed):
    out = pretrain(probed(steps=5, log_every=100, probe={"every": 2}))
    metrics = read_metrics(out)
    assert all(metrics[name][0] == [0, 2, 4, 5] and np.isfinite(metrics[name][1]).all() for name in FIGURES)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "The probe is a diagnostic: it chose nothing." in page and "4 slices of 2 labelled groups of the pool" in page
    assert "the mean over bright, dark." in page and "at step 0 and at step 5" in page
    with Image.open(out / "probe" / "first.png") as first:
        assert first.size == (24, 24)


def test_a_plan_counts_its_looks_and_finds_what_would_stop_it(probed, labelled, tmp_path):
    plan = make_plan(probed(steps=5, probe={"every": 2}))
    assert plan.looks == 4 and plan.cost.look > 0 and "4 looks of the probe" in page(plan)
    assert plan.seconds == pytest.approx(plan.read_seconds + 5 * plan.cost.step + 4 * plan.cost.look)
    assert not (tmp_path / "run").exists()
    (labelled / "masks" / "a0.png").unlink()
    with pytest.raises(InputError, match="a0"):
        make_plan(probed(steps=5, probe={"every": 2}))


def test_squares_that_stand_out_are_found_by_an_untrained_encoder(probed):
    out = pretrain(probed(steps=1, model={"channels": [8, 8], "units": 1}))
    assert read_metrics(out)["probe_dice"][1][0] > 0.7


@pytest.mark.parametrize("choose", ["last", "best"])
def test_a_resumed_run_is_the_uninterrupted_one(probed, tmp_path, sigterm_after, choose):
    whole, stopped = (probed(steps=4, probe={"choose": choose}, out=str(tmp_path / name)) for name in ("whole", "stopped"))
    pretrain(whole)
    sigterm_after(2)
    with pytest.raises(Stopped):
        pretrain(stopped)
    pretrain(stopped.model_copy(update={"resume": True}))
    lines = [(recipe.out / "metrics.jsonl").read_text(encoding="utf-8") for recipe in (stopped, whole)]
    assert lines[0] == lines[1]
    for name in ("config.json", "model.safetensors", "archive.parquet"):
        assert (stopped.out / "model" / name).read_bytes() == (whole.out / "model" / name).read_bytes()


def test_a_run_that_died_before_its_first_checkpoint_logs_step_0_once(probed):
    recipe = probed(steps=1)
    recipe.out.mkdir()
    (recipe.out / "config.json").write_text(recipe.model_dump_json(exclude={"resume"}), encoding="utf-8")
    (recipe.out / "metrics.jsonl").write_text('{"step": 0, "probe_dice": 9.0}\n', encoding="utf-8")
    assert read_metrics(pretrain(recipe.model_copy(update={"resume": True})))["probe_dice"][0] == [0, 1]


def test_the_best_of_the_probed_checkpoints_becomes_the_encoder(probed):
    recipe = probed(steps=3, seed=2, probe={"choose": "best"}, optimizer={"lr": 3.0}, warmup=0)
    out = pretrain(recipe)
    steps, dice = read_metrics(out)["probe_dice"]
    best = steps[1 + int(np.argmax(dice[1:]))]
    assert best < 3, "the last is not the best: otherwise this shows nothing"
    state = torch.load(out / "checkpoints" / "best" / "state.pt", weights_only=True)
    assert state["step"] == best
    encoder = ResidualEncoder.from_pretrained(out / "model").state_dict()
    assert all(torch.equal(tensor, state["network"][f"encoder.{name}"]) for name, tensor in encoder.items())
    assert f"The encoder is the checkpoint of step {best}: probe.choose=best." in (out / "report.html").read_text(
        encoding="utf-8"
    )


def test_its_labels_are_recorded_without_names(probed):
    out = pretrain(probed(steps=1))
    probe = read_config(out / "model").provenance.probe
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert record["probe"] == {"groups": 2, "group_hmacs": list(probe.groups)} and len(probe.groups) == 2
    assert "probe" in record["inputs"]
    for path in ("model/config.json", "run.json", "metrics.jsonl", "report.html"):
        assert "patient" not in (out / path).read_text(encoding="utf-8")


def test_scans_of_a_source_of_their_own_are_in_the_archives_record(probed, archive, labelled):
    out = pretrain(probed(steps=1, data={"source": str(archive)}, probe={"source": str(labelled)}))
    record = read_archive(out / "model")
    assert len(record) == 9 + 4
    assert set(read_config(out / "model").provenance.probe.groups) <= set(record.table.column("group").to_pylist())


def test_every_layer_gets_its_own_mode_back():
    encoder = ResidualEncoder(1, (4, 8), units=1)
    encoder.levels[0].eval()
    before = [module.training for module in encoder.modules()]
    random = torch.get_rng_state()
    with evaluating(encoder):
        assert not any(module.training for module in encoder.modules()) and not torch.is_grad_enabled()
        encoder(torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert [module.training for module in encoder.modules()] == before and torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.num_batches_tracked == 0 for module in encoder.modules() if isinstance(module, torch.nn.BatchNorm2d))
