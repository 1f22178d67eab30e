"""Whether a model has seen the cases that it is judged on: by the record beside it, and by the labels that trained and chose it."""

from collections.abc import Sequence
from pathlib import Path

from resunet.checkpoint import ModelConfig
from resunet.data.cases import LoadedCase
from resunet.data.leakage import (
    ARCHIVE,
    NO_GROUP_EVIDENCE,
    evidence_of_cases,
    evidence_of_groups,
    find_leaks,
    read_archive,
    refuse_leaks,
)

NOT_KNOWN = f"The model has no {ARCHIVE} beside it: whether it was trained on cases of this part is known by their groups only."


def refuse_seen(
    folder: Path, config: ModelConfig, cases: Sequence[LoadedCase], salt_fingerprint: str, split: str, allowed: bool, by: str
) -> list[str]:
    """Stop on cases that a model was trained on or, of test, chosen by, unless that is allowed; notes for the reader.

    Args:
        folder: the model directory. salt_fingerprint: of the cases' groups.
        by: what allows it, for the message.

    Raises:
        CheckFailed: with one case a line.
    """
    held_out, notes, known = evidence_of_cases(cases, salt_fingerprint), [], set[int]()
    whose = [one.case for one in cases]
    if (folder / ARCHIVE).is_file():
        archive = read_archive(folder)
        if archive.salt_fingerprint != salt_fingerprint:
            notes.append(NO_GROUP_EVIDENCE)
        leaks = find_leaks(archive, held_out)
        notes += refuse_leaks(leaks, whose, split, "the model's training data", allowed, by)
        known = {leak.row for leak in leaks}
    else:
        notes.append(NOT_KNOWN)
    if split != "test":  # val chose the model, as its name says
        return notes
    for labels in config.provenance.labels:
        leaks = find_leaks(evidence_of_groups(labels.groups, labels.salt_fingerprint), held_out)
        fresh = [leak for leak in leaks if leak.row not in known]
        notes += refuse_leaks(fresh, whose, split, "the scans whose labels trained or chose the model", allowed, by)
        known |= {leak.row for leak in fresh}
    return notes
