import pytest

from finetune.recipe import FinetuneRecipe
from resunet.config import load_recipe, validate
from resunet.errors import InputError

CLASSES = {0: "background", 255: "lesion"}
LEAST = {"out": "run", "steps": 5, "data": {"source": "scans", "classes": CLASSES}}


def data(**changes: object) -> dict:
    return {"data": LEAST["data"] | changes}


def regions(named: dict) -> dict:
    return data(classes={0: "background", 1: "rim", 2: "core"}, regions=named)


FAULTS = {
    "labelled between groups": (data(labelled=1.5), r"data\.labelled=1\.5: a share is below 1, a number of groups is whole"),
    "labelled nothing": (data(labelled=0), r"data\.labelled=0: .*greater than 0"),
    "one class": (data(classes={0: "background"}), r"data\.classes=.*needs the background and at least one class"),
    "no classes": ({"data": {"source": "scans"}}, r"data\.classes: is required"),
    "one name twice": (data(classes={0: "a", 1: "a"}), r"data\.classes=.*two values have one name"),
    "class is no number": (data(classes={"zero": "a", 1: "b"}), r"data\.classes\.zero.*integer"),
    "ignored class": (data(ignore=[3, 255]), r"ignore=\[3, 255\]: \[255\] are classes too"),
    "draw": (data(draw=-1), r"data\.draw=-1: "),
    "misspelt in data": (data(clases=CLASSES), r"data\.clases=.*did you mean 'data\.classes'\?"),
    "small patch": ({"patch": [64, 7]}, r"patch=\[64, 7\]: \[64, 7\]: at least 8 pixels a side"),
    "patch of three": ({"patch": [8, 8, 8]}, r"patch=\[8, 8, 8\]: "),
    "foreground": ({"foreground": 1.1}, r"foreground=1\.1: .*less than or equal to 1"),
    "batch": ({"batch": 0}, r"batch=0: "),
    "unet and an encoder": (
        {"encoder": "run", "model": {"name": "unet"}},
        r"encoder=run: model\.name='unet' has no place for it",
    ),
    "unet and units": ({"model": {"name": "unet", "units": 3}}, r"name='unet': the plain U-Net has neither units"),
    "unet and squeeze_excite": ({"model": {"name": "unet", "squeeze_excite": True}}, r"nor squeeze_excite; leave them out"),
    "another network": ({"model": {"name": "vnet"}}, r"model\.name='vnet': .*'resunet', 'unet' or 'mobile_resunet'"),
    "contrast upside down": ({"augment": {"contrast": [1.2, 0.8]}}, r"augment\.contrast=.*the first not above the second"),
    "contrast zero": ({"augment": {"contrast": [0, 1]}}, r"augment\.contrast=\[0, 1\]: .*two numbers above 0"),
    "elastic sigma": ({"augment": {"elastic": {"sigma": 0}}}, r"augment\.elastic\.sigma=0: .*greater than 0"),
    "gamma": ({"loss": {"gamma": -1}}, r"loss\.gamma=-1: "),
    "decoder first to the end": (
        {"steps": 10, "optimizer": {"decoder_first": 0.95}},
        r"optimizer\.decoder_first=0\.95: of 10 steps that is all; the encoder would stand still to the end",
    ),
    "decoder_first": ({"optimizer": {"decoder_first": 1}}, r"optimizer\.decoder_first=1: .*less than 1"),
    "encoder_lr_factor": ({"optimizer": {"encoder_lr_factor": 0}}, r"optimizer\.encoder_lr_factor=0: .*greater than 0"),
    "consistency without an average": ({"consistency": {}}, r"consistency: is with the moving average.*set ema=0\.99"),
    "consistency and precise statistics": (
        {"consistency": {}, "ema": 0.9, "model": {"statistics": "precise"}},
        r"model\.statistics='precise' with consistency: .*use 'running'",
    ),
    "consistency and a teacher": ({"consistency": {}, "ema": 0.9, "teacher": "run"}, r"teacher=run: and consistency are two"),
    "consistency of no patch": (
        {"consistency": {"unlabelled": 0.05}, "ema": 0.9},
        r"consistency\.unlabelled=0\.05: of a batch of \d+ that is no patch",
    ),
    "boxes of nothing": ({"consistency": {"cutmix_area": [0, 0.4]}}, r"cutmix_area=\[0\.0, 0\.4\] must lie above 0"),
    "consistency upside down": ({"consistency": {"gamma": [2, 1]}}, r"consistency\.gamma=.*the first not above the second"),
    "sawtooth without a first tooth": (
        {"optimizer": {"sawtooth": True}},
        r"sawtooth=true: needs decoder_first above 0",
    ),
    "decay": ({"optimizer": {"decay": "step"}}, r"optimizer\.decay='step': .*'cosine' or 'polynomial'"),
    "ema": ({"ema": 1}, r"ema=1: .*less than 1"),
    "frozen without an encoder": ({"model": {"statistics": "frozen"}}, r"model\.statistics='frozen': keeps an encoder's"),
    "statistics": ({"model": {"statistics": "moving"}}, r"model\.statistics='moving': .*'running', 'frozen' or 'precise'"),
    "clip": ({"optimizer": {"clip": 0}}, r"optimizer\.clip=0: "),
    "allow": ({"allow": ["everything"]}, r"allow\.0='everything': .*'leak', 'ranks' or 'input_channels'"),
    "validate_every": ({"validate_every": 0}, r"validate_every=0: "),
    "regions of one class": (data(regions={"all": ["lesion"]}), r"regions of one class are that class"),
    "empty region": (
        regions({"all": ["rim", "core"], "none": []}),
        r"region 'none' is empty; name at least one of \['rim', 'core'\]",
    ),
    "region of what is no class": (
        regions({"all": ["rim", "cores"]}),
        r"region 'all' names \['cores'\]; the foreground classes",
    ),
    "region with background": (regions({"all": ["background", "rim"]}), r"region 'all' names \['background'\]"),
    "class twice": (regions({"all": ["rim", "core", "rim"]}), r"region 'all' names a class twice"),
    "class of no region": (regions({"core": ["core"]}), r"no region holds \['rim'\]"),
    "no region": (regions({}), r"no region holds \['rim', 'core'\]"),
    "equal regions": (regions({"all": ["rim", "core"], "both": ["core", "rim"]}), r"regions 'all' and 'both' are the same"),
    "region with a class's name": (regions({"core": ["rim", "core"], "r": ["rim"]}), r"region 'core' has the name of a class"),
    "weights of regions": (
        regions({"all": ["rim", "core"]}) | {"loss": {"class_weights": {"rim": 2}}},
        r"loss\.class_weights names \['rim'\]; the regions are \['all'\]",
    ),
    "regions and postprocessing": (
        regions({"all": ["rim", "core"]}) | {"postprocess": "validate"},
        r"postprocess='validate': removes objects of single classes",
    ),
}


@pytest.mark.parametrize("changes, message", FAULTS.values(), ids=FAULTS.keys())
def test_what_is_out_of_range_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        validate(FinetuneRecipe, LEAST | changes, "recipe")


@pytest.mark.parametrize("labelled", [0.05, 0.999, 1, 1.0, 12])
def test_shares_and_numbers_of_groups_are_allowed(labelled):
    assert validate(FinetuneRecipe, LEAST | data(labelled=labelled), "recipe").data.labelled == labelled


def test_the_defaults():
    recipe = validate(FinetuneRecipe, LEAST, "recipe")
    assert recipe.encoder is None and recipe.normalisation is None and recipe.model.norm is None
    assert (recipe.loss.gamma, recipe.loss.focal_weight, recipe.loss.dice_weight) == (2, 1, 1)
    assert (recipe.augment.elastic.sigma, recipe.augment.elastic.alpha) == (10, 30)


def test_classes_keep_their_order_through_a_file_and_through_json(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("out: run\nsteps: 5\ndata: {source: scans, classes: {7: background, 3: edema, 255: tumour}, ignore: [9]}\n")
    recipe = load_recipe(FinetuneRecipe, "finetune", str(path), ["data.labelled=4", "model.channels=[4,8]"])
    assert list(recipe.data.classes.items()) == [(7, "background"), (3, "edema"), (255, "tumour")]
    assert (recipe.data.labelled, recipe.data.ignore, recipe.model.channels) == (4, (9,), (4, 8))
    again = FinetuneRecipe.model_validate_json(recipe.model_dump_json())
    assert again == recipe and list(again.data.classes) == [7, 3, 255]


def test_a_unet_recipe_survives_its_own_json():
    recipe = validate(FinetuneRecipe, LEAST | {"model": {"name": "unet", "channels": [4, 8]}}, "recipe")
    assert FinetuneRecipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize("name", ["resunet", "unet"])
def test_the_architecture_is_that_of_the_recipe(name):
    recipe = validate(FinetuneRecipe, LEAST | {"model": {"name": name, "channels": [4, 8]}}, "recipe")
    architecture = recipe.model.architecture(in_channels=3, num_classes=5, norm="group")
    assert (architecture.name, architecture.in_channels, architecture.num_classes) == (name, 3, 5)
    assert (architecture.channels, architecture.norm) == ((4, 8), "group")


def test_regions_survive_json_and_may_have_the_name_of_a_class_that_they_are():
    given = regions({"whole": ["core", "rim"], "core": ["core"]}) | {"loss": {"class_weights": {"whole": 2}}}
    recipe = validate(FinetuneRecipe, LEAST | given, "recipe")
    assert recipe.data.region_members() == ((1, 2), (2,))
    assert FinetuneRecipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert validate(FinetuneRecipe, LEAST, "recipe").data.region_members() is None
