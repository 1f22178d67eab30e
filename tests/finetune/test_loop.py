import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.evaluation.evaluate import EvaluateRequest, evaluate
from finetune.labelled import resolve
from finetune.loop import finetune
from finetune.recipe import FinetuneRecipe
from finetune.step import make_optimizer, start_step
from resunet.checkpoint import read_config, read_weights
from resunet.data.evidence import COLUMNS
from resunet.data.identity import load_salt
from resunet.data.leakage import read_archive
from resunet.data.perceptual import HASH_BYTES
from resunet.errors import CheckFailed, InputError, Stopped
from resunet.model import ResUNet, UNet, load_model
from resunet.report import read_metrics
from resunet.runs import check_out
from resunet.transfer import Receipt


def record_of(folder) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def weights_of(folder) -> dict[str, torch.Tensor]:
    return read_weights(folder / "model" / "model.safetensors")


def state_of(folder, name: str) -> dict:
    return torch.load(folder / "checkpoints" / name / "state.pt", weights_only=True)


def test_a_run_writes_its_directory(runs):
    out = runs[0]
    names = {"config.json", "run.json", "metrics.jsonl", "checkpoints", "model", "evaluation", "report.html", "gradients.json"}
    assert {path.name for path in out.iterdir()} == names  # from scratch: no receipt
    recipe = FinetuneRecipe.model_validate_json((out / "config.json").read_text(encoding="utf-8"))
    record = record_of(out)
    assert (record["status"], record["stage"], record["step"]) == ("done", "finetune", 8)
    config = read_config(out / "model")
    assert (config.classes, config.normalisation) == (recipe.data.classes, recipe.normalisation)
    assert {"train", "val", "test"} <= record["inputs"].keys() and len(set(record["inputs"].values())) == len(record["inputs"])
    assert config.provenance.data_sha256 and config.provenance.recipe_sha256 == recipe.sha256()
    assert config.provenance.parent_sha256 is None and config.spacing == (1, 1)
    assert len(read_archive(out / "model")) == 6  # the training cases, not val and test
    metrics = read_metrics(out)
    assert metrics["loss"][0] == list(range(1, 9)) and metrics["val_dice"][0] == list(range(1, 9))
    assert metrics["loss"][1] == pytest.approx(np.add(metrics["focal"][1], metrics["dice"][1]))
    assert {"gradient_norm", "elastic_rms", "learning_rate"} <= metrics.keys()
    load_model(out)


def test_the_last_step_is_kept_where_that_is_asked_for(recipe, runs, monkeypatch):
    """With what val says of it, whatever val said before; and resumed with nothing left to train, too."""
    scores = iter((0.9, 0.1))
    monkeypatch.setattr("finetune.loop.validate", lambda *args: next(scores))
    out = finetune(recipe(name="last", steps=4, validate_every=2, checkpoint="last"))
    assert state_of(out, "best")["step"] == 2
    record = record_of(out)
    assert (record["best_step"], record["best_val_dice"]) == (4, 0.1)
    weights, network = weights_of(out), state_of(out, "last")["network"]
    assert all((weights[name] == network[name]).all() for name in weights)
    (out / "run.json").write_text(json.dumps(record | {"status": "running"}))
    shutil.rmtree(out / "model")
    again = record_of(finetune(recipe(name="last", steps=4, validate_every=2, checkpoint="last", resume=True)))
    assert (again["best_step"], again["best_val_dice"]) == (4, 0.1)


def test_the_best_step_on_val_is_kept(runs):
    out = runs[0]
    steps, scores = read_metrics(out)["val_dice"]
    assert len(set(scores)) > 2 and np.argmax(scores) != len(scores) - 1  # else this test says nothing
    best = max(step for step, score in zip(steps, scores, strict=True) if score == max(scores))
    record = record_of(out)
    assert (record["best_step"], record["best_val_dice"]) == (best, max(scores))
    assert state_of(out, "best")["step"] == best and state_of(out, "last")["step"] == 8
    weights, network = weights_of(out), state_of(out, "best")["network"]
    assert all(torch.equal(tensor, network[name]) for name, tensor in weights.items())
    assert any(not torch.equal(tensor, state_of(out, "last")["network"][name]) for name, tensor in weights.items())


def test_the_val_score_is_that_of_evaluation(runs, tmp_path):
    recipe = FinetuneRecipe.model_validate_json((runs[0] / "config.json").read_text(encoding="utf-8"))
    request = EvaluateRequest.model_validate(
        recipe.data.model_dump(include={"source", "salt_file", "names"}) | {"split": "val"}
    )
    out = evaluate(runs[0], request, tmp_path / "val")
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["dice"]["mean"] == pytest.approx(record_of(runs[0])["best_val_dice"], abs=1e-9)


EVERYTHING = {
    "ema": 0.5,
    "model": {"channels": [4, 4, 6, 8], "statistics": "precise", "statistics_batches": 2},
    "loss": {"deep_supervision": True, "component_weight": 1},
}


@pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["plain", "everything"])
def test_a_resumed_run_is_the_uninterrupted_one(recipe, tmp_path, sigterm_after, changes):
    whole = finetune(recipe(name="whole", steps=4, validate_every=2, **changes))
    stopped = recipe(name="stopped", steps=4, validate_every=2, **changes)
    sigterm_after(3)
    with pytest.raises(Stopped, match="after step 3"):
        finetune(stopped)
    assert record_of(stopped.out)["status"] == "stopped" and not (stopped.out / "model").exists()
    finetune(stopped.model_copy(update={"resume": True}))
    assert (stopped.out / "metrics.jsonl").read_text(encoding="utf-8") == (whole / "metrics.jsonl").read_text(encoding="utf-8")
    for name in ("model/config.json", "model/model.safetensors", "evaluation/summary.json", "evaluation/cases.csv"):
        assert (stopped.out / name).read_bytes() == (whole / name).read_bytes()
    for name in ("status", "step", "best_step", "best_val_dice", "inputs"):
        assert record_of(stopped.out)[name] == record_of(whole)[name]


def test_a_run_begun_before_a_key_was_there_goes_on(recipe):
    """Its config.json lacks what a later version added: that is the default."""
    made = resolve(recipe(steps=2))
    out = finetune(made)
    text = (out / "config.json").read_text(encoding="utf-8")
    earlier = {key: value for key, value in json.loads(text).items() if key not in ("distillation", "start")}
    (out / "config.json").write_text(json.dumps(earlier), encoding="utf-8")
    check_out(made.model_copy(update={"resume": True}))
    (out / "config.json").write_text(json.dumps(earlier | {"steps": 3}), encoding="utf-8")
    with pytest.raises(InputError, match=r"another recipe:\n  steps: 3 then, 2 now\n"):
        check_out(made.model_copy(update={"resume": True}))
    (out / "config.json").write_text(json.dumps(earlier | {"dropped": 3}), encoding="utf-8")
    with pytest.raises(InputError, match="dropped: 3 then"):
        check_out(made.model_copy(update={"resume": True}))


def test_the_average_is_what_is_validated_and_saved(recipe):
    """The live run and the averaged one take the same steps: averaging looks on."""
    live = finetune(recipe(name="live", steps=6, validate_every=3))
    out = finetune(recipe(name="average", steps=6, validate_every=3, ema=0.9))
    assert read_metrics(out)["loss"] == read_metrics(live)["loss"]
    assert read_metrics(out)["val_dice"] != read_metrics(live)["val_dice"]
    last, of_live = state_of(out, "last"), state_of(live, "last")
    assert all(torch.equal(tensor, of_live["network"][name]) for name, tensor in last["network"].items())
    assert int(last["average"]["n_averaged"]) == 6
    average = state_of(out, "best")["average"]
    assert all(torch.equal(tensor, average[f"module.{name}"]) for name, tensor in weights_of(out).items())
    summary = json.loads((out / "evaluation" / "summary.json").read_text(encoding="utf-8"))
    request = EvaluateRequest(source=recipe().data.source, salt_file=recipe().data.salt_file, names="keep")
    again = evaluate(out, request, out.parent / "again")
    assert json.loads((again / "summary.json").read_text(encoding="utf-8"))["dice"] == summary["dice"]


def test_heads_of_deep_supervision_stay_in_the_checkpoints(recipe):
    for name in ("resunet", "unet"):
        model = {"name": name, "channels": [4, 4, 8, 8]} | ({"units": 2} if name == "unet" else {})
        out = finetune(recipe(name=name, steps=2, model=model, loss={"deep_supervision": True}))
        state = state_of(out, "last")
        assert len(state["heads"]) == 2 and state["network"].keys() == weights_of(out).keys()  # a weight and a bias
        assert state["heads"]["0.bias"].abs().max() > 0  # which started at 0
        assert type(load_model(out)) is {"resunet": ResUNet, "unet": UNet}[name]
        metrics = read_metrics(out)
        assert metrics["loss"][1] != pytest.approx(np.add(metrics["focal"][1], metrics["dice"][1]), rel=1e-3)


def test_precise_statistics_are_those_that_are_validated_and_saved(recipe):
    """Training is the same as without: in training mode nothing reads them."""
    plain = finetune(recipe(name="plain", steps=4, validate_every=2))
    out = finetune(recipe(name="precise", steps=4, validate_every=2, model={"statistics": "precise", "statistics_batches": 3}))
    assert read_metrics(out)["loss"] == read_metrics(plain)["loss"]
    of_plain, state = state_of(plain, "last")["network"], state_of(out, "last")["network"]
    for name, tensor in state.items():
        assert torch.equal(tensor, of_plain[name]) == ("running" not in name)
    best = state_of(out, "best")["network"]
    assert all(torch.equal(tensor, best[name]) for name, tensor in weights_of(out).items())


def test_the_sawtooth_stands_in_the_record(recipe, encoder):
    settings = {"decoder_first": 0.5, "sawtooth": True, "lr": 0.01}
    out = finetune(recipe(encoder=str(encoder), steps=8, validate_every=8, optimizer=settings))
    rates = read_metrics(out)["learning_rate"][1]
    assert rates[1] == max(rates) == 0.01 == rates[4] and rates[3] < 0.006  # up and down, and up again


def test_a_transfer_writes_its_receipt(recipe, encoder):
    out = finetune(recipe(encoder=str(encoder), steps=1))
    receipt = Receipt.model_validate_json((out / "receipt.json").read_text(encoding="utf-8"))
    assert receipt.encoder_share_loaded == 1 and receipt.allowed == []
    states = {tensor.name.split(".")[0]: tensor.state for tensor in receipt.tensors}
    assert states == {"encoder": "loaded", "decoder": "fresh", "head": "fresh"}
    inputs, config = record_of(out)["inputs"], read_config(out / "model")
    assert {name: inputs[f"encoder/{name}"] for name in receipt.encoder_sha256} == receipt.encoder_sha256
    assert set(receipt.encoder_sha256) == {"config.json", "model.safetensors", "archive.parquet"}
    assert config.provenance.parent_sha256 == receipt.encoder_sha256["model.safetensors"]
    assert config.architecture.norm == "instance" and config.normalisation == read_config(encoder).normalisation
    written = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert (written["model"]["norm"], written["normalisation"]["mean"]) == ("instance", 60)  # what ran
    # what the segmenter has seen is what its encoder saw and what it was trained on
    files = set(read_archive(out / "model").table.column("file_sha256").to_pylist())
    assert "file" in files and len(files) == 7
    assert any("group evidence unavailable" in one for one in config.allowed)


def test_an_encoder_of_another_shape_is_refused(recipe, encoder):
    with pytest.raises(InputError, match=r"channels: encoder \[4, 8\], network \[4, 6\]"):
        finetune(recipe(encoder=str(encoder), model={"channels": [4, 6]}))
    with pytest.raises(InputError, match=r"norm: encoder instance, network batch"):
        finetune(recipe(encoder=str(encoder), model={"norm": "batch"}))


def test_the_encoder_stands_still_while_the_decoder_goes_first(recipe, encoder, sigterm_after):
    ours = recipe(encoder=str(encoder), steps=4, optimizer={"decoder_first": 0.5, "weight_decay": 0.1})
    given = read_weights(encoder / "model.safetensors")
    sigterm_after(2)
    with pytest.raises(Stopped):
        finetune(ours)
    network = state_of(ours.out, "last")["network"]
    assert all(torch.equal(tensor, network[f"encoder.{name}"]) for name, tensor in given.items())
    assert network["head.bias"].abs().max() > 0  # which started at 0
    finetune(ours.model_copy(update={"resume": True}))
    network = state_of(ours.out, "last")["network"]
    assert not any(torch.equal(tensor, network[f"encoder.{name}"]) for name, tensor in given.items() if tensor.ndim == 4)


def test_the_encoder_has_its_own_learning_rate(recipe, encoder):
    ours = recipe(steps=10, optimizer={"lr": 0.5, "encoder_lr_factor": 0.1, "decoder_first": 0.25})
    model = ResUNet(1, 2, (4, 8), units=1)
    optimizer = make_optimizer(ours, model)
    for transferred, factors in ((True, [0, 0, 0, 0.1, 0.1]), (False, [1, 1, 1, 1, 1])):
        for step, factor in enumerate(factors):
            lr = start_step(ours, model, optimizer, step, transferred)
            assert model.training and model.encoder.training == (factor != 0)
            rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
            assert rates == {"encoder": pytest.approx(factor * lr), "decoder": lr, "head": lr}


def test_several_classes_and_ignored_values(recipe, source):
    for path in (source / "masks").iterdir():
        mask = np.asarray(Image.open(path)).copy()
        mask[:, 12:][mask[:, 12:] == 255] = 128
        mask[0] = 7
        Image.fromarray(mask).save(path)
    classes = {0: "background", 128: "right", 255: "left"}
    with pytest.raises(InputError, match=r"holds the values? 7, which data\.classes does not list"):
        finetune(recipe(data={"classes": classes}))
    out = finetune(recipe(data={"classes": classes, "ignore": [7]}, steps=2))
    assert load_model(out).head.out_channels == 3 and read_config(out / "model").ignore == (7,)
    summary = json.loads((out / "evaluation" / "summary.json").read_text(encoding="utf-8"))
    assert list(summary["classes"]) == ["right", "left"]


def test_the_unet_is_trained_too(recipe, source):
    values = recipe(steps=1).model_dump(mode="json") | {"model": {"name": "unet", "channels": [4, 8]}}
    out = finetune(FinetuneRecipe.model_validate(values))
    assert type(load_model(out)) is UNet


def test_without_test_cases_nothing_is_evaluated(recipe, source):
    splits = json.loads((source / "splits.json").read_text(encoding="utf-8"))
    (source / "splits.json").write_text(json.dumps(splits | {"test": []}))
    out = finetune(recipe(steps=1))
    assert not (out / "evaluation").exists() and (out / "model").is_dir()
    assert "Not evaluated: there are no test cases" in (out / "report.html").read_text(encoding="utf-8")


def test_accumulation_is_the_mean_over_its_batches(recipe):
    still = {"steps": 2, "validate_every": 2, "optimizer": {"lr": 1e-30, "weight_decay": 0}}
    # batch statistics apart, a network that stands still sees in one step of two batches what it sees in two of one
    one = read_metrics(finetune(recipe(name="one", **still)))["loss"][1]
    two = read_metrics(finetune(recipe(name="two", accumulate=2, **still)))["loss"][1]
    assert two[0] == pytest.approx(np.mean(one), rel=1e-5) and one[0] != pytest.approx(one[1], rel=1e-4)


def test_a_leak_stops_the_run_before_it_begins(recipe, source):
    for folder in ("images", "masks"):
        shutil.copy(source / folder / "c01a.png", source / folder / "c09a.png")
    with pytest.raises(CheckFailed, match=r"(?s)1 test cases are among the labelled training cases.*c09a\.png"):
        finetune(recipe())
    assert not recipe().out.exists()
    out = finetune(recipe(allow=["leak"], steps=1))
    (allowed,) = read_config(out / "model").allowed
    assert allowed in (out / "report.html").read_text(encoding="utf-8")
    assert (
        f"Allowed by the recipe: {allowed}."
        in json.loads((out / "evaluation" / "summary.json").read_text(encoding="utf-8"))["notes"]
    )


def test_the_model_remembers_an_archive_of_its_own_salt(recipe, encoder, archive_of, source):
    row = ("group", "file", "pixels", b"\xff" * HASH_BYTES)
    archive_of([row], load_salt(source.parent / "salt").fingerprint)
    out = finetune(recipe(encoder=str(encoder), steps=1))
    assert dict(zip(COLUMNS, row, strict=True)) in read_archive(out / "model").table.to_pylist()
    assert read_config(out / "model").allowed == []


def test_masks_of_another_size_are_the_users_fault(recipe, source):
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(source / "masks" / "c03a.png")
    with pytest.raises(InputError, match=r"c03a\.png: the mask is 5×5, its image 24×24"):
        finetune(recipe())


def test_training_images_without_contrast_are_the_users_fault(recipe, source):
    for i, path in enumerate(sorted((source / "images").glob("c0[0-4]*.png"))):
        Image.fromarray(np.full((24, 24), i, np.uint8)).save(path)
    with pytest.raises(InputError, match="no slice with any contrast"):
        finetune(recipe())
