"""What a fine-tuning run trains on, chooses by and is judged by; and that the three, and the archive, do not overlap."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from finetune.recipe import FinetuneRecipe
from resunet.architecture import ResUNetArchitecture, UNetArchitecture
from resunet.checkpoint import ProbeLabels, model_folder, read_config
from resunet.config import PercentileZScore
from resunet.data.cases import Case, LoadedCase, load_cases, refuse_images
from resunet.data.evidence import Evidence
from resunet.data.leakage import (
    NO_GROUP_EVIDENCE,
    evidence_of_cases,
    evidence_of_groups,
    find_leaks,
    read_archive,
    refuse_leaks,
)
from resunet.data.source import Source, assign_parts, divide, draw_labelled, hold_out, open_source
from resunet.errors import InputError
from resunet.progress import progress

_CHANNELS = {"resunet": ResUNetArchitecture().channels, "unet": UNetArchitecture().channels}


@dataclass(frozen=True)
class LabelledData:
    """Cases in memory. `archive` is what the encoder was pretrained on; None from scratch. `probe`: labels that it used."""

    source: Source
    train: list[LoadedCase]
    val: list[LoadedCase]
    test: list[LoadedCase]
    archive: Evidence | None
    allowed: list[str]
    probe: ProbeLabels | None = None

    def notes(self) -> list[str]:
        """What a reader of the results has to know."""
        allowed = [f"Allowed by the recipe: {one}." for one in self.allowed]
        labelled = [one.case for one in (*self.train, *self.val)]
        return self.source.notes() + _probe_note(self.probe, labelled, self.source) + allowed


@dataclass(frozen=True)
class FoldedData:
    """Cases in memory that are divided into folds, and the test cases, which are in none.

    folds: of each fold, which of `cases`. archive, allowed, probe: as `LabelledData`.
    """

    source: Source
    cases: list[LoadedCase]
    folds: list[list[int]]
    test: list[LoadedCase]
    archive: Evidence | None
    allowed: list[str]
    probe: ProbeLabels | None = None

    def val(self, fold: int) -> list[LoadedCase]:
        return [self.cases[i] for i in self.folds[fold]]

    def train(self, fold: int) -> list[LoadedCase]:
        left_out = set(self.folds[fold])
        return [case for i, case in enumerate(self.cases) if i not in left_out]

    def notes(self) -> list[str]:
        """What a reader of the results has to know."""
        allowed = [f"Allowed by the recipe: {one}." for one in self.allowed]
        return self.source.notes() + _probe_note(self.probe, [one.case for one in self.cases], self.source) + allowed


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

    Of a recipe with folds that names none, those of the first: what is said or tried before training goes by that one.

    Raises:
        InputError: whatever is wrong with the source, or no cases to train on or to choose by.
    """
    source, drawn = _draw(recipe)
    if recipe.data.folds is not None:
        drawn = hold_out(drawn, _divide(recipe, drawn), recipe.data.fold or 0)
    return source, drawn.part("pool"), drawn.part("val"), drawn.part("test") if recipe.evaluate_test else []


def _draw(recipe: FinetuneRecipe) -> tuple[Source, Source]:
    """The source with its parts, and the same with only the labelled draw in pool and val."""
    settings = recipe.data
    source = open_source(settings, masks=True, classes=settings.classes, ignore=settings.ignore)
    source = assign_parts(source, settings.split_seed, settings.stratify)
    pool, val = source.part("pool"), source.part("val")
    if not pool or not (val or settings.folds):
        raise InputError(
            f"data.source={settings.source}: {len(pool)} pool and {len(val)} val cases; both are needed. With data.folds the pool "
            "is enough."
        )
    return source, draw_labelled(source, settings.labelled, settings.draw, settings.stratify)


def _divide(recipe: FinetuneRecipe, drawn: Source) -> dict[str, int]:
    assert recipe.data.folds is not None
    return divide(drawn, recipe.data.folds, recipe.data.split_seed, recipe.data.stratify)


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
    return LabelledData(source, *parts, archive, _refuse_overlap(recipe, source, *parts, archive), probe_of(recipe))


def read_folds(recipe: FinetuneRecipe, quiet: bool) -> FoldedData:
    """The folds of a cross-validation: of pool and val, after the recipe's draw; and test.

    Every case is to choose by in one fold, so that an encoder may have seen none of them.

    Raises:
        InputError: whatever is wrong with the source, or fewer groups than folds.
        CheckFailed: cases of a fold are among those of the others, test cases among any, or either in the encoder's archive.
    """
    assert recipe.normalisation is not None, "resolve() comes first"
    assert recipe.data.folds is not None
    source, drawn = _draw(recipe)
    fold_of = _divide(recipe, drawn)
    divided, test = drawn.part("pool", "val"), drawn.part("test") if recipe.evaluate_test else []
    folds = [[i for i, case in enumerate(divided) if fold_of[case.group_name] == fold] for fold in range(recipe.data.folds)]
    loaded = _load(recipe, [*divided, *test], quiet)
    archive = read_archive(model_folder(recipe.encoder)) if recipe.encoder is not None else None
    data = FoldedData(source, loaded[: len(divided)], folds, loaded[len(divided) :], archive, [], probe_of(recipe))
    allowed = []
    for fold in range(len(folds)):
        found = _refuse_overlap(recipe, source, data.train(fold), data.val(fold), [], archive)
        allowed += [f"fold {fold}: {one}" if one != NO_GROUP_EVIDENCE else one for one in found]
    allowed += _refuse_overlap(recipe, source, data.cases, [], data.test, archive)
    return replace(data, allowed=list(dict.fromkeys(allowed)))


def probe_of(recipe: FinetuneRecipe) -> ProbeLabels | None:
    """The labels that the recipe's encoder was judged by while it was pretrained, if there were any."""
    return read_config(model_folder(recipe.encoder)).provenance.probe if recipe.encoder is not None else None


def labels_beside(probe: ProbeLabels | None, labelled: Sequence[Case], source: Source) -> int:
    """How many groups of a probe are not among those of `labelled`: all, where another salt made their HMACs."""
    if probe is None:
        return 0
    if probe.salt_fingerprint != source.salt_fingerprint:
        return len(probe.groups)
    return len(set(probe.groups) - {case.group_hmac for case in labelled})


def _probe_note(probe: ProbeLabels | None, labelled: Sequence[Case], source: Source) -> list[str]:
    if probe is None:
        return []
    own, beside = len({case.group_hmac for case in labelled}), labels_beside(probe, labelled, source)
    among = len(probe.groups) - beside
    told = f" ({among} more of the probe's are among them)" if among and beside else ""
    if not beside:
        return [f"{own} labelled groups; the {among} that the encoder's probe used are among them."]
    return [f"{own} labelled groups, plus {beside} that the encoder's probe used{told}: {own + beside} had to be labelled."]


def _load(recipe: FinetuneRecipe, cases: Sequence[Case], quiet: bool) -> list[LoadedCase]:
    assert recipe.normalisation is not None
    loaded = load_cases(
        cases,
        recipe.data.channels,
        recipe.normalisation,
        recipe.data.classes,
        recipe.data.ignore,
        progress=lambda items, total: progress(items, total, "read", quiet=quiet),
    )
    refuse_images(loaded, recipe.model.spatial_dims)
    return loaded


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
    if (probe := probe_of(recipe)) is not None:
        seen["the labelled scans of the encoder's probe"] = evidence_of_groups(probe.groups, probe.salt_fingerprint)
    allowed = []
    for where, record in seen.items():
        for part, cases in (("val", val), ("test", test)):
            leaks = find_leaks(record, evidence_of_cases(cases, salt))
            allowed += refuse_leaks(leaks, [case.case for case in cases], part, where, allow)
    if archive is not None and archive.salt_fingerprint != salt:
        allowed.append(NO_GROUP_EVIDENCE)
    return allowed
