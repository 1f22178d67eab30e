"""What a fine-tuning run trains on, chooses by and is judged by; and that the three, and the archive, do not overlap."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from finetune.counted_labels import other_labels, probe_note, probes_of, start_note, teacher_note
from finetune.distillation.teacher import refuse_other_teacher, teacher_normalisation
from finetune.distillation.unlabelled import MixedSampler, load_unlabelled, unlabelled_cases
from finetune.drawing import suggested_order
from finetune.overlap import joined, refuse_overlap, seen_by_others
from finetune.recipe import FinetuneRecipe
from finetune.start import as_started
from finetune.training.patches import Batches, PatchSampler
from resunet.architecture import MOBILE_BACKBONE, ResUNetArchitecture, UNetArchitecture
from resunet.checkpoint import LabelledGroups, model_folder, read_config
from resunet.config import PercentileZScore
from resunet.data.cases import Case, LoadedCase, load_cases, refuse_images
from resunet.data.evidence import Evidence
from resunet.data.leakage import NO_GROUP_EVIDENCE
from resunet.data.source import Source, assign_parts, divide, draw_labelled, hold_out, open_source
from resunet.errors import InputError
from resunet.light_model import decoder_widths
from resunet.light_settings import LIGHT
from resunet.members import join_labels
from resunet.mobile import channels_of
from resunet.plain import number_of
from resunet.progress import progress

_CHANNELS = {"resunet": ResUNetArchitecture().channels, "unet": UNetArchitecture().channels}


def _default_channels(recipe: FinetuneRecipe) -> tuple[int, ...]:
    if recipe.model.name == LIGHT:
        return decoder_widths(channels_of(recipe.model.backbone or MOBILE_BACKBONE))
    return _CHANNELS[recipe.model.name]


@dataclass(frozen=True)
class LabelledData:
    """Cases in memory.

    archive: what else has been seen: the encoder's and the teacher's archives, and the unlabelled scans; None: nothing.
    others: labels behind the encoder and the teacher. unlabelled: scans of the pool that are learned from, without masks.
    remarks: what a reader has to know of labels that others used.
    """

    source: Source
    train: list[LoadedCase]
    val: list[LoadedCase]
    test: list[LoadedCase]
    archive: Evidence | None
    allowed: list[str]
    others: tuple[LabelledGroups, ...] = ()
    unlabelled: list[LoadedCase] = field(default_factory=list)
    remarks: tuple[str, ...] = ()

    def notes(self) -> list[str]:
        """What a reader of the results has to know."""
        return [*self.about(), *(f"Allowed by the recipe: {one}." for one in self.allowed)]

    def about(self) -> tuple[str, ...]:
        """What a reader has to know of the source, of labels that others used, and of scans without."""
        groups = len({one.case.group_hmac for one in self.unlabelled})
        scans = number_of(len(self.unlabelled), "unlabelled scan")
        mixed = [f"{scans} of {number_of(groups, 'group')} are learned from, too."] if groups else []
        return (*self.source.notes(), *self.remarks, *mixed)

    def labels(self) -> tuple[LabelledGroups, ...]:
        """The labelled groups behind what is trained on these cases, for each salt."""
        own = tuple(one.case.group_hmac for one in (*self.train, *self.val))
        return join_labels([LabelledGroups(groups=own, salt_fingerprint=self.source.salt_fingerprint), *self.others])


@dataclass(frozen=True)
class FoldedData:
    """Cases in memory that are divided into folds, and the test cases, which are in none.

    folds: of each fold, which of `cases`. archive, allowed, remarks: as `LabelledData`.
    """

    source: Source
    cases: list[LoadedCase]
    folds: list[list[int]]
    test: list[LoadedCase]
    archive: Evidence | None
    allowed: list[str]
    remarks: tuple[str, ...] = ()

    def val(self, fold: int) -> list[LoadedCase]:
        return [self.cases[i] for i in self.folds[fold]]

    def train(self, fold: int) -> list[LoadedCase]:
        left_out = set(self.folds[fold])
        return [case for i, case in enumerate(self.cases) if i not in left_out]

    def notes(self) -> list[str]:
        """What a reader of the results has to know."""
        return [*self.source.notes(), *self.remarks, *(f"Allowed by the recipe: {one}." for one in self.allowed)]


def resolve(recipe: FinetuneRecipe) -> FinetuneRecipe:
    """The recipe with what it leaves open filled in: the encoder's kind of norm layer and normalisation, default widths.

    Raises:
        InputError: the recipe names another normalisation than the encoder's, a start of another shape, or a teacher that sees
            scans or answers otherwise.
    """
    if recipe.data.draw_by != "random" and recipe.data.labelled is None:
        raise InputError(
            f"data.draw_by={recipe.data.draw_by}: all groups are labelled, and none is drawn. Set data.labelled, or leave it out."
        )
    recipe = as_started(recipe)
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
    channels = recipe.model.channels or _default_channels(recipe)
    resolved = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"norm": norm or "batch", "channels": channels}),
            "normalisation": normalisation or teacher_normalisation(recipe) or PercentileZScore(),
        }
    )
    refuse_other_teacher(resolved)
    return resolved


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
    order = suggested_order(settings, source)
    return source, draw_labelled(source, settings.labelled, settings.draw, settings.stratify, order)


def _divide(recipe: FinetuneRecipe, drawn: Source) -> dict[str, int]:
    assert recipe.data.folds is not None
    return divide(drawn, recipe.data.folds, recipe.data.split_seed, recipe.data.stratify)


def read_labelled(recipe: FinetuneRecipe, quiet: bool) -> LabelledData:
    """The labelled groups of the recipe's draw, val and test.

    With `data.labelled`, val is limited to as many groups as are trained on, by the same nested draw: labels that
    choose a checkpoint are labels too.

    Raises:
        InputError: whatever is wrong with the source.
        CheckFailed: val or test cases are among the training cases, the unlabelled ones, or in the encoder's or teacher's archive.
    """
    assert recipe.normalisation is not None, "resolve() comes first"
    source, train, val, test = choose_cases(recipe)
    loaded = _load(recipe, [*train, *val, *test], quiet)
    parts = loaded[: len(train)], loaded[len(train) : len(train) + len(val)], loaded[len(train) + len(val) :]
    unlabelled = load_unlabelled(recipe, unlabelled_cases(recipe, source, train, val), quiet)
    seen = seen_by_others(recipe, unlabelled, source.salt_fingerprint)
    return LabelledData(
        source,
        *parts,
        archive=joined(seen.values(), source.salt_fingerprint),
        allowed=refuse_overlap(recipe, source, *parts, seen),
        others=other_labels(recipe),
        unlabelled=unlabelled,
        remarks=_remarks(recipe, [*train, *val], source),
    )


def sampler_of(recipe: FinetuneRecipe, data: LabelledData) -> Batches:
    """Where a run's batches come from: the labelled cases, and the unlabelled ones that a teacher or the average is asked about.

    Raises:
        InputError: as `PatchSampler`.
    """
    labelled = PatchSampler(data.train, recipe.patch, recipe.foreground, recipe.foreground_by == "object")
    if not data.unlabelled:
        return labelled
    return MixedSampler(labelled, data.unlabelled, recipe.patch, recipe.unlabelled_share, recipe.batch)


def read_folds(recipe: FinetuneRecipe, quiet: bool) -> FoldedData:
    """The folds of a cross-validation: of pool and val, after the recipe's draw; and test.

    Every case is to choose by in one fold, so that an encoder may have seen none of them.

    Raises:
        InputError: whatever is wrong with the source, or fewer groups than folds.
        CheckFailed: cases of a fold are among those of the others, test cases among any or the unlabelled ones, or either in the
            encoder's or the teacher's archive.
    """
    assert recipe.normalisation is not None, "resolve() comes first"
    assert recipe.data.folds is not None
    source, drawn = _draw(recipe)
    fold_of = _divide(recipe, drawn)
    divided, test = drawn.part("pool", "val"), drawn.part("test") if recipe.evaluate_test else []
    folds = [[i for i, case in enumerate(divided) if fold_of[case.group_name] == fold] for fold in range(recipe.data.folds)]
    loaded = _load(recipe, [*divided, *test], quiet)
    seen = seen_by_others(
        recipe, load_unlabelled(recipe, unlabelled_cases(recipe, source, [], divided), quiet), source.salt_fingerprint
    )
    archive, remarks = joined(seen.values(), source.salt_fingerprint), _remarks(recipe, divided, source)
    data = FoldedData(source, loaded[: len(divided)], folds, loaded[len(divided) :], archive, [], remarks)
    allowed = []
    for fold in range(len(folds)):
        found = refuse_overlap(recipe, source, data.train(fold), data.val(fold), [], seen)
        allowed += [f"fold {fold}: {one}" if one != NO_GROUP_EVIDENCE else one for one in found]
    allowed += refuse_overlap(recipe, source, data.cases, [], data.test, seen)
    return replace(data, allowed=list(dict.fromkeys(allowed)))


def _remarks(recipe: FinetuneRecipe, labelled: Sequence[Case], source: Source) -> tuple[str, ...]:
    probes = probe_note(probes_of(recipe), labelled, source)
    return (*probes, *start_note(recipe, labelled, source), *teacher_note(recipe, labelled, source))


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
