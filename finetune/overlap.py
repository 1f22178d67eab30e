"""What else than the labelled training cases has been seen, and by whom; and that no val or test case is among it."""

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce

from finetune.counted_labels import probes_of
from finetune.distillation.teacher import teacher_archive, teacher_labels
from finetune.recipe import FinetuneRecipe
from finetune.start import start_archive
from resunet.checkpoint import model_folder
from resunet.data.cases import LoadedCase
from resunet.data.evidence import Evidence
from resunet.data.leakage import (
    NO_GROUP_EVIDENCE,
    evidence_of_cases,
    evidence_of_groups,
    find_leaks,
    merge_archives,
    read_archive,
    refuse_leaks,
)
from resunet.data.source import Source


def seen_by_others(recipe: FinetuneRecipe, unlabelled: Sequence[LoadedCase], salt_fingerprint: str) -> dict[str, Evidence]:
    """What else has been seen than the labelled training cases, and by whom."""
    seen = {}
    if recipe.encoder is not None:
        seen["the pretraining archive"] = read_archive(model_folder(recipe.encoder))
    if recipe.data.draw_encoder is not None:  # it chose what is labelled
        seen["the archive of data.draw_encoder"] = read_archive(model_folder(recipe.data.draw_encoder))
    if (archive := start_archive(recipe)) is not None:
        seen["the start's archive"] = archive
    if (archive := teacher_archive(recipe)) is not None:
        seen["the teacher's archive"] = archive
    if unlabelled:
        seen["the unlabelled training cases"] = evidence_of_cases(unlabelled, salt_fingerprint)
    return seen


def joined(seen: Iterable[Evidence], salt_fingerprint: str) -> Evidence | None:
    """One record; those of this salt first, whose groups stay."""
    ordered = sorted(seen, key=lambda one: one.salt_fingerprint != salt_fingerprint)
    return reduce(merge_archives, ordered) if ordered else None


def refuse_overlap(
    recipe: FinetuneRecipe,
    source: Source,
    train: list[LoadedCase],
    val: list[LoadedCase],
    test: list[LoadedCase],
    seen: Mapping[str, Evidence],
) -> list[str]:
    """What the recipe allows of it, in words, for the record.

    Args:
        seen: what `seen_by_others` gave.

    Raises:
        CheckFailed: val or test cases, or copies of them, are among the training cases or in what others have seen.
    """
    salt = source.salt_fingerprint
    records: list[tuple[str, Evidence, tuple[str, ...]]]
    records = [("the labelled training cases", evidence_of_cases(train, salt), ("val", "test"))]
    records += [(where, record, ("val", "test")) for where, record in seen.items()]
    for probe in probes_of(recipe):
        labels = evidence_of_groups(probe.groups, probe.salt_fingerprint)
        records.append(("the labelled scans of the encoder's probe", labels, ("val", "test")))
    for whose, model in (
        ("teacher", recipe.teacher),
        ("start", recipe.start),
        ("model that draws", recipe.data.draw_encoder),
    ):
        for its in teacher_labels(model):  # its val may be this run's: both choose a checkpoint
            labels = evidence_of_groups(its.groups, its.salt_fingerprint)
            records.append((f"the labelled scans of the {whose}", labels, ("test",)))
    held_out, allowed = {"val": val, "test": test}, []
    for where, record, parts in records:
        for part in parts:
            cases = held_out[part]
            leaks = find_leaks(record, evidence_of_cases(cases, salt))
            allowed += refuse_leaks(leaks, [case.case for case in cases], part, where, "leak" in recipe.allow)
    if any(record.salt_fingerprint != salt for record in seen.values()):
        allowed.append(NO_GROUP_EVIDENCE)
    return allowed
