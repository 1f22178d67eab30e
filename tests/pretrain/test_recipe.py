import pytest

from pretrain.recipe import PretrainRecipe
from pretrain.refusals import idle_keys
from resunet.config import load_recipe, validate
from resunet.errors import InputError

CLASSES = {0: "background", 255: "lesion"}
LEAST = {"out": "run", "steps": 5, "data": {"source": "scans"}}

FAULTS = {
    "batch of one": ({"batch": 1}, r"batch=1: .*greater than or equal to 2"),
    "accumulate": ({"accumulate": 0}, r"accumulate=0: .*greater than or equal to 1"),
    "temperature": ({"temperature": 0}, r"temperature=0: .*greater than or equal to 0\.001"),
    "no steps": ({"steps": 0}, r"steps=0: "),
    "warmup": ({"warmup": 1.5}, r"warmup=1\.5: "),
    "out": ({"out": ""}, r"out=.*: must be the path of a new folder"),
    "precision": ({"precision": "fp8"}, r"precision='fp8': .*'fp32', 'bf16' or 'fp16'"),
    "unknown key": ({"temprature": 0.1}, r"temprature=0\.1: there is no such key; did you mean 'temperature'\?"),
    "unknown nested key": ({"views": {"sise": 96}}, r"views\.sise=96: there is no such key; did you mean 'views\.size'\?"),
    "view size": ({"views": {"size": 7}}, r"views\.size=7: .*greater than or equal to 8"),
    "flip": ({"views": {"flip": 1.2}}, r"views\.flip=1\.2: .*less than or equal to 1"),
    "rotation": ({"views": {"rotation": 181}}, r"views\.rotation=181: "),
    "range upside down": (
        {"views": {"gamma": [2, 1]}},
        r"views\.gamma=\[2, 1\]: .*two numbers, the first not above the second",
    ),
    "zero scale": ({"views": {"scale": [0, 1]}}, r"scale=\[0\.0, 1\.0\] must be above 0"),
    "scale above one": ({"views": {"scale": [0.5, 1.5]}}, r"a crop covers at most the whole scan \(1\)"),
    "zero blur": ({"views": {"blur_sigma": [0, 1]}}, r"blur_sigma=\[0\.0, 1\.0\] must be above 0"),
    "no channels": ({"model": {"channels": []}}, r"model\.channels=\[\]: "),
    "zero width": ({"model": {"channels": [4, 0]}}, r"model\.channels\.1=0: "),
    "norm": ({"model": {"norm": "layer"}}, r"model\.norm='layer': .*'batch', 'instance' or 'group'"),
    "lars without decay": ({"optimizer": {"name": "lars", "weight_decay": 0}}, "plain momentum: .*weight_decay=1e-6"),
    "optimizer": ({"optimizer": {"name": "sgd"}}, r"optimizer\.name='sgd': .*'adamw' or 'lars'"),
    "lr": ({"optimizer": {"lr": 0}}, r"optimizer\.lr=0: .*greater than 0"),
    "allow": ({"allow": ["input_channels"]}, r"allow\.0='input_channels': .*'leak'"),
    "normalisation": (
        {"normalisation": {"kind": "percentile_zscore", "low": 99, "high": 1}},
        r"low=99\.0 must be below high=1",
    ),
    "decoupled bank": (
        {"objective": {"loss": "decoupled", "memory_bank": 64}},
        r"objective: loss=decoupled has no memory bank",
    ),
    "bank that knows groups": ({"objective": {"memory_bank": 64, "same_group": "ignore"}}, r"keeps no groups"),
    "decoupled with positions": (
        {"objective": {"loss": "decoupled", "same_group": "ignore", "position_threshold": 0.1}},
        r"are for loss=nt_xent without a memory bank",
    ),
    "positions without groups": (
        {"objective": {"position_threshold": 0.1}},
        r"repel the neighbours of the same one: set same_group",
    ),
    "threshold": ({"objective": {"position_threshold": 0}}, r"objective\.position_threshold=0: .*greater than 0"),
    "bank of another multiple": ({"objective": {"memory_bank": 100}}, r"memory_bank=100 must be a multiple of batch=64"),
    "chunks and batch norm": (
        {"cache_chunk": 8, "head": {"batch_norm": False}},
        r"cache_chunk=8: batch norm would.*model\.norm=group",
    ),
    "chunks and a head's batch norm": ({"cache_chunk": 8, "model": {"norm": "group"}}, r"set .*head\.batch_norm=false"),
    "no chunk": ({"cache_chunk": 0}, r"cache_chunk=0: .*greater than or equal to 1"),
    "what is not finite": ({"on_non_finite": "ignore"}, r"on_non_finite='ignore': .*'stop' or 'skip'"),
    "rate": ({"optimizer": {"lr_scaling": "linear"}}, r"optimizer\.lr_scaling='linear': .*'none' or 'sqrt_batch'"),
    "dimensions": ({"model": {"spatial_dims": 4}}, r"model\.spatial_dims=4: "),
    "sides of images": ({"views": {"size": [8, 8, 8]}}, r"views\.size=\[8, 8, 8\]: model\.spatial_dims=2 takes one.* \(y, x\)"),
    "sides of volumes": (
        {"model": {"spatial_dims": 3}, "views": {"window": [64, 64]}},
        r"views\.window=\[64, 64\]: model\.spatial_dims=3 takes one number for all sides, or three, \(z, y, x\)",
    ),
    "a side": ({"views": {"size": [8, 7]}}, r"views\.size\.1=7: .*greater than or equal to 8"),
    "voxels of images": ({"views": {"voxels": "scan"}}, r"views\.voxels=scan: is of volumes"),
    "positions of volumes": (
        {"model": {"spatial_dims": 3}, "objective": {"same_group": "ignore", "position_threshold": 0.1}},
        r"objective\.position_threshold=0\.1: compares the places of slices.*set it to null",
    ),
    "dense: level": ({"dense": {"level": 4}}, r"dense\.level=4: the decoder of 5 levels \(model\.channels\) has 0 to 3"),
    "dense: one level": ({"dense": {}, "model": {"channels": [8]}}, r"has none: give it more"),
    "dense: pairs": ({"dense": {"pairs": 63}}, r"dense\.pairs=63 must be at least batch=64"),
    "dense: chunks": (
        {"dense": {}, "cache_chunk": 8, "model": {"norm": "group"}, "head": {"batch_norm": False}},
        r"cache_chunk=8: dense has no chunks",
    ),
    "dense: weight alone": (
        {"objective": {"weight": 0}},
        r"objective\.weight=0\.0: is of a loss beside that of dense",
    ),
    "dense: squeeze and excite": ({"model": {"squeeze_excite": True}}, r"model\.squeeze_excite=true: is of the decoder"),
    "dense: no weight": ({"dense": {"weight": 0}}, r"dense\.weight=0: .*greater than 0"),
    "dense: no points": ({"dense": {"points": 0}}, r"dense\.points=0: "),
    "instance norm": (
        {"model": {"norm": "instance", "channels": [4, 4, 8, 8]}, "views": {"size": 8}},
        r"views\.size=8: is one position .* more than 8, or set model\.norm=group",
    ),
    "seed": ({"seed": -1}, r"seed=-1: .*greater than or equal to 0"),
    "dense: no contrast of scans": (
        {"dense": {}, "objective": {"weight": 0, "same_group": "ignore"}},
        r"objective\.weight=0: without the contrast of scans objective\.same_group would do nothing",
    ),
    "no source": ({"data": {}}, r"data\.source: is required"),
}


@pytest.mark.parametrize("changes, message", FAULTS.values(), ids=FAULTS.keys())
def test_what_is_out_of_range_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        validate(PretrainRecipe, LEAST | changes, "recipe")


def test_all_faults_come_at_once():
    with pytest.raises(InputError) as error:
        validate(PretrainRecipe, LEAST | {"batch": 1, "temperature": -1, "views": {"flip": 2}}, "recipe")
    message = str(error.value)
    assert "batch=1" in message and "temperature=-1" in message and "views.flip=2" in message


def test_the_limits_themselves_are_allowed():
    views = {"size": 8, "scale": [1, 1], "rotation": 180, "flip": 1, "noise_sigma": [0, 0]}
    recipe = validate(PretrainRecipe, LEAST | {"batch": 2, "warmup": 1, "views": views}, "recipe")
    assert recipe.views.scale == (1, 1) and recipe.views.intensity == 0.8


def test_a_file_and_its_overrides(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("out: run\nsteps: 5\ndata: {source: scans}\nviews: {gamma: [0.9, 1.1]}\n")
    recipe = load_recipe(PretrainRecipe, "pretrain", str(path), ["steps=7", "views.flip=0", "allow=[leak]"])
    assert (recipe.steps, recipe.views.flip, recipe.views.gamma, recipe.allow) == (7, 0, (0.9, 1.1), ("leak",))
    assert PretrainRecipe.model_validate_json(recipe.model_dump_json()) == recipe
    with pytest.raises(InputError, match=r"mine\.yaml is not valid:\n  batch=1: "):
        load_recipe(PretrainRecipe, "pretrain", str(path), ["batch=1"])


def test_the_architecture_is_that_of_the_recipe():
    recipe = validate(PretrainRecipe, LEAST | {"model": {"channels": [4, 8], "units": 3, "norm": "group"}}, "recipe")
    architecture = recipe.model.architecture(in_channels=5)
    assert architecture.model_dump(exclude={"name", "spatial_dims"}) == {
        "in_channels": 5,
        "channels": (4, 8),
        "units": 3,
        "norm": "group",
        "widths": {},  # nothing is pruned
    }


def test_the_rate_may_grow_with_the_batch():
    """SimCLR's, Chen et al. 2020, appendix B.1: 0.075 · √batch."""
    scaled = {"batch": 256, "optimizer": {"name": "lars", "lr": 0.075, "lr_scaling": "sqrt_batch"}}
    assert validate(PretrainRecipe, LEAST | scaled, "recipe").peak_lr == pytest.approx(1.2)
    assert validate(PretrainRecipe, LEAST | {"batch": 256}, "recipe").peak_lr == 1e-3


def test_what_is_contrasted_is_lightlys_unless_said():
    recipe = validate(PretrainRecipe, LEAST, "recipe")
    assert not recipe.objective.knows_scans and recipe.objective.memory_bank is None and recipe.cache_chunk is None
    assert recipe.head.batch_norm and recipe.on_non_finite == "stop"


def test_views_of_volumes_are_smaller_unless_the_recipe_says_so():
    flat = validate(PretrainRecipe, LEAST, "recipe")
    assert (flat.views.sides(2), flat.views.sides_of_window(2)) == ((96, 96), (512, 512))
    deep = validate(PretrainRecipe, LEAST | {"model": {"spatial_dims": 3}}, "recipe")
    assert (deep.views.sides(3), deep.views.sides_of_window(3)) == ((64,) * 3, (128,) * 3)
    given = validate(
        PretrainRecipe, LEAST | {"model": {"spatial_dims": 3}, "views": {"size": [16, 32, 24], "flip": 0}}, "recipe"
    )
    assert (given.views.sides(3), given.views.sides_of_window(3), given.views.flip) == ((16, 32, 24), (128,) * 3, 0)
    assert PretrainRecipe.model_validate_json(given.model_dump_json()) == given


def test_the_classes_of_the_data_are_the_probes_where_it_has_none():
    data = {"source": "scans", "classes": CLASSES, "ignore": [7]}
    recipe = validate(PretrainRecipe, LEAST | {"data": data, "probe": {"groups": 2}}, "recipe")
    assert recipe.probe is not None and (recipe.probe.classes, recipe.probe.ignore) == (CLASSES, (7,))
    own = {0: "background", 1: "lesion"}
    recipe = validate(PretrainRecipe, LEAST | {"data": data, "probe": {"classes": own, "ignore": []}}, "recipe")
    assert recipe.probe is not None and (recipe.probe.classes, recipe.probe.ignore) == (own, ())
    assert validate(PretrainRecipe, LEAST | {"data": data}, "recipe").probe is None


@pytest.mark.parametrize(
    "changes, keys",
    [
        ({"views": {"blur": 0, "blur_sigma": [1, 2], "intensity": 0, "gamma": [1, 2]}}, ["views.blur_sigma", "views.gamma"]),
        ({"dense": {}, "objective": {"weight": 0}, "temperature": 0.3}, ["temperature"]),
        ({"probe": {"classes": {0: "b", 1: "l"}, "kind": "prototype", "neighbours": 3}}, ["probe.neighbours"]),
        ({}, []),
    ],
)
def test_keys_that_do_nothing_are_known(changes, keys):
    assert [key for key, _ in idle_keys(validate(PretrainRecipe, LEAST | changes, "recipe"))] == keys
