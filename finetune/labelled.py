"""What a fine-tuning run trains on, chooses by and is judged by; and that the three, and the archive, do not overlap."""

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.recipe import FinetuneRecipe
from resunet.architecture import ResUNetArchitecture, UNetArchitecture
from resunet.checkpoint import model_folder, read_config
from resunet.config import PercentileZScore
from resunet.data.cases import Case, LoadedCase, load_cases
from resunet.data.leakage import NO_GROUP_EVIDENCE, Archive, describe_archive, find_leaks, read_archive, refuse_leaks
from resunet.data.source import Source, assign_parts, open_source
from resunet.data.splits import draw_groups
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
    archive: Archive | None
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


def read_labelled(recipe: FinetuneRecipe, quiet: bool) -> LabelledData:
    """The labelled groups of the recipe's draw, val and test.

    With `data.labelled`, val is limited to as many groups as are trained on, by the same nested draw: labels that
    choose a checkpoint are labels too.

    Raises:
        InputError: whatever is wrong with the source.
        CheckFailed: val or test cases are among the training cases or in the encoder's archive.
    """
    assert recipe.normalisation is not None, "resolve() comes first"
    source = assign_parts(open_source(recipe.data, masks=True), recipe.data.split_seed)
    pool, val, test = (source.part(part) for part in ("pool", "val", "test"))
    if not recipe.evaluate_test:
        test = []
    if not pool or not val:
        raise InputError(f"data.source={recipe.data.source}: {len(pool)} pool and {len(val)} val cases; both are needed.")
    # drawn by the source's own names: the draw depends neither on the salt nor on how names are recorded
    drawn = set(draw_groups([case.group_name for case in pool], recipe.data.labelled, recipe.data.draw))
    train = [case for case in pool if case.group_name in drawn]
    if recipe.data.labelled is not None:
        val_groups = [case.group_name for case in val]
        chosen = set(draw_groups(val_groups, min(len(drawn), len(set(val_groups))), recipe.data.draw))
        val = [case for case in val if case.group_name in chosen]
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
    archive: Archive | None,
) -> list[str]:
    salt = source.salt.fingerprint
    allow = "leak" in recipe.allow
    seen = {"the labelled training cases": describe_archive(train, salt)}
    if archive is not None:
        seen["the pretraining archive"] = archive
    allowed = []
    for where, record in seen.items():
        for part, cases in (("val", val), ("test", test)):
            allowed += refuse_leaks(find_leaks(record, cases, salt), part, where, allow)
    if archive is not None and archive.salt_fingerprint != salt:
        allowed.append(NO_GROUP_EVIDENCE)
    return allowed
