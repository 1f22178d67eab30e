"""A finished run → quantised/ → a bundle that answers, is evaluated, and notices what was changed."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from finetune.deploy.export import ExportRequest, export
from finetune.evaluation.evaluate import EvaluateRequest, evaluate, measure_cases
from finetune.evaluation.targets import targets_of
from finetune.finished import recipe_of
from finetune.labelled import read_labelled
from finetune.quantisation.quantise import quantise
from finetune.quantisation.result import open_quantised, read_quantised
from finetune.quantisation.settings import QuantiseSettings
from resunet.bundle import Bundle
from resunet.bundle.contract import Point, parse
from resunet.bundle.predict import BundleRequest, predict_bundle
from resunet.cli import main
from resunet.config import validate
from resunet.errors import CheckFailed, InputError
from resunet.members import make_ensemble

SETTINGS = QuantiseSettings(steps=3, lr=1e-3, calibration=3)


@pytest.fixture(scope="module")
def run(runs, tmp_path_factory) -> Path:
    """A finished run with its network in INT8 beside its model. Not to be changed."""
    copied = Path(shutil.copytree(runs[0], tmp_path_factory.mktemp("int8") / "run", symlinks=True))
    quantise(copied, SETTINGS, copied / "quantised")
    return copied


@pytest.fixture(scope="module")
def bundle(run, tmp_path_factory) -> Path:
    request = ExportRequest(formats=("onnx", "openvino"), precisions=("fp32", "int8"))
    return export(run, tmp_path_factory.mktemp("out") / "int8.bundle", request)


def test_what_is_written(run):
    folder, facts = run / "quantised", read_quantised(run / "quantised")
    assert sorted(path.name for path in folder.iterdir()) == ["golden", "metrics.jsonl", "model.onnx", "quantised.json"]
    assert (facts.method, facts.steps, facts.calibration, facts.grid) == ("qat", 3, 3, "affine")
    assert facts.difference.keys() == {"openvino", "onnxruntime"} and len(facts.golden) == 6
    (last,) = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[-1:])
    assert last["step"] == 3 and last["loss"] > 0 and last["gradient_norm"] > 0


def test_figures_of_the_rounded_network(run, runs):
    recipe = recipe_of(run)
    assert recipe.encoder is None and not recipe.evaluate_test
    val, targets = read_labelled(recipe, quiet=True).val, targets_of(recipe.data.classes)
    measured = measure_cases(open_quantised(run / "quantised"), val, targets, None, "fp32", quiet=True)
    assert len(measured) == len(val) and all(one.measures.macro("dice") is not None for one in measured)


def test_the_same_again(run, tmp_path):
    again = quantise(run, SETTINGS, tmp_path / "again")
    assert (again / "model.onnx").read_bytes() == (run / "quantised" / "model.onnx").read_bytes()


def test_the_bundle(bundle):
    contract = Bundle.open(bundle).contract
    assert [(graph.runtime, graph.precision) for graph in contract.graphs] == [
        *(("openvino", "fp32"), ("onnxruntime", "fp32"), ("openvino", "int8"), ("onnxruntime", "int8"))
    ]
    assert contract.quantisation is not None and contract.quantisation.method == "qat"
    assert [one.precision for one in contract.golden] == ["fp32"] * 6 + ["int8"] * 6
    sizes = {graph: (bundle / "graphs" / graph / "model.bin").stat().st_size for graph in ("fp32", "int8")}
    assert sizes["int8"] < 0.5 * sizes["fp32"]
    assert main(["verify", str(bundle)]) == 0


def test_a_changed_byte(bundle, run, tmp_path, capsys):
    copied = Path(shutil.copytree(bundle, tmp_path / "b"))
    path = copied / "graphs" / "int8" / "model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert main(["verify", str(copied)]) == 1
    assert "graphs/int8/model.onnx: was changed" in capsys.readouterr().err
    other = Path(shutil.copytree(run, tmp_path / "run", symlinks=True))
    (other / "quantised" / "model.onnx").write_bytes(data)
    with pytest.raises(CheckFailed, match=r"model\.onnx: was changed, its sha256 is not that of quantised\.json"):
        export(other, tmp_path / "out", ExportRequest(precisions=("int8",)))


def test_facts_that_name_or_leave_out_files_are_refused(run, tmp_path):
    other = Path(shutil.copytree(run, tmp_path / "run", symlinks=True))
    path = other / "quantised" / "quantised.json"
    said = json.loads(path.read_text())
    (tmp_path / "planted").write_text("as it was")
    elsewhere = [said["golden"][0] | {"file": "../../planted"}, *said["golden"][1:]]
    for changes, message in (
        ({"files": {}}, r"model\.onnx: is not in quantised\.json"),
        ({"golden": elsewhere}, r"\.\./\.\./planted: named in quantised\.json, and not among its files"),
    ):
        path.write_text(json.dumps(said | changes))
        with pytest.raises(CheckFailed, match=message):
            export(other, tmp_path / "out", ExportRequest(precisions=("int8",)))
    assert (tmp_path / "planted").read_text() == "as it was" and not (tmp_path / "out").exists()


def test_a_contract_that_contradicts_itself(bundle):
    said = json.loads((bundle / "contract.json").read_text())
    with pytest.raises(ValueError, match="golden: a case for graphs in int8"):
        parse(json.dumps(said | {"golden": said["golden"][:6]}))
    with pytest.raises(ValueError, match="quantisation: of graphs in int8"):
        parse(json.dumps(said | {"quantisation": None}))


def test_a_bundle_is_evaluated_as_its_model_is(bundle, run, runs, tmp_path):
    source = runs[0].parent / "labelled"
    request = dict(source=source, split="test", names="keep", salt_file=runs[0].parent / "salt")
    of_model = evaluate(run, validate(EvaluateRequest, request, "r"), tmp_path / "model")
    of_bundle = evaluate(bundle, validate(EvaluateRequest, request | {"runtime": "onnxruntime"}, "r"), tmp_path / "bundle")
    ours, theirs = (json.loads((out / "summary.json").read_text()) for out in (of_bundle, of_model))
    assert ours.keys() == theirs.keys()
    for key in ("dice", "hd95", "classes", "lesions", "policy", "cases", "groups"):
        assert ours[key] == theirs[key], key
    assert any("not known" in note for note in ours["notes"]) and any("ONNX Runtime" in note for note in ours["notes"])
    rounded = evaluate(bundle, validate(EvaluateRequest, request | {"precision": "int8"}, "r"), tmp_path / "int8")
    summary = json.loads((rounded / "summary.json").read_text())
    assert summary["arithmetic"] == "int8" and summary["cases"] == theirs["cases"] and (rounded / "report.html").is_file()
    with pytest.raises(InputError, match="--precision int8: is of bundles"):
        evaluate(run, validate(EvaluateRequest, request | {"precision": "int8"}, "r"), tmp_path / "none")


def test_int8_alone_needs_no_pytorch_in_the_bundle(run, tmp_path):
    out = export(run, tmp_path / "b", ExportRequest(precisions=("int8",)))
    assert not (out / "model").exists() and sorted(path.name for path in (out / "graphs").iterdir()) == ["int8"]
    with pytest.raises(InputError, match="is of graphs"):
        export(run, tmp_path / "c", ExportRequest(formats=("pytorch",), precisions=("int8",)))


def test_the_card_tells_figures_of_int8_apart(run, tmp_path):
    copied = Path(shutil.copytree(run, tmp_path / "run", symlinks=True))
    unknown = (export(copied, tmp_path / "a", ExportRequest(precisions=("int8",))) / "README.md").read_text(encoding="utf-8")
    assert "None: the figures above are of the network before it was rounded" in unknown and "model-index" not in unknown
    assert "VNNI" in unknown, "where INT8 saturates"
    dice, less = {"mean": 0.4321, "ci95": [0.4, 0.5], "n": 6}, {"mean": -0.0123, "ci95": None, "n": 6}
    its = {"dice": dice, "dice_difference": less, "size": "5 to 9", "recall": dice, "recall_difference": less}
    (copied / "test.json").write_text(json.dumps({"networks": {"int8": its}}))
    card = (export(copied, tmp_path / "b", ExportRequest(precisions=("int8",))) / "README.md").read_text(encoding="utf-8")
    assert "| Dice | 0.4321 | 0.4 to 0.5 | 6 |" in card and "value: 0.4321" in card
    assert "| recall of objects of 5 to 9 voxels | 0.4321 |" in card


def test_the_operating_point_is_not_that_of_int8(bundle, tmp_path):
    opened = Bundle.open(bundle)
    point = Point(threshold=0.6, budget=20, clean=50, alarmed=1)
    raw = json.loads((bundle / "contract.json").read_text()) | {"operating_point": vars(point)}
    changed = Path(shutil.copytree(bundle, tmp_path / "changed"))
    text = json.dumps(raw)
    (changed / "contract.json").write_text(text)
    (changed / "contract.sha256").write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  contract.json\n")
    assert opened.contract.operating_point is None
    Image.new("L", (40, 40)).save(tmp_path / "scan.png")
    words = ["predict", str(changed), str(tmp_path / "scan.png"), "--operating-point", "--out"]
    assert main([*words, str(tmp_path / "fp32")]) == 0
    with pytest.raises(InputError, match="chosen on the network before it was rounded"):
        predict_bundle(changed, [tmp_path / "scan.png"], tmp_path / "o", BundleRequest(operating_point=True, precision="int8"))


def test_what_cannot_be_quantised(run, runs, tmp_path):
    with pytest.raises(InputError, match="exists already"):
        quantise(run, QuantiseSettings(), run / "quantised")
    with pytest.raises(InputError, match="is no finished fine-tuning run"):
        quantise(run / "model", QuantiseSettings(), tmp_path / "out")
    with pytest.raises(CheckFailed, match="not finite"):
        quantise(run, QuantiseSettings(steps=4, lr=1e30, calibration=2), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []  # nothing half-written
    both = Path(shutil.copytree(run, tmp_path / "both", symlinks=True))
    shutil.rmtree(both / "model")
    make_ensemble(runs, both / "model")
    with pytest.raises(InputError, match="is an ensemble"):
        quantise(both, QuantiseSettings(), tmp_path / "out")


def test_quantised_of_other_weights(run, runs, tmp_path):
    other = Path(shutil.copytree(runs[1], tmp_path / "run", symlinks=True))
    with pytest.raises(InputError, match="has no quantised/ beside it"):
        export(other, tmp_path / "out", ExportRequest(precisions=("int8",)))
    shutil.copytree(run / "quantised", other / "quantised")
    with pytest.raises(InputError, match="was made of other weights"):
        export(other, tmp_path / "out", ExportRequest(precisions=("int8",)))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"method": "ptq", "freeze_statistics": 0.5}, "only method='qat' trains with batch norm"),
        ({"method": "nncf_ptq", "grid": "symmetric"}, "NNCF writes for OpenVINO"),
        ({"freeze_observers": 1.5}, "freeze_observers"),
        ({"method": "ptq", "steps": 300}, "steps=300: does nothing with method='ptq'"),
        ({"method": "ptq", "freeze_observers": 0.2}, "freeze_observers=0.2: does nothing"),
        ({"method": "nncf_qat", "freeze_observers": 0.2}, "freeze_observers=0.2: does nothing"),
        ({"method": "nncf_qat", "keep_float": ["head"]}, "keep_float=.*: does nothing with method='nncf_qat'"),
    ],
)
def test_settings_that_contradict_each_other(values, message):
    with pytest.raises(InputError, match=message):
        validate(QuantiseSettings, values, "quantise")
