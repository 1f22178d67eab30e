"""A whole compression, tiny: its steps, its gate, its continuation after a kill, and what takes its result."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch

from finetune.compression import int8
from finetune.compression.command import compress, tell_changed
from finetune.compression.gate import judge
from finetune.compression.importance import taylor_importance
from finetune.compression.prune import prunable
from finetune.compression.recipe import CompressRecipe
from finetune.compression.sensitivity import Sensitivity
from finetune.compression.subject import read_subject
from finetune.loop import finetune
from finetune.quantisation.sensitivity import RoundingSensitivity
from finetune.quantisation.settings import QuantiseSettings
from finetune.step import forward_backward
from finetune.training.patches import PatchSampler
from resunet.cli import main
from resunet.config import DataSettings, load_recipe, validate
from resunet.data.leakage import ARCHIVE, evidence_of_groups, merge_archives, read_archive, write_archive
from resunet.data.source import open_source
from resunet.ensemble import Ensemble
from resunet.errors import CheckFailed, EnvironmentFault, InputError
from resunet.model import load_model
from tests.finetune.conftest import make_recipe, write_labelled

PRUNE = {"parameters": 0.6, "macs": 0.7, "bites": 1, "round_to": 2, "steps": 4, "sensitivity": [0.5], "sensitivity_cases": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose Dice on val is not 0."""
    root = tmp_path_factory.mktemp("compress")
    made = make_recipe(
        write_labelled(root / "labelled"), root / "run", steps=30, validate_every=15, loss={"deep_supervision": False}
    )
    return finetune(made)


def settings(run: Path, out: Path, prune: dict | None = None, **changes: object) -> CompressRecipe:
    values = dict(run=run, out=out, prune=PRUNE | (prune or {}), wandb={"mode": "disabled"}) | changes
    return validate(CompressRecipe, values, "recipe")


@pytest.fixture(scope="module")
def compressed(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By a gate that lets all pass. Not to be changed: copy what a test changes."""
    out = tmp_path_factory.mktemp("compressed") / "small"
    return compress(settings(run, out, gate={"dice": 0.99, "recall": 0.99}))


def test_the_result_is_a_smaller_model_that_everything_takes(run: Path, compressed: Path, tmp_path: Path):
    record = json.loads((compressed / "compress.json").read_text())
    before, after = load_model(run), load_model(compressed)
    count = [sum(one.numel() for one in model.parameters()) for model in (before, after)]
    step = record["steps"][-1]
    assert record["accepted"] == step["name"] == "01" and step["parameters"] == count[1] <= 0.6 * count[0]
    assert record["start"]["parameters"] == count[0] and step["macs"] <= 0.7 * record["start"]["macs"]
    assert after.config.architecture.widths and after.config.provenance.parent_sha256 is not None
    assert (compressed / "steps" / "01" / "run.json").is_file()  # an ordinary fine-tuning run
    labelled = json.loads((run / "config.json").read_text())["data"]["source"]
    image = next((Path(labelled) / "images").iterdir())
    assert main(["predict", str(compressed), str(image), "--out", str(tmp_path / "masks")]) == 0
    evaluated = json.loads((compressed / "evaluation" / "summary.json").read_text())
    assert evaluated["dice"]["mean"] == pytest.approx(record["test"]["networks"]["after"]["dice"]["mean"])
    theirs = json.loads((run / "evaluation" / "summary.json").read_text())
    assert record["test"]["networks"]["before"]["dice"]["mean"] == pytest.approx(theirs["dice"]["mean"])


def test_the_page_says_it(compressed: Path, look_at):
    seen = look_at(compressed / "report.html")
    assert {"Steps", "Test, read once", "Which layers hurt", "What went", "Size and speed"} <= set(seen.headings)
    assert "of the parameters" in seen.text and len(seen.pictures) == 3


def test_sensitivity_is_of_one_group_alone(run: Path, compressed: Path):
    made = Sensitivity.model_validate_json((compressed / "sensitivity.json").read_text())
    subject = read_subject(settings(run, compressed))
    whole = prunable(load_model(run))
    assert [layer.layer for layer in made.layers] == [group.name for group in whole.groups]
    cases = [case for case in subject.data.val if case.labels.any()]
    chosen = [cases[0], cases[len(cases) // 2]]
    assert made.dice == pytest.approx(subject.dice(whole.network, chosen))
    scores = subject.importance(whole, subject.settings.prune)
    removed = [[] for _ in whole.groups]
    removed[2] = sorted(scores[2].argsort(stable=True)[: whole.groups[2].channels // 2].tolist())
    assert made.layers[2].dice == {"0.5": pytest.approx(subject.dice(whole.without(removed), chosen))}


def test_what_is_finished_stays_and_the_rest_is_the_same(run: Path, compressed: Path, tmp_path: Path):
    out = tmp_path / "again"
    shutil.copytree(compressed, out)
    same = json.loads((out / "compress.json").read_text())
    trained = (out / "steps" / "01" / "run.json").read_text()
    for name in ("compress.json", "report.html", "val/01.json"):
        (out / name).unlink()
    shutil.rmtree(out / "model")
    made = settings(run, out, gate={"dice": 0.99, "recall": 0.99}, resume=True)
    compress(made)
    again = json.loads((out / "compress.json").read_text())
    assert {key: again[key] for key in same if key != "cost"} == {key: same[key] for key in same if key != "cost"}
    assert (out / "steps" / "01" / "run.json").read_text() == trained
    failed = json.loads((out / "run.json").read_text()) | {"status": "failed"}  # after compress.json was written
    (out / "run.json").write_text(json.dumps(failed))
    assert compress(made) == out  # nothing is left to do
    assert json.loads((out / "run.json").read_text())["status"] == "done"
    with pytest.raises(InputError, match="was started with another recipe:\n  seed: 0 then, 1 now"):
        compress(made.model_copy(update={"seed": 1}))
    with pytest.raises(InputError, match="exists already"):
        compress(made.model_copy(update={"resume": False}))
    record = json.loads((out / "run.json").read_text())
    assert (record["stage"], record["status"]) == ("compress", "done") and {"versions", "machine", "git_commit"} <= set(record)
    (out / "run.json").write_text(json.dumps(record | {"inputs": {"run/model.safetensors": "0" * 64}}))
    with pytest.raises(InputError, match="was started with other weights than"):
        compress(made)
    (out / "compress.json").unlink()
    (out / "run.json").write_text(json.dumps(record | {"inputs": record["inputs"] | {"val": "0" * 64}}))
    with pytest.raises(InputError, match=r"cannot be resumed, its inputs have changed since it was started: val\. Restore"):
        compress(made)


def test_labels_that_changed_since_the_run_are_told(run: Path, compressed: Path, tmp_path: Path, capsys):
    inputs = json.loads((compressed / "run.json").read_text())["inputs"]
    assert {"train", "val"} < set(inputs)
    tell_changed(run, inputs)
    assert capsys.readouterr().err == ""
    (tmp_path / "run.json").write_text(json.dumps({"inputs": inputs | {"val": "0" * 64}}))
    tell_changed(tmp_path, inputs)
    assert "images or masks of val are not those that it was trained with" in capsys.readouterr().err
    (tmp_path / "run.json").write_text("{}")
    tell_changed(tmp_path, inputs)
    assert capsys.readouterr().err == "", "of an older run nobody knows"


@pytest.mark.parametrize("allowed", [False, True])
def test_test_is_not_read_of_patients_that_the_runs_encoder_has_seen(
    run: Path, compressed: Path, tmp_path: Path, allowed: bool
):
    """Of a run that did not read test itself nobody has looked; what its network began with is known to its model alone."""
    out = Path(shutil.copytree(compressed, tmp_path / "again"))
    for name in ("compress.json", "test.json"):
        (out / name).unlink()
    shutil.rmtree(out / "evaluation")
    began = Path(shutil.copytree(run, tmp_path / "run"))
    recipe = json.loads((began / "config.json").read_text())
    test = open_source(DataSettings(source=recipe["data"]["source"], salt_file=recipe["data"]["salt_file"]), masks=True)
    group = test.part("test")[0].group_hmac
    own = read_archive(began / "model")
    write_archive(began / "model" / ARCHIVE, merge_archives(evidence_of_groups([group], own.salt_fingerprint), own))
    (began / "config.json").write_text(json.dumps(recipe | ({"allow": ["leak"]} if allowed else {})))
    config = json.loads((out / "config.json").read_text()) | {"run": str(began)}
    (out / "config.json").write_text(json.dumps(config))
    made = settings(began, out, gate={"dice": 0.99, "recall": 0.99}, resume=True)
    if not allowed:
        with pytest.raises(CheckFailed, match="1 test cases are among the model's training data"):
            compress(made)
        assert not (out / "evaluation").exists()
        return
    summary = json.loads((compress(made) / "evaluation" / "summary.json").read_text())
    assert any("1 test cases are among the model's training data" in note for note in summary["notes"])


def test_what_costs_too_much_is_taken_back_by_half_a_bite(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "refused"
    # a rate so high that every step ruins the network
    prune = {"retries": 1, "steps": 2, "lr": 3.0, "teacher": False, "sensitivity": [0.5]}
    made = settings(run, out, prune)
    with pytest.raises(CheckFailed, match="no step passed the gate"):
        compress(made)
    record = json.loads((out / "compress.json").read_text())
    assert [(step["goal"], step["accepted"]) for step in record["steps"]] == [(1.0, False), (0.5, False)]
    assert record["accepted"] is None and record["test"] is None and not (out / "model").exists()
    assert record["steps"][0]["parameters"] < record["steps"][1]["parameters"]
    assert not (out / "evaluation").exists()
    assert "refused: Dice on val falls" in capsys.readouterr().err
    with pytest.raises(CheckFailed):  # asked again, it says so again
        compress(made.model_copy(update={"resume": True}))


def test_taylor_importance_is_the_change_of_the_loss_to_first_order(run: Path, tmp_path: Path):
    subject = read_subject(settings(run, tmp_path / "x"))
    whole = prunable(load_model(run))
    sampler = PatchSampler(subject.data.train, subject.recipe.patch, subject.recipe.foreground)
    made = taylor_importance(subject.recipe, whole.network, whole.groups, sampler, 2, subject.accelerator)
    # naively, layer by layer and channel by channel
    which = 1
    group, found = whole.groups[which], []
    for batch in range(2):
        live = load_model(run)
        forward_backward(subject.recipe, live, sampler, batch, subject.accelerator)
        for channel in range(group.channels):
            terms = []
            for use in group.uses:
                layer, place = live.get_submodule(use.layer), use.places[channel]
                dim = int((use.side == "in") != isinstance(layer, torch.nn.ConvTranspose2d)) if layer.weight.ndim > 1 else 0
                terms.append((layer.weight * layer.weight.grad).select(dim, place).sum().abs())
            found.append(torch.stack(terms).mean())
    naive = torch.stack(found).view(2, -1).mean(dim=0).detach()
    torch.testing.assert_close(made[which], naive / naive.mean(), rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in whole.network.parameters())


def test_runs_that_cannot_be_compressed(run: Path, tmp_path: Path):
    several = tmp_path / "several"
    shutil.copytree(run, several, ignore=shutil.ignore_patterns("model", "checkpoints"))
    Ensemble([load_model(run), load_model(run)]).save_pretrained(several / "model")
    with pytest.raises(InputError, match="is no finished fine-tuning run"):
        compress(settings(run / "model", tmp_path / "a"))
    with pytest.raises(InputError, match="is an ensemble"):
        compress(settings(several, tmp_path / "b"))
    pretrained = shutil.copytree(run, tmp_path / "pretrained")
    record = json.loads((pretrained / "run.json").read_text())
    (pretrained / "run.json").write_text(json.dumps(record | {"stage": "pretrain"}))
    with pytest.raises(InputError, match="is no finished fine-tuning run"):
        compress(settings(pretrained, tmp_path / "d"))
    with pytest.raises(InputError, match="target is not met"):
        compress(settings(run, tmp_path / "c", {"parameters": 0.01, "macs": None, "least": 0.5}))


@pytest.mark.parametrize("name, prunes, quantises", [("prune_int8", True, True), ("prune", True, False), ("int8", False, True)])
def test_the_shipped_recipes_do_what_they_are_called(name, prunes, quantises):
    made = load_recipe(CompressRecipe, "compress", name, ["run=a", "out=b"])
    assert (made.prune is not None, made.quantise is not None) == (prunes, quantises)


def test_what_int8_needs_is_asked_for_before_anything_is_pruned(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torchao" else found(name, *rest))
    with pytest.raises(EnvironmentFault, match=r"torchao is not installed: pip install 'resunet\[export\]'"):
        compress(settings(run, tmp_path / "out", quantise={"method": "ptq"}))
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"keep_float: conv9: no such layer\. They are: encoder"):
        compress(settings(run, tmp_path / "out", quantise={"method": "ptq", "keep_float": ["conv9"]}))
    assert not (tmp_path / "out").exists()


def test_what_was_tried_is_not_tried_again(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    worst = {2: ["a", "b"], 4: ["a", "b", "c"], 8: ["a", "b", "c"]}
    monkeypatch.setattr(int8, "_hurt", lambda *_: SimpleNamespace(worst=lambda count: worst[count]))
    asked = QuantiseSettings(method="qat", keep_float=("a", "b"), retries=3)
    assert [(one.method, one.keep_float) for one in int8._ways(None, asked, run)] == [("qat", ("a", "b")), ("ptq", ("a", "b"))]
    asked = QuantiseSettings(method="ptq", retries=3)
    assert [one.keep_float for one in int8._ways(None, asked, run)] == [(), ("a", "b"), ("a", "b", "c")]


def test_by_default_it_goes_beside_the_run(run: Path, capsys: pytest.CaptureFixture[str]):
    (run.parent / "run-compressed").mkdir()
    assert main(["compress", str(run)]) == 2
    assert f"out={run.parent / 'run-compressed'}: exists already" in capsys.readouterr().err
    (own := run.parent / "own.yaml").write_text(f"out: {run.parent}\nquantise: {{method: ptq}}\n", encoding="utf-8")
    assert main(["compress", str(run), "--recipe", str(own)]) == 2
    assert f"out={run.parent}: exists already" in capsys.readouterr().err
    assert main(["compress", str(run), "out=nowhere", "--out", str(run)]) == 2
    assert f"out={run}: exists already" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{"prune": {"parameters": None, "macs": None}}, {"prune": None}])
def test_something_has_to_be_asked(changes, run: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"there is no target|nothing to do"):
        validate(CompressRecipe, dict(run=run, out=tmp_path / "o") | changes, "recipe")


def test_what_is_left_is_quantised_under_the_same_gate(run: Path, tmp_path: Path):
    out = tmp_path / "int8"
    loose = {"dice": 0.99, "recall": 0.99}
    quantise = {"method": "ptq", "calibration": 4}
    made = settings(run, out, prune=None, gate=loose, quantise=quantise)
    compress(made.model_copy(update={"prune": None}))
    record = json.loads((out / "compress.json").read_text())
    assert record["steps"] == [] and record["accepted"] is None and record["quantised"]["accepted"]
    assert record["quantised"]["bytes"] == sum(file.stat().st_size for file in (out / "quantised").rglob("*.onnx"))
    assert (out / "model" / "model.safetensors").read_bytes() == (run / "model" / "model.safetensors").read_bytes()
    assert set(record["test"]["networks"]) == {"before", "after", "int8"}
    before, int8 = (record["test"]["networks"][name]["dice"]["mean"] for name in ("before", "int8"))
    assert int8 == pytest.approx(before, abs=0.1)


def test_a_refusal_of_int8_says_which_layers_hurt_and_spares_them(run: Path, tmp_path: Path, monkeypatch, look_at):
    verdicts = []

    def judge_strictly(*args):
        verdicts.append(judge(*args))
        return verdicts[-1].model_copy(update={"reasons": ("too much",) if len(verdicts) == 1 else ()})

    monkeypatch.setattr("finetune.compression.int8.judge", judge_strictly)
    monkeypatch.setattr(RoundingSensitivity, "worst", lambda self, count: [one.layer for one in self.layers[:count]])
    out = tmp_path / "int8"
    made = settings(run, out, gate={"dice": 0.99}, quantise={"method": "ptq", "calibration": 4, "sensitivity_cases": 2})
    compress(made.model_copy(update={"prune": None}))
    record = json.loads((out / "compress.json").read_text())
    first, second = record["quantised_steps"]
    assert (first["name"], first["accepted"], second["name"], second["accepted"]) == ("int8", False, "int8-2", True)
    assert record["quantised"] == second and first["hurt"] and not second["hurt"] and first["keep_float"] == []
    layers = [one["layer"] for one in record["rounding"]["layers"]]
    assert second["keep_float"] == layers[:2] == ["encoder.levels.0.0.conv1", "encoder.levels.0.0.conv2"]
    rounded = [sum(node.op_type == "DequantizeLinear" for node in onnx.load(folder / "model.onnx").graph.node)
               for folder in (out / "steps" / "int8", out / "quantised")]  # fmt: skip
    assert rounded[1] <= rounded[0] - 2, "their weights, at least, are floats"
    assert json.loads((out / "quantised" / "quantised.json").read_text())["keep_float"] == layers[:2]
    page = look_at(out / "report.html")
    assert (
        "Which layers INT8 hurts" in page.text and "2 layers in float32" in page.text and "Step int8 was refused" in page.text
    )


def test_int8_whose_training_fails_falls_back_to_calibration(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "int8"
    broken = {"method": "qat", "steps": 4, "lr": 1e30, "calibration": 2}
    made = settings(run, out, gate={"dice": 0.99, "recall": 0.99}, quantise=broken).model_copy(update={"prune": None})
    compress(made)
    first, second = json.loads((out / "compress.json").read_text())["quantised_steps"]
    assert not first["accepted"] and "not finite" in first["reasons"][0] and first["dice"]["mean"] is None
    assert (second["method"], second["accepted"]) == ("ptq", True) and (out / "quantised" / "model.onnx").is_file()
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "failed" in page and "nan" not in page

    (out / "compress.json").unlink()  # as killed before its end: what failed is not trained again
    asked = []
    monkeypatch.setattr("finetune.quantisation.quantise.quantise", lambda *given: asked.append(given))
    compress(made.model_copy(update={"resume": True, "run": run.parent / "." / run.name}))
    again = json.loads((out / "compress.json").read_text())["quantised_steps"]
    assert again == [first, second] and not asked


def test_a_bite_whose_training_fails_is_refused(run: Path, tmp_path: Path):
    """And with it all is not lost: here nothing was accepted before, which the report says."""
    out = tmp_path / "small"
    with pytest.raises(CheckFailed, match=r"no step passed the gate on val(.|\n)*step 01: .*finite"):
        compress(settings(run, out, prune={"lr": 1e30, "retries": 0, "sensitivity": [], "sensitivity_cases": 64}))
    (step,) = json.loads((out / "compress.json").read_text())["steps"]
    assert not step["accepted"] and step["dice"]["mean"] is None
    assert "Nothing was accepted" in (out / "report.html").read_text(encoding="utf-8")


def test_a_batch_of_one_learns_from_its_teacher_without_unlabelled_scans(run: Path, tmp_path: Path):
    subject = read_subject(settings(run, tmp_path / "out"))
    prune = subject.settings.prune
    assert prune is not None and subject.training(prune, run, tmp_path / "a", 4, 1).distillation.unlabelled == 0.5
    single = replace(subject, recipe=subject.recipe.model_copy(update={"batch": 1}))
    assert single.training(prune, run, tmp_path / "a", 4, 1).distillation.unlabelled == 0


@pytest.mark.parametrize("changes", [{"batches": 3}, {"sensitivity": [], "sensitivity_cases": 3}])
def test_settings_that_would_do_nothing_are_refused(changes, run: Path, tmp_path: Path):
    with pytest.raises(InputError, match="leave it out"):
        settings(run, tmp_path / "out", prune={"sensitivity_cases": 64} | changes)


def test_wandb_has_a_run_of_its_kind(run: Path, compressed: Path, tmp_path: Path, offline, read_mirror):
    out = tmp_path / "mirrored"
    shutil.copytree(compressed, out)
    (out / "compress.json").unlink()
    compress(settings(run, out, gate={"dice": 0.99, "recall": 0.99}, resume=True, wandb=offline))
    record, mirrored = json.loads((out / "compress.json").read_text()), read_mirror(out)
    assert mirrored.run().job_type == "compress"
    assert mirrored.summary()["parameters_share"] == pytest.approx(record["steps"][-1]["parameters_share"])
    assert [line["val_dice"] for line in mirrored.history()] == [step["dice"]["mean"] for step in record["steps"]]
    assert next(one.type for one in mirrored.artifacts()) == "segmenter"
    assert str(run.parent).encode() not in mirrored.content and b"small" not in json.dumps(mirrored.config()).encode()
