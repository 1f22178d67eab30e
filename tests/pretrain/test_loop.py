import json
import shutil
import signal

import numpy as np
import pytest
import tifffile
import torch
from accelerate import Accelerator
from PIL import Image

from pretrain.loop import pretrain
from pretrain.network import build_network, build_optimizer
from pretrain.objective import contrast, nt_xent
from pretrain.planning.plan import make_plan
from resunet.checkpoint import read_config
from resunet.data.leakage import read_archive
from resunet.encoder import ResidualEncoder
from resunet.errors import CheckFailed, EnvironmentFault, InputError, Stopped
from resunet.fingerprint import feature_error
from resunet.report import read_metrics


def metrics_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def record_of(folder) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def test_a_run_writes_its_directory(recipe):
    ours = recipe(steps=3)
    out = pretrain(ours)
    assert out == ours.out
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "run.json",
        "metrics.jsonl",
        "gradients.json",
        "checkpoints",
        "model",
        "report.html",
    }
    gradients = json.loads((out / "gradients.json").read_text(encoding="utf-8"))["records"]
    assert [one["step"] for one in gradients] == [1, 2, 3]
    assert all(any(unit.startswith("encoder.") for unit in one["units"]) and one["total"] > 0 for one in gradients)
    assert {path.name for path in (out / "model").iterdir()} >= {"config.json", "model.safetensors", "archive.parquet"}
    assert type(ours).model_validate_json((out / "config.json").read_text(encoding="utf-8")) == ours
    record = record_of(out)
    assert (record["status"], record["stage"], record["step"]) == ("done", "pretrain", 3)
    lines = metrics_of(out)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(np.isfinite(list(line.values())).all() for line in lines)

    config = read_config(out / "model")
    assert config.provenance.data_sha256 == record["inputs"]["data"] and config.provenance.recipe_sha256 == ours.sha256()
    assert config.allowed == [] and config.normalisation == ours.normalisation
    assert len(read_archive(out / "model")) == 9
    encoder = ResidualEncoder.from_pretrained(out / "model")
    assert feature_error(encoder, config.feature_check) < 1e-12
    state = torch.load(out / "checkpoints" / "last" / "state.pt", weights_only=True)
    assert all(torch.equal(tensor, state["network"][f"encoder.{name}"]) for name, tensor in encoder.state_dict().items())
    # one forward pass a step, with both views in it
    assert state["network"]["encoder.levels.0.0.norm1.num_batches_tracked"] == 3


def test_a_resumed_run_is_the_uninterrupted_one(recipe, tmp_path, sigterm_after):
    whole, stopped = recipe(steps=4, out=str(tmp_path / "whole")), recipe(steps=4, out=str(tmp_path / "stopped"))
    pretrain(whole)
    sigterm_after(2)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="after step 2; continue with resume=true"):
        pretrain(stopped)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert (record_of(stopped.out)["status"], record_of(stopped.out)["step"]) == ("stopped", 2)
    assert not (stopped.out / "model").exists() and len(metrics_of(stopped.out)) == 2
    with (stopped.out / "metrics.jsonl").open("a") as file:  # as if it had died after a step it never saved
        file.write('{"step": 3, "loss": 1e9}\n')

    pretrain(stopped.model_copy(update={"resume": True}))
    assert record_of(stopped.out)["status"] == "done"
    assert metrics_of(stopped.out) == metrics_of(whole.out)
    for name in ("config.json", "model.safetensors", "archive.parquet"):
        assert (stopped.out / "model" / name).read_bytes() == (whole.out / "model" / name).read_bytes()


def test_an_existing_run_is_refused_and_so_is_another_recipe(recipe):
    ours = recipe(steps=1)
    pretrain(ours)
    with pytest.raises(InputError, match=r"exists already.*resume=true"):
        pretrain(ours)
    with pytest.raises(InputError, match=r"another recipe:\n  temperature: 0\.2 then, 0\.3 now"):
        pretrain(recipe(steps=1, temperature=0.3, resume=True))


def test_the_seed_decides(recipe, tmp_path):
    weights = []
    for i, seed in enumerate((1, 1, 2)):
        out = pretrain(recipe(steps=2, seed=seed, out=str(tmp_path / str(i))))
        weights.append((out / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_a_memory_bank_is_resumed_exactly(recipe, tmp_path, sigterm_after):
    ours = {"steps": 4, "objective": {"memory_bank": 8}}
    whole, stopped = (recipe(**ours, out=str(tmp_path / name)) for name in ("whole", "stopped"))
    pretrain(whole)
    sigterm_after(2)
    with pytest.raises(Stopped):
        pretrain(stopped)
    pretrain(stopped.model_copy(update={"resume": True}))
    assert metrics_of(stopped.out) == metrics_of(whole.out)
    states = [
        torch.load(out / "checkpoints" / "last" / "state.pt", weights_only=True)["loss"] for out in (stopped.out, whole.out)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in ("memory_bank.bank", "memory_bank.bank_ptr"))


def test_a_large_memory_bank_is_warned_of(recipe, capsys):
    pretrain(recipe(steps=1, objective={"memory_bank": 4}))
    assert "memory_bank" not in capsys.readouterr().err
    pretrain(recipe(steps=1, objective={"memory_bank": 8}, out=str(recipe().out) + "2"))
    assert "objective.memory_bank=8: more than half of the 9 slices" in capsys.readouterr().err


REPORTED = {
    "decoupled": ({"objective": {"loss": "decoupled"}}, "ln(2N − 2) = 1.792."),
    "bank": ({"objective": {"memory_bank": 8}}, "ln(memory bank + 1) = 2.197."),
    "groups": ({"objective": {"same_group": "ignore"}}, "ln(number of views that it is contrasted with) = 1.946."),
    "plain": ({}, "ln(2N − 1) = 1.946."),
    "lars": ({"optimizer": {"name": "lars", "lr": 0.1, "lr_scaling": "sqrt_batch"}}, "NT-Xent"),
    "chunks": ({"cache_chunk": 3, "model": {"norm": "group"}, "head": {"batch_norm": False}}, "ln(2N − 1) = 1.946."),
}


@pytest.mark.parametrize("changes, text", REPORTED.values(), ids=REPORTED.keys())
def test_every_objective_trains_and_reports_its_chance_level(recipe, changes, text):
    out = pretrain(recipe(steps=2, warmup=0, **changes))
    assert text in (out / "report.html").read_text(encoding="utf-8")
    if "optimizer" in changes:
        assert read_metrics(out)["learning_rate"][1][0] == pytest.approx(0.2)


def test_groups_are_of_the_patient_and_same_on_every_rank(recipe, archive):
    from accelerate import Accelerator

    from pretrain.archive import read_archive as read_sources

    stems = sorted(path.stem for path in archive.glob("*.png"))
    rows = "".join(f"{stem},{'late' if i > 5 else 'early'}\n" for i, stem in enumerate(stems))
    (archive / "groups.csv").write_text("stem,group\n" + rows)
    groups = read_sources(recipe(), Accelerator()).groups
    assert len(set(groups[:6])) == len(set(groups[6:])) == 1 and groups[0] != groups[6]


def test_one_group_leaves_nothing_to_tell_apart(recipe, archive):
    (archive / "groups.csv").write_text("stem,group\n" + "".join(f"{path.stem},one\n" for path in archive.glob("*.png")))
    with pytest.raises(InputError, match=r"same_group=ignore: all scans of the archive are of one group.*groups\.csv"):
        pretrain(recipe(objective={"same_group": "ignore"}))
    assert not recipe().out.exists()


def test_groups_that_nobody_knows_are_told_at_once(recipe, archive, capsys):
    told = "no two scans of this archive are known to be of one patient or item"
    pretrain(recipe(objective={"same_group": "ignore"}))
    assert told in capsys.readouterr().err
    stems = [path.stem for path in sorted(archive.glob("*.png"))]
    (archive / "groups.csv").write_text("stem,group\n" + "".join(f"{stem},{i // 2}\n" for i, stem in enumerate(stems)))
    make_plan(recipe(objective={"same_group": "ignore"}))
    assert told not in capsys.readouterr().err


def test_accumulation_logs_the_mean_over_its_sets(recipe, tmp_path):
    # a learning rate so small that the network stands still: the two sets of a step are the sets of two steps
    still = {"steps": 2, "warmup": 0, "optimizer": {"lr": 1e-30, "weight_decay": 0}}
    one = metrics_of(pretrain(recipe(**still, out=str(tmp_path / "one"))))
    two = metrics_of(pretrain(recipe(**still, accumulate=2, out=str(tmp_path / "two"))))
    assert one[0]["loss"] != pytest.approx(one[1]["loss"], rel=1e-3)
    for name in ("loss", "projection_std", "embedding_std"):
        assert two[0][name] == pytest.approx((one[0][name] + one[1][name]) / 2, rel=1e-5)


def test_lars_adapts_the_rate_of_each_tensor(recipe):
    """One step against You et al. 2017 (arXiv 1708.03888, equation 6): trust times ‖w‖ over ‖g‖ + decay times ‖w‖."""
    ours = recipe(optimizer={"name": "lars", "lr": 0.3, "weight_decay": 0.01})
    network = build_network(ours, Accelerator(cpu=True))
    optimizer = build_optimizer(ours, network)
    weights = [network.encoder.levels[0][0].conv1.weight, network.head.layers[0].weight]
    scale = network.encoder.levels[0][0].norm1.weight  # does not decay, and has the rate itself
    torch.manual_seed(1)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = [one.detach().clone() for one in (scale, *weights)]
    optimizer.step()
    torch.testing.assert_close(scale.detach(), before[0] - 0.3 * scale.grad)
    for parameter, old in zip(weights, before[1:], strict=True):
        trust = 0.001 * old.norm() / (parameter.grad.norm() + 0.01 * old.norm())
        torch.testing.assert_close(parameter.detach(), old - 0.3 * trust * (parameter.grad + 0.01 * old))
    assert (
        read_metrics(pretrain(recipe(steps=2, warmup=0, optimizer={"name": "lars", "lr": 0.3})))["learning_rate"][1][0] == 0.3
    )


def test_the_loss_that_is_logged_is_the_objective(recipe):
    """Of the first step, from the same views through a network of the same seed."""
    from accelerate import Accelerator

    from pretrain.archive import read_archive as read_sources
    from pretrain.loader import ContrastiveSets
    from pretrain.network import PretrainingNetwork
    from pretrain.step import views_of_set
    from pretrain.views import stack_scans
    from resunet.data.cases import load_cases
    from resunet.data.order import batch_order
    from resunet.data.source import open_source

    ours = recipe(steps=1)
    logged = metrics_of(pretrain(ours))[0]["loss"]
    torch.manual_seed(ours.seed)
    network = PretrainingNetwork(ResidualEncoder(1, (4, 8), units=1), ours.head)
    cases = load_cases(open_source(ours.data, masks=False).cases, "grey", ours.normalisation)
    chosen = batch_order(9, 4, ours.seed, 0)
    scans, sizes = stack_scans([cases[i].image_slice(0) for i in chosen])
    read = ContrastiveSets(read_sources(ours, Accelerator()).scans, ours, 0).read(0)
    views = views_of_set(ours, read._replace(windows=scans, sizes=sizes), 0, Accelerator())
    assert views.shape == (8, 1, 12, 12)
    assert contrast(*network(views)[:2], nt_xent(ours.temperature))["loss"].item() == pytest.approx(logged, rel=1e-5)


def test_a_held_out_image_in_the_archive_stops_the_run(recipe, archive, tmp_path):
    held_out = tmp_path / "elsewhere"
    held_out.mkdir()
    shutil.copy(archive / "scan03.png", held_out / "renamed.png")
    Image.fromarray(np.eye(9, dtype=np.uint8)).save(held_out / "other.png")
    with pytest.raises(CheckFailed, match=r"(?s)1 held-out cases are among the pretraining archive.*renamed\.png") as error:
        pretrain(recipe(data={"held_out": str(held_out)}))
    assert "sha256 of the file" in str(error.value) and "other.png" not in str(error.value)
    assert not (tmp_path / "run").exists() and error.value.exit_code == 1

    out = pretrain(recipe(data={"held_out": str(held_out)}, steps=1, allow=["leak"]))
    (allowed,) = read_config(out / "model").allowed
    assert "leak: 1 held-out" in allowed and allowed in (out / "report.html").read_text(encoding="utf-8")


def test_a_reencoded_copy_is_found_by_its_pixels(recipe, archive, tmp_path):
    held_out = tmp_path / "elsewhere"
    held_out.mkdir()
    tifffile.imwrite(held_out / "renamed.tif", np.asarray(Image.open(archive / "scan03.png")))
    with pytest.raises(CheckFailed, match=r"renamed\.tif \(sha256 of the pixels; perceptual, correlation 1\.000\)"):
        pretrain(recipe(data={"held_out": str(held_out)}))


def test_only_the_pool_is_pretrained_on(recipe, archive):
    stems = [f"scan{i:02}" for i in range(9)]
    (archive / "splits.json").write_text(json.dumps({"pool": stems[:5], "val": stems[5:7], "test": stems[7:]}))
    out = pretrain(recipe(steps=1))
    assert len(read_archive(out / "model")) == 5


@pytest.mark.parametrize("stratify", [False, True])
def test_what_fine_tuning_will_hold_out_is_left_out(recipe, tmp_path, stratify):
    """Of a labelled source without a split, which both make by `assign_parts`."""
    from accelerate import Accelerator

    from pretrain.archive import read_archive
    from resunet.data.source import assign_parts, open_source

    root, rng = tmp_path / "labelled", np.random.default_rng(0)
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for i in range(20):
        Image.fromarray(rng.integers(0, 99, (12, 12), dtype=np.uint8)).save(root / "images" / f"{i:02}.png")
        Image.fromarray(np.full((12, 12), 255 * (i < 7), np.uint8)).save(root / "masks" / f"{i:02}.png")
    ours = recipe(data={"source": str(root), "names": "keep", "stratify": stratify})
    archive = read_archive(ours, Accelerator(cpu=True))
    labelled = open_source(ours.data, masks=True)
    parts = {way: assign_parts(labelled, 0, way).stems() for way in (False, True)}
    assert parts[False] != parts[True]
    assert [case.id for case in archive.scans.cases] == parts[stratify]["pool"]


def test_a_pool_image_that_is_also_a_test_image_stops_the_run(recipe, archive):
    shutil.copy(archive / "scan00.png", archive / "scan99.png")
    stems = [f"scan{i:02}" for i in range(9)]
    (archive / "splits.json").write_text(json.dumps({"pool": stems, "val": [], "test": ["scan99"]}))
    with pytest.raises(CheckFailed, match=r"scan99\.png"):
        pretrain(recipe())


def test_constant_slices_are_left_out(recipe, archive, tmp_path):
    for i in range(4):
        Image.fromarray(np.full((20, 20), i, np.uint8)).save(archive / f"air{i}.png")
    with pytest.raises(InputError, match=r"batch=10: the archive has only 9 slices"):
        pretrain(recipe(batch=10))
    out = pretrain(recipe(batch=9, steps=1))
    assert "9 slices of 13 scans" in (out / "report.html").read_text(encoding="utf-8")


def test_volumes_give_their_slices(recipe, archive):
    for path in archive.glob("*.png"):
        path.unlink()
    stack = np.random.default_rng(0).integers(0, 99, (6, 14, 16), dtype=np.uint16)
    stack[2] = 5
    tifffile.imwrite(archive / "stack.tif", stack, metadata={"axes": "ZYX"})
    with pytest.raises(InputError, match=r"batch=6: the archive has only 5 slices"):
        pretrain(recipe(batch=6))
    assert "5 slices of 1 scans" in (pretrain(recipe(batch=5, steps=1)) / "report.html").read_text(encoding="utf-8")


def test_nan_in_an_image_is_the_users_fault(recipe, archive, tmp_path):
    values = np.ones((20, 20), np.float32)
    values[3, 3] = np.nan
    tifffile.imwrite(archive / "broken.tif", values)
    with pytest.raises(InputError, match=r"broken\.tif: 1 of 400 values are NaN"):
        pretrain(recipe())
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_fp16_needs_a_gpu(recipe, tmp_path):
    with pytest.raises(EnvironmentFault, match=r"precision=fp16: needs a GPU"):
        pretrain(recipe(precision="fp16"))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(recipe):
    with pytest.raises(CheckFailed, match=r"the loss is not finite.*Start anew with a lower"):
        pretrain(recipe(steps=3, warmup=0, optimizer={"lr": 1e36}))
    assert record_of(recipe().out)["status"] == "failed"


def test_scans_whose_contrast_is_clipped_away_are_left_out(recipe, archive):
    for i, path in enumerate(archive.glob("*.png")):
        pixels = np.zeros((30, 30), np.uint8)
        pixels[i, i] = 200
        Image.fromarray(pixels).save(path)
    with pytest.raises(InputError, match="the archive has only 0 slices with any contrast"):
        pretrain(recipe(steps=1))


def test_more_processes_than_ranks_are_refused(recipe):
    with pytest.raises(InputError, match=r"processes=2: the recipe wants 2 ranks, 1 started"):
        pretrain(recipe(processes=2))


def test_many_channels_are_read_as_they_are(recipe, archive):
    for path in archive.glob("*.png"):
        path.unlink()
    rng = np.random.default_rng(0)
    for i in range(4):
        tifffile.imwrite(
            archive / f"scan{i}.tif",
            rng.random((16, 16, 5)).astype(np.float32),
            photometric="minisblack",
            planarconfig="contig",
        )
    out = pretrain(recipe(steps=1, data={"channels": 5}))
    assert read_config(out / "model").architecture.in_channels == 5
    assert read_config(out / "model").input_channels == 5


def test_the_report_in_a_browser(recipe, look_at):
    seen = look_at(pretrain(recipe()) / "report.html")
    assert {"Loss", "Collapse", "What the network saw"} <= set(seen.headings)
    assert len(seen.pictures) > 3
