import json
import re
from pathlib import Path

import pytest
from pydantic import Field, ValidationError

import resunet
from finetune.recipe import FinetuneRecipe
from pretrain.recipe import PretrainRecipe
from resunet.config import (
    DataSettings,
    FixedNormalisation,
    Frozen,
    PercentileZScore,
    Recipe,
    find_recipe,
    load_recipe,
    split_arguments,
    validate,
)
from resunet.errors import InputError

CLASSES = {"pretrain": PretrainRecipe, "finetune": FinetuneRecipe}
CHECKOUT = Path(resunet.__file__).parents[1]
SHIPPED = sorted(path for stage in CLASSES for path in (CHECKOUT / "configs" / stage).glob("*.yaml"))


class Inner(Frozen):
    temperature: float = Field(0.2, gt=0)
    classes: dict[int, str] = {}


class Outer(Recipe):
    inner: Inner = Inner()
    data: DataSettings = DataSettings(source=Path("data"))


@pytest.fixture
def recipe_file(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "recipe.yaml").write_text(text)
        return str(tmp_path / "recipe.yaml")

    return write


@pytest.fixture
def load(recipe_file):
    """The recipe of three lines, with overrides."""
    name = recipe_file("out: runs/a\nsteps: 10\ninner:\n  temperature: 0.5\n")
    return lambda *overrides: load_recipe(Outer, "pretrain", name, overrides)


def fault(call, *arguments) -> str:
    with pytest.raises(InputError) as error:
        call(*arguments)
    return str(error.value)


def test_recipes_are_shipped_for_both_stages():
    assert {path.parent.name for path in SHIPPED} == set(CLASSES)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_shipped_recipe_parses_by_path_and_by_name_and_survives_json(path):
    stage = path.parent.name
    recipe = load_recipe(CLASSES[stage], stage, str(path))
    assert load_recipe(CLASSES[stage], stage, path.stem) == recipe
    text = recipe.model_dump_json(indent=2)
    again = CLASSES[stage].model_validate_json(text)
    assert again == recipe
    assert again.model_dump_json(indent=2) == text
    assert again.sha256() == recipe.sha256()
    assert CLASSES[stage].model_validate(json.loads(text)) == recipe


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_is_frozen(path):
    recipe = load_recipe(CLASSES[path.parent.name], path.parent.name, str(path))
    with pytest.raises(ValidationError, match="frozen"):
        recipe.steps = 3
    with pytest.raises(ValidationError, match="frozen"):
        recipe.data.channels = "rgb"


@pytest.mark.parametrize(
    "stage, override, suggestion",
    [
        ("pretrain", "temprature=0.1", "temprature=0.1: there is no such key; did you mean 'temperature'?"),
        ("pretrain", "optimizer.weigth_decay=0", "did you mean 'optimizer.weight_decay'?"),
        ("pretrain", "wandb.mod=offline", "did you mean 'wandb.mode'?"),
        ("finetune", "data.clases=3", "data.clases=3: there is no such key; did you mean 'data.classes'?"),
        ("finetune", "stpes=10", "did you mean 'steps'?"),
        ("finetune", "labelled=0.5", "did you mean 'data.labelled'?"),  # the right word in the wrong place
        ("finetune", "model.fuel=1", "allowed here: model.backbone, model.output_stride, model.weights, model.name"),
    ],
)
def test_a_misspelt_key_suggests_the_right_one(stage, override, suggestion):
    assert suggestion in fault(load_recipe, CLASSES[stage], stage, "brain_tumor", [override])


def test_all_faults_are_listed_at_once(load):
    message = fault(load, "steps=0", "inner.temperature=-1", "precision=fp8", "nonsense=1", "warmup=2", "data.channels=0")
    keys = ["steps=0", "inner.temperature=-1", "precision='fp8'", "nonsense=1", "warmup=2", "data.channels"]
    assert all(f"\n  {key}" in message for key in keys)
    assert "'fp32', 'bf16' or 'fp16'" in message  # what is allowed


@pytest.mark.parametrize(
    "override, message",
    [
        ("wandb.tags=one", "wandb.tags='one': is a list: wandb.tags=[…], in brackets"),
        ("inner=5", "inner=5: has keys of its own: inner.KEY=…"),
        ("wandb.project=a/b", "wandb.project='a/b': "),
        ("data.names=keeep", "data.names='keeep': Input should be 'hash' or 'keep'"),
        ("seed=4294967296", "seed=4294967296: Input should be less than 4294967296"),
    ],
)
def test_a_fault_says_how_it_is_written(load, override, message):
    assert message in fault(load, override)


def test_a_rule_between_keys_names_them_and_not_the_whole_recipe():
    message = fault(load_recipe, FinetuneRecipe, "finetune", "brain_tumor", ["teacher=SOMEWHERE", "batch=1"])
    assert "is not valid:\n  distillation.unlabelled=0.5: of a batch of 1" in message and message.count("\n") == 1
    message = fault(load_recipe, FinetuneRecipe, "finetune", "brain_tumor", ["data.folds=3", "data.fold=3"])
    assert "\n  data: fold=3: with data.folds=3 it is at most 2" in message


def test_a_required_key_that_is_missing_is_named(recipe_file):
    message = fault(load_recipe, FinetuneRecipe, "finetune", recipe_file("steps: 1\ndata: {source: x}\n"))
    assert "\n  out: is required" in message and "\n  data.classes: is required" in message
    assert "steps" not in message.split("not valid:")[1]
    assert "\n  data: is required" in fault(load_recipe, FinetuneRecipe, "finetune", recipe_file(""))


@pytest.mark.parametrize(
    "override",
    [
        pytest.param("out=${seed}"),
        pytest.param("data.source=${oc.env:HOME}/x"),
        pytest.param("out=a${b}c"),
        "inner.classes={0: '${out}'}",
    ],
)
def test_interpolation_is_refused(load, override):
    key = override.split("=")[0]
    assert re.search(rf"{key}[\w.]*='.*\$\{{.*interpolation .* is refused", fault(load, override))


def test_interpolation_in_a_file_is_refused(recipe_file):
    assert "out='${seed}': interpolation" in fault(load_recipe, Outer, "pretrain", recipe_file("out: ${seed}\n"))
    assert "allow='${seed}'" in fault(load_recipe, PretrainRecipe, "pretrain", recipe_file("allow: ['${seed}']\n"))


@pytest.mark.parametrize("override", ["steps", "=3", "steps 3"])
def test_an_override_is_key_and_value(load, override):
    message = fault(load, override)
    assert repr(override) in message and "key=value" in message and "quotes" not in message
    message = fault(load, "data.classes={0:", "background}")
    assert "The shell cut a value with blanks in two: put it into quotes, 'data.classes={0: background} …'" in message


def test_overrides_win_and_keep_their_neighbours(load):
    recipe = load("inner.classes={0: a, 7: b}", "steps=20", "steps=30", "data.source=a=b", "wandb.group=null")
    assert recipe.steps == 30
    assert recipe.inner == Inner(temperature=0.5, classes={0: "a", 7: "b"})
    assert recipe.data.source == Path("a=b")
    assert recipe.wandb.group is None
    assert recipe.out == Path("runs/a")


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "3\n", "a: 1\na: 2\n", "\0"])
def test_a_file_that_is_no_recipe_is_named(recipe_file, text):
    name = recipe_file(text)
    assert name in fault(load_recipe, Outer, "pretrain", name).splitlines()[0]


def test_a_value_that_is_not_yaml(load):
    assert "not valid YAML" in fault(load, "steps=[1")


def test_an_unknown_recipe_suggests_one():
    message = fault(find_recipe, "finetune", "brain_tumour")
    assert "Did you mean 'brain_tumor'?" in message and "brain_tumor, brain_tumor_distilled, brain_tumor_light, demo" in message
    message = fault(find_recipe, "finetune", "zzzzz")
    assert "Did you mean" not in message and "brain_tumor, brain_tumor_distilled, brain_tumor_light, demo" in message
    assert "no such file" in fault(find_recipe, "finetune", "somewhere/recipe.yaml")


def test_a_recipe_is_looked_up_within_its_stage(tmp_path, monkeypatch):
    assert find_recipe("pretrain", "demo").parent.name == "pretrain"
    assert find_recipe("finetune", "demo").parent.name == "finetune"
    monkeypatch.chdir(tmp_path)
    Path("demo").write_text("not a recipe")
    assert find_recipe("pretrain", "demo") != Path("demo")


def test_sha256_is_of_what_was_asked_for(load):
    recipe = load()
    assert recipe.sha256() == load("out=elsewhere", "resume=true").sha256()
    assert recipe.sha256() != load("steps=11").sha256()


def test_out_is_a_folder(load):
    assert "out=" in fault(load, "out=''")


def test_normalisation_ranges():
    with pytest.raises(ValidationError, match=r"low=60.*below high=50"):
        PercentileZScore(low=60, high=50)
    with pytest.raises(ValidationError):
        FixedNormalisation(kind="fixed", low=0, high=1, mean=0, std=0)


def test_validate_says_where():
    assert fault(validate, Inner, {"temperature": 0}, "request x").startswith("request x is not valid:\n  temperature=0")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["steps=3"]])
def test_a_command_line_starts_with_a_recipe(arguments):
    assert "usage: python -m pretrain RECIPE" in fault(split_arguments, "python -m pretrain", arguments)


def test_split_arguments():
    assert split_arguments("x", ["demo", "a=1", "b=2"]) == ("demo", ["a=1", "b=2"])


def test_a_key_within_a_union_is_the_recipes_own(recipe_file):
    name = recipe_file("out: a\nsteps: 1\ndata: {source: x}\nnormalisation: {kind: percentile_zscore, hihg: 3}\n")
    message = fault(load_recipe, PretrainRecipe, "pretrain", name)
    assert "\n  normalisation.hihg=3: there is no such key; did you mean 'normalisation.high'?" in message


def test_a_value_of_a_union_is_one_fault(load):
    assert fault(load, "data.channels=blue").count("data.channels") == 1
    assert "\n  data.channels='blue'" in fault(load, "data.channels=blue")


def test_classes_given_on_the_command_line_replace_the_recipes():
    recipe = load_recipe(FinetuneRecipe, "finetune", "brain_tumor", ["data.classes={0: background, 1: lesion}"])
    assert recipe.data.classes == {0: "background", 1: "lesion"}


def test_classes_the_other_way_round_are_turned():
    override = "data.classes={background: 0, lesion: 1}"
    message = fault(load_recipe, FinetuneRecipe, "finetune", "brain_tumor", [override])
    assert message.endswith("mask values come first, then their names: {0: background, 1: lesion}") and message.count("\n") == 1


def test_a_suggestion_is_alike():
    message = fault(load_recipe, PretrainRecipe, "pretrain", "brain_tumor", ["data.clases=1"])
    assert "data.names'?" not in message
