"""The guard: no image of a validation or test patient was in the archive an encoder was pretrained on.

Every encoder carries archive.parquet, one row a scan: HMAC of its group, sha256 of its file and of its pixels. Groups
are comparable only where one salt made both HMACs; hashes always are.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from resunet.data.cases import LoadedCase
from resunet.errors import CheckFailed, InputError

ARCHIVE = "archive.parquet"
NO_GROUP_EVIDENCE = (
    "group evidence unavailable: the model's archive was made with another salt, only hashes of files and pixels compare"
)
_COLUMNS = ("group", "file_sha256", "pixel_sha256")
_SALT = b"resunet.salt_fingerprint"


@dataclass(frozen=True)
class Archive:
    """What a model has seen. rows: (HMAC of the group, sha256 of the file, sha256 of the pixels), one a scan."""

    rows: frozenset[tuple[str, str, str]]
    salt_fingerprint: str


@dataclass(frozen=True)
class Leak:
    """A held-out case that the archive holds, and how that is known."""

    case: LoadedCase
    evidence: tuple[str, ...]


def describe_archive(cases: Iterable[LoadedCase], salt_fingerprint: str) -> Archive:
    """The record of loaded scans."""
    rows = ((case.case.group_hmac, case.file_sha256, case.pixel_sha256) for case in cases)
    return Archive(frozenset(rows), salt_fingerprint)


def merge_archives(own: Archive, inherited: Archive | None) -> Archive:
    """One record of both. Groups that another salt made are dropped: they could not be told from others."""
    if inherited is None:
        return own
    comparable = inherited.salt_fingerprint == own.salt_fingerprint
    rows = inherited.rows if comparable else {("", file, pixels) for _, file, pixels in inherited.rows}
    return Archive(own.rows | rows, own.salt_fingerprint)


def write_archive(path: Path, archive: Archive) -> None:
    """Write archive.parquet, rows sorted."""
    columns = list(zip(*sorted(archive.rows), strict=True)) or [(), (), ()]
    metadata = {_SALT: archive.salt_fingerprint.encode()}
    schema = pa.schema([(name, pa.string()) for name in _COLUMNS], metadata=metadata)
    pq.write_table(pa.table([list(column) for column in columns], schema=schema), path)


def read_archive(folder: Path) -> Archive:
    """The record beside an encoder.

    Raises:
        InputError: there is none, or it is not one.
    """
    path = folder / ARCHIVE
    try:
        table = pq.read_table(path, columns=list(_COLUMNS))
    except FileNotFoundError as error:
        raise InputError(
            f"{folder}: has no {ARCHIVE}, so that nobody can tell whether val or test images were pretrained on. "
            "Give the model/ folder that resunet pretrain wrote."
        ) from error
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable archive record: {error}") from error
    metadata = table.schema.metadata or {}
    rows = zip(*(table.column(name).to_pylist() for name in _COLUMNS), strict=True)
    return Archive(frozenset(rows), metadata.get(_SALT, b"").decode())


def find_leaks(archive: Archive, cases: Sequence[LoadedCase], salt_fingerprint: str) -> list[Leak]:
    """Which held-out cases the archive holds, with the evidence for each."""
    comparable = archive.salt_fingerprint == salt_fingerprint
    groups, files, pixels = (frozenset(column) for column in list(zip(*archive.rows, strict=True)) or ((), (), ()))
    leaks = []
    for case in cases:
        evidence = []
        if comparable and case.case.group_hmac in groups:
            evidence.append("group")
        if case.file_sha256 in files:
            evidence.append("sha256 of the file")
        if case.pixel_sha256 in pixels:
            evidence.append("sha256 of the pixels")
        if evidence:
            leaks.append(Leak(case, tuple(evidence)))
    return leaks


def refuse_leaks(leaks: Sequence[Leak], held_out: str, seen: str, allowed: bool) -> list[str]:
    """Stop on leaks unless the recipe allows them by name; what was set aside, for the record.

    Args:
        held_out: what must be unseen, for the message ('val', 'test').
        seen: where it was found ('the pretraining archive', 'the labelled training cases').

    Raises:
        CheckFailed: with one leak a line.
    """
    if not leaks:
        return []
    if allowed:
        return [f"leak: {len(leaks)} {held_out} cases are among {seen}"]
    shown = "\n".join(f"  {leak.case.case.image} ({', '.join(leak.evidence)})" for leak in leaks[:20])
    more = f"\n  … and {len(leaks) - 20} more" if len(leaks) > 20 else ""
    raise CheckFailed(
        f"{len(leaks)} {held_out} cases are among {seen}:\n{shown}{more}\n"
        "Their figures would not be those of unseen patients. Take them out, or allow it by name: allow=[leak]."
    )
