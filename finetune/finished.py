"""The recipe of a finished run, to go on with its data and its training, whatever its own network began with."""

import json
from pathlib import Path
from typing import Any

from finetune.recipe import FinetuneRecipe
from resunet.config import validate
from resunet.errors import InputError
from resunet.runs import is_done, stage_of


def recipe_of(run: Path) -> FinetuneRecipe:
    """A finished run's recipe, without what gave its network its first weights and without test.

    Raises:
        InputError: no finished fine-tuning run.
    """
    if not (run / "config.json").is_file() or not is_done(run) or stage_of(run) != "finetune":
        raise InputError(f"{run}: is no finished fine-tuning run. Give the folder that resunet finetune wrote, with run.json.")
    values: dict[str, Any] = json.loads((run / "config.json").read_text(encoding="utf-8"))
    values |= dict(out=str(run), encoder=None, transfer=None, start=None, teacher=None, processes=1, evaluate_test=False)
    values |= dict(consistency=None)
    values.pop("distillation", None)
    values["optimizer"] |= dict(decoder_first=0.0, sawtooth=False, encoder_lr_factor=1.0)
    model = values["model"]
    model.pop("weights", None)
    if model["statistics"] == "frozen":
        model["statistics"] = "running"
    return validate(FinetuneRecipe, values, f"{run}/config.json")
