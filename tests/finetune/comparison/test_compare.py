import base64
import io
import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.comparison.arms import numbered, read_arm, recipe_differences
from finetune.comparison.compare import compare, hardly_learned, paired_section, verdict
from finetune.evaluation.evaluate import EvaluateRequest, evaluate
from finetune.evaluation.overlay import error_picture
from finetune.evaluation.targets import targets_of
from finetune.inference.predict import predict_case
from finetune.loop import finetune
from finetune.recipe import FinetuneRecipe
from finetune.start import origin_of
from resunet.data.cases import load_cases
from resunet.data.source import open_source
from resunet.errors import InputError
from resunet.model import load_model


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory):
    return compare(runs, tmp_path_factory.mktemp("compare") / "out", notes=["A note of the caller's."])


def record_of(folder) -> dict:
    return json.loads((folder / "compare.json").read_text(encoding="utf-8"))


def copy_of(run, folder):
    return shutil.copytree(run, folder, symlinks=True)


def change_cases(run, change) -> None:
    path = run / "evaluation" / "cases.csv"
    path.write_text(change(path.read_text(encoding="utf-8")))


def test_the_record_holds_to_the_contract(runs, compared):
    record = record_of(compared)
    assert set(record) == {"schema_version", "runs", "dice", "paired_dice_difference", "cost"}
    assert (record["schema_version"], record["runs"]) == (1, ["first", "second"])
    for run in runs:
        assert record["dice"][run.name] == json.loads((run / "evaluation" / "summary.json").read_text(encoding="utf-8"))["dice"]
    (difference,) = record["paired_dice_difference"].values()
    assert list(record["paired_dice_difference"]) == ["first - second"] and difference["n"] == 6
    # every test case has a target and a group of its own, so that the paired difference is that of the means
    means = [record["dice"][run.name]["mean"] for run in runs]
    assert difference["mean"] == pytest.approx(means[0] - means[1]) and difference["mean"] != 0
    assert difference["ci95"][0] < difference["mean"] < difference["ci95"][1]


def test_the_report_holds_what_it_should(compared):
    page = (compared / "report.html").read_text(encoding="utf-8")
    for words in (
        "A note of the caller",
        "Paired",
        "Trained from scratch.",
        "seconds of training",
        "Dice of the val scans",
    ):
        assert words in page
    assert page.count("<img") == 6 and 'src="http' not in page and 'href="http' not in page


def test_identical_runs_do_not_differ(runs, tmp_path):
    out = compare([runs[0], copy_of(runs[0], tmp_path / "copy")], tmp_path / "out")
    (difference,) = record_of(out)["paired_dice_difference"].values()
    assert difference == {"mean": 0, "ci95": [0, 0], "n": 6, "wins": 0}
    assert "No difference shown between first and copy" in (out / "report.html").read_text(encoding="utf-8")


def test_the_first_is_measured_against_each_of_the_others(runs, tmp_path):
    out = compare([*runs, copy_of(runs[0], tmp_path / "copy")], tmp_path / "out", names=["a", "b", "c"])
    record = record_of(out)
    assert record["runs"] == ["a", "b", "c"]
    assert set(record["paired_dice_difference"]) == {"a - b", "a - c"}
    assert record["paired_dice_difference"]["a - c"]["mean"] == 0


def test_the_sign_is_that_of_the_first(runs, compared, tmp_path):
    backwards = record_of(compare(runs[::-1], tmp_path / "out"))["paired_dice_difference"]["second - first"]
    forwards = record_of(compared)["paired_dice_difference"]["first - second"]
    assert backwards["mean"] == pytest.approx(-forwards["mean"]) and backwards["wins"] + forwards["wins"] <= 6


def test_other_test_cases_are_refused(runs, tmp_path):
    other = copy_of(runs[1], tmp_path / "other")
    change_cases(other, lambda text: text.replace("c08a", "zebra"))
    with pytest.raises(
        InputError, match=r"different test cases:\n  only .*: 1: c08a\n.*\nEvaluate both|different test cases:\n  only"
    ) as error:
        compare([runs[0], other], tmp_path / "out")
    assert str(runs[0]) in str(error.value) and str(other) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_groups_that_are_called_after_a_path_are_the_same_elsewhere(runs, compared, tmp_path):
    """Without groups.csv a group is the HMAC of where its image lies: a copied folder gives other names."""
    groups = sorted(set(read_arm(runs[1], "second").groups.values()))
    moved, merged = copy_of(runs[1], tmp_path / "second"), copy_of(runs[1], tmp_path / "merged")
    change_cases(moved, lambda text: re.sub("|".join(groups), lambda group: f"elsewhere-{group[0]}", text))
    record = record_of(compare([runs[0], moved], tmp_path / "out"))
    assert record["paired_dice_difference"] == record_of(compared)["paired_dice_difference"]
    change_cases(merged, lambda text: text.replace(groups[0], groups[1]))
    with pytest.raises(InputError, match="group the same test cases otherwise"):
        compare([runs[0], merged], tmp_path / "refused")


def test_other_classes_are_refused(runs, tmp_path):
    other = copy_of(runs[1], tmp_path / "other")
    change_cases(other, lambda text: text.replace("lesion,", "tumour,"))
    with pytest.raises(InputError, match=r"different test cases:\n  in the classes they hold"):
        compare([runs[0], other], tmp_path / "out")


@pytest.mark.parametrize("missing", ["config.json", "run.json", "evaluation/summary.json", "evaluation/cases.csv"])
def test_a_run_that_is_not_finished_is_refused(runs, tmp_path, missing):
    other = copy_of(runs[1], tmp_path / "other")
    (other / missing).unlink()
    with pytest.raises(InputError, match=rf"other: its run is not finished: {missing} is not there"):
        compare([runs[0], other], tmp_path / "out")


def test_two_runs_and_a_new_folder_are_needed(runs, tmp_path):
    with pytest.raises(InputError, match=r"at least two runs, 1 given"):
        compare(runs[:1], tmp_path / "out")
    with pytest.raises(InputError, match=r"exists already"):
        compare(runs, tmp_path)


def test_without_the_images_the_pictures_are_left_out(runs, tmp_path):
    gone = copy_of(runs[0], tmp_path / "gone")
    config = json.loads((gone / "config.json").read_text(encoding="utf-8"))
    config["data"]["source"] = str(tmp_path / "nowhere")
    (gone / "config.json").write_text(json.dumps(config))
    page = (compare([gone, runs[1]], tmp_path / "out") / "report.html").read_text(encoding="utf-8")
    assert "Pictures are left out" in page and "<img" not in page


@pytest.mark.parametrize(
    "mean, interval, words",
    [
        (0.1, [0.05, 0.15], r"a is better than b: Dice difference 0.100 [0.050, 0.150], n = 6 groups; better in 4."),
        (-0.1, [-0.15, -0.05], r"a is worse than b: Dice difference -0.100 [-0.150, -0.050], n = 6 groups; better in 4."),
        (0.1, [-0.05, 0.25], "No difference shown between a and b: the interval holds zero."),
        (0.0, [0.0, 0.0], "No difference shown between a and b"),
        (0.5, None, "Too few groups to say whether that is chance."),
    ],
)
def test_verdicts(mean, interval, words):
    assert words in verdict("a", "b", {"mean": mean, "ci95": interval, "n": 6, "wins": 4})


def test_networks_that_hardly_learned_are_told(runs):
    arms = [read_arm(runs[0], "a"), read_arm(runs[1], "b"), read_arm(runs[1], "c")]
    for arm, mean in zip(arms, (0.003, 0.6, None), strict=True):
        arm.summary["dice"] = {"mean": mean}
    (told,) = hardly_learned(arms)
    assert "Hardly learned, with too few steps or too few labels: a (Dice 0.003). Their difference says nothing" in told
    assert hardly_learned(arms[1:]) == []


def test_dice_is_over_cases_with_a_target_then_over_groups(runs, tmp_path):
    run = copy_of(runs[0], tmp_path / "run")
    names = ["id", "group", "class", "dice", "truth_voxels"]
    rows = [
        ["x", "g", "edema", "0.5", "9"],
        ["x", "g", "tumour", "0.0", "0"],  # a false alarm, which stands elsewhere
        ["y", "g", "edema", "0.2", "9"],
        ["y", "g", "tumour", "0.4", "3"],
        ["z", "h", "edema", "", "0"],
        ["z", "h", "tumour", "", "0"],
    ]
    (run / "evaluation" / "cases.csv").write_text("\n".join(",".join(row) for row in [names, *rows]) + "\n")
    arm = read_arm(run, "a")
    assert arm.case_dice() == pytest.approx({"x": 0.5, "y": 0.3})
    assert arm.group_dice() == pytest.approx({"g": 0.4}) and set(arm.groups) == {"x", "y", "z"}


def test_without_a_target_in_test_there_is_no_picture(runs):
    arms = [SimpleNamespace(name=name, group_dice=dict, case_dice=dict) for name in ("a", "b")]
    assert paired_section(arms, {}) == []
    arms = [read_arm(run, run.name) for run in runs]
    (section,) = paired_section(arms, {arms[1].name: {"wins": 1}})
    assert len(section.pictures) == 1


def test_a_run_that_began_with_given_weights_is_not_from_scratch(runs, tmp_path):
    given = replace(arm := read_arm(runs[0], "given"), recipe=arm.recipe.model_copy(deep=True))
    object.__setattr__(given.recipe.model, "weights", "imagenet")
    rows = {row[0]: row[1:] for row in recipe_differences([given, read_arm(runs[1], "scratch")])}
    assert rows["begins"] == ["given MobileNetV3 weights", "from scratch"]
    assert origin_of(given.recipe, None) == "The encoder began with given MobileNetV3 weights, the rest fresh."
    assert origin_of(arm.recipe, None) == "Trained from scratch."


def test_what_differs_is_listed(runs):
    rows = {row[0]: row[1:] for row in recipe_differences([read_arm(run, run.name) for run in runs])}
    assert rows["Recipe key"] == ["first", "second"]
    assert (rows["seed"], rows["validate_every"], rows["steps"]) == (["0", "1"], ["1", "2"], ["8", "2"])
    assert "out" not in rows and "batch" not in rows and "data.source" not in rows


def test_files_that_differ_are_listed_by_their_digests(runs, tmp_path):
    changed = copy_of(runs[0], tmp_path / "changed")
    record = json.loads((changed / "run.json").read_text(encoding="utf-8"))
    record["inputs"] |= {"encoder/model.safetensors": "ab" * 32}
    (changed / "run.json").write_text(json.dumps(record))
    rows = {row[0]: row[1:] for row in recipe_differences([read_arm(run, run.name) for run in (runs[0], changed)])}
    assert rows["sha256 of encoder/model.safetensors"] == ["None", "ab" * 6] and "sha256 of test" not in rows


def test_other_masks_of_the_same_names_are_refused(runs, tmp_path):
    changed = copy_of(runs[0], tmp_path / "changed")
    path = changed / "evaluation" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"cases_sha256": "ab" * 32}))
    with pytest.raises(InputError, match=r"other images or masks of the same names: sha256 .* and abababababab"):
        compare([runs[0], changed], tmp_path / "out")


def test_a_case_that_is_listed_twice_is_refused(runs, tmp_path):
    run = copy_of(runs[0], tmp_path / "run")
    change_cases(run, lambda text: text + text.splitlines()[-1] + "\n")
    with pytest.raises(InputError, match="has a case twice"):
        read_arm(run, "run")


def test_names_are_all_different():
    assert numbered(["a", "b", "a", "a-2", "a"]) == ["a", "b", "a-3", "a-2", "a-4"]


def test_the_unet_can_be_compared(recipe, tmp_path):
    first = recipe(name="resunet", steps=1)
    unet = first.model_dump(mode="json") | {"out": str(tmp_path / "unet"), "model": {"name": "unet", "channels": [4, 8]}}
    out = compare([finetune(first), finetune(FinetuneRecipe.model_validate(unet))], tmp_path / "out")
    assert record_of(out)["runs"] == ["resunet", "unet"]


@pytest.mark.parametrize("place", [0, 1])
def test_every_run_is_pictured_with_its_own_normalisation(recipe, tmp_path, place):
    fixed = {"kind": "fixed", "low": 0, "high": 255, "mean": 500, "std": 20}
    first = finetune(recipe(name="first", steps=1))
    second = finetune(recipe(name="second", steps=8, normalisation=fixed))
    arms = [first, second] if place else [second, first]
    page = (compare(arms, tmp_path / "out") / "report.html").read_text(encoding="utf-8")
    ours = read_arm(second, "second").recipe
    cases = load_cases(open_source(ours.data, masks=True).cases, "grey", ours.normalisation, ours.data.classes)
    by_id = {case.case.id: case for case in cases}
    shown = re.findall(r'<img alt="(c\d+a), Dice[^"]*" src="data:image/png;base64,([^"]+)"', page)
    assert len(shown) == 6
    for name, data in shown:
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            scale = picture.height // 24
            panel = np.asarray(picture)[::scale, ::scale][:, (2 + place) * (24 + 4) :][:, :24]
        case = by_id[name]
        predicted = predict_case(load_model(second), case, torch.device("cpu"), "fp32")
        wanted = error_picture(
            np.zeros((24, 24, 3), np.uint8), case.labels, predicted, targets_of({0: "background", 255: "lesion"})
        )
        # blue over grey is blue: what is called missed in the picture is what the run missed
        missed = panel[..., 2].astype(int) - panel[..., 0] > 20
        assert (missed == (wanted[..., 2] > wanted[..., 0])).all(), name


def test_a_run_that_did_not_read_test_is_told_how_it_may(runs, recipe, tmp_path):
    run = finetune(recipe(name="unread", steps=2, evaluate_test=False))
    with pytest.raises(InputError, match=r"unread: was not evaluated on test .* resunet evaluate .*unread --data SOURCE --out"):
        compare([runs[0], run], tmp_path / "out")
    settings = recipe().data.model_dump(include={"source", "salt_file", "names"})
    evaluate(run, EvaluateRequest(**settings), run / "evaluation")
    assert (compare([runs[0], run], tmp_path / "out") / "report.html").is_file()
