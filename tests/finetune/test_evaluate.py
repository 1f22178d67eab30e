import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.evaluate import EvaluateRequest, Measured, evaluate, measure_cases, telling_cases
from finetune.metrics import METRICS, POLICY, measure_case
from finetune.predict import predict_case
from finetune.recipe import FinetuneRecipe
from resunet.checkpoint import read_config
from resunet.config import PercentileZScore
from resunet.data.cases import Case, LoadedCase, load_cases
from resunet.data.source import open_source
from resunet.errors import CheckFailed, InputError
from resunet.model import load_model

CPU = torch.device("cpu")


def request_for(run, **changes: object) -> EvaluateRequest:
    data = FinetuneRecipe.model_validate_json((run / "config.json").read_text()).data
    return EvaluateRequest.model_validate(data.model_dump(include={"source", "salt_file", "names"}) | changes)


def copy_of_source(run, folder):
    source = FinetuneRecipe.model_validate_json((run / "config.json").read_text()).data.source
    shutil.copytree(source, folder)
    return folder


def summary_of(folder) -> dict:
    return json.loads((folder / "summary.json").read_text())


def measured_case(name: str, true: int, predicted: int) -> Measured:
    """Of `true` pixels the first `predicted` are found."""
    truth, prediction = np.zeros((1, 40), np.uint8), np.zeros((1, 40), np.uint8)
    truth[0, :true] = 1
    prediction[0, :predicted] = 1
    loaded = LoadedCase(Case(name, name, name, name, None, image=None, mask=None), truth[None], (1, 1), [], truth, "", "")
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
    measured = measure_cases(model, cases, 2, CPU, "fp32", quiet=True)
    assert [one.case for one in measured] == cases
    for one in measured:
        alone = measure_case(one.case.labels, predict_case(model, one.case, CPU, "fp32"), 2, (1, 1))
        assert one.measures == alone and one.row() == (one.case.case.id, one.case.case.group, alone)
    assert len({one.measures.macro("dice") for one in measured}) > 5
    assert [one.case for one in measure_cases(model, cases[::-1], 2, CPU, "fp32", quiet=True)] == cases[::-1]
    assert measure_cases(model, [], 2, CPU, "fp32") == []


def test_an_evaluation_writes_its_files(runs):
    out = runs[0] / "evaluation"
    assert {path.name for path in out.iterdir()} == {"summary.json", "cases.csv", "overlays"}
    summary = summary_of(out)
    assert set(summary) == {
        "schema_version", "split", "cases", "groups", *METRICS, "classes", "lesions", "false_alarms", "policy", "notes"
    }  # fmt: skip
    assert (summary["schema_version"], summary["split"], summary["cases"], summary["groups"]) == (1, "test", 6, 6)
    assert summary["policy"] == POLICY and summary["notes"] == []
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


def test_what_the_model_was_trained_on_is_no_test_case(runs, tmp_path):
    with pytest.raises(CheckFailed, match=r"(?s)6 pool cases are among the model's training data.*c00a\.png"):
        evaluate(runs[0], request_for(runs[0], split="pool"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    summary = summary_of(evaluate(runs[0], request_for(runs[0], split="pool"), tmp_path / "out", allow_leak=True))
    assert summary["notes"] == ["leak: 6 pool cases are among the model's training data"]


def test_an_empty_split_and_an_encoder_are_the_users_fault(runs, tmp_path, encoder):
    source = copy_of_source(runs[0], tmp_path / "source")
    splits = json.loads((source / "splits.json").read_text())
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
