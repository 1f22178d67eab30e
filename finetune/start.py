"""A run that goes on from a finished segmenter: its whole network, head included, exactly, and a receipt that says so.

And what any run began with, in words.
"""

from collections.abc import Mapping
from typing import Any

from finetune.recipe import FinetuneRecipe
from finetune.settings import NetworkSettings
from resunet.checkpoint import CONFIG, WEIGHTS, ModelConfig, model_folder, read_config
from resunet.config import validate
from resunet.data.evidence import Evidence
from resunet.data.leakage import read_archive
from resunet.ensemble import Ensemble
from resunet.errors import InputError
from resunet.files import sha256
from resunet.model import Segmenter, load_finetuned
from resunet.transfer import Receipt, receipt_of_start


def as_started(recipe: FinetuneRecipe) -> FinetuneRecipe:
    """The recipe with its start's architecture and normalisation; without a start as it is.

    What the recipe itself says must agree. Raw mask values and regions may be others: they are of the data and of the judgement,
    the names of the classes and their order are of the network.

    Raises:
        InputError: no segmenter, or with all that differs.
    """
    if recipe.start is None:
        return recipe
    config = _config(recipe)
    theirs, ours = _of_network(config), _asked(recipe)
    both = [key for key in ours if key in theirs]
    differing = [f"  {key}: {theirs[key]} there, {ours[key]} here" for key in both if ours[key] != theirs[key]]
    if differing:
        lines = "\n".join(differing)
        raise InputError(
            f"start={recipe.start}: does not fit the recipe:\n{lines}\n"
            "Leave model and normalisation out, and give the classes its names in its order; or take encoder=, or none."
        )
    shape = {key.removeprefix("model."): value for key, value in theirs.items() if key.startswith("model.")}
    model = recipe.model.model_copy(update=shape).model_dump()
    values = recipe.model_dump() | {"model": model, "normalisation": config.normalisation.model_dump()}
    return validate(FinetuneRecipe, values, f"with start={recipe.start} the recipe")


def load_start(recipe: FinetuneRecipe) -> tuple[Segmenter, Receipt]:
    """The network that a run goes on from, pruned or not, and its receipt.

    Raises:
        InputError: weights that do not match.
    """
    assert recipe.start is not None
    folder = model_folder(recipe.start)
    network, _ = load_finetuned(folder)
    return network, receipt_of_start(network, {name: sha256(folder / name) for name in (CONFIG, WEIGHTS)})


def origin_of(recipe: FinetuneRecipe, receipt: Receipt | None) -> str:
    """A sentence on what a run's network began with."""
    if receipt is not None:
        return f"{'Encoder' if recipe.start is None else 'Start'}: {receipt.line()}."
    if recipe.begins == "from scratch":
        return "Trained from scratch."
    return "The encoder began with given MobileNetV3 weights, the rest fresh."


def start_archive(recipe: FinetuneRecipe) -> Evidence | None:
    """What the start was trained on, and what that rests on; None without one."""
    return None if recipe.start is None else read_archive(model_folder(recipe.start))


def _config(recipe: FinetuneRecipe) -> ModelConfig:
    assert recipe.start is not None
    config = read_config(model_folder(recipe.start))
    if config.architecture.name == Ensemble.kind:
        raise InputError(f"start={recipe.start}: is an ensemble; name one of its members' runs.")
    if config.classes is None:
        raise InputError(
            f"start={recipe.start}: holds no segmenter that resunet finetune wrote. An encoder is given as encoder=."
        )
    return config


def _of_network(config: ModelConfig) -> dict[str, Any]:
    """By the recipe's keys, what a finished segmenter is and how it sees scans."""
    assert config.classes is not None
    architecture = config.architecture.model_dump()
    shape = {f"model.{key}": architecture[key] for key in NetworkSettings.model_fields if key in architecture}
    names = ", ".join(config.classes.values())
    return shape | {"data.channels": config.input_channels, "data.classes": names, "normalisation": config.normalisation}


def _asked(recipe: FinetuneRecipe) -> Mapping[str, Any]:
    """What a recipe says of that; what it leaves open is left out."""
    given = {key: getattr(recipe.model, key) for key in recipe.model.model_fields_set | {"spatial_dims"}}
    said = {f"model.{key}": value for key, value in given.items() if value is not None}
    if recipe.normalisation is not None:
        said["normalisation"] = recipe.normalisation
    return said | {"data.channels": recipe.data.channels, "data.classes": ", ".join(recipe.data.classes.values())}
