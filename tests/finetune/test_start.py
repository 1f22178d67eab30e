import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from finetune.labelled import read_labelled, resolve
from finetune.loop import finetune
from finetune.step import build
from resunet.checkpoint import read_config, read_weights
from resunet.data.leakage import read_archive
from resunet.errors import CheckFailed, InputError
from resunet.files import sha256
from resunet.model import load_model
from resunet.transfer import Receipt


@pytest.fixture
def finished(runs, tmp_path: Path) -> Path:
    """A finished run of another source of the same kind, whose groups are others."""
    return runs[0]


@pytest.fixture
def other(recipe, source: Path):
    """A recipe of cases that the finished run has not seen: its leak rules would stop it else. Shape and norm left open."""

    def make(start: Path, **changes):
        made = recipe(allow=["leak"], **changes)
        values = made.model_dump(exclude_unset=True)
        values["model"].pop("channels", None)
        values["model"].pop("units", None)
        return type(made).model_validate(values | {"start": start})

    return make


def test_a_run_begins_with_the_whole_network(finished: Path, other):
    made = resolve(other(finished))
    assert made.model.channels == (4, 8) and made.model.units == 1
    assert resolve(made) == made
    model, receipt = build(made)
    given = read_weights(finished / "model" / "model.safetensors")
    assert all(torch.equal(tensor, given[name]) for name, tensor in model.state_dict().items())
    assert receipt.start_sha256["model.safetensors"] == sha256(finished / "model" / "model.safetensors")
    assert {one.state for one in receipt.tensors} == {"loaded"} and "head" in receipt.line()


def test_a_continued_run_is_a_run_like_any_other(finished: Path, other):
    made = other(finished, steps=1)
    run = finetune(made)
    config, parent = read_config(run / "model"), sha256(finished / "model" / "model.safetensors")
    assert config.provenance.parent_sha256 == parent
    receipt = Receipt.model_validate_json((run / "receipt.json").read_text())
    assert receipt.start_sha256["model.safetensors"] == parent
    assert json.loads((run / "run.json").read_text())["inputs"]["start/model.safetensors"] == parent
    before, after = (load_model(one).state_dict() for one in (finished, run))
    assert all(not torch.equal(before[name], after[name]) for name in ("head.weight", "encoder.levels.0.0.conv1.weight"))
    theirs = read_archive(finished / "model").table.column("pixel_sha256").to_pylist()
    assert set(theirs) <= set(read_archive(run / "model").table.column("pixel_sha256").to_pylist())


def test_what_the_start_was_trained_on_is_not_what_it_is_judged_by(finished: Path, recipe, source: Path):
    splits = json.loads((source / "splits.json").read_text())
    splits["pool"], splits["val"] = splits["val"], splits["pool"]
    (source / "splits.json").write_text(json.dumps(splits))
    with pytest.raises(CheckFailed, match="are among the start's archive"):
        read_labelled(resolve(recipe(start=str(finished))), quiet=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"channels": [4, 16]}}, r"model.channels: \(4, 8\) there, \(4, 16\) here"),
        ({"model": {"norm": "instance"}}, "model.norm: batch there"),
        ({"normalisation": {"kind": "fixed", "low": 0, "high": 1, "mean": 0, "std": 1}}, "normalisation"),
        ({"data": {"classes": {0: "background", 255: "scratch"}}}, "data.classes: background, lesion there"),
        ({"data": {"channels": "rgb"}}, "data.channels: grey there, rgb here"),
    ],
)
def test_what_does_not_fit_is_listed(changes, said, finished: Path, recipe):
    with pytest.raises(InputError, match=said):
        resolve(recipe(start=str(finished), **changes))


def test_raw_mask_values_may_be_others(finished: Path, recipe):
    made = resolve(recipe(start=str(finished), data={"classes": {0: "background", 1: "lesion"}}))
    assert made.data.classes == {0: "background", 1: "lesion"} and read_config(finished / "model").classes != made.data.classes


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"encoder": "runs/encoder"}, "leave one out"), ({"optimizer": {"decoder_first": 0.1}}, "decoder_first")],
)
def test_one_beginning(changes, said, recipe):
    with pytest.raises(InputError, match=said):
        recipe(start="runs/a", **changes)


def test_the_labels_behind_a_start_are_told(finished: Path, other):
    run = finetune(other(finished, steps=1))
    page = (run / "report.html").read_text(encoding="utf-8")
    assert re.search(r"plus \d that the start was trained on or chosen by: \d+ had to be labelled", page)
    assert "Start: all" in page and "Trained from scratch" not in page


def test_only_a_segmenter_is_a_start(encoder: Path, folded: Path, recipe):
    with pytest.raises(InputError, match="given as encoder="):
        resolve(recipe(start=str(encoder)))
    with pytest.raises(InputError, match="is an ensemble"):
        resolve(recipe(start=str(folded)))


def test_a_record_of_what_it_saw_is_needed(finished: Path, recipe, tmp_path: Path):
    copied = tmp_path / "copy"
    shutil.copytree(finished / "model", copied)
    (copied / "archive.parquet").unlink()
    with pytest.raises(InputError, match=r"has no archive\.parquet"):
        read_labelled(resolve(recipe(start=str(copied))), quiet=True)
