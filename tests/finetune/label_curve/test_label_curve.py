"""A whole curve, tiny: its cells, its test, its figures, its continuation and its sharing among processes."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from finetune.label_curve.cells import numbers_of_groups, points_of
from finetune.label_curve.command import label_curve
from finetune.label_curve.cost import cost_of
from finetune.label_curve.recipe import LabelCurveRecipe
from finetune.label_curve.result import read_curve
from finetune.label_curve.statistics import difference, labels_needed
from finetune.label_curve.work import locked, work_alone
from finetune.labelled import choose_cases
from finetune.loop import finetune
from finetune.recipe import FinetuneRecipe
from resunet.checkpoint import ModelConfig
from resunet.cli import main
from resunet.config import validate
from resunet.data.evidence import SCHEMA, Evidence
from resunet.data.leakage import ARCHIVE, write_archive
from resunet.data.perceptual import HASH_BYTES
from resunet.encoder import ResidualEncoder
from resunet.errors import CheckFailed, InputError
from resunet.fingerprint import fingerprint

ARMS, TRAIN, DRAWS, STEPS = ("scratch", "pretrained"), (1, 3), (0, 1), (2, 3)


@pytest.fixture(scope="module")
def values(runs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Of a curve on the source of the finished runs: 5 pool groups, 3 val groups, 6 test groups."""
    torch.manual_seed(7)
    network = ResidualEncoder(1, (4, 8), units=1)
    network.config = ModelConfig(
        architecture=network.config.architecture, normalisation=network.config.normalisation, feature_check=fingerprint(network)
    )
    encoder = tmp_path_factory.mktemp("encoder") / "encoder"
    network.save_pretrained(encoder)
    nobody = [pa.array([one], field.type) for one, field in zip(("g", "f", "p", b"\xff" * HASH_BYTES), SCHEMA, strict=True)]
    write_archive(encoder / ARCHIVE, Evidence(pa.table(nobody, schema=SCHEMA), "another salt"))
    shared = json.loads((runs[0] / "config.json").read_text(encoding="utf-8"))
    for key in ("out", "seed", "steps", "encoder", "evaluate_test", "processes"):
        del shared[key]
    for key in ("labelled", "draw", "folds", "fold"):
        del shared["data"][key]
    own = {"optimizer": {"encoder_lr_factor": 0.5}, "postprocess": "validate"}
    return {
        "finetune": shared,
        "arms": {"scratch": {}, "pretrained": {"encoder": str(encoder), **own}},
        "budgets": [0.2, 0.6, 3],
        "draws": len(DRAWS),
        "steps": list(STEPS),
    }


@pytest.fixture
def recipe(values: dict, tmp_path: Path) -> Callable[..., LabelCurveRecipe]:
    return lambda **changes: validate(LabelCurveRecipe, {"out": str(tmp_path / "curve"), **values, **changes}, "recipe")


@pytest.fixture(scope="module")
def curve(values: dict, tmp_path_factory: pytest.TempPathFactory) -> LabelCurveRecipe:
    """A finished curve. Not to be changed: copy what a test changes."""
    made = validate(LabelCurveRecipe, {"out": str(tmp_path_factory.mktemp("curve") / "out"), **values}, "recipe")
    assert label_curve(made) == made.out
    return made


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def cell(curve: LabelCurveRecipe, arm: str, train: int, draw: int, steps: int) -> Path:
    return curve.out / "cells" / arm / str(train) / f"draw-{draw}" / f"steps-{steps}"


def test_every_cell_is_a_finished_run_that_differs_in_what_it_should(curve):
    cells = {(a, n, d, s): cell(curve, a, n, d, s) for a in ARMS for n in TRAIN for d in DRAWS for s in STEPS}
    assert sorted(cells.values()) == sorted(path.parent for path in (curve.out / "cells").rglob("run.json"))
    for (arm, train, draw, steps), folder in cells.items():
        record, config = read(folder / "run.json"), read(folder / "config.json")
        assert record["status"] == "done" and (folder / "model" / "model.safetensors").is_file()
        assert not (folder / "checkpoints").exists(), "they would fill the disk"
        assert (config["data"]["labelled"], config["data"]["draw"], config["steps"]) == (train, draw, steps)
        assert config["seed"] == record["seed"] == draw
        assert (config["encoder"] is not None) == (arm == "pretrained")
        # all arms see the same cases
        other = read(cell(curve, "scratch", train, draw, STEPS[0]) / "run.json")["inputs"]
        assert {part: record["inputs"][part] for part in ("train", "val")} == {part: other[part] for part in ("train", "val")}


def test_draws_are_nested(curve):
    for point in points_of(curve):
        _, train, val, test = choose_cases(point.cells[0].recipe)
        small = choose_cases(curve.cell(point.arm, TRAIN[0], point.draw, 1, curve.out))
        assert {case.id for case in small[1]} <= {case.id for case in train} and not test
        assert len({case.group for case in val}) == len({case.group for case in train}) == point.labelled


def test_test_is_read_for_what_val_chose_only(curve):
    for point in points_of(curve):
        val = {one.steps: read(one.folder / "run.json")["best_val_dice"] for one in point.cells}
        best = max(steps for steps, dice in val.items() if dice == max(val.values()))
        evaluated = [one.steps for one in point.cells if (one.folder / "evaluation").exists()]
        assert evaluated == [best]


def test_of_equals_on_val_the_judged_one_is_chosen_then_the_one_with_most_steps(curve, tmp_path):
    copied = curve.model_copy(update={"out": shutil.copytree(curve.out, tmp_path / "curve")})
    point = points_of(copied)[0]
    for one in point.cells:
        path = one.folder / "run.json"
        path.write_text(json.dumps(read(path) | {"best_val_dice": 0.25}))
        shutil.rmtree(one.folder / "evaluation", ignore_errors=True)
    assert tuple(one.steps for one in point.cells) == STEPS and points_of(copied)[0].chosen.steps == max(STEPS)
    judged = point.cells[0].folder / "evaluation"
    judged.mkdir()
    (judged / "summary.json").write_text("{}")
    assert points_of(copied)[0].chosen.steps == min(STEPS)


def test_the_evaluation_is_what_the_run_itself_would_have_written(curve, tmp_path):
    point = next(point for point in points_of(curve) if point.arm == "pretrained" and point.labelled == TRAIN[1])
    config = FinetuneRecipe.model_validate_json((point.chosen.folder / "config.json").read_text(encoding="utf-8"))
    run = finetune(config.model_copy(update={"evaluate_test": True, "out": tmp_path / "run"}))
    for name in ("summary.json", "cases.csv"):
        assert (run / "evaluation" / name).read_text() == (point.chosen.folder / "evaluation" / name).read_text()


def test_the_record_is_what_the_cases_say(curve):
    record = read(curve.out / "curve.json")
    assert [(one["labels"], one["train"], one["val"]) for one in record["labels"]] == [(2, 1, 1), (6, 3, 3)]
    rows = pq.read_table(curve.out / "cases.parquet").to_pylist()
    assert len(rows) == len(ARMS) * len(TRAIN) * len(DRAWS) * 6
    assert {type(row["truth_voxels"]) for row in rows} == {type(row["lesions_found"]) for row in rows} == {int}
    # every test group has one case with a target
    dice = {(row["arm"], row["labels"], row["group"], row["draw"]): row["dice"] for row in rows}
    groups = sorted({row["group"] for row in rows})
    scores = {arm: np.array([[[dice[arm, n, g, d] for d in DRAWS] for g in groups] for n in (2, 6)]) for arm in ARMS}
    for index, labels in enumerate((2, 6)):
        for arm in ARMS:
            figure = record["dice"][arm][index]
            assert figure["mean"] == pytest.approx(scores[arm][index].mean()) and figure["labels"] == labels
            assert figure["by_draw"] == pytest.approx(scores[arm][index].mean(axis=0)) and figure["n"] == 6
        expected = difference(scores["pretrained"][index] - scores["scratch"][index])
        found = record["differences"]["pretrained"][index]
        assert found["mean"] == pytest.approx(expected["mean"]) and found["ci95"] == pytest.approx(expected["ci95"])
        assert found["p"] == pytest.approx(expected["p"]) and found["p_holm"] >= found["p"]
        needed = labels_needed(scores["pretrained"][index], scores["scratch"], [2, 6])
        assert record["labels_saved"]["pretrained"][index]["baseline_needs"] == needed.labels.record()
    assert record["cost"]["scratch"]["pretraining_hours"] == 0
    assert record["cost"]["pretrained"]["pretraining_hours"] is None, "a model directory does not say what it took"


def test_suggested_draws_beside_random_ones(recipe, values, tmp_path, monkeypatch):
    """Both from scratch: pairs have the same groups to choose by, seed and steps, and others to train on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    suggested = {"data": {"draw_by": "kcenter", "draw_encoder": values["arms"]["pretrained"]["encoder"]}}
    made = recipe(arms={"random": {}, "suggested": suggested}, baseline="random", budgets=[2], draws=3, steps=[1])
    label_curve(made)
    differ = 0
    for draw in range(3):
        ours, theirs = (read(cell(made, arm, 2, draw, 1) / "run.json") for arm in ("suggested", "random"))
        assert ours["inputs"]["val"] == theirs["inputs"]["val"] and ours["seed"] == theirs["seed"] == draw
        differ += ours["inputs"]["train"] != theirs["inputs"]["train"]
    assert differ
    record = read(made.out / "curve.json")
    assert record["draw_by"] == {"random": "random", "suggested": "kcenter"}
    images = [len([*train, *val]) for _, train, val, _ in (choose_cases(point.cells[0].recipe) for point in points_of(made))]
    assert sorted(record["labels"][0]["images"]) == sorted(images)
    page = (made.out / "report.html").read_text(encoding="utf-8")
    assert "random at random, suggested by k-centre" in page and str(tmp_path) not in page


def test_cells_of_one_draw_must_have_the_same_cases(curve, tmp_path):
    out = shutil.copytree(curve.out, tmp_path / "curve")
    copied = curve.model_copy(update={"out": out})
    odd = cell(copied, "pretrained", 3, 1, 2) / "run.json"
    record = read(odd)
    odd.write_text(json.dumps(record | {"inputs": record["inputs"] | {"train": "other"}}))
    with pytest.raises(InputError, match=r"was trained on or chosen by other cases than .*scratch/3/draw-1"):
        read_curve(copied, points_of(copied))


def test_test_files_and_models_that_changed_are_told_apart(curve, tmp_path):
    record = read(curve.out / "curve.json")
    one = cell(curve, "pretrained", 3, 1, 2)
    digests = {name: digest for name, digest in read(one / "run.json")["inputs"].items() if name.startswith("encoder/")}
    assert record["models_sha256"] == {"scratch": {}, "pretrained": digests} and len(digests) == 3
    assert record["test_sha256"] == finetune_inputs(curve, tmp_path)["test"], "not the digest of nothing"
    for name, message in {
        "encoder/model.safetensors": r"3/draw-1/steps-2: rests on another encoder/model\.safetensors than .*, of the same arm",
        "test": "was evaluated on other test cases than",
    }.items():
        copied = curve.model_copy(update={"out": shutil.copytree(curve.out, tmp_path / name.replace("/", "-"))})
        for steps in STEPS:
            odd = cell(copied, "pretrained", 3, 1, steps) / "run.json"
            odd.write_text(json.dumps(read(odd) | {"inputs": read(odd)["inputs"] | {name: "ab" * 32}}))
        with pytest.raises(InputError, match=message):
            label_curve(copied.model_copy(update={"resume": True}))


def finetune_inputs(curve, tmp_path) -> dict:
    """Of an ordinary run that reads test itself."""
    recipe = curve.cell("scratch", 1, 0, 1, tmp_path / "run").model_copy(update={"evaluate_test": True})
    inputs: dict = read(finetune(recipe) / "run.json")["inputs"]
    return inputs


def test_an_encoder_that_was_pretrained_again_needs_an_arm_of_its_own(curve, tmp_path, monkeypatch):
    out = shutil.copytree(curve.out, tmp_path / "curve")
    grown = curve.model_copy(update={"resume": True, "out": out, "draws": 3})
    monkeypatch.setattr("finetune.label_curve.refusals.sha256", lambda path: "cd" * 32)
    monkeypatch.setattr("finetune.label_curve.command.do_all", lambda points, locks: pytest.fail("trained"))
    with pytest.raises(
        InputError, match=r"arms\.pretrained: .*/encoder/config\.json is not what the cells that are done rest on"
    ):
        label_curve(grown)


def test_a_leak_is_found_before_anything_is_trained(recipe, tmp_path, monkeypatch):
    asked = []

    def leaking(finetuning, quiet):
        asked.append((finetuning.data.labelled, finetuning.evaluate_test))
        raise CheckFailed("test cases are in the archive")

    monkeypatch.setattr("finetune.label_curve.work.read_labelled", leaking)
    with pytest.raises(CheckFailed, match="in the archive"):
        label_curve(recipe())
    assert asked == [(3, True)] and not (tmp_path / "curve" / "cells").exists()


@pytest.mark.parametrize(
    "made, key, given",
    [
        ({"architecture": {"norm": "group"}}, "model.norm", {"model": {"norm": "group"}}),
        ({"normalisation": {"high": 100.0}}, "normalisation", None),
    ],
)
def test_arms_that_differ_in_what_nobody_named_are_refused(recipe, values, tmp_path, monkeypatch, made, key, given):
    """An arm with an encoder takes its kind of norm layer and its normalisation; scratch would have the defaults."""
    other = Path(shutil.copytree(values["arms"]["pretrained"]["encoder"], tmp_path / "other"))
    path = other / "config.json"
    config = read(path)
    path.write_text(json.dumps(config | {name: config[name] | its for name, its in made.items()}))
    monkeypatch.setattr(
        "finetune.label_curve.command.look_for_leaks", lambda points, locks: pytest.fail("begun", pytrace=False)
    )
    shared = values["finetune"]
    ours = recipe(finetune=shared | {"normalisation": None, "model": shared["model"] | {"norm": None}})
    arms = ours.arms | {"pretrained": ours.arms["pretrained"] | {"encoder": str(other)}}
    with pytest.raises(InputError, match=rf"arms\.pretrained: has {key}=.* by its encoder or teacher, scratch has"):
        label_curve(ours.model_copy(update={"arms": arms}))
    assert not (ours.out / "config.json").exists()
    said = given or {"normalisation": config["normalisation"] | made["normalisation"]}
    ours = ours.model_copy(update={"arms": {arm: its | said for arm, its in arms.items()}})  # the folder is as good as new
    with pytest.raises(pytest.fail.Exception, match="begun"):
        label_curve(ours)


def test_a_new_arm_that_is_refused_leaves_the_curve_as_it_was(curve, tmp_path, monkeypatch):
    out = shutil.copytree(curve.out, tmp_path / "curve")
    before = (out / "config.json").read_bytes()

    def grown(**values) -> LabelCurveRecipe:
        arms = curve.arms | {"new": values}
        return curve.model_copy(update={"resume": True, "out": out, "arms": arms})

    def leaking(finetuning, quiet):
        raise CheckFailed("test cases are in the archive")

    with monkeypatch.context() as patch:
        patch.setattr("finetune.label_curve.work.read_labelled", leaking)
        with pytest.raises(CheckFailed, match="in the archive"):
            label_curve(grown(batch=2))
    assert (out / "config.json").read_bytes() == before
    asked = []
    read_nothing = SimpleNamespace(test=[])
    monkeypatch.setattr(
        "finetune.label_curve.work.read_labelled", lambda finetuning, quiet: asked.append(finetuning.batch) or read_nothing
    )
    monkeypatch.setattr("finetune.label_curve.command.do_all", lambda points, locks: pytest.fail("trained", pytrace=False))
    for batch in (2, 4, 4):  # what never trained may change, and is looked at again only then
        with pytest.raises(pytest.fail.Exception, match="trained"):
            label_curve(grown(batch=batch))
    assert asked == [2, 4]
    (out / "cells" / "new").mkdir()
    with pytest.raises(InputError, match=r"an arm goes, or changes, once .*cells has no folder of it"):
        label_curve(grown(batch=2))


def test_the_wandb_group_that_a_curve_began_with_stays(curve, tmp_path):
    out = shutil.copytree(curve.out, tmp_path / "curve")
    finetuning = curve.finetune | {"wandb": {"mode": "disabled", "group": "another"}}
    with pytest.raises(InputError, match=r"finetune\.wandb\.group=another: the curve in .* began with label-curve-"):
        label_curve(curve.model_copy(update={"resume": True, "out": out, "finetune": finetuning}))


def test_a_curve_that_grew_says_that_it_was_read_before(curve, tmp_path):
    out = shutil.copytree(curve.out, tmp_path / "curve")
    grown = curve.model_copy(update={"resume": True, "out": out, "arms": curve.arms | {"again": curve.arms["scratch"]}})
    told = "This curve was read before"
    assert told not in (out / "report.html").read_text(encoding="utf-8")
    label_curve(grown)
    looks = read(out / "curve.json")["looks"]
    assert looks[:-1] == read(curve.out / "curve.json")["looks"] and [one["arms"] for one in looks] == [2, 3]
    assert f"{told} it was as large as now: with 2 draws, 2 arms" in (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "took, hours",
    [
        ({"seconds": 7200, "cpu_seconds": 3600}, 1.0),
        ({"seconds": 7200}, 12.0),
        ({"seconds_per_step": 2.0, "step": 1800}, 6.0),
        ({"step": 1800}, None),
    ],
)
def test_the_cost_of_pretraining_is_what_its_run_says(curve, tmp_path, took, hours):
    """Hours of all threads of all processes."""
    run = tmp_path / "run"
    shutil.copytree(curve.arms["pretrained"]["encoder"], run / "model")
    (run / "config.json").write_text(json.dumps({"processes": 3}))
    (run / "run.json").write_text(json.dumps({"machine": {"gpus": [], "threads": 2}, **took}))
    points = [point for point in points_of(curve) if point.arm == "pretrained"]
    moved = [replace(cell, recipe=cell.recipe.model_copy(update={"encoder": run})) for cell in points[0].cells]
    assert cost_of([replace(points[0], cells=tuple(moved)), *points[1:]]).pretraining == hours
    assert cost_of(points).pretraining is None


def test_the_cost_counts_all_that_is_behind_an_arm_once(curve, tmp_path):
    """A teacher from an encoder, which the arm has, too, and a start that was trained on a GPU."""

    def trained(name: str, **recipe) -> Path:
        run = tmp_path / name
        shutil.copytree(curve.arms["pretrained"]["encoder"], run / "model")
        (run / "config.json").write_text(json.dumps({"processes": 1, "data": {}, **recipe}))
        gpus = ["one"] if name == "start" else []
        (run / "run.json").write_text(json.dumps({"machine": {"gpus": gpus, "threads": 1}, "seconds": 3600}))
        return run

    encoder = trained("encoder")
    behind = {"encoder": encoder, "teacher": trained("teacher", encoder=str(encoder))}
    points = [point for point in points_of(curve) if point.arm == "pretrained"]

    def cost(**models):
        moved = [replace(cell, recipe=cell.recipe.model_copy(update=models)) for cell in points[0].cells]
        return cost_of([replace(points[0], cells=tuple(moved)), *points[1:]])

    assert (cost(**behind).pretraining, cost(**behind).device) == (2.0, "CPU thread")
    more = cost(encoder=None, start=trained("start", teacher=str(behind["teacher"])))
    assert (more.pretraining, more.device) == (3.0, "CPU thread or one GPU")


def test_the_page_and_its_pictures(curve):
    page = (curve.out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!data:|#)|<script|@import""", page), "opens without a network"
    for words in ("Labels saved", "Paired differences", "What val chose", "How it was counted", "2 (1 + 1)", "6 (3 + 3)"):
        assert words in page
    assert page.count('<svg role="img" aria-label="') == page.count("<svg") >= 2
    assert (curve.out / "curve.png").read_bytes().startswith(b"\x89PNG") and b"<svg" in (curve.out / "curve.svg").read_bytes()
    digest = read(curve.out / "curve.json")["models_sha256"]["pretrained"]["encoder/model.safetensors"]
    assert f"pretrained, encoder/model.safetensors {digest[:12]}" in page
    assert str(curve.out) not in page and str(curve.arms["pretrained"]["encoder"]) not in page


def test_a_finished_curve_is_not_done_again(curve, capsys):
    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (curve.out / "cells").rglob("*")}

    before, written = state(), (curve.out / "curve.json").read_bytes()
    label_curve(curve.model_copy(update={"resume": True}))
    assert state() == before and (curve.out / "curve.json").read_bytes() == written
    record = read(curve.out / "run.json")
    assert (record["stage"], record["status"]) == ("label-curve", "done") and {"versions", "machine", "git_commit"} <= set(
        record
    )
    assert record["inputs"]["test"] and "pretrained/encoder/archive.parquet" in record["inputs"]
    with pytest.raises(InputError, match=r"exists already\. Name another folder, continue it with resume=true"):
        label_curve(curve)


def test_another_recipe_is_refused(curve):
    less = {"draws": 1, "budgets": curve.budgets[:1], "arms": {"scratch": {}, "other": {}}, "steps": (*curve.steps, 9)}
    for key, value in less.items():
        with pytest.raises(InputError, match=rf"was started with another recipe:\n  {key}: .* then, .* now\nName another out"):
            label_curve(curve.model_copy(update={"resume": True, key: value}))


def test_a_curve_grows_by_draws_budgets_and_arms(curve, tmp_path, monkeypatch):
    out = shutil.copytree(curve.out, tmp_path / "grown")
    arms = curve.arms | {"again": curve.arms["scratch"]}
    larger = curve.model_copy(update={"resume": True, "out": out, "draws": 3, "budgets": (1.0, *curve.budgets), "arms": arms})
    monkeypatch.setattr("finetune.label_curve.command.do_all", lambda points, locks: pytest.fail(f"{len(points)}"))
    with pytest.raises(pytest.fail.Exception, match=str(3 * 3 * len({1, *numbers_of_groups(curve)}))):
        label_curve(larger)
    grown = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert grown["draws"] == 3 and larger.group != curve.group == grown["finetune"]["wandb"]["group"], "as it began"
    with pytest.raises(InputError, match="draws: 3 then, 2 now"):
        label_curve(curve.model_copy(update={"resume": True, "out": out}))


def test_a_folder_of_something_else_is_refused(recipe, tmp_path):
    (tmp_path / "curve").mkdir()
    (tmp_path / "curve" / "thesis.txt").touch()
    with pytest.raises(InputError, match=r"is not a label curve"):
        label_curve(recipe(resume=True))
    assert [path.name for path in (tmp_path / "curve").iterdir()] == ["thesis.txt"]


def test_budgets_become_numbers_and_equal_ones_merge(recipe):
    assert numbers_of_groups(recipe(budgets=["all", 0.01, 0.2, 1, 5, 0.5])) == [1, 2, 5]
    with pytest.raises(InputError, match=r"budgets: 6 groups, but the pool has only 5"):
        numbers_of_groups(recipe(budgets=[6]))


def test_a_source_without_test_cases_is_refused(recipe, values, tmp_path):
    source = shutil.copytree(values["finetune"]["data"]["source"], tmp_path / "labelled")
    splits = read(source / "splits.json")
    (source / "splits.json").write_text(json.dumps(splits | {"test": []}))
    shared = values["finetune"] | {"data": values["finetune"]["data"] | {"source": str(source)}}
    with pytest.raises(InputError, match=r"has no test cases, and a curve is of test Dice"):
        label_curve(recipe(finetune=shared))
    assert not (tmp_path / "curve").exists()


def test_test_cases_without_a_target_are_refused_before_anything_is_trained(recipe, values, tmp_path):
    source = Path(shutil.copytree(values["finetune"]["data"]["source"], tmp_path / "labelled"))
    for stem in read(source / "splits.json")["test"]:
        (path,) = (source / "masks").glob(f"{stem}.*")
        Image.fromarray(np.zeros_like(np.asarray(Image.open(path)))).save(path)
    shared = values["finetune"] | {"data": values["finetune"]["data"] | {"source": str(source)}}
    with pytest.raises(InputError, match=r"test cases has a pixel of any class, and a curve is of test Dice"):
        label_curve(recipe(finetune=shared))
    assert not list((tmp_path / "curve").rglob("metrics.jsonl"))


def test_an_unfinished_cell_is_finished_and_all_others_are_kept(curve, tmp_path):
    """As a kill leaves it: a cell that had begun, one that had not, a point that was not yet evaluated."""
    out = shutil.copytree(curve.out, tmp_path / "curve")
    copied = curve.model_copy(update={"out": out, "resume": True})
    begun, gone = cell(copied, "scratch", 1, 0, 3), cell(copied, "pretrained", 3, 1, 2)
    record = read(begun / "run.json")
    unread = {"test": hashlib.sha256(b"").hexdigest()}
    (begun / "run.json").write_text(json.dumps(record | {"status": "running", "inputs": record["inputs"] | unread}))
    shutil.rmtree(begun / "evaluation", ignore_errors=True)
    shutil.rmtree(gone)
    kept = cell(copied, "scratch", 3, 0, 2) / "run.json"
    before = kept.stat().st_mtime_ns
    for evaluation in (out / "cells" / "pretrained" / "1" / "draw-0").glob("steps-*/evaluation"):
        shutil.rmtree(evaluation)
    label_curve(copied)
    assert kept.stat().st_mtime_ns == before
    assert read(begun / "run.json")["status"] == read(gone / "run.json")["status"] == "done"
    ours, theirs = read(out / "curve.json"), read(curve.out / "curve.json")
    assert {key: ours[key] for key in ours if key != "cost"} == {key: theirs[key] for key in theirs if key != "cost"}


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path):
    path = tmp_path / "locks" / "cell.lock"
    code = f"""
from pathlib import Path
from finetune.label_curve.work import locked
with locked(Path({str(path)!r}), wait=False) as mine:
    print(mine, flush=True)
    input()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "True\n"
        with locked(path, wait=False) as mine:
            assert not mine
        os.kill(other.pid, signal.SIGKILL)
        with locked(path, wait=True) as mine:
            assert mine


def test_ranks_of_a_launcher_share_the_cells(recipe, values, tmp_path):
    """Two processes as a launcher starts them: every cell is done once, both end well, one speaks, the record is whole."""
    out = tmp_path / "curve"
    path = tmp_path / "curve.json"  # JSON is YAML
    path.write_text(recipe(budgets=[1], draws=2).model_dump_json(exclude={"out", "resume"}))
    (tmp_path / "curve.yaml").write_text(path.read_text())
    command = [sys.executable, "-m", "resunet", "label-curve", str(tmp_path / "curve.yaml"), f"out={out}", "resume=true"]
    ranks = [
        subprocess.Popen(
            command,
            env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        )
        for rank in (0, 1)
    ]  # fmt: skip
    said = [rank.communicate(timeout=240) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    begun = [re.findall(r"label-curve \d+/\d+: (\S+)", err) for _, err in said]
    points = [f"{arm}-1-draw-{draw}" for arm in ARMS for draw in DRAWS]
    tasks = [f"{point}-{what}" for point in points for what in (*(f"steps-{steps}" for steps in STEPS), "test")]
    assert sorted(begun[0] + begun[1]) == sorted(tasks)
    assert said[0][0].splitlines()[-1] == str(out) and said[1][0] == ""
    assert len(read(out / "curve.json")["dice"]["scratch"]) == 1 and (out / "report.html").is_file()


def test_ranks_without_resume_are_refused_and_workers_forget_them(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "3", "LOCAL_RANK": "1", "ACCELERATE_MIXED_PRECISION": "no"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    with pytest.raises(InputError, match=r"resume=false: several processes share a label curve only with resume=true"):
        work_alone(joins=False)
    work_alone(joins=True)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
    assert not {"WORLD_SIZE", "RANK", "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & set(os.environ)


def test_the_command(curve, tmp_path, capsys):
    path = tmp_path / "curve.yaml"
    path.write_text(curve.model_dump_json(exclude={"resume"}))
    assert main(["label-curve", str(path), "resume=true"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(curve.out)
    assert main(["label-curve", str(path)]) == 2
    assert "exists already" in capsys.readouterr().err
