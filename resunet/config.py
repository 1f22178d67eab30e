"""Recipes: frozen pydantic models, parsed from YAML and `key=value` by OmegaConf, with messages a person can act on.

What every stage shares is here; each application declares its own recipe on top of it. A recipe is looked up as a
path, then by name in the installed package, then in the checkout.
"""

import difflib
import hashlib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from resunet.errors import InputError

Precision = Literal["fp32", "bf16", "fp16"]


class Frozen(BaseModel):
    """Every record in this project: no key that is not declared, no change after it was made."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PercentileZScore(Frozen):
    """Clip a scan to two of its own percentiles, then subtract its mean and divide by its standard deviation."""

    kind: Literal["percentile_zscore"] = "percentile_zscore"
    low: float = Field(0.5, ge=0, lt=100)
    high: float = Field(99.5, gt=0, le=100)

    @model_validator(mode="after")
    def _ordered(self) -> "PercentileZScore":
        if self.low >= self.high:
            raise ValueError(f"low={self.low} must be below high={self.high}")
        return self


class FixedNormalisation(Frozen):
    """The same constants for every scan: clip to [low, high], subtract `mean`, divide by `std`."""

    kind: Literal["fixed"]
    low: float
    high: float
    mean: float
    std: float = Field(gt=0)


Normalisation = Annotated[PercentileZScore | FixedNormalisation, Field(discriminator="kind")]


class WandbSettings(Frozen):
    """Where the run is mirrored. The local record is complete without it."""

    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = Field("resunet", min_length=1, max_length=128, pattern=r"^[^/\\#?%:]*$", description="without / \\ # ? % :")
    group: str | None = None
    name: str | None = Field(None, description="of the run; null: W&B thinks of one")
    tags: tuple[str, ...] = Field((), description="by which W&B filters and groups; a label curve adds the arm's name")
    upload: tuple[Literal["overlays", "weights"], ...] = Field(
        (), description="beside figures: pictures of scans with their masks, and models; ids and paths never"
    )


@dataclass(frozen=True)
class Called:
    """What a user calls what messages about a source name: recipe keys, or flags of a command."""

    source: str = "data.source="
    splits: str = "data.splits="
    salt_file: str = "data.salt_file="


class DataSettings(Frozen):
    """What is read, and how. See `resunet.data.source` for the layouts that `source` may have."""

    source: Path
    channels: Literal["grey", "rgb"] | Annotated[int, Field(ge=1)] = "grey"
    names: Literal["hash", "keep"] = "hash"
    salt_file: Path | None = None
    splits: Path | None = Field(None, description="a split to use instead of the source's own splits.json")
    split_seed: int = Field(0, ge=0, description="of the split by group that a source without splits.json gets")
    stratify: bool = Field(False, description="that split, and labelled draws, balanced over what each group's masks hold")


def _not_empty(path: Path) -> Path:
    if path == Path():
        raise ValueError("must be the path of a new folder")
    return path


def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"{list(value)}: two numbers, the first not above the second")
    return value


def _values_first(classes: Any) -> Any:
    """Refuses {name: value}, which is nnU-Net's way round."""
    given = classes.items() if isinstance(classes, dict) else ()
    if any(isinstance(name, str) and not name.lstrip("-").isdigit() and isinstance(value, int) for name, value in given):
        swapped = ", ".join(f"{value}: {name}" for name, value in given)
        raise ValueError(f"mask values come first, then their names: {{{swapped}}}")
    return classes


def _distinct(classes: dict[int, str]) -> dict[int, str]:
    if not 2 <= len(classes) <= 254:
        raise ValueError("needs the background and at least one class, for example {0: background, 255: tumour}")
    if len(set(classes.values())) < len(classes):
        raise ValueError("two values have one name; give every class its own")
    return classes


Range = Annotated[tuple[float, float], AfterValidator(_ordered)]
Probability = Annotated[float, Field(ge=0, le=1)]
# raw mask value → name, background first
Classes = Annotated[dict[int, str], BeforeValidator(_values_first), AfterValidator(_distinct)]
NewFolder = Annotated[Path, AfterValidator(_not_empty)]


class Recipe(Frozen):
    """The keys that every stage shares."""

    out: NewFolder
    resume: bool = False
    seed: int = Field(0, ge=0, lt=2**32)
    steps: int = Field(ge=1)
    precision: Precision = "fp32"
    processes: int = Field(1, ge=1)
    allow: tuple[str, ...] = ()
    warmup: float = Field(0.05, ge=0, le=1, description="share of steps over which the learning rate rises")
    log_every: int = Field(10, ge=1)
    checkpoint_every: int = Field(200, ge=1)
    keep_checkpoints: int = Field(2, ge=1, description="so many of the latest stay, and the best")
    wandb: WandbSettings = WandbSettings()

    def sha256(self) -> str:
        """Identifies what was asked for, wherever it is written and however often it was resumed."""
        return hashlib.sha256(self.model_dump_json(exclude={"out", "resume"}).encode()).hexdigest()


R = TypeVar("R", bound=Frozen)


def load_recipe(recipe_class: type[R], stage: str, name: str, overrides: Sequence[str] = (), defaults: Sequence[str] = ()) -> R:
    """The recipe `name` of a stage ('pretrain', 'finetune') with `key=value` overrides applied.

    Args:
        defaults: `key=value` too, of the keys that the file leaves out.

    Raises:
        InputError: no such recipe, YAML that does not parse, an interpolation, or keys and values that are not
            allowed; all faults at once, each with its key, its value and what is allowed.
    """
    path = find_recipe(stage, name)
    try:
        parsed = OmegaConf.load(path)
        if not isinstance(parsed, DictConfig):
            raise InputError(f"{path}: a recipe is a mapping of keys to values, this file holds a list.")
        left_out = [default for default in defaults if default.split("=", 1)[0] not in parsed]
        for key, override in _last_overrides([*left_out, *overrides]).items():
            # the value given is the value: a mapping replaces the recipe's, it is not mixed into it
            given = OmegaConf.to_container(OmegaConf.from_dotlist([override]), resolve=False)
            for part in key.split("."):
                assert isinstance(given, dict)
                given = given[part]
            OmegaConf.update(parsed, key, given, merge=False)
        values = OmegaConf.to_container(parsed, resolve=False)
    except (OmegaConfBaseException, ValueError, OSError) as error:
        raise InputError(f"{path}: cannot be read as a recipe: {error}") from error
    except Exception as error:  # PyYAML's own errors share no public base with OmegaConf's
        if type(error).__module__.split(".")[0] != "yaml":
            raise
        raise InputError(f"{path}: not valid YAML: {error}") from error
    _refuse_interpolation(values, path)
    return validate(recipe_class, values, f"recipe {path}")


def validate(recipe_class: type[R], values: Any, where: str) -> R:
    """`recipe_class` from plain values, or an InputError that lists every fault."""
    try:
        return recipe_class.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{where} is not valid:\n{_faults(recipe_class, error)}") from error


def find_recipe(stage: str, name: str) -> Path:
    """The file of a recipe: a path, a name in the installed package, or a name in the checkout."""
    given = Path(name)
    if given.suffix in (".yaml", ".yml") or len(given.parts) > 1:
        if given.is_file():
            return given
        raise InputError(f"recipe {name}: no such file. Shipped {stage} recipes: {', '.join(_shipped(stage))}.")
    for folder in _recipe_folders(stage):
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    close = difflib.get_close_matches(name, _shipped(stage), n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise InputError(
        f"recipe {name!r}: not found.{hint} Give the path of a YAML file, or one of the shipped {stage} recipes: "
        f"{', '.join(_shipped(stage)) or 'none'}."
    )


def _recipe_folders(stage: str) -> list[Path]:
    package = Path(__file__).parent
    return [package / "configs" / stage, package.parent / "configs" / stage]


def _shipped(stage: str) -> list[str]:
    return sorted({path.stem for folder in _recipe_folders(stage) for path in folder.glob("*.yaml")})


def _last_overrides(overrides: Sequence[str]) -> dict[str, str]:
    """key → the override that counts: of several for one key, the last."""
    for before, override in zip(["", *overrides], overrides, strict=False):
        if not re.match(r"[\w.]+=", override):
            opened = any(before.count(bracket) > before.count(closed) for bracket, closed in ("[]", "{}"))
            hint = f" The shell cut a value with blanks in two: put it into quotes, '{before} {override} …'." if opened else ""
            raise InputError(f"{override!r}: an override is written key=value, for example steps=500 or data.source=DIR.{hint}")
    return {override.split("=", 1)[0]: override for override in overrides}


def _refuse_interpolation(values: Any, path: Path, key: str = "") -> None:
    if isinstance(values, dict):
        for name, value in values.items():
            _refuse_interpolation(value, path, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            _refuse_interpolation(value, path, key)
    elif isinstance(values, str) and "${" in values:
        raise InputError(f"{path}: {key}={values!r}: interpolation (${{…}}) is refused; write the value itself.")


def _faults(model: type[BaseModel], error: ValidationError) -> str:
    """A line a key; what the branches of a union say of one value stands in one line."""
    by_key: dict[str, list[Any]] = {}
    for one in error.errors():
        by_key.setdefault(_key(model, one), []).append(one)
    lines = []
    for key, ones in by_key.items():
        kind, value = ones[0]["type"], ones[0]["input"]
        if kind == "extra_forbidden":
            lines.append(f"  {key}={value!r}: there is no such key; {_suggestion(model, key)}")
        elif kind == "missing":
            lines.append(f"  {key}: is required and has no default; give it in the recipe or as {key}=…")
        else:
            messages = dict.fromkeys(_said(key, one) for one in ones)
            # what a rule between keys says names them; their section is not repeated, still less the whole recipe
            section = isinstance(value, dict | BaseModel) and (not key or f"{key}." in " ".join(_keys(model)))
            told = "" if not key else f"{key}: " if section else f"{key}={value!r}: "
            lines.append(f"  {told}{'; or '.join(messages)}")
    return "\n".join(lines)


def _said(key: str, one: Any) -> str:
    """pydantic's message of a fault, in words of the command line where it has those of Python."""
    if one["type"] in ("tuple_type", "list_type"):
        return f"is a list: {key}=[…], in brackets, with commas between"
    if one["type"] in ("dict_type", "model_type", "model_attributes_type", "mapping_type"):
        return f"has keys of its own: {key}.KEY=…, or in a recipe a line for each below it"
    return str(one["msg"]).removeprefix("Value error, ")


def _key(model: type[BaseModel], error: Any) -> str:
    """The recipe's key of a fault: pydantic's location without the names it gives to the branches of unions."""
    parts: list[str] = []
    models: list[type[BaseModel]] = [model]
    names_are_data = False  # within a mapping such as data.classes
    for position, part in enumerate(error["loc"]):
        field = next((m.model_fields[part] for m in models if part in m.model_fields), None)
        if field is not None:
            models = list(_models_in(field.annotation))
            names_are_data = typing.get_origin(field.annotation) is dict
        unknown_key = error["type"] == "extra_forbidden" and position == len(error["loc"]) - 1
        if field is not None or unknown_key or names_are_data or str(part).isdigit():
            parts.append(str(part))
    return ".".join(parts)


def _suggestion(model: type[BaseModel], key: str) -> str:
    """The key that was probably meant: a sibling spelt alike, else a key elsewhere whose last word is alike."""
    parent, _, word = key.rpartition(".")
    known = list(_keys(model))
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == parent}
    elsewhere = {k.rpartition(".")[2]: k for k in known}
    for words, cutoff in ((siblings, 0.7), (elsewhere, 0.8)):
        close = difflib.get_close_matches(word, list(words), n=1, cutoff=cutoff)
        if close:
            return f"did you mean {words[close[0]]!r}?"
    return f"allowed here: {', '.join(siblings.values())}"


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for nested in _models_in(field.annotation):
            yield from _keys(nested, f"{prefix}{name}.")


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif isinstance(annotation, types.UnionType) or typing.get_origin(annotation) in (typing.Union, Annotated):
        for argument in typing.get_args(annotation):
            yield from _models_in(argument)


def split_arguments(program: str, arguments: Sequence[str]) -> tuple[str, list[str]]:
    """RECIPE and its overrides from a command line."""
    if not arguments or arguments[0].startswith("-") or "=" in arguments[0]:
        raise InputError(f"usage: {program} RECIPE [key=value …]; RECIPE is a YAML file or the name of a shipped recipe.")
    return arguments[0], list(arguments[1:])
