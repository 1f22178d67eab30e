import csv
import itertools
import json
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image

from finetune.evaluation.evaluate import EvaluateRequest, Measured, evaluate, mean_dice, measure_cases, telling_cases
from finetune.evaluation.metrics import METRICS, measure_case, values_by_group
from finetune.evaluation.statistics import figure
from finetune.evaluation.summary import policy
from finetune.evaluation.surface import TOLERANCE
from finetune.evaluation.targets import targets_of
from finetune.inference.predict import predict_case
from finetune.inference.window import Inference
from finetune.recipe import FinetuneRecipe
from resunet.checkpoint import read_config
from resunet.cli import main
from resunet.config import PercentileZScore
from resunet.data.cases import Case, LoadedCase, load_cases
from resunet.data.perceptual import look
from resunet.data.source import open_source
from resunet.errors import CheckFailed, InputError
from resunet.model import load_model

CPU = torch.device("cpu")
BINARY = targets_of({0: "background", 255: "lesion"})


def request_for(run, **changes: object) -> EvaluateRequest:
    data = FinetuneRecipe.model_validate_json((run / "config.json").read_text(encoding="utf-8")).data
    return EvaluateRequest.model_validate(data.model_dump(include={"source", "salt_file", "names"}) | changes)


def copy_of_source(run, folder):
    source = FinetuneRecipe.model_validate_json((run / "config.json").read_text(encoding="utf-8")).data.source
    shutil.copytree(source, folder)
    return folder


def summary_of(folder) -> dict:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def measured_case(name: str, true: int, predicted: int) -> Measured:
    """Of `true` pixels the first `predicted` are found."""
    truth, prediction = np.zeros((1, 40), np.uint8), np.zeros((1, 40), np.uint8)
    truth[0, :true] = 1
    prediction[0, :predicted] = 1
    case = Case(name, name, name, name, None, files=(), mask=None)
    loaded = LoadedCase(case, truth[None], (1, 1), [], truth, "", "", look(truth[None]))
    return Measured(loaded, measure_case(truth, prediction, 2, (1, 1)))


@pytest.mark.parametrize("count", range(13))
def test_telling_cases_are_the_worst_the_median_and_the_best(count):
    measured = [measured_case(str(i), 30, (7 * i) % 13 + 1) for i in range(count)]  # all of different Dice
    told = telling_cases([*measured, measured_case("empty", 0, 0)])
    names = [one.case.case.id for _, one in told]
    assert len(set(names)) == len(names) == min(count, 9) and "empty" not in names
    order = [one.case.case.id for one in sorted(measured, key=lambda one: one.measures.macro("dice"))]
    of = {kind: [one.case.case.id for name, one in told if name.startswith(kind)] for kind in ("worst", "median", "best")}
    assert [name for name, _ in told] == [f"{kind}-{i + 1}" for kind, ids in of.items() for i in range(len(ids))]
    assert of["worst"] == order[: len(of["worst"])] and of["best"] == order[::-1][: len(of["best"])]
    if count >= 9:
        assert all(len(ids) == 3 for ids in of.values())
    if of["median"]:
        at = [order.index(name) for name in of["median"]]
        assert abs(np.mean(at) - (count - 1) / 2) <= 1


def test_cases_are_measured_in_their_order(runs):
    request, config = request_for(runs[0]), read_config(runs[0] / "model")
    cases = load_cases(open_source(request, masks=True).cases, "grey", PercentileZScore(), config.classes)
    model = load_model(runs[0])
    measured = measure_cases(model, cases, BINARY, CPU, "fp32", quiet=True)
    assert [one.case for one in measured] == cases
    for one in measured:
        alone = measure_case(one.case.labels, predict_case(model, one.case, CPU, "fp32"), 2, (1, 1))
        assert one.measures == alone and one.row() == (one.case.case.id, one.case.case.group, alone)
    assert len({one.measures.macro("dice") for one in measured}) > 5
    assert [one.case for one in measure_cases(model, cases[::-1], BINARY, CPU, "fp32", quiet=True)] == cases[::-1]
    assert measure_cases(model, [], BINARY, CPU, "fp32") == []
    by_group = values_by_group([one.row() for one in measured], lambda case: case.macro("dice"))
    assert mean_dice(model, cases, BINARY, CPU, "fp32") == pytest.approx(figure(by_group)["mean"], rel=1e-12)
    assert mean_dice(model, [], BINARY, CPU, "fp32") == 0
    for measure in (mean_dice, measure_cases):
        with pytest.raises(InputError, match=r"c\d+a\.png: memory=0\.1 GiB: too little for a scan of"):
            measure(model, cases, BINARY, CPU, "fp32", inference=Inference(memory=0.1))


def test_an_evaluation_writes_its_files(runs):
    out = runs[0] / "evaluation"
    assert {path.name for path in out.iterdir()} == {"summary.json", "cases.csv", "overlays"}
    summary = summary_of(out)
    assert set(summary) == {
        "schema_version", "split", "arithmetic", "cases", "groups", "cases_sha256", "in_mm", "surface_tolerance_mm", *METRICS,
        "volume_error", "classes", "lesions", "false_alarms", "calibration", "policy", "notes",
    }  # fmt: skip
    assert (summary["schema_version"], summary["split"], summary["cases"], summary["groups"]) == (1, "test", 6, 6)
    assert summary["policy"] == policy(TOLERANCE) and summary["notes"] == []
    for metric in METRICS:
        assert set(summary[metric]) == {"mean", "ci95", "n"}
    with open(out / "cases.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["group"], row["class"]) for row in rows] == [
        (f"c{i:02}a", f"patient{i}", "lesion") for i in range(8, 14)
    ]
    assert np.mean([float(row["dice"]) for row in rows]) == pytest.approx(summary["dice"]["mean"])
    overlays = sorted(path.name for path in (out / "overlays").iterdir())
    assert len(overlays) == 6 and len({name.rpartition("-")[2] for name in overlays}) == 6
    worst = min(rows, key=lambda row: float(row["dice"]))["id"]
    assert f"worst-1-{worst}.png" in overlays
    with Image.open(out / "overlays" / overlays[0]) as picture:
        assert picture.size == (3 * 24 + 2 * 4, 24)


def test_evaluating_again_gives_the_same(runs, tmp_path):
    out = evaluate(runs[0], request_for(runs[0]), tmp_path / "again")
    assert out == tmp_path / "again"
    assert summary_of(out) == summary_of(runs[0] / "evaluation")
    assert (out / "cases.csv").read_bytes() == (runs[0] / "evaluation" / "cases.csv").read_bytes()


def test_the_default_folder_is_named_after_the_split(runs, tmp_path):
    run = shutil.copytree(runs[0], tmp_path / "run", symlinks=True)
    assert evaluate(run, request_for(run, split="val")) == run / "evaluation-val"
    summary = summary_of(run / "evaluation-val")
    assert (summary["split"], summary["cases"]) == ("val", 3)
    with pytest.raises(InputError, match=r"evaluation-val: exists already"):
        evaluate(run, request_for(run, split="val"))


def test_a_source_without_splits_is_evaluated_whole_and_says_so(runs, tmp_path):
    source = copy_of_source(runs[0], tmp_path / "source")
    (source / "splits.json").unlink()
    summary = summary_of(evaluate(runs[0], request_for(runs[0], source=source), tmp_path / "out"))
    assert summary["cases"] == 15 and summary["groups"] == 14
    assert "--split test: without splits.json all 15 cases were evaluated." in summary["notes"]
    assert any("leak: 6 test cases are among the model's training data" in note for note in summary["notes"])
    chosen_by = "leak: 3 test cases are among the scans whose labels trained or chose the model"
    assert chosen_by in summary["notes"], "val of the run"


def test_what_the_model_was_trained_on_is_no_test_case(runs, tmp_path):
    with pytest.raises(CheckFailed, match=r"(?s)6 pool cases are among the model's training data.*c00a\.png"):
        evaluate(runs[0], request_for(runs[0], split="pool"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    summary = summary_of(evaluate(runs[0], request_for(runs[0], split="pool"), tmp_path / "out", allow_leak=True))
    assert summary["notes"] == ["leak: 6 pool cases are among the model's training data"]


def test_what_the_model_was_chosen_by_is_no_test_case_and_a_lost_record_is_told(runs, tmp_path):
    """Another split is made later, and the training cases are kept out of its test: the old val is not."""
    source = copy_of_source(runs[0], tmp_path / "source")
    splits = json.loads((source / "splits.json").read_text(encoding="utf-8"))
    (source / "splits.json").write_text(json.dumps(splits | {"val": splits["test"][:1], "test": splits["val"]}))
    request = request_for(runs[0], source=source)
    with pytest.raises(CheckFailed, match="3 test cases are among the scans whose labels trained or chose the model"):
        evaluate(runs[0], request, tmp_path / "out")
    bare = tmp_path / "bare"
    shutil.copytree(runs[0] / "model", bare)
    (bare / "archive.parquet").unlink()
    with pytest.raises(CheckFailed, match="3 test cases are among the scans whose labels"):
        evaluate(bare, request, tmp_path / "out")
    summary = summary_of(evaluate(bare, request_for(runs[0]), tmp_path / "out"))
    assert any(note.startswith("The model has no archive.parquet beside it") for note in summary["notes"])


def test_an_empty_split_and_an_encoder_are_the_users_fault(runs, tmp_path, encoder):
    source = copy_of_source(runs[0], tmp_path / "source")
    splits = json.loads((source / "splits.json").read_text(encoding="utf-8"))
    (source / "splits.json").write_text(json.dumps(splits | {"val": []}))
    with pytest.raises(InputError, match=r"--split val: is empty in .*splits\.json"):
        evaluate(runs[0], request_for(runs[0], source=source, split="val"), tmp_path / "out")
    with pytest.raises(InputError, match=r"holds an encoder, not a segmenter"):
        evaluate(encoder, request_for(runs[0]), tmp_path / "out")


def test_another_salt_is_said_to_give_no_evidence(runs, tmp_path):
    other = tmp_path / "other_salt"
    other.write_text("ef" * 32)
    summary = summary_of(evaluate(runs[0], request_for(runs[0], salt_file=other), tmp_path / "out"))
    assert any("group evidence unavailable" in note for note in summary["notes"])


def test_a_data_set_as_nnunet_lays_it_out(runs, tmp_path):
    """The same test images give the same figures; the model, and not the request, says how channels are read."""
    source = copy_of_source(runs[0], tmp_path / "source")
    for part in ("Tr", "Ts"):
        (source / f"images{part}").mkdir()
        (source / f"labels{part}").mkdir()
    splits = json.loads((source / "splits.json").read_text(encoding="utf-8"))
    for stem in itertools.chain(*splits.values()):
        part = "Ts" if stem in splits["test"] else "Tr"
        (source / "images" / f"{stem}.png").rename(source / f"images{part}" / f"{stem}_0000.png")
        (source / "masks" / f"{stem}.png").rename(source / f"labels{part}" / f"{stem}.png")
    (source / "splits.json").unlink()
    labels = {"background": 0, "lesion": 255}
    about = {"channel_names": {"0": "MR"}, "labels": labels, "file_ending": ".png", "numTraining": 9}
    (source / "dataset.json").write_text(json.dumps(about))
    out = evaluate(runs[0], request_for(runs[0], source=source, channels=3), tmp_path / "out")
    summary, before = summary_of(out), summary_of(runs[0] / "evaluation")
    assert {key: value for key, value in summary.items() if key != "notes"} == {k: v for k, v in before.items() if k != "notes"}
    assert any("imagesTs is the test part" in note for note in summary["notes"])
    with pytest.raises(InputError, match=r"--split val: is empty in .*splits\.json"):
        evaluate(runs[0], request_for(runs[0], source=source, split="val"), tmp_path / "val")
    (source / "dataset.json").write_text(json.dumps(about | {"labels": {"background": 0, "lesion": 1}}))
    with pytest.raises(InputError, match=r"has the labels \{background: 0, lesion: 1\}: the recipe does not say what 1 is"):
        evaluate(runs[0], request_for(runs[0], source=source), tmp_path / "other")


def test_probabilities_are_those_of_the_decision(runs):
    """What calibration counts is of the same pass as the labels: voxels above 0.5 are the predicted ones."""
    summary = summary_of(runs[0] / "evaluation")
    with open(runs[0] / "evaluation" / "cases.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    bins = summary["calibration"]["bins"]
    assert sum(one["voxels"] for one in bins) == 6 * 24 * 24
    assert sum(one["voxels"] for one in bins[10:]) == sum(int(row["predicted_voxels"]) for row in rows)
    positive = sum(one["voxels"] * one["observed"] for one in bins if one["voxels"])
    assert positive == pytest.approx(sum(int(row["truth_voxels"]) for row in rows))
    assert 0 < summary["calibration"]["ece"]["mean"] < 1 and summary["calibration"]["ece"]["n"] == 6


def test_a_tolerance_is_a_setting(runs, tmp_path):
    strict = summary_of(evaluate(runs[0], request_for(runs[0], tolerance=0.25), tmp_path / "out"))
    usual = summary_of(runs[0] / "evaluation")
    assert strict["surface_dice"]["mean"] < usual["surface_dice"]["mean"] and strict["hd95"] == usual["hd95"]
    assert (strict["surface_tolerance_mm"], usual["surface_tolerance_mm"]) == (0.25, 1)
    assert "within 0.25 mm" in strict["policy"]["surface"] and "within 1 mm" in usual["policy"]["surface"]


def empty_some(source, stems) -> None:
    for stem in stems:
        Image.fromarray(np.zeros((24, 24), np.uint8)).save(source / "masks" / f"{stem}.png")


def test_an_operating_point_is_chosen_on_val_and_counted_on_test(runs, tmp_path):
    source = copy_of_source(runs[0], tmp_path / "source")
    empty_some(source, ["c05a", "c06a", "c08a", "c09a", "c10a"])
    out = evaluate(runs[0], request_for(runs[0], source=source, false_alarms_per_1000=100), tmp_path / "out")
    summary = summary_of(out)
    point = summary["false_alarms"]["operating_point"]
    model = load_model(runs[0])
    config = read_config(runs[0] / "model")

    def peak(stem: str, on=slice(None)) -> float:
        (case,) = [case for case in open_source(request_for(runs[0], source=source), masks=True).cases if case.stem == stem]
        (loaded,) = load_cases([case], "grey", config.normalisation, config.classes)
        with torch.no_grad():
            found = model.eval()(torch.from_numpy(loaded.image_slice(0)[None])).sigmoid()[0, 0].numpy()
        return float(found[loaded.labels > 0].max() if on == "target" else found.max())

    assert point["threshold"] == pytest.approx(max(peak("c05a"), peak("c06a")), abs=1e-5)
    assert point["chosen_on"] == {"split": "val", "images_without_target": 2, "alarmed": 0}
    alarmed = [peak(stem) > point["threshold"] for stem in ("c08a", "c09a", "c10a")]
    assert point["alarmed"] == sum(alarmed)
    assert point["false_alarms_per_1000"]["mean"] == pytest.approx(1000 * np.mean(alarmed))
    found = [peak(stem, "target") > point["threshold"] for stem in ("c11a", "c12a", "c13a")]
    assert point["found"] == {"mean": pytest.approx(np.mean(found)), "ci95": None, "n": 3}
    assert point["lesions_found"] == point["found"]  # each has one
    assert any("chosen on 2 val cases" in note for note in summary["notes"])
    assert summary["false_alarms"]["images_without_target"] == 3


def test_an_operating_point_that_cannot_be_chosen(runs, tmp_path):
    with pytest.raises(InputError, match=r"per-1000 5: val has no case without target"):
        evaluate(runs[0], request_for(runs[0], false_alarms_per_1000=5), tmp_path / "out")
    with pytest.raises(InputError, match=r"threshold is chosen on the val part"):
        evaluate(runs[0], request_for(runs[0], false_alarms_per_1000=5, split="val"), tmp_path / "out")
    with pytest.raises(InputError, match=r"are no probabilities to set a threshold"):
        evaluate(masks_of(runs[0], tmp_path / "masks"), request_for(runs[0], false_alarms_per_1000=5), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def masks_of(run, folder, ending: str = "png"):
    """The test masks of the run's model, as another program would write them."""
    config = read_config(run / "model")
    cases = load_cases(open_source(request_for(run), masks=True).part("test"), "grey", config.normalisation, config.classes)
    folder.mkdir()
    for case in cases:
        mask = predict_case(load_model(run), case, CPU, "fp32") * 255
        Image.fromarray(mask).save(folder / f"{case.case.stem}.{ending}")
    return folder


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_masks_of_another_program_are_measured_as_a_models_are(runs, tmp_path, ending):
    masks = masks_of(runs[0], tmp_path / "masks", ending)
    out = evaluate(masks, request_for(runs[0]))
    assert out == tmp_path / "masks-evaluation-test"
    theirs, ours = summary_of(out), summary_of(runs[0] / "evaluation")
    assert theirs["calibration"] is None and theirs["arithmetic"] is None and list(theirs["classes"]) == ["255"]
    theirs["classes"]["lesion"] = theirs["classes"].pop("255")
    assert theirs["policy"].pop("postprocessing").startswith("Not known") and ours["policy"].pop("postprocessing")
    same = {key: value for key, value in theirs.items() if key not in ("calibration", "arithmetic", "notes")}
    assert same == {key: ours[key] for key in same} and set(theirs) == set(ours)
    assert "masks of another program, 6 of them" in theirs["notes"][0]
    overlays = [sorted(path.name for path in (folder / "overlays").iterdir()) for folder in (out, runs[0] / "evaluation")]
    assert overlays[0] == overlays[1]
    for name in overlays[0]:
        assert (out / "overlays" / name).read_bytes() == (runs[0] / "evaluation" / "overlays" / name).read_bytes()


def test_missing_masks_are_listed_and_nothing_is_written(runs, tmp_path, capsys):
    masks = masks_of(runs[0], tmp_path / "masks")
    (masks / "c08a.png").unlink()
    (masks / "c13a.png").unlink()
    before = sorted(tmp_path.rglob("*"))
    request = request_for(runs[0])
    where = ["--data", str(request.source), "--salt-file", str(request.salt_file), "--out", str(tmp_path / "out")]
    assert main(["evaluate", str(masks), *where]) == 2
    assert "masks: has no prediction for 2 of 6 cases: c08a, c13a. Predict them too" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match=r"empty: holds neither a model \(config\.json\) nor masks"):
        evaluate(empty, request_for(runs[0]))


@pytest.mark.parametrize(
    "changes, leak, flag",
    [({}, True, "--allow-leak"), ({"precision": "bf16"}, False, "--precision bf16"), ({"memory": 2}, False, r"--memory 2\.0")],
)
def test_flags_of_models_are_not_of_masks(runs, tmp_path, changes, leak, flag):
    masks = masks_of(runs[0], tmp_path / "masks")
    with pytest.raises(InputError, match=rf"{flag}: .*masks holds masks that another program made"):
        evaluate(masks, request_for(runs[0], **changes), tmp_path / "out", allow_leak=leak)
    assert not (tmp_path / "out").exists()


def test_extra_masks_are_named_where_names_may_be_kept(runs, tmp_path):
    masks = masks_of(runs[0], tmp_path / "masks")
    shutil.copy(masks / "c08a.png", masks / "stranger.png")
    shutil.copy(masks / "c08a.png", masks / "c00a.png")  # of a pool case: not asked for, and known
    (masks / "plans.json").write_text("{}")
    notes = {}
    for names in ("keep", "hash"):
        notes[names] = summary_of(evaluate(masks, request_for(runs[0], names=names), tmp_path / names))["notes"]
    assert notes["keep"][-1] == "1 predictions belong to no case: stranger.png."
    assert notes["hash"][-1] == "1 predictions belong to no case."


def test_the_command_line_takes_every_setting(runs, tmp_path, capsys):
    masks, request = masks_of(runs[0], tmp_path / "masks"), request_for(runs[0])
    where = ["--data", str(request.source), "--salt-file", str(request.salt_file), "--out", str(tmp_path / "out")]
    assert main(["evaluate", str(masks), *where, "--tolerance", "0.5", "--ignore", "7", "--names", "keep"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out")
    assert summary_of(tmp_path / "out")["surface_tolerance_mm"] == 0.5
    where[-1] += "-2"
    assert main(["evaluate", str(runs[0]), *where, "--false-alarms-per-1000", "5"]) == 2
    assert "val has no case without target" in capsys.readouterr().err
    assert main(["evaluate", str(runs[0]), *where, "--ignore", "7"]) == 2
    assert main(["evaluate", str(runs[0]), *where, "--memory", "0.5"]) == 2
    assert "memory=0.5 GiB: too little" in capsys.readouterr().err


def test_masks_that_do_not_fit_their_images(runs, tmp_path):
    masks = masks_of(runs[0], tmp_path / "masks")
    Image.fromarray(np.zeros((24, 25), np.uint8)).save(masks / "c09a.png")
    with pytest.raises(InputError, match=r"c09a\.png: the prediction is 24×25, its image 24×24\."):
        evaluate(masks, request_for(runs[0]))
    Image.fromarray(np.ones((24, 24), np.uint8)).save(masks / "c09a.png")
    with pytest.raises(InputError, match=r"c09a\.png: the prediction holds 1, the source's masks only 0, 255\."):
        evaluate(masks, request_for(runs[0]))
    shutil.copy(masks / "c08a.png", masks / "c09a.png")
    shutil.copy(masks / "c08a.png", masks / "c09a.bmp")
    with pytest.raises(InputError, match=r"c09a\.png: c09a\.bmp has the same stem"):
        evaluate(masks, request_for(runs[0]))
    assert not (tmp_path / "masks-evaluation-test").exists()


def volume_source(root, truth: np.ndarray, spacing=(1.0, 1.0, 5.0)):
    """One NIfTI volume with its mask. spacing: x, y, z."""
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    write_volume(root / "images" / "a.nii.gz", np.random.default_rng(0).normal(size=truth.shape).astype(np.float32), spacing)
    write_volume(root / "masks" / "a.nii.gz", truth, spacing)
    return root


def write_volume(path, values: np.ndarray, spacing) -> None:
    image = sitk.GetImageFromArray(values)
    image.SetSpacing(spacing)
    path.parent.mkdir(exist_ok=True)
    sitk.WriteImage(image, str(path))


def test_volumes_are_compared_in_millimetres_and_by_their_geometry(tmp_path):
    truth, predicted = np.zeros((2, 6, 8, 7), np.uint8)
    truth[2, 3, 3] = predicted[4, 3, 3] = 1  # 10 mm
    truth[:, 7] = 9  # nobody labelled that
    source = volume_source(tmp_path / "source", truth)
    masks = tmp_path / "masks"
    write_volume(masks / "a.nrrd", predicted, (1, 1, 5))
    request = EvaluateRequest(source=source, ignore=(9,))
    summary = summary_of(evaluate(masks, request, tmp_path / "out"))
    assert list(summary["classes"]) == ["1"] and summary["cases"] == 1
    assert (summary["hd95"]["mean"], summary["dice"]["mean"]) == (10, 0)
    assert summary["volume_error"]["unit"] == "ml" and summary["lesions"]["by_volume"][0]["n"] == 1
    with_class_9 = evaluate(masks, request.model_copy(update={"ignore": ()}), tmp_path / "other")
    assert list(summary_of(with_class_9)["classes"]) == ["1", "9"]
    write_volume(masks / "a.nrrd", predicted, (1, 1, 4))
    with pytest.raises(InputError, match=r"a spacing of 4, 1, 1 mm, its image 5, 1, 1 mm"):
        evaluate(masks, request, tmp_path / "third")


def test_masks_of_nothing_but_background_have_no_class(tmp_path):
    source = volume_source(tmp_path / "source", np.zeros((3, 4, 5), np.uint8))
    request = EvaluateRequest(source=source)
    with pytest.raises(InputError, match=r"source: the masks hold nothing but background"):
        evaluate(source / "masks", request, tmp_path / "out")


def test_ignored_values_are_the_models_own(runs, tmp_path):
    with pytest.raises(InputError, match=r"--ignore \[7\]: is for masks of another program"):
        evaluate(runs[0], request_for(runs[0], ignore=(7,)), tmp_path / "out")
