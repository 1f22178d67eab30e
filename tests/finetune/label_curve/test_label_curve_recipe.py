import json
from pathlib import Path

import pytest

import resunet
from finetune.label_curve.recipe import LabelCurveRecipe, merge
from finetune.recipe import FinetuneRecipe
from resunet.config import load_recipe
from resunet.errors import InputError

SHIPPED = Path(resunet.__file__).parents[1] / "configs" / "label_curve"
INLINE = """
out: runs/curve
finetune:
  data: {source: somewhere, classes: {0: background, 255: lesion}}
  optimizer: {lr: 0.002}
  normalisation: {kind: percentile_zscore, low: 1}
arms: {scratch: {}, other: {encoder: runs/encoder, optimizer: {encoder_lr_factor: 0.1}}}
budgets: [0.5, all, 2]
steps: [20, 10, 20]
"""


@pytest.fixture
def load(tmp_path):
    def load_text(*overrides: str, text: str = INLINE) -> LabelCurveRecipe:
        path = tmp_path / "curve.yaml"
        path.write_text(text)
        return load_recipe(LabelCurveRecipe, "label_curve", str(path), overrides)

    return load_text


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_recipe_parses_and_survives_json(path):
    recipe = load_recipe(LabelCurveRecipe, "label_curve", path.stem, ["finetune.data.source=elsewhere"])
    text = recipe.model_dump_json(indent=2)
    again = LabelCurveRecipe.model_validate_json(text)
    assert again == recipe and again.model_dump_json(indent=2) == text
    assert recipe.recipe is None and recipe.finetune["data"]["source"] == "elsewhere"


def test_a_cell_is_the_named_recipe_with_what_the_curve_sets():
    curve = load_recipe(LabelCurveRecipe, "label_curve", "brain_tumor", ["seed=3", "arms.pretrained.optimizer.lr=0.5"])
    named = load_recipe(FinetuneRecipe, "finetune", "brain_tumor")
    cell = curve.cell("pretrained", 6, 2, 250, Path("cell"))
    assert (cell.data.labelled, cell.data.draw, cell.seed, cell.steps, cell.out) == (6, 2, 5, 250, Path("cell"))
    assert cell.resume and not cell.evaluate_test and cell.optimizer.lr == 0.5 and cell.encoder is not None
    own = {"out", "resume", "seed", "steps", "evaluate_test", "encoder", "data", "optimizer", "wandb"}
    assert cell.model_dump(exclude=own) == named.model_dump(exclude=own)
    scratch = curve.cell("scratch", 6, 2, 250, Path("cell"))
    differing = {key for key in type(cell).model_fields if getattr(cell, key) != getattr(scratch, key)}
    assert differing == {"encoder", "optimizer", "wandb"} and scratch.encoder is None


def test_a_recipe_that_was_written_whole_can_be_named(load, tmp_path):
    """Its `encoder: null`, as resunet finetune --write has it, is nobody's choice; an encoder would be the scratch arm's too."""
    named = tmp_path / "whole.yaml"
    shared = load_recipe(FinetuneRecipe, "finetune", "brain_tumor").model_dump(mode="json")
    named.write_text(json.dumps(shared))
    arms = "arms: {scratch: {}, other: {encoder: runs/encoder}}"
    text = f"out: runs/curve\nrecipe: {named}\n{arms}\nbudgets: [2]\nsteps: [10]\n"
    recipe = load(text=text)
    assert LabelCurveRecipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert recipe.cell("scratch", 2, 0, 10, Path("cell")).encoder is None
    named.write_text(json.dumps(shared | {"encoder": "runs/first"}))
    with pytest.raises(InputError, match=r"whole\.yaml: names encoder=runs/first, with which every arm would begin"):
        load(text=text)


def test_in_wandb_the_cells_of_a_curve_are_one_group_and_have_names(load):
    recipe = load()
    cells = [recipe.cell(arm, 2, 1, 10, Path(arm)).wandb for arm in recipe.arms]
    assert {cell.group for cell in cells} == {recipe.group} and recipe.group.startswith("label-curve-")
    assert [cell.name for cell in cells] == [f"{arm}-2-1-10" for arm in recipe.arms]
    assert load("draws=7").group != recipe.group == load("out=elsewhere").group
    assert load("finetune.wandb.group=mine").cell("other", 2, 1, 10, Path("cell")).wandb.group == "mine"


def test_what_every_stage_calls_alike_is_of_the_fine_tunings(load):
    curve = load("data.source=elsewhere", "wandb.mode=disabled", "precision=bf16", "finetune.precision=fp32")
    assert curve.finetune["data"] == {"source": "elsewhere", "classes": {"0": "background", "255": "lesion"}}
    assert curve.finetune["wandb"] == {"mode": "disabled"} and curve.finetune["precision"] == "bf16"
    assert curve == load("finetune.data.source=elsewhere", "finetune.wandb.mode=disabled", "finetune.precision=bf16")


def test_keys_of_an_arm_win_and_keep_their_neighbours(load):
    recipe = load()
    other = recipe.cell("other", 2, 0, 10, Path("cell"))
    assert (other.optimizer.lr, other.optimizer.encoder_lr_factor) == (0.002, 0.1)
    assert recipe.steps == (10, 20) and recipe.baseline == "scratch" and recipe.others() == ["other"]


def test_merge_lays_mappings_over_mappings_and_replaces_another_kind():
    assert merge({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4}}) == {"a": {"b": 4, "c": 2}, "d": 3}
    assert merge({"a": {"kind": "x", "c": 2}}, {"a": {"kind": "y"}}) == {"a": {"kind": "y"}}
    assert merge({"a": 1}, {"a": {"b": 2}}) == {"a": {"b": 2}}


@pytest.mark.parametrize(
    "override, message",
    [
        ("finetune.steps=3", r"finetune\.steps: is not set here, but by steps"),
        ("finetune.encoder=x", r"finetune\.encoder: is not set here, but by arms\.NAME\.encoder"),
        ("finetune.data.labelled=3", r"finetune\.data\.labelled: is not set here, but by budgets"),
        ("arms.other.data.source=x", r"arms\.other\.data\.source: is not set here, but by finetune\.data\.source, for all"),
        ("arms.other.data.draw=1", r"arms\.other\.data\.draw: is not set here, but by draws"),
        (
            "arms.other.data.draw_by=kcenter",
            r"arm other is not valid:\n  data: draw_by=kcenter, draw_encoder=None: one goes with",
        ),
        ("arms.other.wandb.mode=online", r"arms\.other\.wandb: is not set here, but by finetune\.wandb, for all arms"),
        ("arms.other.seed=2", r"arms\.other\.seed: is not set here, but by seed"),
        ("arms.other.optimizer.lrr=2", r"arm other is not valid:\n  optimizer\.lrr=2: .*did you mean 'optimizer\.lr'"),
        ("finetune.data=3", r"finetune is not valid:\n  data=3"),
        ("finetune.optimizer.lr=-1", r"finetune is not valid:\n  optimizer\.lr=-1"),
        ("recipe=brain_tumour", r"Did you mean 'brain_tumor'"),
        ("baseline=scrach", r"baseline='scrach': is no arm; the arms are scratch, other"),
        ("arms={scratch: {}}", r"at least two arms"),
        ("arms={../up: {}, scratch: {}}", r"a name becomes a folder"),
        ("arms=[scratch]", r"arms=\['scratch'\]"),
        ("budgets=[1.5]", r"a share is below 1"),
        ("budgets=[most]", r"budgets\.0='most'"),
        ("budgets=[]", r"budgets=\[\]"),
        ("steps=[0]", r"steps\.0=0"),
        ("draws=0", r"draws=0"),
        ("drawz=3", r"did you mean 'draws'"),
    ],
)
def test_faults_name_the_key_and_what_to_do(load, override, message):
    with pytest.raises(InputError, match=message):
        load(override)


def test_arms_may_differ_in_how_their_groups_are_drawn(load):
    suggested = "{data: {draw_by: typicality, draw_encoder: runs/encoder}}"
    recipe = load(f"arms.suggested={suggested}", f"arms.again={suggested}")
    cell = recipe.cell("suggested", 2, 1, 10, Path("cell"))
    assert (cell.data.draw_by, cell.data.draw_encoder) == ("typicality", Path("runs/encoder"))
    assert cell.data.source == recipe.cell("scratch", 2, 1, 10, Path("cell")).data.source
    assert [recipe.drawn_with(arm) for arm in recipe.arms] == ["scratch", "scratch", "suggested", "suggested"]
    everywhere = load("finetune.data.draw_by=kcenter", "finetune.data.draw_encoder=runs/encoder")
    assert {everywhere.draw_of(arm) for arm in everywhere.arms} == {("kcenter", "runs/encoder")}
