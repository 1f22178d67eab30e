import json
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from finetune.choices import choose_on_val
from finetune.evaluation.evaluate import EvaluateRequest, evaluate
from finetune.inference.postprocess import choose_postprocessing, predicted_objects
from finetune.inference.predict import PredictRequest, predict
from finetune.inference.window import predict_values
from finetune.labelled import read_labelled, resolve
from finetune.loop import finetune
from resunet.checkpoint import read_config
from resunet.cli import main
from resunet.errors import InputError
from resunet.model import load_model
from resunet.runtime import ObjectRule, remove_objects

CPU = torch.device("cpu")


def empty_some(source, *stems) -> None:
    for stem in stems:
        Image.fromarray(np.zeros((24, 24), np.uint8)).save(source / "masks" / f"{stem}.png")


def summary_of(folder) -> dict:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def mask_of(folder, stem: str) -> np.ndarray:
    return np.asarray(Image.open(folder / f"{stem}.png"))


@pytest.fixture
def with_rule(runs, tmp_path):
    """A copy of a finished run whose model removes objects below 30 voxels."""
    run = shutil.copytree(runs[0], tmp_path / "ruled", symlinks=True)
    raw = json.loads((run / "model" / "config.json").read_text(encoding="utf-8"))
    raw["postprocessing"] = {
        "rules": [{"name": "lesion", "largest_only": False, "smallest": 30}],
        "val_groups": 3,
        "val_dice": [0.5, 0.75],
        "val_lesion_recall": [1.0, 1.0],
    }
    (run / "model" / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    return run


@pytest.mark.parametrize("precision", ["fp32", "bf16"])  # in which it is trained: a threshold is chosen and applied in fp32
def test_a_run_chooses_on_val_and_its_test_figures_are_those_of_its_model(recipe, source, tmp_path, precision):
    empty_some(source, "c05a", "c06a", "c09a", "c10a")
    made = recipe(steps=6, postprocess="validate", false_alarms_per_1000=400, precision=precision)
    run = finetune(made)
    config, model = read_config(run / "model"), load_model(run)
    data = read_labelled(resolve(made), quiet=True)
    val, peaks = [], []
    for case in data.val:
        probabilities = predict_values(model, case.values, case.axis, case.intensities, CPU, probabilities=True)
        decided = np.asarray(probabilities[0] > 0.5, np.uint8)
        val.append(predicted_objects(case.case.group, case.labels, decided, 2))
        if not case.labels.any():
            peaks.append(float(probabilities.max()))
    assert config.postprocessing == choose_postprocessing([*data.train, *data.val], val, ["background", "lesion"])
    point = config.operating_point
    assert point.threshold == pytest.approx(max(peaks)) and (point.clean, point.alarmed, point.budget) == (2, 0, 400)

    summary = summary_of(run / "evaluation")
    assert summary["policy"]["postprocessing"] == config.postprocessing.described()
    assert summary["false_alarms"]["operating_point"]["threshold"] == point.threshold
    assert any("chosen on 2 val cases" in note for note in summary["notes"])
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Post-processing: " in page and "Operating point: probability" in page and "<h2>Operating point</h2>" in page

    settings = made.data.model_dump(include={"source", "salt_file", "names"})
    again = summary_of(evaluate(run, EvaluateRequest(**settings), tmp_path / "again"))
    assert again == summary  # the model's own operating point, without asking
    other = summary_of(evaluate(run, EvaluateRequest(**settings, false_alarms_per_1000=600), tmp_path / "other"))
    assert other["false_alarms"]["operating_point"]["budget_per_1000"] == 600

    predicted = predict(run, [source], tmp_path / "masks", PredictRequest(operating_point=True)).out
    alarmed = sum(mask_of(predicted, stem).any() for stem in ("c09a", "c10a"))
    assert alarmed == summary["false_alarms"]["operating_point"]["alarmed"]
    assert not any(mask_of(predicted, stem).any() for stem in ("c05a", "c06a"))


def test_nothing_is_chosen_that_is_not_asked_for(runs, recipe):
    config = read_config(runs[0] / "model")
    assert config.postprocessing is None is config.operating_point
    assert "operating_point" not in summary_of(runs[0] / "evaluation")["false_alarms"]
    made = resolve(recipe(postprocess="validate"))
    data = read_labelled(made, quiet=True)
    choices = choose_on_val(load_model(runs[0]), data, made, Accelerator(cpu=True), quiet=True)
    assert choices.postprocessing is not None and choices.operating_point is None


def test_a_budget_needs_val_cases_without_target_before_anything_is_trained(recipe):
    made = recipe(false_alarms_per_1000=10)
    with pytest.raises(InputError, match=r"^false_alarms_per_1000=10: val has no case without target"):
        finetune(made)
    assert not made.out.exists()


def test_evaluation_and_prediction_remove_what_the_model_says(runs, with_rule, tmp_path):
    source = runs[0].parent / "labelled"
    raw = predict(runs[0], [source], tmp_path / "raw", PredictRequest()).out
    ruled = predict(with_rule, [source], tmp_path / "masks", PredictRequest()).out
    changed = 0
    for path in sorted((source / "images").iterdir()):
        before, after = mask_of(raw, path.stem), mask_of(ruled, path.stem)
        wanted = remove_objects((before > 0).astype(np.uint8), [ObjectRule(1, False, 30)]) * 255
        assert np.array_equal(after, wanted)
        changed += (before != after).any()
    assert changed
    request = EvaluateRequest(source=source, salt_file=source.parent / "salt", names="keep")
    ours = evaluate(with_rule, request, tmp_path / "ours")
    theirs = evaluate(ruled, request, tmp_path / "theirs")  # the same masks, as if another program had made them
    assert summary_of(ours)["dice"] == summary_of(theirs)["dice"] != summary_of(runs[0] / "evaluation")["dice"]
    rows = [(folder / "cases.csv").read_text(encoding="utf-8") for folder in (ours, theirs)]
    assert rows[0].replace(",lesion,", ",255,") == rows[1]
    assert "objects below 30 voxels are removed" in summary_of(ours)["policy"]["postprocessing"]
    assert sorted(path.name for path in (ours / "overlays").iterdir()) == sorted(
        path.name for path in (theirs / "overlays").iterdir()
    )
    for path in (ours / "overlays").iterdir():
        assert path.read_bytes() == (theirs / "overlays" / path.name).read_bytes()


def test_a_threshold_decides_alone(runs, with_rule, tmp_path, capsys):
    source = runs[0].parent / "labelled"
    scores = predict(runs[0], [source], tmp_path / "scores", PredictRequest(probabilities=True)).out
    assert main(["predict", str(with_rule), str(source), "--out", str(tmp_path / "low"), "--threshold", "0.3"]) == 0
    assert "where the probability is above 0.3, not post-processed" in capsys.readouterr().err
    for path in sorted((source / "images").iterdir()):
        values = np.asarray(Image.open(scores / f"{path.stem}.tiff"))
        assert np.array_equal(mask_of(tmp_path / "low", path.stem), (values > 0.3) * np.uint8(255))
    ruled = ["predict", str(with_rule), str(source), "--out"]
    assert main([*ruled, str(tmp_path / "scores2"), "--probabilities"]) == 0
    assert "post-processing" not in capsys.readouterr().err
    for path in scores.iterdir():
        assert path.read_bytes() == (tmp_path / "scores2" / path.name).read_bytes()  # probabilities are untouched
    assert main([*ruled, str(tmp_path / "point"), "--operating-point"]) == 2
    assert "--operating-point: the model has none" in capsys.readouterr().err and not (tmp_path / "point").exists()
    assert main([*ruled, str(tmp_path / "half"), "--threshold", "0.5"]) == 0
    assert "post-processing: lesion: objects below 30 voxels" in capsys.readouterr().err
