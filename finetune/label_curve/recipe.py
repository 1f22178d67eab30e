"""The recipe of a label curve: which arms, on how many labels, how often, for how long."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from finetune.recipe import FinetuneRecipe
from finetune.settings import LabelledSettings
from resunet.config import Frozen, NewFolder, load_recipe, validate
from resunet.errors import InputError

Values = dict[str, Any]
Budget = Literal["all"] | Annotated[float, Field(gt=0)]
Steps = Annotated[int, Field(ge=1)]

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,39}")
# What the curve sets in every cell, and by which key of its own.
_SET_BY_CURVE = {
    "out": "out",
    "resume": "resume",
    "seed": "seed",
    "steps": "steps",
    "processes": "the curve: a cell is one process, and several processes share the cells",
    "evaluate_test": "the curve: test is read for what val chose, and only once",
    "encoder": "arms.NAME.encoder",
    "data.labelled": "budgets",
    "data.draw": "draws",
    "data.folds": "draws",
    "data.fold": "draws",
}
# What an arm may say of its data: how its training groups are drawn. The rest arms have in common, beside what the curve sets: they
# are judged by the same cases.
_OF_DRAWS = ("draw_by", "draw_encoder")
_SHARED = {f"data.{key}": f"finetune.data.{key}, for all arms" for key in LabelledSettings.model_fields if key not in _OF_DRAWS}
_SHARED["wandb"] = "finetune.wandb, for all arms"


# Keys that every stage has by these names: given beside `finetune`, they are meant of it.
_OF_EVERY_STAGE = ("data", "precision", "wandb")


class LabelCurveRecipe(Frozen):
    """Everything `resunet label-curve` reads.

    Once validated, `finetune` holds all keys and `recipe` is null: what is written down can be run again wherever it is read.
    """

    out: NewFolder
    resume: bool = Field(
        False,
        description="continue, with more draws, budgets or arms where given; for each of several processes on one `out`, too",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="draw d trains with seed + d in every arm")
    recipe: str | None = Field(None, description="a fine-tuning recipe, by name or path; null: `finetune` has all keys")
    finetune: Values = Field({}, description="keys of the fine-tuning recipe that all arms share; they win over `recipe`'s")
    arms: dict[str, Values] = Field(description="name → keys of the fine-tuning recipe that make the arm; encoder among them")
    baseline: str = Field("scratch", validate_default=True, description="the arm that the others are measured against")
    budgets: tuple[Budget, ...] = Field(
        min_length=1, description="as data.labelled: shares below 1 or numbers of groups; or all"
    )
    draws: int = Field(
        3,
        ge=1,
        description="nested draws of the labelled groups, random and the same in every arm unless finetune.data.draw_by, or an "
        "arm's, says otherwise",
    )
    steps: tuple[Steps, ...] = Field(min_length=1, description="the grid that every arm gets; val chooses from it")

    @field_validator("budgets")
    @classmethod
    def _whole_numbers(cls, budgets: tuple[Budget, ...]) -> tuple[Budget, ...]:
        broken = [budget for budget in budgets if budget != "all" and budget >= 1 and budget != round(budget)]
        if broken:
            raise ValueError(f"{broken}: a share is below 1, a number of groups is whole, and 'all' is all")
        return budgets

    @field_validator("steps")
    @classmethod
    def _ascending(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(steps)))

    @field_validator("arms")
    @classmethod
    def _named(cls, arms: dict[str, Values]) -> dict[str, Values]:
        broken = [name for name in arms if not _NAME.fullmatch(name)]
        if broken:
            raise ValueError(f"{broken}: a name becomes a folder: letters, digits, '.', '_' and '-', at most 40")
        if len(arms) < 2:
            raise ValueError("at least two arms, for example {scratch: {}, pretrained: {encoder: runs/encoder}}")
        return arms

    @field_validator("baseline")
    @classmethod
    def _is_an_arm(cls, baseline: str, info: ValidationInfo) -> str:
        arms = info.data.get("arms", {baseline: {}})
        if baseline not in arms:
            raise ValueError(f"is no arm; the arms are {', '.join(arms)}")
        return baseline

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """With `recipe` laid under `finetune`, and both that and the arms as a fine-tuning will read them."""
        if not isinstance(values, dict):
            return values
        if beside := {key: values[key] for key in _OF_EVERY_STAGE if key in values}:
            given = values.get("finetune") or {}
            kept = {key: value for key, value in values.items() if key not in beside}
            values = kept | {"finetune": merge(given, beside) if isinstance(given, dict) else given}
        name, shared, arms = values.get("recipe"), values.get("finetune") or {}, values.get("arms")
        mappings = isinstance(shared, dict) and isinstance(arms, dict) and all(isinstance(one, dict) for one in arms.values())
        if not mappings or not isinstance(name, str | None):
            return values  # the fields say what is wrong
        assert isinstance(arms, dict)
        _refuse("finetune", shared, _SET_BY_CURVE)
        for arm, changes in arms.items():
            own = {key: by for key, by in _SET_BY_CURVE.items() if key != "encoder"}
            _refuse(f"arms.{arm}", changes, _SHARED | own)
        shared = _plain(_validate(shared if name is None else merge(_read(name), shared), "finetune"))
        full = {arm: _plain(_validate(merge(shared, changes), f"arm {arm}")) for arm, changes in arms.items()}
        own_keys = {arm: _only(changes, full[arm]) for arm, changes in arms.items()}
        return values | {"recipe": None, "finetune": shared, "arms": own_keys}

    @property
    def group(self) -> str:
        """What W&B calls the runs of this curve together."""
        if given := self.finetune.get("wandb", {}).get("group"):
            return str(given)
        told = self.model_dump_json(exclude={"out", "resume"})
        return f"label-curve-{hashlib.sha256(told.encode()).hexdigest()[:8]}"

    def in_group(self, group: str) -> "LabelCurveRecipe":
        """The same with that W&B group."""
        return self.model_copy(update={"finetune": merge(self.finetune, {"wandb": {"group": group}})})

    def cell(self, arm: str, labelled: int, draw: int, steps: int, out: Path) -> FinetuneRecipe:
        """The fine-tuning of one cell, which does not read test; it continues what is there."""
        values = merge(self.finetune, self.arms[arm])
        values = merge(values, {"data": {"labelled": labelled, "draw": draw}})
        tags = [*self.finetune.get("wandb", {}).get("tags", ()), arm]
        mirrored = {"group": self.group, "name": f"{arm}-{labelled}-{draw}-{steps}", "tags": tags}
        values = merge(values, {"wandb": mirrored})
        cell = {"out": str(out), "resume": True, "seed": self.seed + draw, "steps": steps, "evaluate_test": False}
        return validate(FinetuneRecipe, values | cell, f"arm {arm}")

    def draw_of(self, arm: str) -> tuple[str, str | None]:
        """How an arm's training groups are drawn: by what, and in which encoder's embedding."""
        data = merge(self.finetune, self.arms[arm])["data"]
        return data.get("draw_by", "random"), data.get("draw_encoder")

    def drawn_with(self, arm: str) -> str:
        """The first arm, from the baseline on, that has the same groups in every draw."""
        return next(one for one in (self.baseline, *self.arms) if self.draw_of(one) == self.draw_of(arm))

    def others(self) -> list[str]:
        """The arms beside the baseline."""
        return [name for name in self.arms if name != self.baseline]


def merge(values: Mapping[str, Any], changes: Mapping[str, Any]) -> Values:
    """`values` with `changes` laid over them, mapping by mapping; one with a `kind` replaces another kind whole."""
    merged = dict(values)
    for key, change in changes.items():
        before = merged.get(key)
        if isinstance(before, Mapping) and isinstance(change, Mapping) and "kind" not in change:
            merged[key] = merge(before, change)
        else:
            merged[key] = change
    return merged


def _read(name: str) -> Values:
    """The keys that a fine-tuning recipe gives, but for those that the curve sets.

    Raises:
        InputError: it names an encoder, with which every arm would begin.
    """
    values = _plain(load_recipe(FinetuneRecipe, "finetune", name))
    if (encoder := values.pop("encoder", None)) is not None:
        raise InputError(
            f"recipe={name}: names encoder={encoder}, with which every arm would begin, the scratch arm too. Take it out of the "
            "recipe and give it as arms.NAME.encoder."
        )
    return values


def _plain(recipe: FinetuneRecipe) -> Values:
    """What was given of a recipe, as JSON has it, without what the curve sets."""
    values = recipe.model_dump(mode="json", exclude_unset=True)
    for key in _SET_BY_CURVE:
        *parents, last = key.split(".")
        if key != "encoder":
            _at(values, parents).pop(last, None)
    return values


def _only(changes: Mapping[str, Any], values: Mapping[str, Any]) -> Values:
    """Of `values` what `changes` name: an arm's own keys in their plain form."""
    return {
        key: _only(change, values[key]) if isinstance(change, Mapping) and isinstance(values[key], Mapping) else values[key]
        for key, change in changes.items()
    }


def _validate(values: Mapping[str, Any], where: str) -> FinetuneRecipe:
    """As a cell will: with something in the place of what the curve sets."""
    return validate(FinetuneRecipe, {**values, "out": "cell", "steps": 1}, where)


def _refuse(where: str, values: Mapping[str, Any], keys: Mapping[str, str]) -> None:
    for key, by in keys.items():
        *parents, last = key.split(".")
        if last in _at(values, parents):
            raise InputError(f"{where}.{key}: is not set here, but by {by}. Leave it out.")


def _at(values: Mapping[str, Any], parents: list[str]) -> Any:
    for parent in parents:
        inner = values.get(parent)
        values = inner if isinstance(inner, Mapping) else {}
    return values
