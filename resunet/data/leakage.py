"""The guard: no image of a validation or test patient was in the archive an encoder was pretrained on.

Every encoder carries archive.parquet, one row a scan: HMAC of its group, sha256 of its file and of its pixels, and the hash of its
look, but no thumbnail, which would show patients. Groups are comparable only where one salt made both HMACs; hashes always are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from resunet.data.cases import Case, LoadedCase
from resunet.data.evidence import COLUMNS, SCHEMA, Evidence, find_pairs
from resunet.data.perceptual import HASH_BYTES
from resunet.errors import CheckFailed, InputError

ARCHIVE = "archive.parquet"
NO_GROUP_EVIDENCE = (
    "group evidence unavailable: the model's archive was made with another salt, only hashes of files, pixels and looks compare"
)
_SALT = b"resunet.salt_fingerprint"


@dataclass(frozen=True)
class Leak:
    """A held-out scan that an archive holds. row: which of the held-out; evidence: how that is known."""

    row: int
    evidence: tuple[str, ...]


def evidence_of_cases(cases: Sequence[LoadedCase], salt_fingerprint: str) -> Evidence:
    """Loaded scans, in their order, with their thumbnails."""
    columns = [
        [case.case.group_hmac for case in cases],
        [case.file_sha256 for case in cases],
        [case.pixel_sha256 for case in cases],
        [case.look.hash for case in cases],
    ]
    table = pa.table([pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)
    return Evidence(table, salt_fingerprint, lambda row: cases[row].look.thumbnail)


def evidence_of_groups(groups: Sequence[str], salt_fingerprint: str) -> Evidence:
    """Groups (HMACs) of which nothing else is known."""
    columns: list[list[str | bytes]] = [list(groups), [""] * len(groups), [""] * len(groups), [bytes(HASH_BYTES)] * len(groups)]
    table = pa.table([pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)
    return Evidence(table, salt_fingerprint)


def merge_archives(own: Evidence, inherited: Evidence | None) -> Evidence:
    """One record of both, as it goes beside a model, without the groups that another salt made: they would compare wrongly."""
    tables = [own.table]
    if inherited is not None:
        table = inherited.table
        if inherited.salt_fingerprint != own.salt_fingerprint:
            table = table.set_column(0, SCHEMA.field("group"), pa.array([""] * table.num_rows, pa.string()))
        tables.append(table)
    return Evidence(pa.concat_tables(tables), own.salt_fingerprint)


def write_archive(path: Path, archive: Evidence) -> None:
    """Write archive.parquet: rows sorted, each once, no thumbnails."""
    table = archive.table.group_by(list(COLUMNS)).aggregate([]).sort_by([(name, "ascending") for name in COLUMNS])
    pq.write_table(table.cast(SCHEMA).replace_schema_metadata({_SALT: archive.salt_fingerprint.encode()}), path)


def read_archive(folder: Path) -> Evidence:
    """The record beside an encoder.

    Raises:
        InputError: there is none, or it is not one.
    """
    path = folder / ARCHIVE
    try:
        table = pq.read_table(path)
    except FileNotFoundError as error:
        raise InputError(
            f"{folder}: has no {ARCHIVE}, so that nobody can tell whether val or test images were pretrained on. "
            "Give the model/ folder that resunet pretrain wrote."
        ) from error
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable archive record: {error}") from error
    metadata = table.schema.metadata or {}
    if not table.schema.remove_metadata().equals(SCHEMA) or _SALT not in metadata:
        raise InputError(f"{path}: not a record of an archive: its columns are {table.schema.names}, not {list(COLUMNS)}.")
    return Evidence(table, metadata[_SALT].decode())


def find_leaks(archive: Evidence, held_out: Evidence) -> list[Leak]:
    """Which held-out scans the archive holds, with all the evidence for each."""
    pairs = find_pairs(archive, held_out)
    rows, firsts = np.unique(pairs.held_out, return_index=True)
    by_row = np.split(np.arange(len(pairs)), firsts[1:])
    return [Leak(int(row), pairs.evidence(its)) for row, its in zip(rows, by_row, strict=False)]


def refuse_leaks(
    leaks: Sequence[Leak], cases: Sequence[Case], held_out: str, seen: str, allowed: bool, by: str = "allow=[leak]"
) -> list[str]:
    """Stop on leaks unless they are allowed by name; what was set aside, for the record.

    Args:
        cases: the held-out cases by row.
        held_out: what must be unseen, for the message ('val', 'test').
        seen: where it was found ('the pretraining archive', 'the labelled training cases').
        by: the recipe key or flag that allows it, for the message.

    Raises:
        CheckFailed: with one leak a line.
    """
    if not leaks:
        return []
    if allowed:
        return [f"leak: {len(leaks)} {held_out} cases are among {seen}"]
    shown = "\n".join(f"  {cases[leak.row].where()} ({'; '.join(leak.evidence)})" for leak in leaks[:20])
    more = f"\n  … and {len(leaks) - 20} more" if len(leaks) > 20 else ""
    raise CheckFailed(
        f"{len(leaks)} {held_out} cases are among {seen}:\n{shown}{more}\n"
        f"Their figures would not be those of unseen patients. Take them out, or allow it by name: {by}."
    )
