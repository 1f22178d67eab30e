import csv
import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

from finetune.cross_validation.folds import train
from finetune.cross_validation.out_of_fold import OF_SINGLE_NETWORKS, OPTIMISTIC, SPLIT
from finetune.evaluation.evaluate import EvaluateRequest, case_scores, evaluate, measure_cases
from finetune.evaluation.targets import targets_of
from finetune.inference.window import Inference, footprint
from finetune.labelled import read_folds, read_labelled, resolve
from finetune.recipe import FinetuneRecipe
from resunet.checkpoint import read_config
from resunet.data.leakage import read_archive
from resunet.data.perceptual import HASH_BYTES
from resunet.ensemble import Ensemble
from resunet.errors import CheckFailed, InputError, Stopped
from resunet.model import ResUNet, load_model
from resunet.report import read_metrics

CPU = torch.device("cpu")
FILES = (
    *("model/config.json", "model/model.safetensors", "model/archive.parquet", "metrics.jsonl"),
    *(f"{folder}/{name}" for folder in ("evaluation", "cross_validation") for name in ("summary.json", "cases.csv")),
)


@pytest.fixture
def folds(recipe):
    """A recipe of the cross-validation that `folded` is, of this test's own source; keyword arguments as `recipe`'s."""

    def make(name: str = "run", fold: int | None = None, **changes) -> FinetuneRecipe:
        data = {"folds": 3, "fold": fold} | changes.pop("data", {})
        return recipe(name=name, data=data, **({"steps": 4} | changes))

    return make


def json_of(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def recipe_of(run: Path) -> FinetuneRecipe:
    return FinetuneRecipe.model_validate(json_of(run / "config.json"))


def same_results(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in FILES)


def test_it_writes_a_run_of_runs(folded):
    names = {"config.json", "run.json", "metrics.jsonl", "model", "evaluation", "cross_validation", "report.html"}
    folders = {f"fold-{fold}" for fold in range(3)}
    assert {path.name for path in folded.iterdir()} == names | folders
    record = json_of(folded / "run.json")
    assert (record["status"], record["stage"], record["step"]) == ("done", "finetune", 4)
    for fold in range(3):
        one = recipe_of(folded / f"fold-{fold}")
        assert (one.data.fold, one.data.folds, one.evaluate_test) == (fold, 3, False)
        own = json_of(folded / f"fold-{fold}" / "run.json")
        assert own["status"] == "done" and not (folded / f"fold-{fold}" / "evaluation").exists()
        assert (record["best_step"][fold], record["best_val_dice"][fold]) == (own["best_step"], own["best_val_dice"])
    assert recipe_of(folded).data.fold is None and recipe_of(folded).evaluate_test
    steps, losses = read_metrics(folded)["loss"]
    assert steps == [1, 2, 3, 4]
    assert losses == pytest.approx(np.mean([read_metrics(folded / f"fold-{f}")["loss"][1] for f in range(3)], axis=0))


def test_the_folds_divide_pool_and_val_by_group(folded):
    recipe = recipe_of(folded)
    data = read_folds(recipe, quiet=True)
    names = {case.case.id for case in data.cases}
    assert len(data.cases) == 9 and len(data.test) == 6 and not names & {case.case.id for case in data.test}
    vals = [{case.case.id for case in data.val(fold)} for fold in range(3)]
    assert set.union(*vals) == names and sum(map(len, vals)) == len(names)
    groups = [{case.case.group for case in data.val(fold)} for fold in range(3)]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 8
    for fold in range(3):
        one = read_labelled(recipe_of(folded / f"fold-{fold}"), quiet=True)
        assert {case.case.id for case in one.val} == vals[fold] and one.test == []
        assert {case.case.id for case in one.train} == names - vals[fold] == {case.case.id for case in data.train(fold)}


def test_out_of_fold_each_case_is_predicted_by_the_network_that_was_not_trained_on_it(folded):
    recipe = recipe_of(folded)
    data = read_folds(recipe, quiet=True)
    expected = {}
    for fold in range(3):
        model = load_model(folded / f"fold-{fold}")
        seen = set(read_archive(folded / f"fold-{fold}" / "model").table.column("file_sha256").to_pylist())
        assert not seen & {case.file_sha256 for case in data.val(fold)}
        for one in measure_cases(model, data.val(fold), targets_of({0: "background", 255: "lesion"}), CPU, "fp32"):
            expected[one.case.case.id] = one.measures.macro("dice")
    rows = rows_of(folded / "cross_validation" / "cases.csv")
    assert {row["id"]: float(row["dice"]) for row in rows} == expected
    assert [row["id"] for row in rows] == [case.case.id for case in data.cases]
    summary, test = (json_of(folded / name / "summary.json") for name in ("cross_validation", "evaluation"))
    assert summary.keys() == test.keys() and (summary["split"], summary["cases"], summary["groups"]) == (SPLIT, 9, 8)
    assert OPTIMISTIC in summary["notes"] and OPTIMISTIC not in test["notes"]
    by_group: dict[str, list[float]] = {}
    for row in rows:
        by_group.setdefault(row["group"], []).append(float(row["dice"]))
    assert summary["dice"]["mean"] == pytest.approx(np.mean([np.mean(values) for values in by_group.values()]))
    assert summary["dice"]["n"] == 8 and summary["dice"]["ci95"] is not None


def test_the_model_is_the_ensemble_and_test_is_its(folded, tmp_path):
    ensemble = load_model(folded)
    assert isinstance(ensemble, Ensemble)
    x = torch.randn(1, 1, 24, 24)
    with torch.no_grad():
        expected = torch.stack([load_model(folded / f"fold-{f}")(x).sigmoid() for f in range(3)]).mean(0)
        torch.testing.assert_close(ensemble(x).sigmoid(), expected)
    recipe = recipe_of(folded)
    request = EvaluateRequest.model_validate(recipe.data.model_dump(include={"source", "salt_file", "names"}))
    again = json_of(evaluate(folded, request, tmp_path / "again") / "summary.json")
    assert again["dice"] == json_of(folded / "evaluation" / "summary.json")["dice"]
    config = read_config(folded / "model")
    assert config.classes == recipe.data.classes and config.provenance.recipe_sha256 == recipe.sha256()
    data = read_folds(recipe, quiet=True)
    seen = read_archive(folded / "model").table.column("file_sha256").to_pylist()
    assert set(seen) == {case.file_sha256 for case in data.cases}
    with pytest.raises(CheckFailed, match="3 val cases are among the model's training data"):
        evaluate(folded, request.model_copy(update={"split": "val"}), tmp_path / "val")


def test_an_ensemble_needs_the_memory_of_one_member():
    torch.manual_seed(0)
    members = [ResUNet(channels=(4, 6, 8), num_classes=3).eval() for _ in range(5)]
    assert footprint(Ensemble(members), 1, CPU) == footprint(members[0], 1, CPU)


def test_the_report_puts_the_folds_beside_each_other(folded):
    page = (folded / "report.html").read_text(encoding="utf-8")
    summary, test = (json_of(folded / name / "summary.json") for name in ("cross_validation", "evaluation"))
    assert f"Ensemble of 3: test Dice {test['dice']['mean']:.3f} [" in page
    assert f"Out of fold: Dice {summary['dice']['mean']:.3f} [" in page and OPTIMISTIC in page
    for fold in range(3):
        dice = json_of(folded / f"fold-{fold}" / "run.json")["best_val_dice"]
        assert re.search(rf"<td[^>]*>{fold}</td>(\s*<td[^>]*>[^<]*</td>){{3}}\s*<td[^>]*>{dice:.3f} ", page)
    headings = re.findall("<h2>([^<]*)", page)
    for heading in ("Test, the ensemble: On the test cases", "Out of fold, each network: On the out-of-fold cases", "Folds"):
        assert headings.count(heading) == 1
    assert len(headings) == len(set(headings)) and not re.search(r"""(src|href)=["'](?!data:|#)|<script""", page)


def test_stopped_and_resumed_is_the_uninterrupted_one(folded, tmp_path):
    stopped = recipe_of(folded).model_copy(update={"out": tmp_path / "stopped"})
    count = []

    def hook(optimizer, args, kwargs):
        count.append(None)
        if len(count) == 4 + 3:  # the third step of the second fold
            signal.raise_signal(signal.SIGTERM)

    handle = register_optimizer_step_post_hook(hook)
    try:
        with pytest.raises(Stopped, match="after step 3"):
            train(stopped)
        assert [path.name for path in sorted(stopped.out.iterdir())] == ["fold-0", "fold-1"]
        written = (stopped.out / "fold-0" / "run.json").read_bytes()
        with pytest.raises(InputError, match=r"stopped: exists already.*resume=true"):
            train(stopped)
        train(stopped.model_copy(update={"resume": True}))
    finally:
        handle.remove()
    assert len(count) == 3 * 4, "finished folds are not trained again"
    assert (stopped.out / "fold-0" / "run.json").read_bytes() == written
    assert same_results(folded, stopped.out)
    before = (stopped.out / "run.json").read_bytes()
    train(stopped.model_copy(update={"resume": True}))
    assert (stopped.out / "run.json").read_bytes() == before, "a finished one is left alone, and test with it"


@pytest.fixture
def shared(folded, tmp_path):
    """A recipe whose folds 0 and 2 are there, from elsewhere."""
    for fold in (0, 2):
        shutil.copytree(folded / f"fold-{fold}", tmp_path / "shared" / f"fold-{fold}", symlinks=True)
    return recipe_of(folded).model_copy(update={"out": tmp_path / "shared", "resume": True})


def of_fold(recipe: FinetuneRecipe, fold: int, **changes) -> FinetuneRecipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"fold": fold}), "resume": False} | changes)


def test_machines_share_the_folds(shared, folded):
    assert train(of_fold(shared, 1)) == shared.out / "fold-1"
    assert sorted(path.name for path in shared.out.iterdir()) == ["fold-0", "fold-1", "fold-2"]
    with pytest.raises(InputError, match=r"fold-1: exists already"):
        train(of_fold(shared, 1))
    train(shared)
    assert same_results(folded, shared.out)
    assert train(of_fold(shared, 1, resume=True)) == shared.out / "fold-1"  # done before
    with pytest.raises(InputError, match=r"fold-1: was started with another recipe:\n  steps: 4 then, 5 now"):
        train(of_fold(shared, 1, resume=True, steps=5))


def test_folds_of_another_recipe_or_of_other_cases_are_not_joined(shared, folded):
    with pytest.raises(InputError, match=r"fold-0: was started with another recipe:\n  batch: 2 then, 4 now"):
        train(shared.model_copy(update={"batch": 4}))
    assert sorted(path.name for path in shared.out.iterdir()) == ["fold-0", "fold-2"], "nothing is trained before that"
    shutil.copytree(folded / "fold-1", shared.out / "fold-1", symlinks=True)
    record = json_of(shared.out / "fold-1" / "run.json")
    record["inputs"]["val"] = record["inputs"]["train"]
    (shared.out / "fold-1" / "run.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(InputError, match=r"fold-1: was trained on other cases than fold 1 has now \(val differ\)"):
        train(shared)
    assert not (shared.out / "model").exists() and not (shared.out / "run.json").exists()


def test_a_fold_does_not_go_into_a_strange_run(runs, folds):
    ours = folds(fold=0).model_copy(update={"out": runs[0]})
    with pytest.raises(InputError, match=r"(?s)first: was started with another recipe:.*data\.folds: None then, 3 now"):
        train(ours)
    assert not (runs[0] / "fold-0").exists()


@pytest.mark.parametrize("fold", [None, 0])
@pytest.mark.parametrize("copy, message", [("c06a", r"val cases are among the labelled"), ("c09a", r"1 test cases are among")])
def test_a_leak_stops_it_before_the_first_fold(folds, source, copy, message, fold):
    for folder in ("images", "masks"):
        shutil.copy(source / folder / "c01a.png", source / folder / f"{copy}.png")
    data = read_folds(resolve(folds(allow=["leak"])), quiet=True)
    assert not any({"c01a", copy} <= {case.case.id for case in data.val(fold)} for fold in range(3)), "else there is none"
    assert len(data.allowed) == (1 if copy == "c09a" else 2)
    ours = folds(fold=fold)
    with pytest.raises(CheckFailed, match=message):
        train(ours)
    assert not ours.out.exists()


def test_an_encoder_that_saw_a_case_is_a_leak(folds, encoder, archive_of):
    """Every case is val of some fold. And without test cases nothing is evaluated on test."""
    seen = read_folds(resolve(folds()), quiet=True)
    archive_of([(seen.cases[0].case.group_hmac, "file", "pixels", b"\xff" * HASH_BYTES)], seen.source.salt_fingerprint)
    with pytest.raises(CheckFailed, match=r"(?s)val cases are among the pretraining archive.*c00a\.png"):
        train(folds(encoder=str(encoder)))
    out = train(folds(encoder=str(encoder), allow=["leak"], steps=1, evaluate_test=False, data={"folds": 2}))
    assert (out / "receipt.json").read_bytes() == (out / "fold-1" / "receipt.json").read_bytes()
    assert any("val cases are among the pretraining archive" in one for one in read_config(out / "model").allowed)
    assert not (out / "evaluation").exists() and (out / "cross_validation" / "summary.json").is_file()
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Not evaluated on test" in page and "Out of fold: Dice" in page and "Encoder: " in page


def test_what_is_chosen_on_val_is_chosen_out_of_fold(folds, source):
    """For the ensemble, by all cases, each as the network predicts it that was not trained on it."""
    black = Image.fromarray(np.zeros((24, 24), np.uint8))
    for number in (1, 2, 5, 6):
        black.save(source / "masks" / f"c{number:02}a.png")
    ours = folds(data={"folds": 2, "stratify": True}, postprocess="validate", false_alarms_per_1000=300.0, steps=2)
    with pytest.raises(InputError, match=r"false_alarms_per_1000=300, fold \d: val has no case without target"):
        train(folds(data={"folds": 8}, false_alarms_per_1000=300.0))
    assert not ours.out.exists()
    out = train(ours)
    data = read_folds(recipe_of(out), quiet=True)
    peaks = []
    for fold in range(2):
        model = load_model(out / f"fold-{fold}")
        for case in data.val(fold):
            if not case.labels.any():
                peaks.append(float(case_scores(model, case, CPU, "fp32", Inference())[1].max()))
    chosen = read_config(out / "model")
    point, rules = chosen.operating_point, chosen.postprocessing
    assert len(peaks) == point.clean == 4 and point.alarmed == 1
    assert point.threshold == pytest.approx(sorted(peaks)[-2], rel=1e-5)
    dice = json_of(out / "cross_validation" / "summary.json")["dice"]  # without post-processing
    assert rules.val_groups == 8 and rules.val_dice[0] == pytest.approx(dice["mean"])
    test = json_of(out / "evaluation" / "summary.json")
    assert test["false_alarms"]["operating_point"]["threshold"] == point.threshold
    assert OF_SINGLE_NETWORKS in test["notes"] and OF_SINGLE_NETWORKS in (out / "report.html").read_text(encoding="utf-8")


def test_a_source_without_val_can_be_folded(folds, source):
    splits = json_of(source / "splits.json")
    (source / "splits.json").write_text(json.dumps(splits | {"val": []}))
    data = read_folds(resolve(folds()), quiet=True)
    assert len(data.cases) == 6 and [len(data.val(fold)) > 0 for fold in range(3)] == [True] * 3


def test_more_folds_than_groups_are_refused(folds):
    with pytest.raises(InputError, match=r"data\.folds=9: pool and val have only 8 groups"):
        train(folds(data={"folds": 9}))
    with pytest.raises(InputError, match=r"data\.folds=5: pool and val have only 4 groups"):
        train(folds(data={"folds": 5, "labelled": 2}))
    with pytest.raises(InputError, match=r"fold=3: with data\.folds=3 it is at most 2"):
        folds(fold=3)
    with pytest.raises(InputError, match=r"fold=1: set data\.folds too"):
        folds(fold=1, data={"folds": None})
