import html
import re
from dataclasses import replace

import numpy as np
import pytest

from finetune.label_curve.cells import Budget
from finetune.label_curve.cost import Cost
from finetune.label_curve.figures import curve_figure, difference_figure
from finetune.label_curve.page import write_report
from finetune.label_curve.recipe import LabelCurveRecipe
from finetune.label_curve.result import Curve, summarise, with_looks
from finetune.label_curve.verdict import grid_caution, needed, saved, verdicts
from resunet.config import validate

TRAIN = (2, 4, 8, 16)
ARMS = {"scratch": {}, "pretrained": {"encoder": "SECRET/encoder", "optimizer": {"lr": 0.5}}}


def make_curve(shift=(0.0, 0.0, 0.0, 0.0), groups=12, draws=3, noise=0.01, pretraining: float | None = 0.25) -> Curve:
    """Scratch gains 0.1 with every doubling of the labels, and `shift` is what pretraining adds."""
    random = np.random.default_rng(1)
    shared = {"data": {"source": "SECRET/data", "classes": {0: "background", 1: "lesion"}}}
    values = {"out": "SECRET/out", "finetune": shared, "arms": ARMS, "budgets": TRAIN, "draws": draws, "steps": [10, 20]}
    level = 0.25 + 0.1 * np.arange(4)[:, None, None] + 0.05 * random.normal(size=(1, groups, 1))
    arms = {
        arm: level + added + noise * random.normal(size=(4, groups, draws))
        for arm, added in (("scratch", 0.0), ("pretrained", np.array(shift)[:, None, None]))
    }
    hours = {"scratch": 0.0, "pretrained": pretraining}
    return Curve(
        recipe=validate(LabelCurveRecipe, values, "recipe"),
        budgets=[Budget(train, train, (10 * train,) * draws) for train in TRAIN],
        groups=[f"group{i}" for i in range(groups)],
        scores=arms,
        steps={arm: np.full((4, draws), 10) for arm in arms},
        val={arm: np.full((4, draws), 0.5) for arm in arms},
        cost={arm: Cost("CPU thread", 4.0, 1.0, hours[arm], (0.1, 0.1, 0.2, 0.2)) for arm in arms},
        models={arm: {} for arm in arms},
        test="ab" * 32,
    )


def said(curve: Curve) -> str:
    return " ".join(verdicts(summarise(curve)))


def test_better_where_it_is_and_what_it_saves():
    record = summarise(make_curve(shift=(0.1, 0.1, 0.0, 0.0)))
    assert [figure["verdict"] for figure in record["differences"]["pretrained"]] == ["better"] * 2 + ["no difference"] * 2
    text = " ".join(verdicts(record))
    assert re.search(
        r"pretrained is better than scratch with 4 \(Dice \+0\.\d+\) and 8 \(Dice \+0\.\d+\) labelled groups\.", text
    )
    assert "With 16 and 32 no difference is shown." in text
    assert re.search(r"What pretrained has with 4, scratch has with (7\.\d|8\.\d|8) \[", text)
    rows = record["labels_saved"]["pretrained"]
    assert rows[0]["baseline_needs"]["labels"] == pytest.approx(8, rel=0.1) and saved(rows[0]).startswith("4 [")
    low, high = rows[1]["ci95"]
    assert low["labels"] < 16 < high["labels"] and re.fullmatch(r"1\d \[1\d, 1\d\]|1\d \[1\d, \d\d\]", needed(rows[1]))


def test_what_is_never_reached_is_not_extrapolated():
    record = summarise(make_curve(shift=(0.3, 0.3, 0.3, 0.3)))
    assert "What pretrained has with 32, scratch does not reach with 32." in " ".join(verdicts(record))
    last = record["labels_saved"]["pretrained"][-1]
    assert (needed(last), saved(last)) == ("> 32 [> 32, > 32]", "> 0 [> 0, > 0]")


def test_worse_and_no_difference_are_answers():
    worse = said(make_curve(shift=(-0.1, -0.1, -0.1, -0.1)))
    assert "pretrained is WORSE than scratch with 4 (Dice −0." in worse and "better" not in worse
    assert said(make_curve()) == "No difference shown between pretrained and scratch, at any number of labels."


@pytest.mark.parametrize("shape, why", [((4, 3), "4 test groups are too few"), ((12, 1), "1 draw is too few")])
def test_too_few_for_a_verdict(shape, why, tmp_path):
    curve = make_curve(shift=(0.3, 0.3, 0.3, 0.3), groups=shape[0], draws=shape[1])
    record = summarise(curve)
    assert why in " ".join(verdicts(record)) and {figure["verdict"] for figure in record["differences"]["pretrained"]} == {
        "unknown"
    }
    assert record["labels_saved"]["pretrained"][0]["ci95"] is None
    write_report(curve, with_looks(record, tmp_path / "curve.json"), tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "too few for an interval" in page and ("Every value" in page) == (shape[0] < 5)
    if shape[0] < 5:
        difference = curve.scores["pretrained"][2, 3, 1] - curve.scores["scratch"][2, 3, 1]
        assert f"{difference:+.3f}" in page and "{:.3f}".format(curve.scores["scratch"][2, 3, 1]) in page


def with_arms(curve: Curve, **others: dict) -> Curve:
    """With further arms, whose test groups have the scores of other ones from scratch."""
    both = {"recipe": curve.recipe.model_copy(update={"arms": curve.recipe.arms | others})}
    for name in ("scores", "steps", "val", "cost", "models"):
        its = getattr(curve, name)
        both[name] = its | dict.fromkeys(others, its["scratch"][:, ::-1] if name == "scores" else its["scratch"])
    return replace(curve, **both)


def test_a_baseline_that_may_not_be_at_its_best_is_told(tmp_path):
    """Whoever gives scratch too few steps finds that pretraining helps."""
    curve = make_curve(shift=(0.1, 0.05, 0.0, 0.0))
    assert grid_caution(summarise(curve)) == []
    longest = curve.steps | {"scratch": np.array([[20, 20, 10], [20, 20, 20], [10, 10, 20], [10, 10, 10]])}
    less = replace(curve, steps=longest)
    (told,) = grid_caution(summarise(less))
    assert told.startswith(
        "Val chose the most steps of the grid, 20 for scratch in 6 of 12 points: scratch may do better with more"
    )
    assert "steps=[…, 80] would tell" in told
    write_report(less, with_looks(summarise(less), tmp_path / "curve.json"), tmp_path)
    assert told in html.unescape((tmp_path / "report.html").read_text(encoding="utf-8"))
    fewer = replace(less, steps=curve.steps | {"pretrained": np.full((4, 3), 20), "scratch": np.full((4, 3), 10)})
    assert grid_caution(summarise(fewer)) == [], "the others' own loss"
    one = replace(curve, recipe=curve.recipe.model_copy(update={"steps": (10,)}))
    assert grid_caution(summarise(one))[0].startswith("The grid has one number of steps, 10: scratch may do better with more")


def test_an_arm_has_one_colour_wherever_the_baseline_stands():
    record = summarise(make_curve())
    turned = record | {"arms": ["pretrained", "scratch"], "dice": dict(reversed(record["dice"].items()))}
    for one in (record, turned):
        curve, difference = (
            {line.get_label(): line.get_color() for line in drawn(one).axes[0].lines}
            for drawn in (curve_figure, difference_figure)
        )
        assert curve["pretrained"] == difference["pretrained"] != curve["scratch"]


def test_the_family_is_all_arms_at_all_budgets():
    curve = make_curve(shift=(0.05, 0.0, 0.0, 0.0), noise=0.03)
    alone = summarise(curve)["differences"]["pretrained"][0]
    assert alone["p_holm"] == pytest.approx(min(1, 4 * alone["p"])) and alone["p"] < 0.2
    more = with_arms(curve, again={"encoder": "other"})
    assert summarise(more)["differences"]["pretrained"][0]["p_holm"] == pytest.approx(min(1, 8 * alone["p"]))


def test_the_page_names_nobody_and_needs_no_network(tmp_path):
    curve = make_curve(shift=(0.1, 0.05, 0.0, -0.1))
    write_report(curve, with_looks(summarise(curve), tmp_path / "curve.json"), tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!data:|#)|<script|@import""", page)
    assert "SECRET" not in page + (tmp_path / "curve.svg").read_text(encoding="utf-8") and "&#34;lr&#34;: 0.5" in page
    assert page.count('<svg role="img" aria-label="') == 3, "Dice by labels, differences, Dice by hours"


def test_without_the_cost_of_pretraining_there_is_no_figure_of_it(tmp_path):
    curve = make_curve(pretraining=None)
    write_report(curve, with_looks(summarise(curve), tmp_path / "curve.json"), tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count('<svg role="img"') == 2 and "not known" in page


@pytest.mark.parametrize("many", [False, True])
def test_the_page_in_a_browser(many, tmp_path, look_at):
    """With two arms, and with so many that they do not fit beside each other, one of a long name and with draws of its own."""
    curve = make_curve(shift=(0.1, 0.05, 0.0, -0.1), draws=5)
    if many:
        drawn = {"draw_by": "kcenter", "draw_encoder": "SECRET/other"}
        curve = with_arms(
            curve, positions={}, large={}, masked={}, **{"dense-with-a-slow-encoder-and-its-own-drawing": {"data": drawn}}
        )
    write_report(curve, with_looks(summarise(curve), tmp_path / "curve.json"), tmp_path)
    seen = look_at(tmp_path / "report.html")
    assert seen.headings == [
        "Label curve",
        "Dice",
        "Paired differences",
        "Labels saved",
        "What val chose",
        "Cost",
        "What makes the arms",
        "How it was counted",
    ]
    names = [one["name"] for one in seen.pictures]
    assert len(names) == 3 and all(word in names[0] for word in ("labelled groups", *curve.recipe.arms))
    assert "scratch" in names[1] and "hours" in names[2]
    assert all(verdict in seen.text for verdict in verdicts(summarise(curve)))
    assert ("all arms have the same draws" in seen.text) != many and ("its-own-drawing by k-centre" in seen.text) == many
