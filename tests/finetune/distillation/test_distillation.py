"""Fine-tuning with a teacher: what it may be, what it must not have seen, what is recorded, and that a run can be resumed."""

import html
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from finetune.distillation.losses import soft_target_loss
from finetune.distillation.teacher import load_teacher
from finetune.label_curve.cells import count_labels, points_of
from finetune.label_curve.recipe import LabelCurveRecipe
from finetune.labelled import read_folds, read_labelled, resolve, sampler_of
from finetune.loop import finetune
from finetune.planning.checks import find_rate, overfit
from finetune.planning.command import before_training
from finetune.recipe import FinetuneRecipe
from finetune.step import _TRAINING, _batch, build, forward_backward, prepare
from finetune.training.patches import PatchSampler
from resunet.checkpoint import model_folder, read_config, read_weights
from resunet.config import DataSettings, FixedNormalisation, validate
from resunet.data.leakage import NO_GROUP_EVIDENCE, read_archive
from resunet.data.source import open_source
from resunet.errors import CheckFailed, EnvironmentFault, InputError, Stopped
from resunet.files import sha256
from resunet.losses import segmentation_loss
from resunet.members import make_ensemble
from resunet.model import load_model
from resunet.report import read_metrics

FEW = {"labelled": 2}
EVERYTHING = {
    "ema": 0.5,
    "accumulate": 2,
    "model": {"channels": [4, 4, 6, 8]},
    "loss": {"deep_supervision": True},
    "distillation": {"attention_weight": 2, "temperature": 3},
}


@pytest.fixture
def taught(recipe, runs):
    """Recipes of students of the first run."""
    return lambda **changes: recipe(**{"teacher": str(runs[0]), "data": FEW} | changes)


@pytest.fixture
def changed(runs, tmp_path):
    """A copy of the first run's model with other values in its config.json."""

    def copy(**values) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(runs[0] / "model", folder)
        config = read_config(folder).model_copy(update=values)
        (folder / "config.json").write_text(config.model_dump_json(), encoding="utf-8")
        return folder

    return copy


def groups_of(source: Path) -> dict[str, str]:
    """patient → HMAC."""
    settings = DataSettings(source=source, salt_file=source.parent / "salt")
    return {case.group_name: case.group_hmac for case in open_source(settings, masks=False).cases}


def test_a_student_and_its_records(taught, runs, source):
    ours = taught(steps=4, validate_every=2, seed=3)
    out = finetune(ours)
    digest = sha256(runs[0] / "model" / "model.safetensors")
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    config = read_config(out / "model")
    assert record["inputs"]["teacher/model.safetensors"] == digest == config.provenance.teacher_sha256
    assert "unlabelled" in record["inputs"] and config.provenance.parent_sha256 is None

    metrics = read_metrics(out)
    parts = np.sum([metrics[name][1] for name in ("focal", "dice", "distillation")], axis=0)
    assert metrics["loss"][1] == pytest.approx(parts) and min(metrics["distillation"][1]) > 0
    learned = np.add(metrics["soft_targets"][1], metrics["soft_dice"][1])
    assert metrics["distillation"][1] == pytest.approx(learned) and "attention" not in metrics

    hmacs = groups_of(source)
    pool = {hmacs[f"patient{i}"] for i in range(5)}
    assert set(read_archive(out / "model").table.column("group").to_pylist()) == pool  # labelled, unlabelled and the teacher's
    (labels,) = config.provenance.labels
    assert set(labels.groups) == pool | {hmacs[f"patient{i}"] for i in range(5, 8)}  # the teacher's, with its val

    state = torch.load(out / "checkpoints" / "last" / "state.pt", weights_only=True)
    assert state.keys() == {"network", "optimizer", "scaler", "step", "best", "val_dice", "seconds", "cpu_seconds"}
    assert state["network"].keys() == read_weights(out / "model" / "model.safetensors").keys()
    page = html.unescape((out / "report.html").read_text(encoding="utf-8"))
    assert (
        f"Distilled from a teacher, weights {digest[:12]}…: soft targets of weight 1 and soft Dice of weight 1, temperature 2."
        in page
    )
    assert "4 labelled groups; the teacher was trained on or chosen by 8, 4 of them beside these: 8 had to be labelled." in page
    assert "unlabelled scans of 3 groups are learned from, too" in page


def test_what_is_learned_is_the_teachers_answer_to_the_same_patches(taught):
    """The first step's terms, computed again by hand; the student is random, the batch is augmented."""
    ours = resolve(taught(batch=4, distillation={"temperature": 3, "unlabelled": 0, "logits_weight": 0.5, "dice_weight": 2}))
    accelerator = Accelerator(cpu=True)
    data = read_labelled(ours, quiet=True)
    sampler = PatchSampler(data.train, ours.patch, ours.foreground)
    model, _ = build(ours)
    seen = []
    handle = model.register_forward_hook(lambda module, given, made: seen.append((given[0].detach(), made.detach())))
    learner, teacher = prepare(ours, model, None, accelerator), load_teacher(ours, accelerator.device)
    before = {name: tensor.clone() for name, tensor in teacher.network.state_dict().items()}
    terms = forward_backward(ours, learner.wrapped, sampler, 0, accelerator, teacher)
    handle.remove()
    ((images, logits),) = seen
    with torch.no_grad():
        theirs = teacher.network(images)
    expected = float(soft_target_loss(logits, theirs, torch.ones(4, 16, 16), 3.0))
    assert terms["soft_targets"] == pytest.approx(expected, rel=1e-5)
    p, q = logits.sigmoid(), theirs.sigmoid()
    assert terms["soft_dice"] == pytest.approx(float((p - q).abs().sum() / (p + q).sum()), rel=1e-4)
    learned = 0.5 * expected + 2 * terms["soft_dice"]
    assert terms["loss"] == pytest.approx(terms["focal"] + terms["dice"] + learned, rel=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.network.state_dict().items())
    assert all(one.grad is None and not one.requires_grad for one in teacher.network.parameters())
    alone = forward_backward(ours.model_copy(update={"teacher": None}), learner.wrapped, sampler, 0, accelerator)
    assert {name: terms[name] for name in ("focal", "dice")} == pytest.approx({n: alone[n] for n in ("focal", "dice")})


def test_a_teacher_computes_in_its_own_precision(taught, monkeypatch):
    """The student in float32, its teacher in bf16."""
    ours = resolve(taught(distillation={"precision": "bf16", "unlabelled": 0}))
    accelerator = Accelerator(cpu=True)
    teacher = load_teacher(ours, accelerator.device)
    seen = []
    teacher.network.register_forward_hook(lambda module, given, made: seen.append(made.dtype))
    images, logits = torch.zeros(2, 1, 16, 16), torch.zeros(2, 1, 16, 16)
    terms = teacher.terms(images, logits, None, torch.ones(2, 16, 16), accelerator)
    assert seen == [torch.bfloat16] and terms["distillation"].dtype == torch.float32
    same = load_teacher(resolve(taught()), accelerator.device)
    assert same.precision == "fp32" and teacher.precision == "bf16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    without = ours.model_copy(update={"distillation": ours.distillation.model_copy(update={"precision": "fp16"})})
    with pytest.raises(EnvironmentFault, match=r"distillation\.precision=fp16: needs a GPU"):
        load_teacher(without, accelerator.device)


def test_a_student_of_itself_has_nothing_to_learn(taught, runs):
    """With the teacher's weights and in evaluation mode the divergence is 0: both see one patch, normalised alike."""
    ours = resolve(taught(distillation={"unlabelled": 0.75}, batch=4))
    accelerator = Accelerator(cpu=True)
    sampler, teacher = sampler_of(ours, read_labelled(ours, quiet=True)), load_teacher(ours, accelerator.device)
    assert len(sampler.places) == 3
    terms = forward_backward(ours, load_model(runs[0]), sampler, 0, accelerator, teacher)
    assert terms["distillation"] == pytest.approx(0, abs=1e-6)

    # the labels' terms are those of the one labelled patch
    images, labels, _ = _batch(ours, sampler, 0, accelerator, _TRAINING)
    (one,) = set(range(4)) - sampler.places
    with torch.no_grad():
        expected = segmentation_loss(teacher.network(images[one, None]), labels[one, None])
    assert {name: terms[name] for name in expected} == pytest.approx({n: float(term) for n, term in expected.items()}, rel=1e-5)


@pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["plain", "everything"])
def test_a_resumed_student_is_the_uninterrupted_one(taught, changes, sigterm_after):
    whole = finetune(taught(name="whole", steps=4, validate_every=2, **changes))
    stopped = taught(name="stopped", steps=4, validate_every=2, **changes)
    sigterm_after(3)
    with pytest.raises(Stopped, match="after step 3"):
        finetune(stopped)
    finetune(stopped.model_copy(update={"resume": True}))
    for name in (
        "metrics.jsonl",
        "model/config.json",
        "model/model.safetensors",
        "model/archive.parquet",
        "evaluation/cases.csv",
    ):
        assert (stopped.out / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_light_students_finest_logits_are_those_of_an_odd_patch(taught):
    """They are one longer, with deep supervision not yet cut."""
    light = {"name": "mobile_resunet", "backbone": "mobilenetv3_small_050", "channels": None, "units": 2}
    out = finetune(taught(steps=1, patch=[33, 37], model=light, loss={"deep_supervision": True}))
    assert read_metrics(out)["distillation"][1][0] > 0


def test_another_teacher_cannot_resume(taught, tmp_path, runs):
    shutil.copytree(runs[0], tmp_path / "teacher")
    ours = taught(teacher=str(tmp_path / "teacher"), steps=2, evaluate_test=False)
    finetune(ours)
    record = json.loads((ours.out / "run.json").read_text(encoding="utf-8"))
    (ours.out / "run.json").write_text(json.dumps(record | {"status": "running"}), encoding="utf-8")
    shutil.copy(runs[1] / "model" / "model.safetensors", tmp_path / "teacher" / "model")
    with pytest.raises(InputError, match=r"teacher/model\.safetensors"):
        finetune(ours.model_copy(update={"resume": True}))


def test_an_ensemble_teaches_attention_to_another_depth(taught, runs, tmp_path):
    ensemble = make_ensemble(runs, tmp_path / "ensemble")
    ours = taught(
        teacher=str(ensemble),
        steps=1,
        model={"channels": [2, 4, 8], "norm": "group"},
        distillation={"attention_weight": 3, "logits_weight": 2, "dice_weight": 0.5, "unlabelled": 0.5},
        evaluate_test=False,
    )
    out = finetune(ours)
    ((_, (value,)), (_, (soft,)), (_, (dice,)), (_, (attention,))) = (
        read_metrics(out)[name] for name in ("distillation", "soft_targets", "soft_dice", "attention")
    )
    assert value == pytest.approx(2 * soft + 0.5 * dice + 3 * attention) and attention > 0 and dice > 0
    (labels,) = read_config(out / "model").provenance.labels
    assert len(labels.groups) == 8 and len(read_config(ensemble).provenance.labels) == 1


def test_normalisation_is_the_teachers(taught, recipe, encoder, tmp_path):
    teacher = finetune(recipe(name="teacher", encoder=str(encoder), steps=1, evaluate_test=False))
    its = read_config(teacher / "model").normalisation
    assert isinstance(its, FixedNormalisation) and resolve(taught(teacher=str(teacher))).normalisation == its
    with pytest.raises(InputError, match=r"normalisation: .*there"):
        resolve(taught(teacher=str(teacher), normalisation={"kind": "percentile_zscore"}))


def test_all_that_differs_is_one_message(taught, changed):
    other = changed(classes={0: "background", 254: "lesion"}, input_channels="rgb")
    with pytest.raises(InputError) as caught:
        resolve(taught(teacher=str(other)))
    said = str(caught.value)
    assert "data.classes: {0: background, 254: lesion} there, {0: background, 255: lesion} here" in said
    assert "data.channels: rgb there, grey here" in said and said.count("there,") == 2


def test_regions_and_the_order_of_classes_differ(taught, changed):
    classes = {0: "background", 254: "core", 255: "lesion"}
    other = changed(classes=classes, regions={"whole": ("lesion", "core"), "core": ("core",)})
    ours = {"classes": {0: "background", 255: "lesion", 254: "core"}}
    with pytest.raises(InputError) as caught:
        resolve(taught(teacher=str(other), data=ours))
    assert "data.regions: {'whole': ('lesion', 'core'), 'core': ('core',)} there, None here" in str(caught.value)
    assert "data.classes: {0: background, 254: core, 255: lesion} there, {0: background, 255: lesion, 254: core} here" in str(
        caught.value
    )


def test_a_teacher_without_a_record(taught, changed, encoder):
    folder = changed()
    (folder / "archive.parquet").unlink()
    with pytest.raises(InputError, match=r"has no archive\.parquet, so that nobody could tell whether it has seen val or test"):
        resolve(taught(teacher=str(folder)))
    with pytest.raises(InputError, match=r"config\.json names no classes"):
        resolve(taught(teacher=str(encoder)))


def test_a_patch_that_the_teacher_cannot_see(taught, recipe):
    teacher = finetune(recipe(name="deep", steps=1, patch=[24, 24], model={"channels": [2] * 5, "norm": "instance"}))
    with pytest.raises(InputError, match=r"patch=\[16, 16\]: the coarsest level of the teacher, 1/16 of the size"):
        finetune(taught(teacher=str(teacher)))


@pytest.mark.parametrize("part, patient", [("val", 1), ("test", 2)])
def test_a_teacher_that_was_trained_on_val_or_test_is_a_leak(taught, source, part, patient):
    splits = json.loads((source / "splits.json").read_text(encoding="utf-8"))
    moved = [stem for stem in splits["pool"] if stem.startswith(f"c{patient:02}")]
    splits["pool"] = [stem for stem in splits["pool"] if stem not in moved]
    splits[part] += moved
    (source / "splits.json").write_text(json.dumps(splits), encoding="utf-8")
    with pytest.raises(CheckFailed, match=rf"1 {part} cases are among the teacher's archive:\n.*group.*sha256"):
        read_labelled(resolve(taught(data={})), quiet=True)
    allowed = read_labelled(resolve(taught(data={}, allow=["leak"])), quiet=True).allowed
    assert f"leak: 1 {part} cases are among the teacher's archive" in allowed


def test_the_teachers_val_may_not_be_test(taught, source):
    """Its val chose it. The student's val may be the same: it chooses, too."""
    splits = json.loads((source / "splits.json").read_text(encoding="utf-8"))
    splits["test"].append(splits["val"].pop())
    (source / "splits.json").write_text(json.dumps(splits), encoding="utf-8")
    with pytest.raises(CheckFailed, match="1 test cases are among the labelled scans of the teacher"):
        read_labelled(resolve(taught(data={})), quiet=True)


def test_in_no_fold_either(taught):
    with pytest.raises(CheckFailed, match="cases are among the teacher's archive"):
        read_folds(resolve(taught(data={"folds": 2})), quiet=True)


def test_a_teacher_that_does_not_know_its_labels(taught, changed, runs):
    config = read_config(runs[0] / "model")
    unknown = changed(provenance=config.provenance.model_copy(update={"labels": ()}))
    notes = " ".join(read_labelled(resolve(taught(teacher=str(unknown))), quiet=True).notes())
    assert "On how many labelled groups the teacher was trained is not known" in notes


def test_a_teacher_of_another_salt(taught, tmp_path):
    """Its groups compare with none here: its labels all count, and images alone tell what it has seen."""
    (tmp_path / "other").write_text("ef" * 32, encoding="utf-8")
    data = read_labelled(resolve(taught(data=FEW | {"salt_file": str(tmp_path / "other")})), quiet=True)
    assert "8 of them beside these: 12 had to be labelled" in " ".join(data.notes())
    assert NO_GROUP_EVIDENCE in data.allowed and len(data.labels()) == 2
    groups = data.archive.table.column("group").to_pylist()  # of the unlabelled; the teacher's would compare wrongly
    assert len(set(groups) - {""}) == 3 and groups.count("") == 6


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"distillation": {"temperature": 3}}, "there is nobody to learn from; name a teacher"),
        ({"teacher": "runs/a", "batch": 4, "distillation": {"unlabelled": 0.1}}, "of a batch of 4 that is no patch; raise it"),
        ({"teacher": "runs/a", "batch": 1}, "unlabelled=0.5: of a batch of 1 that is no patch"),
        (
            {"teacher": "runs/a", "distillation": {"temperature": 3, "logits_weight": 0}},
            "temperature=3: is of the logits",
        ),
        ({"teacher": "x", "distillation": {"logits_weight": 0, "dice_weight": 0}}, "all weights are 0"),
        ({"teacher": "x", "distillation": {"unlabelled": 1}}, "distillation.unlabelled=1"),
    ],
)
def test_recipes_that_are_refused(recipe, changes, message):
    with pytest.raises(InputError, match=message):
        recipe(**changes)


def test_the_plan_counts_what_a_teacher_takes(taught, tmp_path):
    ours = taught(steps=20, batch=4)
    plan = before_training(ours, "plan", tmp_path / "planned.yaml")
    assert "unlabelled scans of 3 groups are learned from, too" in " ".join(plan.split())
    assert "teacher:" in (tmp_path / "planned.yaml").read_text(encoding="utf-8") and not ours.out.exists()


def test_rates_are_tried_with_the_teacher_and_a_batch_is_learned_by_heart_without(taught):
    ours = resolve(taught(distillation={"attention_weight": 1}))
    accelerator = Accelerator(cpu=True)
    data, teacher = read_labelled(ours, quiet=True), load_teacher(ours, accelerator.device)
    sampler, alone = sampler_of(ours, data), ours.model_copy(update={"teacher": None})

    def first_loss(recipe: FinetuneRecipe, teacher) -> float:
        return find_rate(recipe, build(ours)[0], sampler, accelerator, False, 3, quiet=True, teacher=teacher).losses[0]

    assert first_loss(ours, teacher) > first_loss(alone, None) + 1e-3
    losses = {overfit(one, build(one)[0], data.train, accelerator, False, 1, quiet=True).first_loss for one in (ours, alone)}
    assert len(losses) == 1


def test_a_label_curves_arm(taught, runs, tmp_path):
    shared = json.loads(taught().model_dump_json(exclude_unset=True))
    for key in ("out", "steps", "teacher"):
        shared.pop(key)
    shared["data"].pop("labelled")
    values = {
        "out": str(tmp_path / "curve"),
        "finetune": shared,
        "arms": {"scratch": {}, "distilled": {"teacher": str(runs[0]), "distillation": {"temperature": 4}}},
        "budgets": [1, "all"],
        "draws": 1,
        "steps": [1],
    }
    curve = validate(LabelCurveRecipe, values, "recipe")
    one, everything = count_labels(curve, points_of(curve))
    assert one.labels_of("scratch") == 2 and one.labels_of("distilled") == 8  # the teacher's 5 + 3 hold them
    assert everything.labels_of("distilled") == 8 == everything.labels
    cell = curve.cell("distilled", 1, 0, 1, tmp_path / "cell")
    assert cell.teacher == runs[0] and cell.distillation.temperature == 4


def work(path: Path) -> None:
    """What each of two ranks does."""
    finetune(FinetuneRecipe.model_validate_json(path.read_text(encoding="utf-8")))


def test_two_ranks_are_one(taught, tmp_path):
    same = dict(
        steps=3,
        batch=4,
        validate_every=3,
        evaluate_test=False,
        model={"channels": [4, 8], "norm": "group"},
        distillation={"attention_weight": 1},
    )
    two = taught(name="two", processes=2, **same)
    (tmp_path / "two.json").write_text(two.model_dump_json(), encoding="utf-8")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, str(tmp_path / "two.json")]
    done = subprocess.run([sys.executable, *command], capture_output=True, encoding="utf-8", timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    ours, expected = read_metrics(two.out), read_metrics(finetune(taught(name="one", **same)))
    assert ours.keys() == expected.keys() >= {"soft_targets", "attention"}
    for name in expected:
        assert ours[name][1] == pytest.approx(expected[name][1], rel=2e-4), name
    weights = [read_weights(model_folder(tmp_path / name) / "model.safetensors") for name in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=1e-4)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
