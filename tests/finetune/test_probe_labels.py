"""Labels that an encoder's probe used: they count, and are in neither val nor test."""

import html
import json
from pathlib import Path

import pytest

from finetune.label_curve.cells import count_labels, points_of
from finetune.label_curve.recipe import LabelCurveRecipe
from finetune.labelled import read_folds, read_labelled, resolve
from finetune.loop import finetune
from resunet.checkpoint import LabelledGroups, read_config
from resunet.config import validate
from resunet.data.source import open_source
from resunet.errors import CheckFailed


@pytest.fixture
def probed(encoder: Path, recipe):
    """Gives `encoder` a probe that used some groups, and a recipe that fine-tunes it."""

    def make(groups: list[str], salt: str | None = None, **changes):
        source = open_source(recipe().data, masks=True)
        hmacs = {case.group_name: case.group_hmac for case in source.cases}
        labels = LabelledGroups(
            groups=tuple(hmacs[group] for group in groups), salt_fingerprint=salt or source.salt_fingerprint
        )
        config = read_config(encoder)
        config = config.model_copy(update={"provenance": config.provenance.model_copy(update={"probe": labels})})
        (encoder / "config.json").write_text(config.model_dump_json(), encoding="utf-8")
        return resolve(recipe(encoder=str(encoder), **changes))

    return make


@pytest.mark.parametrize("group, part", [("patient5", "val"), ("patient9", "test")])
def test_a_probe_group_in_val_or_test_stops_the_run(probed, group, part):
    with pytest.raises(
        CheckFailed, match=rf"1 {part} cases are among the labelled scans of the encoder's probe.*\n.*\(group\)"
    ):
        read_labelled(probed(["patient0", group]), quiet=True)
    allowed = read_labelled(probed([group], allow=["leak"]), quiet=True).allowed
    assert f"leak: 1 {part} cases are among the labelled scans of the encoder's probe" in allowed


def test_in_no_fold_either(probed):
    with pytest.raises(CheckFailed, match="1 val cases are among the labelled scans of the encoder's probe"):
        read_folds(probed(["patient3"], data={"folds": 2}), quiet=True)


def test_probe_groups_count_as_labels(probed, recipe):
    def notes(*arguments, **changes) -> str:
        return " ".join(read_labelled(probed(*arguments, **changes), quiet=True).notes())

    one = {"data": {"labelled": 1}}  # one group of the pool, and one of val
    (train,) = read_labelled(resolve(recipe(**one)), quiet=True).train[:1]
    drawn = train.case.group_name
    others = [f"patient{i}" for i in range(5) if f"patient{i}" != drawn]
    assert "2 labelled groups, plus 2 that the encoder's probe used: 4 had to be labelled." in notes(others[:2], **one)
    assert "2 labelled groups, plus 1 that the encoder's probe used (1 more of the probe's are among them): 3 had" in notes(
        [drawn, others[0]], **one
    )
    assert "2 labelled groups; the 1 that the encoder's probe used are among them." in notes([drawn], **one)
    assert "2 labelled groups, plus 1 that the encoder's probe used: 3" in notes([drawn], "another salt", **one)
    assert "probe" not in " ".join(read_labelled(resolve(recipe(**one)), quiet=True).notes())


def test_the_report_and_the_summary_say_so(probed):
    out = finetune(probed(["patient0"], steps=1))
    said = "8 labelled groups; the 1 that the encoder's probe used are among them."
    assert said in html.unescape((out / "report.html").read_text(encoding="utf-8"))
    assert said in (out / "evaluation" / "summary.json").read_text(encoding="utf-8")


def test_a_label_curves_axis_counts_them(probed, tmp_path):
    fine = probed(["patient0", "patient1"])
    shared = json.loads(fine.model_dump_json(exclude_unset=True))
    for key in ("out", "steps", "encoder", "normalisation"):
        shared.pop(key, None)
    values = {
        "out": str(tmp_path / "curve"),
        "finetune": shared,
        "arms": {"scratch": {}, "pretrained": {"encoder": str(fine.encoder)}},
        "budgets": [1, "all"],
        "draws": 3,
        "steps": [1],
    }
    curve = validate(LabelCurveRecipe, values, "recipe")
    one, everything = count_labels(curve, points_of(curve))
    # one group to train on is at most one of the two, and in one of three draws is neither or the other
    assert one.labels == 2 and one.labels_of("scratch") == 2 and one.labels_of("pretrained") in (3, 4)
    assert everything.labels_of("pretrained") == everything.labels == 8
