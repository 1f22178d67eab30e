"""What a fine-tuning run trains on, chooses by and is judged by; and that the three, and the archive, do not overlap."""

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.recipe import FinetuneRecipe
from resunet.architecture import ResUNetArchitecture, UNetArchitecture
from resunet.checkpoint import model_folder, read_config
from resunet.config import PercentileZScore
from resunet.data.cases import Case, LoadedCase, load_cases
from resunet.data.evidence import Evidence
from resunet.data.leakage import NO_GROUP_EVIDENCE, evidence_of_cases, find_leaks, read_archive, refuse_leaks
from resunet.data.source import Source, assign_parts, draw_labelled, open_source
from resunet.errors import InputError
from resunet.progress import progress

_CHANNELS = {"resunet": ResUNetArchitecture().channels, "unet": UNetArchitecture().channels}


@dataclass(frozen=True)
class LabelledData:
    """Cases in memory. `archive` is what the encoder was pretrained on; None from scratch."""

    source: Source
    train: list[LoadedCase]
    val: list[LoadedCase]
    test: list[LoadedCase]
    archive: Evidence | None
    allowed: list[str]

    def notes(self) -> list[str]:
        """What a reader of the results has to know."""
        return self.source.notes() + [f"Allowed by the recipe: {one}." for one in self.allowed]


def resolve(recipe: FinetuneRecipe) -> FinetuneRecipe:
    """The recipe with what it leaves open filled in: the encoder's kind of norm layer and normalisation, default widths.

    Raises:
        InputError: the recipe names another normalisation than the encoder's.
    """
    norm, normalisation = recipe.model.norm, recipe.normalisation
    if recipe.encoder is not None:
        config = read_config(model_folder(recipe.encoder))
        norm = norm or getattr(config.architecture, "norm", None)
        if normalisation is not None and normalisation != config.normalisation:
            raise InputError(
                f"normalisation={normalisation.model_dump()}: the encoder was pretrained with "
                f"{config.normalisation.model_dump()}. Leave the key out to use the encoder's."
            )
        normalisation = config.normalisation
    channels = recipe.model.channels or _CHANNELS[recipe.model.name]
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"norm": norm or "batch", "channels": channels}),
            "normalisation": normalisation or PercentileZScore(),
        }
    )


def choose_cases(recipe: FinetuneRecipe) -> tuple[Source, Sequence[Case], Sequence[Case], Sequence[Case]]:
    """The source, and its cases to train on, to choose by and to be judged by; nothing is read.

    Raises:
        InputError: whatever is wrong with the source, or no cases to train on or to choose by.
    """
    settings = recipe.data
    source = open_source(settings, masks=True, classes=settings.classes, ignore=settings.ignore)
    source = assign_parts(source, settings.split_seed, settings.stratify)
    pool, val = source.part("pool"), source.part("val")
    if not pool or not val:
        raise InputError(f"data.source={settings.source}: {len(pool)} pool and {len(val)} val cases; both are needed.")
    drawn = draw_labelled(source, settings.labelled, settings.draw, settings.stratify)
    return source, drawn.part("pool"), drawn.part("val"), drawn.part("test") if recipe.evaluate_test else []


def read_labelled(recipe: FinetuneRecipe, quiet: bool) -> LabelledData:
    """The labelled groups of the recipe's draw, val and test.

    With `data.labelled`, val is limited to as many groups as are trained on, by the same nested draw: labels that
    choose a checkpoint are labels too.

    Raises:
        InputError: whatever is wrong with the source.
        CheckFailed: val or test cases are among the training cases or in the encoder's archive.
    """
    assert recipe.normalisation is not None, "resolve() comes first"
    source, train, val, test = choose_cases(recipe)
    loaded = _load(recipe, [*train, *val, *test], quiet)
    parts = loaded[: len(train)], loaded[len(train) : len(train) + len(val)], loaded[len(train) + len(val) :]
    archive = read_archive(model_folder(recipe.encoder)) if recipe.encoder is not None else None
    return LabelledData(source, *parts, archive, _refuse_overlap(recipe, source, *parts, archive))


def _load(recipe: FinetuneRecipe, cases: Sequence[Case], quiet: bool) -> list[LoadedCase]:
    assert recipe.normalisation is not None
    return load_cases(
        cases,
        recipe.data.channels,
        recipe.normalisation,
        recipe.data.classes,
        recipe.data.ignore,
        progress=lambda items, total: progress(items, total, "read", quiet=quiet),
    )


def _refuse_overlap(
    recipe: FinetuneRecipe,
    source: Source,
    train: list[LoadedCase],
    val: list[LoadedCase],
    test: list[LoadedCase],
    archive: Evidence | None,
) -> list[str]:
    salt = source.salt_fingerprint
    allow = "leak" in recipe.allow
    seen = {"the labelled training cases": evidence_of_cases(train, salt)}
    if archive is not None:
        seen["the pretraining archive"] = archive
    allowed = []
    for where, record in seen.items():
        for part, cases in (("val", val), ("test", test)):
            leaks = find_leaks(record, evidence_of_cases(cases, salt))
            allowed += refuse_leaks(leaks, [case.case for case in cases], part, where, allow)
    if archive is not None and archive.salt_fingerprint != salt:
        allowed.append(NO_GROUP_EVIDENCE)
    return allowed
