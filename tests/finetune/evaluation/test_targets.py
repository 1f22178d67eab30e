"""Regions: how they are measured and shown, and that a run is trained, evaluated, compared, joined and explained by them."""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.comparison.compare import compare
from finetune.cross_validation.folds import train
from finetune.evaluation.evaluate import EvaluateRequest, evaluate, measure_cases
from finetune.evaluation.metrics import case_dice, measure_case, measure_targets
from finetune.evaluation.objects import caption_of, largest_wrong, wrong_objects
from finetune.evaluation.summary import case_rows, policy, summarise
from finetune.evaluation.surface import TOLERANCE
from finetune.evaluation.targets import FALSE, FOUND, MISSED, targets_of
from finetune.explanation.explain import explain
from finetune.explanation.request import ExplainRequest
from finetune.labelled import read_labelled, resolve
from finetune.loop import finetune
from finetune.planning.checks import overfit
from finetune.planning.page import page, write_recipe
from finetune.planning.plan import make_plan
from finetune.recipe import FinetuneRecipe
from finetune.step import build, loss_of
from finetune.training.patches import PatchSampler
from resunet.checkpoint import read_config
from resunet.config import load_recipe
from resunet.data.cases import IGNORE, Case, LoadedCase
from resunet.data.perceptual import look
from resunet.errors import InputError
from resunet.losses import segmentation_loss
from resunet.runtime import percentile_intensity
from resunet.training import start_ranks

CLASSES = {0: "background", 60: "edema", 160: "core", 255: "enhancing"}
REGIONS = {"whole": ("edema", "core", "enhancing"), "inner": ("core", "enhancing"), "enhancing": ("enhancing",)}
NESTED = targets_of(CLASSES, REGIONS)
OVERLAPPING = targets_of(
    dict(enumerate(["none", "scratch", "stain", "both"])), {"a": ("both", "scratch"), "b": ("stain", "both")}
)


TOGETHER = {"whole": ("edema", "core", "enhancing"), "enhancing": ("enhancing",)}  # nothing tells edema and core apart


def random_pair(seed: int, *size: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    truth, predicted = ((random.integers(1, 4, size) * (random.random(size) < 0.2)).astype(np.uint8) for _ in range(2))
    truth[random.random(size) < 0.05] = IGNORE
    return truth, predicted


def test_members_are_class_indices_in_the_order_of_the_classes():
    assert NESTED.names == ("whole", "inner", "enhancing") and NESTED.members == ((1, 2, 3), (2, 3), (3,))
    assert OVERLAPPING.members == ((1, 3), (2, 3)) and not OVERLAPPING.are_classes
    assert OVERLAPPING.described() == "a = scratch + both; b = stain + both"
    assert targets_of(CLASSES, TOGETHER).alike() == ["edema and core"]
    assert NESTED.alike() == targets_of(CLASSES).alike() == []
    plain = targets_of(CLASSES)
    assert plain.are_classes and plain.names == ("edema", "core", "enhancing") and plain.num_classes == 4


@pytest.mark.parametrize("targets", [NESTED, OVERLAPPING, targets_of(CLASSES)], ids=["nested", "overlapping", "classes"])
@pytest.mark.parametrize("size", [(21, 17), (6, 9, 8)], ids=["2D", "3D"])
def test_dice_alone_is_the_dice_of_all_measures(targets, size):
    for seed in range(4):
        truth, predicted = random_pair(seed, *size)
        if seed == 3:
            truth[truth != IGNORE] = 0
        expected = measure_targets(truth, predicted, targets, (1.0,) * len(size)).macro("dice")
        assert case_dice(truth, predicted, targets) == expected
    nothing = np.zeros(size, np.uint8)
    assert case_dice(nothing, nothing, targets) is None


@pytest.mark.parametrize("targets", [NESTED, OVERLAPPING], ids=["nested", "overlapping"])
@pytest.mark.parametrize("size", [(21, 17), (6, 9, 8)], ids=["2D", "3D"])
def test_a_region_is_measured_as_what_it_is_and_what_it_is_not(targets, size):
    truth, predicted = random_pair(0, *size)
    predicted[truth == IGNORE] = IGNORE  # whatever is said there
    spacing = (1.0, 2.0, 0.5)[: len(size)]
    found = measure_targets(truth, predicted, targets, spacing)
    assert len(found.classes) == len(targets.names) and found.evaluated_voxels == (truth != IGNORE).sum()
    for members, its in zip(targets.members, found.classes, strict=True):
        inside = np.where(truth == IGNORE, IGNORE, np.isin(truth, members)).astype(np.uint8)
        assert its == measure_case(inside, np.isin(predicted, members).astype(np.uint8), 2, spacing).classes[0]
    assert 0 < found.classes[0].dice < 1 and all(its.lesion_sizes for its in found.classes)


def test_regions_of_single_classes_are_the_classes():
    truth, predicted = random_pair(1, 20, 20)
    alone = targets_of(CLASSES, {name: (name,) for name in ("edema", "core", "enhancing")})
    assert measure_targets(truth, predicted, alone, (1, 1)) == measure_case(truth, predicted, 4, (1, 1))
    # not by its shortcut: binary by binary
    truth_of, guess_of = ([alone.mask(labels, i) for i in range(3)] for labels in (truth, predicted))
    one_by_one = [measure_case(*pair, 2, (1, 1)).classes[0] for pair in zip(truth_of, guess_of, strict=True)]
    assert one_by_one == list(measure_case(truth, predicted, 4, (1, 1)).classes)


def test_a_case_without_target_has_no_region_and_strange_values_are_refused():
    empty, predicted = np.zeros((2, 8, 8), np.uint8)
    predicted[2, 2] = 3
    case = measure_targets(empty, predicted, NESTED, (1, 1))
    assert case.without_target and case.false_alarm and case.macro("dice") == 0
    with pytest.raises(InputError, match=r"the prediction holds \[4\], which are no class indices: allowed are 0 to 3"):
        measure_targets(empty, predicted + 4 * (predicted == 0).astype(np.uint8), NESTED, (1, 1))


def test_the_summary_is_by_region_and_says_so():
    truth, predicted = random_pair(2, 16, 16)
    cases = [("a", "g", measure_targets(truth, predicted, NESTED, (1, 1)))]
    summary = summarise(cases, NESTED, TOLERANCE)
    assert list(summary["classes"]) == list(REGIONS) == [row["class"] for row in case_rows(cases, NESTED)]
    dice = [its.dice for its in cases[0][2].classes]
    assert summary["dice"]["mean"] == pytest.approx(np.mean(dice)) and len(set(dice)) == 3
    assert set(summary["policy"]) - set(policy(TOLERANCE)) == {"regions"}


def test_errors_are_of_regions():
    # true, predicted: what a pixel of nested regions is, by hand
    expected = {(0, 0): 0, (1, 1): FOUND, (3, 3): FOUND, (0, 1): FALSE, (1, 3): FALSE, (3, 1): MISSED, (2, 0): MISSED}
    expected[IGNORE, 3] = 0
    for (true, guess), kind in expected.items():
        assert NESTED.errors(np.array([[true]], np.uint8), np.array([[guess]], np.uint8)) == kind
    # neither region holds the other: what is taken for the other is false, though one is missed, too
    assert OVERLAPPING.errors(np.array([1], np.uint8), np.array([2], np.uint8)) == FALSE
    together = targets_of(CLASSES, {"whole": REGIONS["whole"]})
    assert together.errors(np.array([1], np.uint8), np.array([3], np.uint8)) == FOUND  # nothing tells them apart


def test_wrong_objects_are_those_of_regions():
    truth, predicted = np.zeros((2, 40, 40), np.uint8)
    truth[4:10, 4:10] = 1
    truth[6:8, 6:8] = 3  # 4 pixels of enhancing tumour in 36 of the whole
    predicted[4:10, 4:10] = 1
    predicted[30:33, 30:33] = 2
    wanted = largest_wrong([measure_targets(truth, predicted, NESTED, (1, 1))])
    assert wanted[0].counts == {("missed", 1): 1, ("missed", 2): 1, ("false", 0): 1, ("false", 1): 1}
    values = np.random.default_rng(0).integers(0, 90, truth.shape).astype(np.uint8)[None]
    case = Case("a", "a", "a", "a", None, files=(), mask=None)
    scan = LoadedCase(case, values, (1.0, 1.0), percentile_intensity(values, 0, 100), truth, "", "", look(values))
    captions = {caption_of(one, NESTED) for one in wrong_objects(scan, predicted, 1.0, wanted[0], NESTED)}
    sizes = {
        "inner: 4 pixels, 4 mm²; a",
        "enhancing: 4 pixels, 4 mm²; a",
        "whole: 9 pixels, 9 mm²; a",
        "inner: 9 pixels, 9 mm²; a",
    }
    assert captions == sizes


@pytest.fixture
def nested(source: Path, recipe: Callable[..., FinetuneRecipe]) -> Callable[..., FinetuneRecipe]:
    """Recipes of a source whose squares have a core, and that an enhancing part."""
    for path in sorted((source / "masks").iterdir()):
        mask = np.asarray(Image.open(path))
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        y, x, side = rows[0], columns[0], len(rows)
        labels = np.zeros_like(mask)
        for depth, value in ((0, 60), (1, 160), (2, 255)):
            labels[y + depth : y + side - depth, x + depth : x + side - depth] = value
        Image.fromarray(labels).save(path)

    def make(data: dict | None = None, **changes: object) -> FinetuneRecipe:
        return recipe(data={"classes": CLASSES, "regions": REGIONS} | (data or {}), **changes)

    return make


def test_the_loss_and_the_dice_of_one_batch_are_of_regions(nested):
    """With nothing but the Dice in the loss, and no step to speak of, the batch's Dice is what the loss leaves of 1."""
    ours = resolve(nested(loss={"focal_weight": 0, "class_weights": None}, optimizer={"lr": 1e-12}))
    accelerator = start_ranks(ours, ours.batch, "patches")
    model, train_on = build(ours)[0], read_labelled(ours, quiet=True).train
    done = overfit(ours, model, train_on, accelerator, transferred=False, steps=1, quiet=True)
    assert done.dice_training == pytest.approx(1 - done.last_loss, abs=1e-4)

    batch = PatchSampler(train_on, ours.patch, 1.0).batch(2, (0,))
    with torch.no_grad():
        logits = 3 * torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        found = loss_of(nested(loss={"class_weights": {"inner": 2}}), logits, batch.labels, accelerator)
        wanted = segmentation_loss(logits, batch.labels, class_weights=[1, 2, 1], regions=NESTED.members)
    assert found == wanted


def test_the_peaks_of_an_operating_point_are_of_the_objects_of_regions(nested):
    """As many as lesions are counted: each object once in every region that it belongs to."""
    ours = resolve(nested())
    model, cases = build(ours)[0].eval(), read_labelled(ours, quiet=True).val
    for one in measure_cases(model, cases, NESTED, torch.device("cpu"), "fp32", quiet=True):
        assert one.probabilities is not None
        assert len(one.probabilities.object_peaks) == len(one.measures.lesions_found()) == 3
    outer = replace(cases[0], labels=np.where(cases[0].labels == 1, 1, 0).astype(np.uint8))  # a ring is of one region only
    (one,) = measure_cases(model, [outer], NESTED, torch.device("cpu"), "fp32", quiet=True)
    assert one.probabilities is not None and len(one.probabilities.object_peaks) == 1


def test_a_run_is_trained_judged_compared_and_explained_by_regions(nested, source, tmp_path):
    terms = {"component_weight": 1, "deep_supervision": True, "class_weights": {"inner": 2}}
    ours = nested(loss=terms, model={"channels": [4, 6, 8, 8]}, patch=[16, 16], steps=4)
    run = finetune(ours)
    assert read_config(run / "model").regions == REGIONS
    summary = json.loads((run / "evaluation" / "summary.json").read_text(encoding="utf-8"))
    assert list(summary["classes"]) == list(REGIONS) and "may overlap: whole = edema" in (run / "report.html").read_text(
        "utf-8"
    )
    with open(run / "evaluation" / "cases.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    truth = {row["id"]: {} for row in rows}
    for row in rows:
        truth[row["id"]][row["class"]] = int(row["truth_voxels"])
    for name, its in truth.items():
        mask = np.asarray(Image.open(source / "masks" / f"{name}.png"))
        assert its == {"whole": (mask > 0).sum(), "inner": (mask > 60).sum(), "enhancing": (mask == 255).sum()}

    again = evaluate(run, EvaluateRequest(source=source, salt_file=source.parent / "salt", names="keep"), tmp_path / "again")
    assert json.loads((again / "summary.json").read_text(encoding="utf-8"))["classes"] == summary["classes"]

    other = shutil.copytree(run, tmp_path / "other")
    record = json.loads((compare([run, other], tmp_path / "compared") / "compare.json").read_text(encoding="utf-8"))
    assert record["paired_dice_difference"]["run - other"]["n"] == 6
    changed = json.loads((other / "config.json").read_text(encoding="utf-8"))
    changed["data"]["regions"]["inner"] = ["edema", "core"]  # the same name
    (other / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(InputError, match=r"run is judged by .*inner = core \+ enhancing; .*other by .*inner = edema \+ core"):
        compare([run, other], tmp_path / "unlike")

    scan = source / "images" / "c10a.png"
    request = ExplainRequest(inputs=(scan,), salt_file=source.parent / "salt", lesions=1, class_name="core")
    page_of = explain(run, request, tmp_path / "why")
    notes = json.loads((page_of / "explain.json").read_text(encoding="utf-8"))["notes"]
    assert any("regions (whole = edema + core + enhancing; inner = core + enhancing" in note for note in notes)
    with pytest.raises(InputError, match=r"'whole' is a region: explain one of its classes\. Its classes: background, edema"):
        explain(run, request.model_copy(update={"class_name": "whole"}), tmp_path / "region")


def test_folds_and_their_ensemble_are_judged_by_regions(nested):
    run = train(nested(data={"folds": 2, "regions": TOGETHER}, steps=1))
    for folder in ("cross_validation", "evaluation"):
        summary = json.loads((run / folder / "summary.json").read_text(encoding="utf-8"))
        assert list(summary["classes"]) == list(TOGETHER) and "regions" in summary["policy"]
    assert any("edema and core are of the same regions" in note for note in summary["notes"])
    assert read_config(run / "model").regions == TOGETHER


def test_a_plan_names_the_regions_and_writes_them(nested, tmp_path):
    plan = make_plan(nested())
    assert "by regions: whole = edema + core + enhancing; inner = core + enhancing; enhancing = enhancing\n" in page(plan)
    write_recipe(plan, tmp_path / "mine.yaml")
    assert load_recipe(FinetuneRecipe, "finetune", str(tmp_path / "mine.yaml"), []).data.regions == REGIONS
    assert not any("same data.regions" in one for one in plan.warnings)
    plain, together = (make_plan(nested(data={"regions": given})) for given in (None, TOGETHER))
    assert "judged by regions" not in page(plain)
    assert any("edema and core are of the same data.regions" in one for one in together.warnings)
